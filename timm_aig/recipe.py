"""The arguments of a fine-tuning, and the two recipes that set their defaults."""
import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import yaml

from .data import UNREADABLE
from .trainer import NONFINITE

__all__ = ['InputError', 'RECIPES', 'parse_args', 'recipe_of']

# Defaults that a recipe sets; --config and the command line win over them.
RECIPES: Dict[str, Dict[str, Any]] = {
    'distill': dict(
        gate_loss='macs', gate_loss_weight=10., block_bounds=1., tau=[5., 0.5], anneal=1 / 3, noise_off=0.2,
        distill_weight=0.5, gate_weight_decay=0., bn_recalibrate=100, lr=0.05, sched='cosine'),
    'paper': dict(
        gate_loss='rate', gate_loss_weight=2., block_bounds=0., tau=[1., 1.], anneal=0., noise_off=0.,
        distill_weight=0., gate_weight_decay=None, bn_recalibrate=0, lr=0.1, sched='multistep', warmup_epochs=0),
}


# Where and how a training runs, not what it computes: left out of a recipe.
NOT_RECIPE = (
    'checkpoint_interval', 'config', 'data_dir', 'dataset_download', 'device', 'experiment', 'json', 'output', 'resume',
    'tensorboard', 'val_interval', 'workers')


class InputError(ValueError):
    """An argument that cannot be used; the message names it and what is allowed."""


def create_parser(description: Optional[str] = None, epilog: Optional[str] = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = parser.add_argument
    arg('--config', metavar='FILE', help='YAML or JSON of arguments, or a file of hub_configs: its recipe')
    arg('--recipe', choices=RECIPES, default='distill', help='default: %(default)s')

    arg = parser.add_argument_group('data').add_argument
    arg('--data-dir', metavar='DIR', help='root of the data set')
    arg('--dataset', default='folder', metavar='NAME', help='folder, torch/..., hfds/..., hfids/..., tfds/..., wds/...')
    arg('--train-split', default='train', metavar='NAME', help='default: %(default)s')
    arg('--val-split', default='validation', metavar='NAME', help='default: %(default)s')
    arg('--dataset-download', action='store_true', help='let timm download the data set to --data-dir')
    arg('--holdout', type=int, default=0, metavar='N', help='validate on N training images instead of --val-split')
    arg('--unreadable', choices=UNREADABLE, default='skip', help='images: skip and count (default), or error')

    arg = parser.add_argument_group('model').add_argument
    arg('--model', default='resnet50', metavar='NAME', help='static (converted) or adaptive; local-dir:, hf-hub: too')
    arg('--pretrained', action='store_true', help="load the model's weights, as local-dir: and hf-hub: always do")
    arg('--initial-checkpoint', metavar='FILE', help='load these weights')
    arg('--static', action='store_true', help='train a static model, without gates')
    arg('--num-classes', type=int, metavar='N', help="default: the model's")
    arg('--input-size', type=int, nargs=3, metavar=('C', 'H', 'W'), help="default: the model's")
    arg('--mean', type=float, nargs='+', help="of each channel, default: the model's")
    arg('--std', type=float, nargs='+', help="of each channel, default: the model's")
    arg('--crop-pct', type=float, help="of validation images, default: the model's")
    arg('--interpolation', help="default: the model's")
    arg('--drop', type=float, default=0., metavar='PCT', help='dropout rate of the head')
    arg('--drop-path', type=float, default=0., metavar='PCT', help='stochastic depth rate')

    arg = parser.add_argument_group('gates').add_argument
    arg('--target-rate', type=float, default=0.6, metavar='T', help='share of the MACs, or of images that run a block')
    arg('--schedule', choices=['paper'], help="which blocks always run: the paper's (default: none)")
    arg('--gate-channels', type=int, default=16, metavar='N', help='default: %(default)s')
    arg('--gate-norm', choices=['bn', 'none'], default='bn', help='default: %(default)s')
    arg('--gate-loss', choices=['macs', 'rate'], help='one target for the whole network, or one for each block')
    arg('--gate-loss-weight', type=float, metavar='W')
    arg('--block-bounds', type=float, metavar='W', help='weight of the bounds of each block during --anneal')
    arg('--tau', type=float, nargs=2, metavar=('START', 'END'), help='temperature')
    arg('--anneal', type=float, metavar='SHARE', help='share of the training in which the target falls from 1')
    arg('--noise-off', type=float, metavar='SHARE', help='share of the training, at the end, without noise')
    arg('--gate-lr-scale', type=float, default=1., metavar='F', help='learning rate of the gates over --lr')
    arg('--gate-weight-decay', type=float, metavar='WD', help='default: --weight-decay')
    arg('--bn-recalibrate', type=int, metavar='N', help='training batches to measure batch norms on at the end')

    arg = parser.add_argument_group('distillation').add_argument
    arg('--distill-weight', type=float, metavar='W', help='share of the teacher in the loss, 0 for no teacher')
    arg('--distill-temperature', type=float, default=4., metavar='T', help='default: %(default)s')
    arg('--teacher', metavar='NAME', help='model with weights, default: the parent')

    arg = parser.add_argument_group('optimization').add_argument
    arg('--epochs', type=int, default=12, help='default: %(default)s')
    arg('--batch-size', '-b', type=int, default=128, help='of each process, default: %(default)s')
    arg('--validation-batch-size', type=int, metavar='N', help='default: --batch-size')
    arg('--grad-accum-steps', type=int, default=1, metavar='N', help='batches an update, default: 1')
    arg('--opt', default='sgd', help='of timm.optim, default: %(default)s')
    arg('--lr', type=float)
    arg('--momentum', type=float, default=0.9, help='default: %(default)s')
    arg('--weight-decay', type=float, default=5e-4, help='default: %(default)s')
    arg('--sched', help='of timm.scheduler')
    arg('--warmup-epochs', type=int, default=1, metavar='N', help='default: %(default)s')
    arg('--decay-milestones', type=int, nargs='+', metavar='N', help='epochs, default: 3/7 and 5/7 of all')
    arg('--decay-rate', type=float, default=0.1, help='default: %(default)s')
    arg('--min-lr', type=float, default=0., help='default: %(default)s')
    arg('--clip-grad', type=float, metavar='NORM')
    arg('--clip-mode', choices=['norm', 'value', 'agc'], default='norm', help='default: %(default)s')
    arg('--model-ema', action='store_true', help='keep an average of the weights, and save it')
    arg('--model-ema-decay', type=float, default=0.9998, help='default: %(default)s')

    arg = parser.add_argument_group('augmentation').add_argument
    arg('--crop-padding', type=int, metavar='PX', help='pad, crop and flip only, as is usual for CIFAR-size images')
    arg('--scale', type=float, nargs=2, default=[0.08, 1.], help='of random resized crops, default: %(default)s')
    arg('--ratio', type=float, nargs=2, default=[3 / 4, 4 / 3], help='of random resized crops')
    arg('--hflip', type=float, default=0.5, help='default: %(default)s')
    arg('--color-jitter', type=float, default=0.4, help='default: %(default)s')
    arg('--aa', metavar='NAME', help='AutoAugment policy, rand-m9-mstd0.5 for one')
    arg('--reprob', type=float, default=0., help='random erasing, default: %(default)s')
    arg('--mixup', type=float, default=0., help='alpha, default: %(default)s')
    arg('--cutmix', type=float, default=0., help='alpha, default: %(default)s')
    arg('--mixup-off-epoch', type=int, default=0, metavar='N')
    arg('--smoothing', type=float, default=0., help='of the labels, default: %(default)s')

    arg = parser.add_argument_group('running').add_argument
    arg('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: %(default)s')
    arg('--amp', action='store_true', help='mixed precision')
    arg('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='default: %(default)s')
    arg('--torchcompile', metavar='BACKEND', nargs='?', const='inductor', help='compile the model')
    arg('--workers', '-j', type=int, default=4, metavar='N', help='loader processes, default: %(default)s')
    arg('--seed', type=int, default=0, help='default: %(default)s')
    arg('--output', default='output/finetune', metavar='DIR', help='default: %(default)s')
    arg('--experiment', metavar='NAME', help='subfolder of --output, default: model, recipe and target')
    arg('--resume', metavar='auto', choices=['auto'], help='go on from the last checkpoint there, if there is one')
    arg('--checkpoint-interval', type=int, default=0, metavar='STEPS', help='also inside an epoch')
    arg('--val-interval', type=int, default=1, metavar='N', help='epochs between validations, default: %(default)s')
    arg('--nonfinite', choices=NONFINITE, default='stop', help='loss: stop (default) or skip the step')
    arg('--tensorboard', action='store_true', help='write curves, of each gate too')
    arg('--json', action='store_true', help='print results.json rather than the table')
    return parser


def parse_args(
        argv: Optional[List[str]],
        description: Optional[str] = None,
        epilog: Optional[str] = None,
) -> argparse.Namespace:
    """Arguments of a command line, over those of its --config, over those of its recipe.

    Raises:
        InputError: A config that cannot be used, or a value out of range.
    """
    parser = create_parser(description, epilog)
    known = {action.dest for action in parser._actions}
    first, _ = parser.parse_known_args(argv)
    config: Dict[str, Any] = {}
    if first.config:
        try:
            config = yaml.safe_load(Path(first.config).read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
            raise InputError(f'--config {first.config}: {e}') from e
        config = config.get('recipe', config) if isinstance(config, dict) else config
        if not isinstance(config, dict):
            raise InputError(f'--config {first.config} must hold arguments by name.')
        config = {str(k).replace('-', '_'): v for k, v in config.items()}
        unknown = sorted(config.keys() - known)
        if unknown:
            raise InputError(f'--config {first.config}: no such argument, {", ".join(unknown)}.')
    parser.set_defaults(**config)
    recipe = parser.parse_known_args(argv)[0].recipe
    if recipe not in RECIPES:
        raise InputError(f'--recipe must be one of {", ".join(RECIPES)}, not {recipe!r}.')
    parser.set_defaults(**{**RECIPES[recipe], **config})
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    for name in ('epochs', 'batch_size', 'grad_accum_steps', 'val_interval'):
        if getattr(args, name) < 1:
            raise InputError(f'--{name.replace("_", "-")} must be at least 1, not {getattr(args, name)}.')
    for name in ('holdout', 'workers', 'bn_recalibrate', 'checkpoint_interval'):
        if getattr(args, name) < 0:
            raise InputError(f'--{name.replace("_", "-")} must not be below 0, not {getattr(args, name)}.')
    for name in ('anneal', 'noise_off', 'distill_weight'):
        if not 0 <= getattr(args, name) <= 1:
            raise InputError(f'--{name.replace("_", "-")} must be in [0, 1], not {getattr(args, name)}.')
    if not args.static and not 0 < args.target_rate < 1:
        raise InputError(f'--target-rate must be in (0, 1), not {args.target_rate}; --static trains without gates.')
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise InputError(f'--batch-size must be even for mixup, not {args.batch_size}.')


def recipe_of(args: argparse.Namespace) -> Dict[str, Any]:
    """What another training needs to compute the same, as --config reads it."""
    return {k: v for k, v in vars(args).items() if k not in NOT_RECIPE}
