#!/usr/bin/env python3
"""Make a static ResNet adaptive, on real images: train it, gate it, fine-tune it, compare both, save and reload it.

Both trainings are those of scripts/finetune.py; the adaptive model has its recipe `distill`.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from _common import (
    ResultError,
    add_args,
    blame,
    create_parser,
    integer,
    number,
    open_folder,
    require,
    run_script,
    sleep_when_idle,
)
from _recipes import parse_training_args

EXAMPLES = """examples:
  scripts/demo.py                                       scikit-learn's digits, nothing is downloaded
  scripts/demo.py --target-rate 0.4 --output output/t04
  scripts/demo.py --dataset torch/fashion_mnist --data-dir data --dataset-download
  scripts/demo.py --data-dir photos --model resnet18 --input-size 3 128 128
                                                        photos/train/<class>/*.jpg, photos/validation/<class>/*.jpg"""

TIMED_BATCHES = (1, 64)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_args(parser, 'data_dir', 'dataset_download')
    add_args(parser, 'dataset', default=None,
             help='digits (default without --data-dir), folder (default with it), or as in finetune.py')
    add_args(parser, 'model', default='cifar_resnet20', help='static ResNet of timm or timm_aig (default: %(default)s)')
    add_args(parser, 'input_size')
    arg('--target-rate', type=number('(0, 1)'), default=0.6, metavar='T',
        help='share of the MACs to aim at (default: %(default)s)')
    arg('--epochs', type=integer(1), default=6, metavar='N', help='epochs of the static parent (default: %(default)s)')
    arg('--finetune-epochs', type=integer(1), default=7, metavar='N',
        help='epochs of the adaptive model (default: %(default)s)')
    add_args(parser, 'batch_size', type=integer(2), default=32)
    arg('--lr', type=number('(0, inf)'), default=0.01, metavar='LR', help='learning rate (default: %(default)s)')
    add_args(parser, 'seed', 'json')
    add_args(parser, 'output', default='output/demo')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import platform
import shutil
import statistics
import tempfile
import time

import finetune
import timm
import torch
import torch.nn as nn
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import timm_aig
from timm_aig import InputError
from timm_aig.analysis.counts import block_kinds, class_rates
from timm_aig.analysis.figures import plot_execution_rates
from timm_aig.training.data import check_same_classes, class_names, open_dataset
from timm_aig.training.evaluate import Evaluation, evaluate


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
    """Training and test split."""
    name = args.dataset or ('folder' if args.data_dir else 'digits')
    if name == 'digits':
        return [Digits(train=True), Digits(train=False)]
    return [open_dataset(name, args.data_dir, split, split == 'train', args.dataset_download, unreadable='error')
            for split in ('train', 'validation')]


def training_args(args: argparse.Namespace, folder: Path, *more: Any) -> argparse.Namespace:
    """Arguments of finetune.py; gentle crops and no flips, since a flipped or half hidden digit is another one."""
    argv = [
        '--output', folder, '--batch-size', args.batch_size, '--seed', args.seed, '--lr', args.lr, '--workers', 0,
        '--val-interval', 1000, '--scale', 0.8, 1, '--ratio', 0.9, 1.1, '--hflip', 0, '--color-jitter', 0, *more]
    return parse_training_args([str(a) for a in argv])


def check_model(args: argparse.Namespace) -> None:
    """Find out before the parent is trained whether it can become adaptive."""
    arch = f'{args.model.partition(".")[0]}_aig'
    if arch not in timm.list_models(module='resnet_aig'):
        raise InputError(f'must be a static ResNet of timm or timm_aig, {args.model!r} is not.', 'model')
    adaptive = timm.create_model(arch)
    size = args.input_size or adaptive.pretrained_cfg['input_size']
    with blame('target_rate', f'{args.target_rate}, --input-size {size}', (RuntimeError, ValueError)):
        timm_aig.ComputeTargetLoss(timm_aig.compute_cost(adaptive, (3, *size[1:])), args.target_rate)


def train(args: argparse.Namespace, datasets: List[Any], names: List[str], folder: Path) -> Tuple[nn.Module, nn.Module]:
    """The static parent and the adaptive model, trained."""
    given = [*(['--input-size', *args.input_size] if args.input_size else []),
             *(['--num-classes', len(names)] if names else [])]
    finetune.train(training_args(
        args, folder, '--static', '--model', args.model, *given, '--epochs', args.epochs, '--experiment', 'parent'),
        datasets)
    parent = load(folder / 'parent')
    finetune.train(training_args(
        args, folder, '--model', f'local-dir:{folder}/parent', '--target-rate', args.target_rate, '--epochs',
        args.finetune_epochs, '--experiment', 'adaptive'), datasets)
    return parent, load(folder / 'adaptive')


def load(folder: Path) -> nn.Module:
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    return model.to(memory_format=torch.channels_last).eval()


def spread_images(loader: DataLoader, count: int) -> torch.Tensor:
    """`count` images spread over the data set, repeated if it has fewer."""
    step = max(1, len(loader.dataset) // count)
    images = [image for i, image in enumerate(image for batch, _ in loader for image in batch) if i % step == 0]
    images = [images[i % len(images)] for i in range(count)]
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def measure(models: List[nn.Module], images: torch.Tensor, batch_size: int, rounds: int) -> List[float]:
    """Median milliseconds per image of each model; the models take turns on the same batches."""
    times: List[List[float]] = [[] for _ in models]
    for batch in (images.split(batch_size) * (rounds + 1)):
        for model, model_times in zip(models, times):
            start = time.perf_counter()
            model(batch)
            model_times.append((time.perf_counter() - start) * 1000 / len(batch))
    warm_up = len(images) // batch_size
    return [statistics.median(model_times[warm_up:]) for model_times in times]


def compare(
        parent: nn.Module, adaptive: nn.Module, static: Evaluation, gated: Evaluation, loader: DataLoader,
) -> Dict[str, Any]:
    """The figures of the table."""
    images = spread_images(loader, max(TIMED_BATCHES))
    cost = timm_aig.compute_cost(adaptive, tuple(images.shape[1:]))
    run, blocks = gated.gates.sum(1), gated.gates.shape[1]
    times = [measure([parent, adaptive], images, size, rounds=max(3, size // 4)) for size in TIMED_BATCHES]
    static_ms, adaptive_ms = ({str(s): t for s, t in zip(TIMED_BATCHES, ms)} for ms in zip(*times))
    return {
        'blocks': blocks,
        'test_images': len(run),
        'static': dict(accuracy=static.top1 / 100, blocks_run=blocks, macs_share=1., ms_per_image=static_ms),
        'adaptive': dict(
            accuracy=gated.top1 / 100, blocks_run=run.double().mean().item(), paths=gated.paths,
            blocks_run_range=[int(run.min()), int(run.max())], macs_share=gated.macs_shares(cost).mean().item(),
            ms_per_image=adaptive_ms),
    }


def print_table(results: Dict[str, Any]) -> None:
    print(f'\n{"":13}  test accuracy  blocks run   MACs' + ''.join(f'  ms/image at {size}' for size in TIMED_BATCHES))
    for name, r in (('static parent', results['static']), ('adaptive', results['adaptive'])):
        times = ''.join(f'{r["ms_per_image"][str(s)]:{14 + len(str(s))}.2f}' for s in TIMED_BATCHES)
        blocks = f'{r["blocks_run"]:.1f} of {results["blocks"]}'
        print(f'{name:13}  {r["accuracy"]:11.1%}  {blocks:>12}  {r["macs_share"]:5.0%}{times}')
    low, high = results['adaptive']['blocks_run_range']
    print(f'\nOn the {results["test_images"]} test images the adaptive model runs {low} to {high} blocks, '
          f'in {results["adaptive"]["paths"]} combinations.')
    print(f'Milliseconds are medians, both models timed in turn. {results["environment"]}, seed {results["seed"]}')


@torch.inference_mode()
def is_equal(model: nn.Module, other: nn.Module, images: torch.Tensor) -> bool:
    """True if both models give the same logits and gates."""
    return all(map(torch.equal, timm_aig.forward_gates(model, images), timm_aig.forward_gates(other, images)))


def run(args: argparse.Namespace) -> None:
    require('demo', 'matplotlib', 'sklearn')
    check_model(args)
    datasets = open_datasets(args)
    check_same_classes(*datasets)
    output, names = open_folder(args.output), class_names(datasets[0])
    with tempfile.TemporaryDirectory(dir=output, prefix='.training-') as folder:
        parent, adaptive = train(args, datasets, names, Path(folder))
        for name in ('model.safetensors', 'config.json'):
            shutil.copy(Path(folder, 'adaptive', name), output / name)
    loader = DataLoader(datasets[1], args.batch_size)
    static, gated = evaluate(parent, loader), evaluate(adaptive, loader)
    names = names or [str(i) for i in range(parent.num_classes)]
    plot_execution_rates(
        class_rates(gated.labels, gated.gates, len(names)), list(timm_aig.gated_blocks(adaptive)), names,
        output / 'execution_rates.png', block_kinds(adaptive)['downsampling'],
        title=f'{adaptive.pretrained_cfg["architecture"]} on {len(gated.labels)} test images')
    results = {
        'model': args.model, 'target_rate': args.target_rate, 'seed': args.seed, 'output': str(output),
        'environment': f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
                       f'timm {timm.__version__}, timm_aig {timm_aig.__version__}',
        'reloaded_equal': is_equal(adaptive, load(output), spread_images(loader, 64)),
        **compare(parent, adaptive, static, gated, loader)}
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results)
        print(f'Wrote model.safetensors, config.json and execution_rates.png to {output}.')
    if not results['reloaded_equal']:
        raise ResultError(f'the model reloaded from {output} gives other logits.')
    if not args.json:
        print(f"Reloaded with timm.create_model('local-dir:{output}', pretrained=True): logits equal.")


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
