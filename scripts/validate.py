#!/usr/bin/env python3
"""Accuracy, execution rate, MACs and throughput of a model, adaptive or static, on a data set.

Under torchrun each process takes a shard, and the counts are exact: no image is left out or counted twice.

    top1, top5  accuracy, percent
    blocks run  share of the gated blocks that ran
    MACs        over those of the static parent: mean over the images, and the range that 90 % of them are in
    paths       distinct combinations of blocks
    images/s    of the forward passes, all processes together, on a machine that may have had other work to do
"""
import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

# Before torch is imported: threads that spin while they wait make small models ten times slower on a busy machine.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import timm
import torch
import torch.nn as nn
from _common import error_text, open_device
from timm.data import create_loader
from torch.utils.data import IterableDataset, Subset

import timm_aig
from timm_aig import InputError
from timm_aig.analysis.figures import plot_accuracy_macs
from timm_aig.training.checkpoint import write_atomically
from timm_aig.training.data import (
    UNREADABLE,
    convert_images,
    count_unreadable,
    hold_out,
    open_dataset,
    resolve_config,
)
from timm_aig.training.evaluate import Evaluation, evaluate

EXAMPLES = """examples:
  scripts/validate.py --model resnet50_aig --pretrained --data-dir imagenet
  scripts/validate.py --model local-dir:output/finetune/r32 --dataset torch/fashion_mnist --data-dir data
  scripts/validate.py --model local-dir:output/demo --data-dir photos --gate-offset -1 -0.5 0 0.5 1
  scripts/validate.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --dataset torch/fashion_mnist \\
      --data-dir data --budget 0.4 0.5 0.6 0.7 0.8 0.9 1 --alternatives local-dir:output/finetune/r32_s0 --plot all.png
  scripts/validate.py --model local-dir:a --against local-dir:b --data-dir photos     paired test on the same images
  scripts/validate.py --model local-dir:a --against local-dir:b --data-dir photos --split train --holdout 5000
  torchrun --nproc-per-node 8 scripts/validate.py --model resnet101_aig --pretrained --data-dir imagenet

exit code: 0 done, 2 bad input"""


def add_evaluation_args(arg: Callable[..., Any], split: str = 'validation') -> None:
    """Arguments for a model and a data set; analyze.py and calibrate.py have them too."""
    arg('--model', required=True, metavar='NAME', help='of timm, or local-dir: or hf-hub:')
    arg('--pretrained', action='store_true', help='load weights, as local-dir: and hf-hub: always do')
    arg('--data-dir', metavar='DIR', help='root of the data set')
    arg('--dataset', default='folder', metavar='NAME', help='folder, torch/..., hfds/..., hfids/..., tfds/..., wds/...')
    arg('--input-key', metavar='NAME', help="of the images in hfds/, wds/ and the like, default: timm's")
    arg('--target-key', metavar='NAME', help="of the labels there, default: timm's")
    arg('--split', default=split, metavar='NAME', help='default: %(default)s')
    arg('--holdout', type=int, metavar='N', help='take N images of the split, drawn at random, the same that '
        'finetune.py --holdout N leaves out of the training (default: all)')
    arg('--dataset-download', action='store_true', help='let timm download the data set to --data-dir')
    arg('--unreadable', choices=UNREADABLE, default='skip', help='images: skip and count (default), or error')
    arg('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help="default: the model's")
    arg('--crop-pct', type=float, help="default: the model's")
    arg('--batch-size', '-b', type=int, default=128, help='default: %(default)s')
    arg('--workers', '-j', type=int, default=4, metavar='N', help='loader processes, default: %(default)s')
    arg('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: %(default)s')


def check_evaluation_args(args: argparse.Namespace) -> None:
    """Raise InputError for what the arguments of add_evaluation_args must not be."""
    for name, low in (('batch_size', 1), ('workers', 0), ('input_size', 1)):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < low:
            raise InputError(f'--{name.replace("_", "-")} must be from {low}, not {value}.')
    if args.crop_pct is not None and not 0 < args.crop_pct < math.inf:
        raise InputError(f'--crop-pct must be above 0, not {args.crop_pct}.')


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = parser.add_argument
    add_evaluation_args(arg)
    arg('--against', metavar='NAME', help='second model, compared image by image')
    arg('--amp', action='store_true', help='bfloat16 autocast')
    arg('--optimize', action='store_true', help='run what timm_aig.optimize_for_inference makes of the model')
    gates = parser.add_mutually_exclusive_group().add_argument
    gates('--gate-offset', type=float, nargs='+', metavar='X', help="one row for each (default: the model's own)")
    gates('--budget', type=float, nargs='+', metavar='X', help='one row for each, of a model that calibrate.py wrote')
    arg('--sample', action='store_true', help="draw the gates, as the authors' code does in its tests")
    arg('--alternatives', nargs='+', metavar='NAME', default=[], help='static models to show beside it')
    arg('--plot', metavar='FILE', help='write a PNG of accuracy against MACs, alternatives beside the rows')
    arg('--predictions', metavar='FILE', help='write a CSV of label, prediction and MACs share of each image, and its '
        'number in the split, from 0')
    arg('--json', action='store_true', help='print JSON rather than the table')
    args = parser.parse_args(argv)
    if len(args.budget or args.gate_offset or ()) > 1:
        for argument, given in (('--against', args.against), ('--predictions', args.predictions)):
            if given:
                raise InputError(f'{argument} is for one row: pass one --budget or --gate-offset.')
    if args.gate_offset and any(math.isnan(offset) for offset in args.gate_offset):
        raise InputError('--gate-offset must be numbers, not nan.')
    check_evaluation_args(args)
    return args


class Timed(nn.Module):
    """A model that sums up the seconds of its forward passes."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model
        self.synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
        self.seconds = 0.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.synchronize()
        start = time.perf_counter()
        output = self.model(x)
        self.synchronize()
        self.seconds += time.perf_counter() - start
        return output


def create_model(args: argparse.Namespace, name: str, argument: str = '--model') -> Any:
    """The model that an argument names."""
    kwargs = {'in_chans': args.input_size[0]} if args.input_size else {}
    try:
        return timm.create_model(name, pretrained=args.pretrained or ':' in name, **kwargs).eval()
    except Exception as e:  # timm's, the Hub's and the files' own
        raise InputError(f'{argument} {name}: {e}') from e


def data_config(args: argparse.Namespace, model: Any) -> Dict[str, Any]:
    """timm's data config of the model, with what the arguments say."""
    return resolve_config(model, {'input_size': args.input_size, 'crop_pct': args.crop_pct})


def open_split(args: argparse.Namespace) -> Any:
    """The data set that the arguments name."""
    dataset = open_dataset(
        args.dataset, args.data_dir, args.split, download=args.dataset_download, unreadable=args.unreadable,
        input_key=args.input_key, target_key=args.target_key)
    if args.holdout is None:
        return dataset
    return hold_out(dataset, dataset, args.holdout)[1]  # no second copy: the other part is not used


def create_test_loader(args: argparse.Namespace, dataset: Any, config: Dict[str, Any], **kwargs: Any) -> Any:
    """Loader of images cropped in the middle, not augmented."""
    loader = create_loader(
        dataset, config['input_size'], args.batch_size, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], num_workers=args.workers, persistent_workers=False, **kwargs)
    convert_images(dataset, config['input_size'][0])
    return loader


def gate_offsets(
        args: argparse.Namespace,
        name: str,
        argument: str,
        model: nn.Module,
) -> List[Tuple[Optional[float], float]]:
    """Budget, if one was asked for, and offset of each row."""
    gated = timm_aig.gated_blocks(model)
    if not gated:
        if argument == '--model' and (args.budget or args.gate_offset):
            raise InputError(f'{"--budget" if args.budget else "--gate-offset"}: --model {name} has no gates.')
        return [(None, 0.)]
    if args.budget:
        try:
            return [(budget, timm_aig.set_budget(model, budget)) for budget in args.budget]
        except ValueError as e:
            raise InputError(f'--budget, model {name}: {e}') from e
    return [(None, offset) for offset in args.gate_offset or [float(next(iter(gated.values())).gate.offset)]]


class Opened(NamedTuple):
    """A model to validate."""
    name: str
    model: Any
    config: Dict[str, Any]  # of its data, as timm has it
    offsets: List[Tuple[Optional[float], float]]  # of gate_offsets


def open_model(args: argparse.Namespace, name: str, argument: str) -> Opened:
    model = create_model(args, name, argument)
    config = data_config(args, model)
    if args.optimize:
        try:
            timm_aig.optimize_for_inference(model)
        except ValueError as e:
            raise InputError(f'--optimize, {argument} {name}: {e}') from e
    return Opened(name, model, config, gate_offsets(args, name, argument, model))


def validate(args: argparse.Namespace, opened: Opened, device: torch.device) -> List[Dict[str, Any]]:
    """One row for each gate offset or budget, with its Evaluation under 'evaluation'."""
    name, model, config, offsets = opened
    dataset = open_split(args)
    if args.distributed and isinstance(dataset, IterableDataset):
        raise InputError(f'--dataset {args.dataset} has no exact shards, run it in one process.')
    loader = create_test_loader(
        args, dataset, config, distributed=args.distributed, device=device, use_prefetcher=device.type == 'cuda')
    cost = timm_aig.compute_cost(model, config['input_size'])
    model = model.to(device, memory_format=torch.channels_last)
    gated = timm_aig.gated_blocks(model)
    rows = []
    for budget, offset in offsets:
        if gated:
            timm_aig.set_gate_offset(model, offset)
        timed = Timed(timm_aig.optimize_for_inference(model) if args.optimize else model, device).eval()
        try:
            evaluation = evaluate(timed, loader, device, torch.bfloat16 if args.amp else None, args.sample)
        except ValueError as e:
            raise InputError(f'{args.split}: {e}', 'split') from e
        seconds = torch.tensor(timed.seconds)
        if args.distributed:
            seconds = seconds.to(device)
            torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
        shares = evaluation.macs_shares(cost)
        rows.append({
            'model': name,
            'architecture': model.pretrained_cfg['architecture'],
            'gate_offset': offset,
            'budget': budget,
            'images': len(evaluation.labels),
            'unreadable': count_unreadable(dataset, device),
            'loss': evaluation.loss,
            **evaluation.metrics(cost),
            'all_macs': cost.static,
            'macs': cost.static * shares.mean().item(),
            'macs_share_quantiles': {q: shares.quantile(q).item() for q in (0., .05, .5, .95, 1.)},
            'block_rates': dict(zip(gated, evaluation.block_rates.tolist())),
            'images_per_second': len(evaluation.labels) / seconds.item(),
            'evaluation': evaluation,
            'dataset': dataset,
            'shares': shares,
        })
    return rows


def mcnemar(a: Evaluation, b: Evaluation) -> Dict[str, Any]:
    """Exact two-sided test of whether two models are right on equally many of the same images (McNemar, 1947)."""
    right, other = a.predictions == a.labels, b.predictions == b.labels
    only_a, only_b = int((right & ~other).sum()), int((other & ~right).sum())
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return {
        'difference': 100 * (only_a - only_b) / len(right), 'only_first_right': only_a, 'only_second_right': only_b,
        'p_value': min(1., 2 * tail / 2 ** n)}


def print_table(rows: List[Dict[str, Any]]) -> None:
    width = max(len(row['model']) for row in rows)
    print(f'{"model":{width}}  {"offset":>6}  {"top1":>6}  {"top5":>6}  {"blocks run":>10}  {"MACs":>6}  '
          f'{"90 % of images":>14}  {"paths":>6}  {"images/s":>8}')
    for r in rows:
        q = r['macs_share_quantiles']
        spread = f'{100 * q[.05]:.1f}-{100 * q[.95]:.1f}%'
        print(f'{r["model"]:{width}}  {r["gate_offset"]:6.2f}  {r["top1"]:5.2f}%  {r["top5"]:5.2f}%  '
              f'{r["execution_rate"]:10.1%}  {r["macs_share"]:6.1%}  {spread:>14}  {r["paths"]:6}  '
              f'{r["images_per_second"]:8.0f}')
    skipped = f', {rows[0]["unreadable"]} unreadable ones left out' if rows[0]['unreadable'] else ''
    print(f'{rows[0]["images"]} images{skipped}.')


def label(row: Dict[str, Any]) -> str:
    name = row['model'].rstrip('/').rpartition('/')[2]
    return name if name.startswith(row['architecture']) else f'{row["architecture"]} ({name})'


def plot(rows: List[Dict[str, Any]], others: List[Dict[str, Any]], path: str) -> None:
    """Accuracy against MACs, all over those of the first model's parent."""
    points = [(label(row), row['macs'] / rows[0]['all_macs'], row['top1'])
              for row in sorted(rows, key=lambda row: row['macs']) + others]
    try:
        plot_accuracy_macs(points[:len(rows)], points[len(rows):], path, title=f'{rows[0]["images"]:,} images')
    except (ImportError, OSError) as e:
        raise InputError(f'--plot {path}: {e}') from e


def write_predictions(row: Dict[str, Any], path: str) -> None:
    e, images = row['evaluation'], row['evaluation'].positions.tolist()
    if isinstance(row['dataset'], Subset):  # held out: their numbers in the whole split
        images = [row['dataset'].indices[i] for i in images]
    lines = [f'{image},{label},{prediction},{share:.6f}' for image, label, prediction, share in
             zip(images, e.labels.tolist(), e.predictions.tolist(), row['shares'].tolist())]
    text = '\n'.join(['image,label,prediction,macs_share', *lines, ''])
    try:
        write_atomically(Path(path), lambda file: file.write(text.encode()))
    except OSError as e:
        raise InputError(f'--predictions {path}: {e}') from e


def run(args: argparse.Namespace) -> None:
    device = open_device(args)
    model = open_model(args, args.model, '--model')  # all of them before hours are spent on the first
    against = open_model(args, args.against, '--against') if args.against else None
    others = [open_model(args, name, '--alternatives') for name in args.alternatives]
    rows = validate(args, model, device)
    comparison, other = None, []
    if against is not None:
        other = validate(args, against, device)
        first, second = rows[0]['evaluation'], other[0]['evaluation']
        if not torch.equal(first.labels, second.labels):
            raise InputError('--against: the two models did not see the same images in the same order.')
        comparison = mcnemar(first, second)
        rows += other
    alternatives = [validate(args, opened, device)[0] for opened in others]
    if args.rank != 0:
        return
    # printed first: nothing that cannot be written loses it
    if args.json:
        shown = [{k: v for k, v in row.items() if k not in ('dataset', 'evaluation', 'shares')}
                 for row in rows + alternatives]
        print(json.dumps({'rows': shown, 'comparison': comparison}, indent=2))
    else:
        print_table(rows + alternatives)
        if comparison:
            print(f'{args.model} is right on {comparison["only_first_right"]} images where {args.against} is not, and '
                  f'the other way round on {comparison["only_second_right"]}: {comparison["difference"]:+.2f} points, '
                  f'p = {comparison["p_value"]:.3g} (exact McNemar test).')
    if args.predictions:
        write_predictions(rows[0], args.predictions)
    if args.plot:
        plot(rows[:len(rows) - len(other)], [*other, *alternatives], args.plot)


def main(argv: Optional[List[str]] = None) -> int:
    try:
        run(parse_args(argv))
    except InputError as e:
        print(f'error: {error_text(e)}', file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == '__main__':
    sys.exit(main())
