#!/usr/bin/env python3
"""Make a static ResNet adaptive, on real images: train it, gate it, fine-tune it, compare both, save and reload it."""
import argparse
import copy
import json
import os
import platform
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
    from timm.data import ImageDataset, create_dataset, create_loader, resolve_data_config
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import ClassificationTask
    from timm.utils import random_seed
    from torch.utils.data import DataLoader, Dataset, IterableDataset
    from torchvision.transforms import Compose
    from tqdm import tqdm

    import timm_aig
    from timm_aig.analysis import execution_rates, plot_execution_rates
except ImportError as e:
    print(f"error: {e}. The demo needs the extra 'demo': pip install 'timm_aig[demo]' "
          f"(in a checkout: pip install -e '.[demo]')", file=sys.stderr)
    sys.exit(2)

EXAMPLES = """examples:
  scripts/demo.py                                       scikit-learn's digits, nothing is downloaded
  scripts/demo.py --target-rate 0.4 --output output/t04
  scripts/demo.py --dataset torch/fashion_mnist --data-dir data --download
  scripts/demo.py --data-dir photos --model resnet18 --img-size 128
                                                        photos/train/<class>/*.jpg, photos/validation/<class>/*.jpg

exit code: 0 done, 1 the reloaded model differs from the saved one, 2 bad input"""

SOURCES = ('folder', 'torch/', 'hfds/', 'hfids/', 'tfds/', 'wds/')
TIMED_BATCHES = (1, 64)


class InputError(Exception):
    """Something the user gave cannot be used; the message names the argument and what is allowed."""


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
    seed = number(int, 0, 2 ** 32 - 1, 'a whole number from 0 to 2^32 - 1')
    rate = number(float, 1e-6, 1 - 1e-6, 'a number in (0, 1): a block of rate 1 always runs and has no gate')
    arg = parser.add_argument
    arg('--dataset', metavar='NAME', help=f'digits (default without --data-dir) or of timm: {", ".join(SOURCES)}')
    arg('--data-dir', metavar='DIR', help='root of the dataset; alone: a folder with train and validation subfolders')
    arg('--download', action='store_true', help='let timm download the dataset to --data-dir')
    arg('--model', default='cifar_resnet20', help='static ResNet of timm or timm_aig (default: %(default)s)')
    arg('--img-size', type=size, metavar='PX', help="default: the model's own")
    arg('--target-rate', type=rate, default=0.6, metavar='T', help='share of images to run a block for (default: 0.6)')
    arg('--epochs', type=count, default=6, help='of the static parent (default: %(default)s)')
    arg('--finetune-epochs', type=count, default=7, help='of the adaptive model (default: %(default)s)')
    arg('--batch-size', type=batch, default=32, help='default: %(default)s')
    arg('--lr', type=number(float, 1e-9, 10, 'a number in (0, 10]'), default=0.1, help='default: %(default)s')
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
        self.transform = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = self.images[index]
        return self.transform(image) if self.transform else image, self.labels[index]


def open_datasets(name: Optional[str], data_dir: Optional[str], download: bool) -> List[Dataset]:
    """Training and test split."""
    name = name or ('folder' if data_dir else 'digits')
    if name == 'digits':
        if data_dir:
            raise InputError('--data-dir: the digits come with scikit-learn, leave it out or choose another --dataset.')
        return [Digits(train=True), Digits(train=False)]
    if not name.startswith(SOURCES) or (name.startswith('folder') and name != 'folder'):
        raise InputError(f'--dataset must be digits or start with one of {", ".join(SOURCES)}, not {name!r}.')
    if not data_dir and not name.startswith(('hfds/', 'hfids/')):
        raise InputError(f'--data-dir: {name} needs one.')
    if data_dir and not Path(data_dir).is_dir() and (name == 'folder' or not download):
        raise InputError(f'--data-dir must be a folder, {data_dir!r} is not.')
    try:
        datasets = [
            create_dataset(
                '' if name == 'folder' else name, root=data_dir, split=split, is_training=split == 'train',
                download=download)
            for split in ('train', 'validation')
        ]
    except (Exception, SystemExit) as e:  # every kind of dataset has its own
        argument = '--data-dir' if name == 'folder' else f'--dataset {name}'
        raise InputError(f'{argument}: {str(e) or type(e).__name__}') from e
    if name in ('folder', 'torch/folder', 'torch/image_folder'):
        check_folder(data_dir, *(getattr(dataset, 'reader', dataset) for dataset in datasets))
    return datasets


def check_folder(data_dir: str, train: Any, test: Any) -> None:
    # timm takes the folder itself for a split that it does not find: the test images would be the training images
    if any(Path(reader.root).samefile(data_dir) for reader in (train, test)):
        raise InputError(f'--data-dir must have a train and a validation subfolder, {data_dir!r} does not.')
    if train.class_to_idx != test.class_to_idx:
        differ = sorted(train.class_to_idx.keys() ^ test.class_to_idx.keys())
        raise InputError(f'--data-dir: train and validation must have the same classes, only one has {differ[:5]}.')


def check_images(dataset: Dataset) -> int:
    """Read all images once, for timm's datasets replace by others those that they cannot read.

    Returns:
        Number of classes.
    """
    source = dataset.reader if isinstance(dataset, ImageDataset) else dataset  # the reader gives files
    samples = source if isinstance(dataset, IterableDataset) else (source[i] for i in range(len(source)))
    labels: List[int] = []
    try:
        for image, label in tqdm(samples, 'check images', len(dataset), leave=False):
            if source is not dataset:
                with image:
                    Image.open(image).convert('RGB')
            labels.append(int(label))
    except Exception as e:  # decoders raise all kinds
        name = f'image {len(labels)}' if source is dataset else dataset.filename(len(labels), absolute=True)
        raise InputError(f'--data-dir: cannot read {name}, {type(e).__name__}: {e}') from e
    if len(set(labels)) < 2 or min(labels) < 0:
        raise InputError(f'--data-dir: need images of at least 2 classes, found labels {sorted(set(labels))}.')
    return max(labels) + 1


def class_names(dataset: Dataset, num_classes: int) -> List[str]:
    """Names that the dataset gives its classes, else numbers."""
    names = getattr(dataset, 'classes', None) or list(getattr(getattr(dataset, 'reader', None), 'class_to_idx', ()))
    return [str(name) for name in names] if len(names) >= num_classes else [str(i) for i in range(num_classes)]


def check_output(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise InputError(f'--output must be a folder to write to, {str(folder)!r} is not: {e.strerror}.') from e


def create_parent(name: str, num_classes: int, img_size: Optional[int], target_rate: float) -> Tuple[nn.Module, Any]:
    """The static model, and what its adaptive kin costs; a model that cannot become one is found out here."""
    overlay: Dict[str, Any] = {'tag': None, 'origin_url': None, 'test_input_size': None}  # of others' weights
    if img_size:
        overlay.update(input_size=(3, img_size, img_size), pool_size=None)
    try:
        model = timm.create_model(name, num_classes=num_classes, pretrained_cfg_overlay=overlay)
        adaptive = timm_aig.gate_(copy.deepcopy(model), timm_aig.AIGConfig(target_rate=target_rate))
        if model.pretrained_cfg['architecture'] + '_aig' != adaptive.pretrained_cfg['architecture']:
            raise ValueError('timm_aig has no adaptive kin of it.')
        cost = timm_aig.compute_cost(adaptive, model.pretrained_cfg['input_size'])
    except (RuntimeError, TypeError, ValueError) as e:
        raise InputError(f'--model must be a static ResNet of timm or a cifar_resnet, {name!r} is not: {e}') from e
    return model.to(memory_format=torch.channels_last), cost  # channels_last: a quarter faster on CPUs


def create_loaders(datasets: List[Dataset], model: nn.Module, batch_size: int) -> List[DataLoader]:
    data = resolve_data_config({}, model=model)
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')
    loaders = [
        create_loader(
            dataset, batch_size=batch_size, is_training=is_training, num_workers=0, use_prefetcher=False,
            # gentle: a mirrored or half hidden digit is another one
            scale=(0.8, 1.), ratio=(0.9, 1.1), hflip=0., color_jitter=None, **{key: data[key] for key in keys})
        for dataset, is_training in zip(datasets, (True, False))
    ]
    for dataset in datasets:
        dataset.transform = Compose([lambda image: image.convert('RGB'), dataset.transform])
    return loaders


def train(task: ClassificationTask, loader: DataLoader, epochs: int, lr: float, title: str) -> None:
    model = task.get_trainable_module()
    groups = [
        {'params': [p for n, p in model.named_parameters() if '.gate.' not in n], 'lr': lr, 'weight_decay': 5e-4},
        # Gates start undecided and have a few hundred steps to tell images apart.
        {'params': [p for n, p in model.named_parameters() if '.gate.' in n], 'lr': 10 * lr, 'weight_decay': 0.},
    ]
    optimizer = create_optimizer_v2([group for group in groups if group['params']], opt='sgd', lr=lr, momentum=0.9)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=epochs, warmup_epochs=min(1, epochs - 1), step_on_epochs=False,
        updates_per_epoch=len(loader))
    task.train()
    with tqdm(total=epochs * len(loader), desc=title) as bar:
        for _ in range(epochs):
            for images, labels in loader:
                result = task(images.contiguous(memory_format=torch.channels_last), labels)
                if not result['loss'].isfinite():
                    raise InputError('--lr: the loss is no longer finite, choose a lower one.')
                optimizer.zero_grad()
                result['loss'].backward()
                optimizer.step()
                bar.update()
                scheduler.step_update(bar.n)
                bar.set_postfix({k: f'{v.item():.2f}' for k, v in result.items() if v.ndim == 0}, refresh=False)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader) -> Tuple[float, torch.Tensor]:
    """Accuracy, and the gates [N, L] of all N images."""
    model.eval()
    correct, gates = 0, []
    for images, labels in tqdm(loader, 'evaluate', leave=False):
        logits, batch_gates = timm_aig.forward_gates(model, images.contiguous(memory_format=torch.channels_last))
        correct += (logits.argmax(1) == labels).sum().item()
        gates.append(batch_gates)
    gates = torch.cat(gates)
    return correct / len(gates), gates


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


def compare(parent: nn.Module, adaptive: nn.Module, cost: timm_aig.Cost, loader: DataLoader) -> Dict[str, Any]:
    """The figures of the table."""
    static_accuracy, _ = evaluate(parent, loader)
    accuracy, gates = evaluate(adaptive, loader)
    run, blocks = gates.sum(1), gates.shape[1]
    total = cost.total - cost.gates  # the parent's
    images = spread_images(loader, max(TIMED_BATCHES))
    times = [measure([parent, adaptive], images, size, rounds=max(3, size // 4)) for size in TIMED_BATCHES]
    static_ms, adaptive_ms = ({str(s): t for s, t in zip(TIMED_BATCHES, ms)} for ms in zip(*times))
    return {
        'blocks': blocks,
        'test_images': len(gates),
        'static': {'accuracy': static_accuracy, 'blocks_run': blocks, 'macs_share': 1., 'ms_per_image': static_ms},
        'adaptive': {
            'accuracy': accuracy,
            'blocks_run': run.mean().item(),
            'blocks_run_range': [int(run.min()), int(run.max())],
            'paths': len(gates.unique(dim=0)),
            'macs_share': cost.executed(gates).mean().item() / total,
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


def save(model: nn.Module, loader: DataLoader, names: List[str], folder: Path) -> bool:
    """Write the folder and whether the model that timm makes of it gives the same logits and gates."""
    model.eval()
    timm_aig.save_pretrained(model, folder, model_config={'label_names': names})
    rates, _ = execution_rates(model, loader, len(names))
    blocks = timm_aig.gated_blocks(model)
    downsampling = [name for name, block in blocks.items() if block.downsample is not None]
    plot_execution_rates(rates, list(blocks), names, folder / 'execution_rates.png', downsampling)

    reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(memory_format=torch.channels_last).eval()
    images = spread_images(loader, 64)
    with torch.inference_mode():
        outputs = zip(timm_aig.forward_gates(model, images), timm_aig.forward_gates(reloaded, images))
        return all(torch.equal(*pair) for pair in outputs)


def run(args: argparse.Namespace) -> int:
    random_seed(args.seed)
    folder = Path(args.output)
    datasets = open_datasets(args.dataset, args.data_dir, args.download)
    num_classes = max(check_images(dataset) for dataset in datasets)
    names = class_names(datasets[0], num_classes)
    model, cost = create_parent(args.model, len(names), args.img_size, args.target_rate)
    if args.batch_size > len(datasets[0]):
        raise InputError(f'--batch-size must be at most the {len(datasets[0])} training images, not {args.batch_size}.')
    check_output(folder)
    train_loader, test_loader = create_loaders(datasets, model, args.batch_size)

    train(ClassificationTask(model, verbose=False), train_loader, args.epochs, args.lr, 'train the static parent')
    parent = copy.deepcopy(model).eval()
    timm_aig.gate_(model, timm_aig.AIGConfig(target_rate=args.target_rate))
    task = timm_aig.AIGTask(model, verbose=False)
    train(task, train_loader, args.finetune_epochs, args.lr / 2, 'fine-tune with gates')

    same = save(model, test_loader, names, folder)
    environment = f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ' \
                  f'timm {timm.__version__}, timm_aig {timm_aig.__version__}'
    results = {
        'model': args.model, 'target_rate': args.target_rate, 'seed': args.seed, 'environment': environment,
        'output': str(folder), 'reloaded_equal': same, **compare(parent, model, cost, test_loader)}
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print_table(results)
        print(f'Wrote model.safetensors, config.json and execution_rates.png to {folder}.')
        print(f"Reloaded with timm.create_model('local-dir:{folder}', pretrained=True): "
              f"logits {'equal' if same else 'DIFFER'}.")
    return 0 if same else 1


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except InputError as e:
        print(f'error: {" ".join(str(e).split())}', file=sys.stderr)  # on one line, whatever a library said
        return 2


if __name__ == '__main__':
    sys.exit(main())
