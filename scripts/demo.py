#!/usr/bin/env python3
"""Make a static ResNet adaptive, on real images: train it, gate it, fine-tune it, compare both, save and reload it.

Both trainings are scripts/finetune.py's, with its recipe `distill` for the adaptive model.
"""
import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

# Before torch is imported: threads that spin while they wait make small models ten times slower on a busy machine.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

try:
    import matplotlib  # noqa: F401, the heatmap needs it, better to hear that before the training
    import sklearn.datasets
    import sklearn.model_selection
    import timm
    import torch
    import torch.nn as nn
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
except ImportError as e:
    print(f"error: {e}. The demo needs the extra 'demo': pip install 'timm_aig[demo]' "
          f"(in a checkout: pip install -e '.[demo]')", file=sys.stderr)
    sys.exit(2)

import finetune
from _recipes import parse_args as parse_training

import timm_aig
from timm_aig import InputError
from timm_aig.analysis.counts import block_kinds, class_rates
from timm_aig.analysis.figures import plot_execution_rates
from timm_aig.training.data import check_same_classes, class_names, open_dataset
from timm_aig.training.evaluate import Evaluation, evaluate
from timm_aig.training.trainer import NonFiniteError

EXAMPLES = """examples:
  scripts/demo.py                                       scikit-learn's digits, nothing is downloaded
  scripts/demo.py --target-rate 0.4 --output output/t04
  scripts/demo.py --dataset torch/fashion_mnist --data-dir data --download
  scripts/demo.py --data-dir photos --model resnet18 --img-size 128
                                                        photos/train/<class>/*.jpg, photos/validation/<class>/*.jpg

exit code: 0 done, 1 the reloaded model differs from the saved one, 2 bad input"""

TIMED_BATCHES = (1, 64)


def number(kind: type, low: float, high: float, allowed: str):
    """An argparse type: a number with low <= number <= high."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float('nan')
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'must be {allowed}, not {text!r}')
        return value
    return parse


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = number(int, 1, float('inf'), 'a whole number above 0')
    size = number(int, 8, 4096, 'a whole number from 8 to 4096')
    batch = number(int, 2, float('inf'), 'a whole number from 2')
    seed = number(int, 0, 2 ** 31 - 1, 'a whole number from 0 to 2^31 - 1')
    rate = number(float, 1e-6, 1 - 1e-6, 'a number in (0, 1): a block of rate 1 always runs and has no gate')
    arg = parser.add_argument
    arg('--dataset', metavar='NAME', help='digits (default without --data-dir), or as in finetune.py')
    arg('--data-dir', metavar='DIR', help='root of the data set; alone: a folder with train and validation subfolders')
    arg('--download', action='store_true', help='let timm download the data set to --data-dir')
    arg('--model', default='cifar_resnet20', help='static ResNet of timm or timm_aig (default: %(default)s)')
    arg('--img-size', type=size, metavar='PX', help="default: the model's own")
    arg('--target-rate', type=rate, default=0.6, metavar='T', help='wanted share of the MACs (default: 0.6)')
    arg('--epochs', type=count, default=6, help='of the static parent (default: %(default)s)')
    arg('--finetune-epochs', type=count, default=7, help='of the adaptive model (default: %(default)s)')
    arg('--batch-size', type=batch, default=32, help='default: %(default)s')
    arg('--lr', type=number(float, 1e-9, 10, 'a number in (0, 10]'), default=0.01, help='default: %(default)s')
    arg('--seed', type=seed, default=0, help='default: %(default)s')
    arg('--output', default='output/demo', metavar='DIR', help='folder to write (default: %(default)s)')
    arg('--json', action='store_true', help='print JSON rather than the table')
    return parser.parse_args(argv)


class Digits(Dataset):
    """scikit-learn's handwritten digits as images, a fixed fifth of them for testing."""
    classes = tuple('0123456789')

    def __init__(self, train: bool) -> None:
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
        if args.data_dir:
            raise InputError('--data-dir: the digits come with scikit-learn, leave it out or choose another --dataset.')
        return [Digits(train=True), Digits(train=False)]
    return [
        open_dataset(name, args.data_dir, split, split == 'train', args.download, unreadable='error')
        for split in ('train', 'validation')
    ]


def training_args(args: argparse.Namespace, folder: Path, *more: Any) -> argparse.Namespace:
    """Arguments of finetune.py: gentle crops and no mirroring, a mirrored or half hidden digit is another one."""
    argv = [
        '--output', folder, '--batch-size', args.batch_size, '--seed', args.seed, '--workers', 0,
        '--val-interval', 1000, '--scale', 0.8, 1, '--ratio', 0.9, 1.1, '--hflip', 0, '--color-jitter', 0, *more]
    training = parse_training([str(a) for a in argv])
    training.command = 'scripts/demo.py'
    return training


def check_model(args: argparse.Namespace) -> None:
    """Find out before the parent is trained that it could not become adaptive."""
    arch, _, _ = args.model.partition('.')
    if not timm.is_model(f'{arch}_aig'):
        raise InputError(f'--model must be a static ResNet of timm or timm_aig, {args.model!r} is not.')
    adaptive = timm.create_model(f'{arch}_aig')
    size = 3 * [args.img_size] if args.img_size else list(adaptive.pretrained_cfg['input_size'])
    try:
        timm_aig.ComputeTargetLoss(timm_aig.compute_cost(adaptive, (3, *size[1:])), args.target_rate)
    except (RuntimeError, ValueError) as e:
        raise InputError(f'--target-rate {args.target_rate}, --img-size {size[1]}: {e}') from e


def train(args: argparse.Namespace, folder: Path) -> Any:
    """Loader of the test images, names of the classes, the static parent and the adaptive model, trained."""
    check_model(args)
    datasets = open_datasets(args)
    check_same_classes(*datasets)
    if args.batch_size > len(datasets[0]):
        raise InputError(f'--batch-size must be at most the {len(datasets[0])} training images, not {args.batch_size}.')
    names = class_names(datasets[0])
    size = ['--input-size', 3, args.img_size, args.img_size] if args.img_size else []
    classes = ['--num-classes', len(names)] if names else []
    finetune.run(training_args(
        args, folder, '--static', '--model', args.model, *size, *classes, '--epochs', args.epochs, '--lr', args.lr,
        '--experiment', 'parent'), datasets)
    parent = timm.create_model(f'local-dir:{folder}/parent', pretrained=True)
    finetune.run(training_args(
        args, folder, '--model', f'local-dir:{folder}/parent', '--target-rate', args.target_rate, '--epochs',
        args.finetune_epochs, '--lr', args.lr, '--experiment', 'adaptive'), datasets)
    adaptive = timm.create_model(f'local-dir:{folder}/adaptive', pretrained=True)
    loader = DataLoader(datasets[1], args.batch_size)
    models = [model.to(memory_format=torch.channels_last).eval() for model in (parent, adaptive)]
    return loader, names or [str(i) for i in range(parent.num_classes)], *models


def spread_images(loader: DataLoader, count: int) -> torch.Tensor:
    """So many images from all over the data, in turn if it has fewer."""
    step = max(1, len(loader.dataset) // count)
    images = [image for i, image in enumerate(image for batch, _ in loader for image in batch) if i % step == 0]
    images = [images[i % len(images)] for i in range(count)]
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def measure(models: List[nn.Module], images: torch.Tensor, batch_size: int, rounds: int) -> List[float]:
    """Median milliseconds per image for each model, run in turn on the same batches."""
    times: List[List[float]] = [[] for _ in models]
    for batch in (images.split(batch_size) * (rounds + 1)):
        for model, model_times in zip(models, times):
            start = time.perf_counter()
            model(batch)
            model_times.append((time.perf_counter() - start) * 1000 / len(batch))
    warm_up = len(images) // batch_size
    return [statistics.median(model_times[warm_up:]) for model_times in times]


def compare(
        parent: nn.Module,
        adaptive: nn.Module,
        static: Evaluation,
        gated: Evaluation,
        loader: DataLoader,
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
        'static': {
            'accuracy': static.top1 / 100, 'blocks_run': blocks, 'macs_share': 1., 'ms_per_image': static_ms},
        'adaptive': {
            'accuracy': gated.top1 / 100,
            'blocks_run': run.double().mean().item(),
            'blocks_run_range': [int(run.min()), int(run.max())],
            'paths': gated.paths,
            'macs_share': gated.macs_shares(cost).mean().item(),
            'ms_per_image': adaptive_ms,
        },
    }


def print_table(results: Dict[str, Any]) -> None:
    print(f'\n{"":13}  test accuracy  blocks run   MACs' + ''.join(f'  ms/image at {size}' for size in TIMED_BATCHES))
    for name in ('static', 'adaptive'):
        r = results[name]
        times = ''.join(f'{r["ms_per_image"][str(s)]:{14 + len(str(s))}.2f}' for s in TIMED_BATCHES)
        blocks = f'{r["blocks_run"]:.1f} of {results["blocks"]}'
        name = 'static parent' if name == 'static' else name
        print(f'{name:13}  {r["accuracy"]:11.1%}  {blocks:>12}  {r["macs_share"]:5.0%}{times}')
    low, high = results['adaptive']['blocks_run_range']
    print(f'\nOn the {results["test_images"]} test images the adaptive model runs {low} to {high} blocks, '
          f'in {results["adaptive"]["paths"]} combinations.')
    print('Milliseconds are medians, both models timed in turn.')
    print(f'{results["environment"]}, seed {results["seed"]}')


def save(
        model: nn.Module,
        evaluation: Evaluation,
        trained: Path,
        loader: DataLoader,
        names: List[str],
        folder: Path,
) -> bool:
    """Write the folder and whether the model that timm makes of it gives the same logits and gates."""
    for name in ('model.safetensors', 'config.json'):
        shutil.copy(trained / name, folder / name)
    rates = class_rates(evaluation.labels, evaluation.gates, len(names))
    plot_execution_rates(
        rates, list(timm_aig.gated_blocks(model)), names, folder / 'execution_rates.png',
        block_kinds(model)['downsampling'],
        title=f'{model.pretrained_cfg["architecture"]} on {len(evaluation.labels)} test images')

    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(memory_format=torch.channels_last).eval()
    images = spread_images(loader, 64)
    with torch.inference_mode():
        outputs = zip(timm_aig.forward_gates(model, images), timm_aig.forward_gates(reloaded, images))
        return all(torch.equal(*pair) for pair in outputs)


def run(args: argparse.Namespace) -> int:
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        trainings = tempfile.TemporaryDirectory(dir=output, prefix='.training-')
    except OSError as e:
        raise InputError(f'--output must be a folder to write to, {args.output!r} is not: {e.strerror}.') from e
    with trainings:
        loader, names, parent, adaptive = train(args, Path(trainings.name))
        static, gated = evaluate(parent, loader), evaluate(adaptive, loader)
        same = save(adaptive, gated, Path(trainings.name, 'adaptive'), loader, names, output)
    environment = f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ' \
                  f'timm {timm.__version__}, timm_aig {timm_aig.__version__}'
    results = {
        'model': args.model, 'target_rate': args.target_rate, 'seed': args.seed, 'environment': environment,
        'output': str(output), 'reloaded_equal': same, **compare(parent, adaptive, static, gated, loader)}
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results)
        print(f'Wrote model.safetensors, config.json and execution_rates.png to {output}.')
        print(f"Reloaded with timm.create_model('local-dir:{output}', pretrained=True): "
              f"logits {'equal' if same else 'DIFFER'}.")
    return 0 if same else 1


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except NonFiniteError:
        error = '--lr: the loss is no longer finite, choose a lower one.'
    except InputError as e:
        error = ' '.join(str(e).split())  # on one line, whatever a library said
    print(f'error: {error}', file=sys.stderr)
    return 2


if __name__ == '__main__':
    sys.exit(main())
