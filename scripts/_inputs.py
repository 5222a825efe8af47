"""The models, data sets and loaders that a script's arguments name."""
import argparse
import math
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import torch
import torch.nn as nn
from _common import blame, create_model
from timm.data import create_loader
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import DistributedSampler, IterableDataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize

from timm_aig import InputError
from timm_aig.training.data import (
    HeldOut,
    check_same_classes,
    class_names,
    convert_images,
    hold_out,
    label_names_of,
    match_classes,
    open_dataset,
    read_images,
    resolve_config,
    start_worker,
)

MAX_BYTES = 32 * 10 ** 9  # of calibration images, which are kept in memory


def open_model(args: argparse.Namespace, name: str, argument: str = 'model') -> Any:
    """The model that an argument names, in eval, with the channels of --input-size."""
    kwargs = {'in_chans': args.input_size[0]} if args.input_size else {}
    return create_model(name, args.pretrained, argument, **kwargs).eval()


def warn_of_random_weights(args: argparse.Namespace, name: str, consequence: str) -> None:
    """Warn on stderr if a model is named without weights to load; `consequence` ends the sentence."""
    if not args.pretrained and ':' not in name:
        print(f'warning: {name} has random weights without --pretrained{consequence}.', file=sys.stderr)


def load_images(args: argparse.Namespace, config: Dict[str, Any]) -> torch.Tensor:
    """--num-images of --images, else noise, [N, C, H, W]."""
    if not args.images:
        return torch.randn(args.num_images, *config['input_size'], generator=torch.Generator().manual_seed(0))
    if not Path(args.images).exists():
        raise InputError(f'{args.images}: there is no such folder.', 'images')
    with blame('images', args.images, Exception):  # timm's and PIL's errors
        return read_images(args.images, config, args.num_images)


def open_split(args: argparse.Namespace, split: str, is_training: bool = False, **kwargs: Any) -> Any:
    """A split of the data set that --dataset and --data-dir name."""
    return open_dataset(
        args.dataset, args.data_dir, split, is_training, args.dataset_download, args.unreadable,
        input_key=args.input_key, target_key=args.target_key, **kwargs)


def open_evaluation_split(args: argparse.Namespace, model: Any) -> Any:
    """--split, or the --holdout images of it, with the labels of a model. Sets args.split."""
    args.split = args.split or ('train' if args.holdout else args.default_split)
    dataset = open_split(args, args.split)
    if args.holdout:
        dataset = hold_out(dataset, dataset, args.holdout)[1]  # the other part is not used
    match_classes(dataset, label_names_of(model), model.num_classes)
    return dataset


def data_config(args: argparse.Namespace, model: Any) -> Dict[str, Any]:
    """timm's data config of a model, with --input-size and --crop-pct."""
    return resolve_config(model, {'input_size': args.input_size, 'crop_pct': args.crop_pct})


def create_evaluation_loader(args: argparse.Namespace, dataset: Any, config: Dict[str, Any], **kwargs: Any) -> Any:
    """Loader of images as the model takes them, without augmentation."""
    loader = create_loader(
        dataset, config['input_size'], args.batch_size, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], num_workers=args.workers,
        persistent_workers=False, **kwargs)
    convert_images(dataset, config['input_size'][0])
    return loader


class TrainingData(NamedTuple):
    """Loaders, and what the saved model says about its data."""
    train: Any
    val: Any
    names: List[str]  # of the classes; empty if the data set has none
    config: Dict[str, Any]  # input_size, mean, std, interpolation, crop_pct, crop_mode


def open_training_splits(args: argparse.Namespace) -> Any:
    """Training and validation split."""
    common = dict(batch_size=args.batch_size, seed=args.seed)  # wds/, tfds/ and hfids/ shard and shuffle by these
    train = open_split(args, args.train_split, is_training=True, **common)
    if args.holdout:
        return hold_out(train, open_split(args, args.train_split, **common), args.holdout)
    val = open_split(args, args.val_split, **common)
    check_same_classes(train, val)
    return train, val


def fit_batch_size(args: argparse.Namespace, train: Any) -> None:
    """Make args.batch_size a quarter of the training images of a process if they do not fill a batch.

    It stays above the least with which the gates can be trained.
    """
    images = args.batch_size if isinstance(train, IterableDataset) else len(train) // args.world_size
    if images < args.batch_size:
        least = 4 if not args.static and args.gate_loss == 'budgets' else 2
        batch_size = max(least, images // 8 * 2)
        print(f'--batch-size {args.batch_size} is more than the {images} training images of a process, {batch_size} is '
              'used.', file=sys.stderr)
        args.batch_size = batch_size


def check_size(dataset: Any, config: Dict[str, Any], argument: str, most: float = math.inf) -> None:
    """Check that calibration can keep the images of a data set, or so many of them, in memory.

    Raises:
        InputError: It cannot; `argument` is the one that says how many there are.
    """
    if isinstance(dataset, IterableDataset):
        return
    count, size = int(min(most, len(dataset))), 4 * math.prod(config['input_size'])
    if count * size > MAX_BYTES:
        raise InputError(
            f'must be at most {MAX_BYTES // size:.0f}, since the images are kept in memory: {count} take '
            f'{count * size / 1e9:.0f} GB; 10000 are plenty.', argument)


def create_calibration_loader(args: argparse.Namespace, train: Any, data: TrainingData) -> Any:
    """Loader of --calibrate training images, drawn at random, without augmentation."""
    if isinstance(train, IterableDataset):
        raise InputError('needs a data set with random access.', 'calibrate')
    copy = open_split(args, args.train_split)
    match_classes(copy, data.names, len(data.names))
    indices = train.indices if isinstance(train, HeldOut) else range(len(train))
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(args.seed))[:args.calibrate]
    part = HeldOut(copy, sorted(indices[i] for i in order.tolist()))
    return create_evaluation_loader(args, part, data.config, use_prefetcher=False)


def create_training_loaders(args: argparse.Namespace, train: Any, val: Any, model: nn.Module) -> TrainingData:
    given = {k: getattr(args, k) for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    if args.crop_padding is not None:  # evaluate the whole image too, at the same scale
        given.update(crop_pct=args.crop_pct or 1., crop_mode='center')
    channels = (args.input_size or model.pretrained_cfg['input_size'])[0]
    for name in ('mean', 'std'):
        if given[name] and len(given[name]) not in (1, channels):
            raise InputError(f'must be one number, or one for each of {channels} channels.', name)
    config = resolve_config(model, given)
    device = torch.device(args.device)
    common = dict(
        input_size=config['input_size'], interpolation=config['interpolation'], mean=config['mean'], std=config['std'],
        num_workers=args.workers, distributed=args.distributed, persistent_workers=False, worker_seeding=start_worker,
        use_prefetcher=device.type == 'cuda', device=device, pin_memory=device.type == 'cuda')
    with blame('aa', f'{args.aa} or --interpolation {config["interpolation"]}', (AssertionError, KeyError, ValueError)):
        train_loader = create_loader(
            train, batch_size=args.batch_size, is_training=True, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
            color_jitter=args.color_jitter or None, auto_augment=args.aa, re_prob=args.reprob, **common)
        val_loader = create_loader(
            val, batch_size=args.batch_size, crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], **common)
    if len(train_loader) == 0:
        raise InputError(f'{args.batch_size} is more than the {len(train)} training images.', 'batch_size')
    if isinstance(train_loader.sampler, DistributedSampler):
        train_loader.sampler.seed = args.seed  # decides the order of the images
    if args.crop_padding is not None:
        steps = train.transform.transforms  # keep timm's steps from its tensor on; random crop and colours are before
        first = next(i for i, step in enumerate(steps) if 'Tensor' in type(step).__name__)
        size = config['input_size'][1:]
        train.transform = Compose([
            Resize(size, str_to_interp_mode(config['interpolation'])), RandomCrop(size, padding=args.crop_padding),
            RandomHorizontalFlip(args.hflip), *steps[first:]])
    for dataset in (train, val):
        convert_images(dataset, config['input_size'][0])
    return TrainingData(train_loader, val_loader, class_names(train), config)
