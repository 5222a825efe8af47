#!/usr/bin/env python3
"""Accuracy, execution rate, MACs and throughput of a model, adaptive or static, on a data set.

Under torchrun each process takes a shard, and the counts are exact: no image is left out or counted twice.

    offset      logit offset of the gates
    top1, top5  accuracy, percent
    blocks run  share of the gated blocks that ran
    MACs        MACs share: executed MACs over the static parent's, mean over the images
    90 % ...    range of the MACs share that 90 % of the images are in
    paths       distinct combinations of blocks
    images/s    of the forward passes, all processes together; other work on the machine lowers it
"""
import argparse
import json
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from _args import add_args, add_evaluation_args, create_parser, number
from _common import blame, check_file, open_device, print_table, require, run_script, sleep_when_idle, write_csv

EXAMPLES = """examples:
  scripts/validate.py --model resnet50_aig --pretrained --data-dir imagenet
  scripts/validate.py --model local-dir:output/demo --data-dir photos --gate-offset -1 -0.5 0 0.5 1
  scripts/validate.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --dataset torch/fashion_mnist \\
      --data-dir data --budgets 0.4 0.5 0.6 0.7 0.8 0.9 1 --alternatives local-dir:output/finetune/r32_s0 --plot all.png
  scripts/validate.py --model local-dir:a --against local-dir:b --data-dir photos   # paired test on the same images
  scripts/validate.py --cascade resnet18 resnet50 --pretrained --data-dir imagenet --thresholds 0.5 0.7 0.9
  torchrun --nproc-per-node 8 scripts/validate.py --model resnet101_aig --pretrained --data-dir imagenet"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_evaluation_args(parser, cascade=True)
    add_args(parser, 'amp')
    arg('--optimize', action='store_true', help='run the model as timm_aig.optimize_for_inference returns it')
    arg('--sample', action='store_true', help="draw the gates at random, as the authors' code does in its tests")
    gates = parser.add_mutually_exclusive_group()
    add_args(gates, 'gate_offset', nargs='+')
    add_args(gates, 'budgets', help='MACs shares, a row for each; the model must be calibrated (calibrate.py)')
    arg('--thresholds', type=number('[0, 1]'), nargs='+', metavar='X',
        help='of all stages of --cascade but the last, a row for each (default: its own, or 0.9)')
    arg('--against', metavar='NAME', help='second model, compared image by image')
    arg('--alternatives', nargs='+', metavar='NAME', default=[], help='more models for the table and the plot')
    arg('--plot', metavar='FILE', help='write a PNG of accuracy against MACs')
    arg('--predictions', metavar='FILE',
        help="write a CSV of each image's number in the split (from 0), label, prediction and MACs share")
    add_args(parser, 'json')
    args = parser.parse_args(argv)
    if args.cascade and (args.optimize or args.sample or args.against or args.alternatives or args.plot
                         or args.predictions or args.budgets or args.gate_offset):
        parser.error('--cascade takes --thresholds, not the options for the gates of one model, or for comparing.')
    if args.thresholds and not args.cascade:
        parser.error('--thresholds is for --cascade.')
    for argument in ('against', 'predictions'):
        if getattr(args, argument) and len(args.budgets or args.gate_offset or ()) > 1:
            parser.error(f'--{argument} takes one --budgets or --gate-offset value, not several.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import torch
import torch.nn as nn
from _cascade import cascade_rows, open_cascade, print_cascade_rows
from _inputs import create_evaluation_loader, data_config, open_evaluation_split, open_model
from torch.utils.data import IterableDataset, Subset

import timm_aig
from timm_aig import InputError
from timm_aig.analysis.figures import plot_accuracy_macs
from timm_aig.gate import ALL_OPEN
from timm_aig.training.data import count_unreadable
from timm_aig.training.evaluate import Evaluation, evaluate


class Timed(nn.Module):
    """Sums up the seconds of a model's forward passes."""

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


class Opened(NamedTuple):
    """A model to validate."""
    name: str
    model: Any
    config: Dict[str, Any]  # timm's data config
    dataset: Any
    offsets: List[Tuple[Optional[float], float]]  # (budget if one was asked for, gate offset) of each row


class Result(NamedTuple):
    """A row of the table and what it was made from."""
    row: Dict[str, Any]
    evaluation: Evaluation
    macs_shares: torch.Tensor  # [N]
    dataset: Any


def prepare_model(args: argparse.Namespace, name: str, argument: str) -> Opened:
    model = open_model(args, name, argument)
    if args.optimize:
        with blame('optimize', name):
            timm_aig.optimize_for_inference(model)
    config, offsets = data_config(args, model), gate_offsets(args, name, argument, model)
    dataset = open_evaluation_split(args, model)
    if args.distributed and isinstance(dataset, IterableDataset):
        raise InputError(f'{args.dataset} cannot be sharded exactly, run it in one process.', 'dataset')
    return Opened(name, model, config, dataset, offsets)


def gate_offsets(
        args: argparse.Namespace, name: str, argument: str, model: nn.Module,
) -> List[Tuple[Optional[float], float]]:
    """(Budget if one was asked for, gate offset) of each row."""
    gated = timm_aig.gated_blocks(model)
    if not gated:
        if argument == 'model' and (args.budgets or args.gate_offset):
            raise InputError(f'{name} has no gates to set.', argument)
        return [(None, 0.)]
    if args.budgets:
        with blame('budgets', name):
            return [(budget, timm_aig.set_budget(model, budget)) for budget in args.budgets]
    offsets = args.gate_offset or [float(next(iter(gated.values())).gate.offset)]
    return [(None, min(max(offset, -ALL_OPEN), ALL_OPEN)) for offset in offsets]  # as the gates take it


def validate(args: argparse.Namespace, opened: Opened, device: torch.device) -> List[Result]:
    """One result for each budget or gate offset."""
    name, model, config, dataset, offsets = opened
    loader = create_evaluation_loader(
        args, dataset, config, distributed=args.distributed, device=device, use_prefetcher=device.type == 'cuda')
    cost = timm_aig.compute_cost(model, config['input_size'])
    model = model.to(device, memory_format=torch.channels_last)
    gated = timm_aig.gated_blocks(model)
    results = []
    for budget, offset in offsets:
        if gated:
            timm_aig.set_gate_offset(model, offset)
        timed = Timed(timm_aig.optimize_for_inference(model) if args.optimize else model, device).eval()
        with blame('split', args.split):
            evaluation = evaluate(timed, loader, device, torch.bfloat16 if args.amp else None, args.sample)
        seconds = torch.tensor(timed.seconds)
        if args.distributed:
            seconds = seconds.to(device)
            torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
        shares = evaluation.macs_shares(cost)
        row = {
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
        }
        results.append(Result(row, evaluation, shares, dataset))
    return results


def mcnemar(right: torch.Tensor, other: torch.Tensor) -> Dict[str, Any]:
    """Exact two-sided test of whether two models are right on the same number of images (McNemar, 1947).

    Args:
        right, other: For each image, whether the first and the second model is right, bool [N] each.
    """
    only_a, only_b = int((right & ~other).sum()), int((other & ~right).sum())
    n = only_a + only_b
    tail = ways = 1  # to choose k of n
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return {
        'difference': 100 * (only_a - only_b) / len(right), 'only_first_right': only_a, 'only_second_right': only_b,
        'p_value': min(1., 2 * tail / 2 ** n)}


def print_rows(rows: List[Dict[str, Any]]) -> None:
    print_table([{
        'model': r['model'], 'offset': f'{r["gate_offset"]:.2f}', 'top1': f'{r["top1"]:.2f}%',
        'top5': f'{r["top5"]:.2f}%', 'blocks run': f'{r["execution_rate"]:.1%}', 'MACs': f'{r["macs_share"]:.1%}',
        '90 % of images': '{:.1%}-{:.1%}'.format(*(r['macs_share_quantiles'][q] for q in (.05, .95))),
        'paths': r['paths'], 'images/s': f'{r["images_per_second"]:.0f}',
    } for r in rows], 'model')
    unreadable = f', {rows[0]["unreadable"]} unreadable ones left out' if rows[0]['unreadable'] else ''
    print(f'{rows[0]["images"]} images{unreadable}.')


def label(row: Dict[str, Any]) -> str:
    name = row['model'].rstrip('/').rpartition('/')[2]
    return name if name.startswith(row['architecture']) else f'{row["architecture"]} ({name})'


def plot(rows: List[Dict[str, Any]], others: List[Dict[str, Any]], path: str) -> None:
    """Accuracy against MACs, all over the MACs of the first model's parent."""
    points = [(label(row), row['macs'] / rows[0]['all_macs'], row['top1'])
              for row in sorted(rows, key=lambda row: row['macs']) + others]
    plot_accuracy_macs(points[:len(rows)], points[len(rows):], path, f'{rows[0]["images"]:,} images')


def write_predictions(result: Result, path: str) -> None:
    e, images = result.evaluation, result.evaluation.positions.tolist()
    if isinstance(result.dataset, Subset):  # of --holdout; write the number in the whole split
        images = [result.dataset.indices[i] for i in images]
    shares = [f'{share:.6f}' for share in result.macs_shares.tolist()]
    write_csv(path, ['image', 'label', 'prediction', 'macs_share'], zip(
        images, e.labels.tolist(), e.predictions.tolist(), shares))


def run(args: argparse.Namespace) -> None:
    device = open_device(args)
    if args.cascade:
        if args.distributed:
            raise InputError('validate.py --cascade runs in one process, without torchrun.')
        found = cascade_rows(args, open_cascade(args), device)
        print(json.dumps({'rows': found}, indent=2)) if args.json else print_cascade_rows(found)
        return
    if args.plot:
        require('train', 'matplotlib')
    for argument in ('plot', 'predictions'):
        if getattr(args, argument):
            check_file(getattr(args, argument), argument)
    opened = prepare_model(args, args.model, 'model')  # open all before hours are spent on the first
    against = [prepare_model(args, args.against, 'against')] if args.against else []
    alternatives = [prepare_model(args, name, 'alternatives') for name in args.alternatives]

    results = validate(args, opened, device)
    others = [result for model in against + alternatives for result in validate(args, model, device)]
    comparison = None
    if against:
        first, second = results[0].evaluation, others[0].evaluation
        if not torch.equal(first.positions, second.positions):
            raise InputError('did not see the same images in the same order as --model.', 'against')
        comparison = mcnemar(*(part.predictions == part.labels for part in (first, second)))
    if args.rank != 0:
        return

    rows = [result.row for result in results]
    other_rows = [result.row for result in others]
    if args.json:  # print first: a file that cannot be written does not lose the figures
        print(json.dumps({'rows': rows + other_rows, 'comparison': comparison}, indent=2))
    else:
        print_rows(rows + other_rows)
        if comparison:
            print(f'{args.model} is right on {comparison["only_first_right"]} images where {args.against} is wrong, '
                  f'and wrong on {comparison["only_second_right"]} where it is right: '
                  f'{comparison["difference"]:+.2f} points, p = {comparison["p_value"]:.3g} (exact McNemar test).')
    if args.predictions:
        write_predictions(results[0], args.predictions)
    if args.plot:
        plot(rows, other_rows, args.plot)


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
