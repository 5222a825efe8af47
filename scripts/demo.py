#!/usr/bin/env python3
"""Make a static ResNet adaptive, on real images: train it, gate it, fine-tune it, compare, save and reload it.

It is compared with a smaller static net and with a cascade of both static ones. All trainings are those of
scripts/finetune.py; the adaptive model has its recipe `any`. Budgets and the cascade are calibrated on a fifth of the
training images, which no model is trained on.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from _args import add_args, create_parser, integer, number
from _common import open_folder, print_table, require, run_script, sleep_when_idle
from _recipes import parse_training_args

EXAMPLES = """examples:
  scripts/demo.py                                       # scikit-learn's digits, nothing is downloaded
  scripts/demo.py --dataset torch/fashion_mnist --data-dir data --dataset-download
  scripts/demo.py --data-dir photos --model resnet18 --input-size 3 128 128
                                                        # photos/train/<class>/*.jpg, photos/validation/<class>/*.jpg"""

TIMED_BATCHES = (1, 64)
TOLERANCES = (.01, .1, .9)  # of the budgets, the next one if a few images do not allow the one before


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_args(parser, 'data_dir', 'dataset_download')
    add_args(parser, 'dataset', default=None,
             help='digits (default without --data-dir), folder (default with it), or as in finetune.py')
    add_args(parser, 'model', default='cifar_resnet20', help='static ResNet of timm or timm_aig (default: %(default)s)')
    add_args(parser, 'input_size')
    arg('--small', default='cifar_resnet8', metavar='NAME', help='smaller static ResNet (default: %(default)s)')
    arg('--budgets', type=number('(0, 1)'), nargs=2, default=[0.4, 0.6], metavar=('LOW', 'HIGH'),
        help='shares of the MACs to run the adaptive model at (default: 0.4 0.6)')
    arg('--epochs', type=integer(1), default=6, metavar='N', help='epochs of each static net (default: %(default)s)')
    arg('--finetune-epochs', type=integer(1), default=7, metavar='N',
        help='epochs of the adaptive model (default: %(default)s)')
    add_args(parser, 'batch_size', type=integer(4), default=32)
    arg('--lr', type=number('(0, inf)'), default=0.01, metavar='LR', help='learning rate (default: %(default)s)')
    add_args(parser, 'seed', 'json')
    add_args(parser, 'output', default='output/demo')
    args = parser.parse_args(argv)
    if args.budgets[0] >= args.budgets[1]:
        parser.error(f'--budgets must ascend, not {args.budgets[0]:g} {args.budgets[1]:g}.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import platform
import signal
import tempfile
from contextlib import suppress

import finetune
import timm
import torch
import torch.nn as nn
from _cascade import at_offset, evaluate_cascade
from _timing import sum_up, time_runs
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler

import timm_aig
from timm_aig import Cascade, InputError
from timm_aig.analysis.counts import block_kinds, class_rates
from timm_aig.analysis.figures import plot_execution_rates
from timm_aig.budget import budget_offset
from timm_aig.convert import residual_blocks
from timm_aig.training.data import check_same_classes, class_names, hold_out, open_dataset
from timm_aig.training.evaluate import evaluate
from timm_aig.training.trainer import Stopped


class Digits(Dataset):
    """scikit-learn's handwritten digits as images, a fixed fifth of them for testing."""
    classes = tuple('0123456789')

    def __init__(self, train: bool) -> None:
        import sklearn.datasets
        import sklearn.model_selection

        digits = sklearn.datasets.load_digits()
        split = sklearn.model_selection.train_test_split(
            digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        images, labels = split[0::2] if train else split[1::2]
        self.images = [Image.fromarray((image * 255 / 16).astype('uint8')) for image in images]  # values are 0 to 16
        self.labels = labels.tolist()
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.images[index]
        return self.transform(image) if self.transform else image, self.labels[index]


def open_datasets(args: argparse.Namespace) -> List[Any]:
    """Images to train on, images to calibrate on, and test split."""
    name = args.dataset or ('folder' if args.data_dir else 'digits')
    if name == 'digits':
        train, copy, test = (Digits(train) for train in (True, True, False))
    else:
        train, copy, test = (
            open_dataset(name, args.data_dir, split, split == 'train', args.dataset_download, unreadable='error')
            for split in ('train', 'train', 'validation'))
    check_same_classes(train, test)
    if len(train) < 20:
        raise InputError(f'has {len(train)} training images, the demo needs at least 20.', 'data_dir')
    return [*hold_out(train, copy, len(train) // 5), test]


def training_args(args: argparse.Namespace, folder: Path, *more: Any) -> argparse.Namespace:
    """Arguments of finetune.py; gentle crops and no flips, since a flipped or half hidden digit is another one."""
    argv = [
        '--output', folder, '--batch-size', args.batch_size, '--seed', args.seed, '--lr', args.lr, '--workers', 0,
        '--val-interval', 1000, '--scale', 0.8, 1, '--ratio', 0.9, 1.1, '--hflip', 0, '--color-jitter', 0, *more]
    return parse_training_args([str(a) for a in argv])


def check_models(args: argparse.Namespace) -> None:
    """Find out before the trainings whether the parent can become adaptive, and whether the smaller net is smaller."""
    parent, small = (f'{name.partition(".")[0]}_aig' for name in (args.model, args.small))
    for name, argument in ((parent, 'model'), (small, 'small')):
        if name not in timm.list_models(module='resnet_aig'):
            raise InputError(f'must be a static ResNet of timm or timm_aig, not {getattr(args, argument)!r}.', argument)
    adaptive = timm.create_model(parent)
    size = (3, *(args.input_size or adaptive.pretrained_cfg['input_size'])[1:])
    cost = timm_aig.compute_cost(adaptive, size)
    least = cost.share(torch.zeros(1, len(cost.blocks))).item()
    if args.budgets[0] <= least:
        raise InputError(f'must be above {least:.3f}, the share that always runs, not {args.budgets[0]:g}.', 'budgets')
    share = timm_aig.compute_cost(timm.create_model(small), size).static / cost.static
    if share >= args.budgets[1]:
        raise InputError(f"must have less than {args.budgets[1]:g} of the parent's MACs, not {share:.2f}.", 'small')


def train(args: argparse.Namespace, datasets: List[Any], names: List[str], folder: Path) -> List[Any]:
    """The static parent, the smaller static net and the adaptive model, trained."""
    classes = ['--num-classes', len(names)] if names else []
    size = ['--input-size', *args.input_size] if args.input_size else []

    def fit(experiment: str, epochs: int, *more: Any) -> Any:
        finetune.train(training_args(args, folder, '--epochs', epochs, '--experiment', experiment, *more), datasets)
        model = timm.create_model(f'local-dir:{folder / experiment}', pretrained=True)
        return model.to(memory_format=torch.channels_last).eval()

    parent = fit('parent', args.epochs, '--static', '--model', args.model, *classes, *size)
    config = timm.data.resolve_data_config(model=parent)
    same = [a for name in ('input_size', 'mean', 'std') for a in (f'--{name.replace("_", "-")}', *config[name])]
    small = fit('small', args.epochs, '--static', '--model', args.small, *classes, *same,
                '--interpolation', config['interpolation'], '--crop-pct', config['crop_pct'])
    adaptive = fit('adaptive', args.finetune_epochs, '--model', f'local-dir:{folder}/parent', '--recipe', 'any',
                   '--least-budget', args.budgets[0])
    return [parent, small, adaptive]


def calibrate(args: argparse.Namespace, adaptive: nn.Module, cascade: Cascade, loader: DataLoader) -> None:
    """Find the budgets, set the higher one, and choose the most accurate cascade within it."""
    for tolerance in TOLERANCES:
        with suppress(InputError):
            timm_aig.calibrate_budget(adaptive, loader, args.budgets, tolerance=tolerance)
            break
    timm_aig.set_budget(adaptive, args.budgets[1])
    cascade.calibrate(loader, macs=args.budgets[1])


@torch.inference_mode()
def compare(args: argparse.Namespace, models: List[Any], cascade: Cascade, loader: DataLoader) -> List[Dict[str, Any]]:
    """The rows of the table. The adaptive model is left at the higher budget."""
    *static, adaptive = models
    drawn = RandomSampler(loader.dataset, True, max(TIMED_BATCHES), torch.Generator().manual_seed(args.seed))
    images = torch.stack([loader.dataset[i][0] for i in drawn]).contiguous(memory_format=torch.channels_last)
    cost = timm_aig.compute_cost(adaptive, tuple(images.shape[1:]))
    rows: List[Dict[str, Any]] = []
    runs: Dict[str, Callable] = {}

    def add(name: str, run: Callable, top1: float, blocks_run: float, blocks: int, macs_share: float) -> None:
        rows.append(dict(name=name, accuracy=top1 / 100, blocks_run=blocks_run, blocks=blocks, macs_share=macs_share))
        runs[name] = run

    for name, model in zip((args.model, args.small), static):
        blocks, macs = len(residual_blocks(model)), timm_aig.compute_cost(model, tuple(images.shape[1:])).static
        add(f'static {name}', model, evaluate(model, loader).top1, blocks, blocks, macs / cost.static)
    for budget in args.budgets:
        timm_aig.set_budget(adaptive, budget)
        gated, offset = evaluate(adaptive, loader), budget_offset(timm_aig.budget_table(adaptive), budget)
        add(f'adaptive at {budget:g}', at_offset(adaptive, offset), gated.top1,
            gated.gates.sum(1).double().mean().item(), gated.gates.shape[1], gated.macs_shares(cost).mean().item())
    found = evaluate_cascade(cascade, loader, torch.device('cpu'))
    large, small = rows[0]['blocks'], rows[1]['blocks']
    add('cascade of both static', cascade, found['top1'], small + found['stage_shares'][1] * large, small + large,
        found['macs'] / cost.static)
    for size in TIMED_BATCHES:
        seconds = time_runs(runs, images, size, rounds=max(3, size // 4))
        for row in rows:
            figures = sum_up(seconds[row['name']], seconds[rows[0]['name']], size)
            row.setdefault('ms_per_image', {})[str(size)] = figures['ms_per_image']
    return rows


def print_results(results: Dict[str, Any]) -> None:
    print_table([{
        '': row['name'], 'test accuracy': f'{row["accuracy"]:.1%}',
        'blocks run': f'{row["blocks_run"]:.1f} of {row["blocks"]}', 'MACs': f'{row["macs_share"]:.0%}',
        **{f'ms/image at {size}': f'{ms:.2f}' for size, ms in row['ms_per_image'].items()},
    } for row in results['rows']], '')
    print(f'\n{results["test_images"]} test images. Budgets and the cascade are calibrated on {results["held_out"]} '
          'training images that were left out.')
    print(f'Milliseconds are medians, all timed in turn. {results["environment"]}, seed {results["seed"]}')


def run(args: argparse.Namespace) -> None:
    require('demo', 'matplotlib', 'sklearn')
    check_models(args)
    datasets = open_datasets(args)
    output, names = open_folder(args.output), class_names(datasets[0])
    with tempfile.TemporaryDirectory(dir=output, prefix='.training-') as folder:
        try:
            models = train(args, datasets[:2], names, Path(folder))
        except Stopped as e:
            raise Stopped(f'stopped by {signal.Signals(e.signum).name}. The demo keeps nothing of it.', e.signum) from e
    parent, small, adaptive = models
    datasets[2].transform = datasets[1].transform
    held_out, loader = (DataLoader(dataset, args.batch_size) for dataset in datasets[1:])
    cascade = Cascade([small, parent])
    calibrate(args, adaptive, cascade, held_out)
    timm_aig.save_pretrained(adaptive, output)
    gated = evaluate(adaptive, loader)
    names = names or [str(i) for i in range(parent.num_classes)]
    plot_execution_rates(
        class_rates(gated.labels, gated.gates, len(names)), list(timm_aig.gated_blocks(adaptive)), names,
        output / 'execution_rates.png', block_kinds(adaptive)['downsampling'],
        title=f'{adaptive.pretrained_cfg["architecture"]} on {len(gated.labels)} test images')
    results = {
        'model': args.model, 'small': args.small, 'budgets': args.budgets, 'seed': args.seed, 'output': str(output),
        'environment': f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
                       f'timm {timm.__version__}, timm_aig {timm_aig.__version__}',
        'test_images': len(gated.labels), 'held_out': len(datasets[1]),
        'rows': compare(args, models, cascade, loader)}
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print_results(results)
        print(f'Wrote model.safetensors, config.json and execution_rates.png to {output}.')
        print(f"Reload: timm.create_model('local-dir:{output}', pretrained=True). Saving checked: logits are equal.")


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
