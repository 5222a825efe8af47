"""The arguments of a fine-tuning, and the two recipes and the optimizers that set their defaults."""
import argparse
import math
import sys
from pathlib import Path
from typing import Any, Dict, List, NoReturn, Optional

import torch
import yaml

from timm_aig import InputError
from timm_aig.training.data import UNREADABLE
from timm_aig.training.update import NONFINITE

# Defaults that a recipe sets; --config and the command line win over them.
RECIPES: Dict[str, Dict[str, Any]] = {
    'distill': dict(
        gate_loss='macs', gate_loss_weight=10., anneal=1 / 3, noise_off=0.6, distill_weight=0.5, gate_weight_decay=0.,
        opt='muon', sched='cosine', warmup_epochs=1),
    'paper': dict(
        gate_loss='rate', gate_loss_weight=2., anneal=0., noise_off=0., distill_weight=0., gate_weight_decay=None,
        opt='sgd', sched='multistep', warmup_epochs=0),
}

# Defaults that an optimizer sets; others than these take SGD's but for the learning rate, which has to be given. Muon's
# weight decay is apart from the gradient.
OPTIMIZERS: Dict[str, Dict[str, Any]] = {
    'muon': dict(lr=0.01, gate_lr_scale=0.3, momentum=0.95, weight_decay=0.02),
    'sgd': dict(lr=0.1, gate_lr_scale=1., momentum=0.9, weight_decay=5e-4),
}

# Where and how a training runs, not what it computes: left out of a recipe.
NOT_RECIPE = (
    'checkpoint_interval', 'config', 'data_dir', 'dataset_download', 'device', 'experiment', 'json', 'output', 'resume',
    'tensorboard', 'val_interval', 'workers')


# One that --no-... takes back, over a --config.
FLAG: Dict[str, Any] = dict(action=argparse.BooleanOptionalAction, default=False)

# What numbers are allowed, each of them for an argument that takes several. None, not given, always is.
RANGES = (
    ('from 1', lambda v: v >= 1, (
        'batch_size', 'epochs', 'gate_channels', 'grad_accum_steps', 'input_size', 'num_classes', 'val_interval',
        'validation_batch_size')),
    ('from 0', lambda v: 0 <= v < math.inf, (
        'checkpoint_interval', 'color_jitter', 'crop_padding', 'cutmix', 'decay_milestones',
        'gate_loss_weight', 'gate_weight_decay', 'holdout', 'min_lr', 'mixup',
        'mixup_off_epoch', 'warmup_epochs', 'weight_decay', 'workers')),
    ('above 0', lambda v: 0 < v < math.inf, (
        'clip_grad', 'crop_pct', 'decay_rate', 'distill_temperature', 'gate_lr_scale', 'lr', 'ratio', 'std')),
    ('in [0, 1]', lambda v: 0 <= v <= 1, (
        'anneal', 'distill_weight', 'hflip', 'model_ema_decay', 'noise_off', 'reprob')),
    ('in [0, 1)', lambda v: 0 <= v < 1, ('drop', 'drop_path', 'momentum', 'smoothing')),
    ('in (0, 1]', lambda v: 0 < v <= 1, ('scale',)),
    ('a number', math.isfinite, ('mean',)),
    ('in [0, 2^31)', lambda v: 0 <= v < 2 ** 31, ('seed',)),
)


def described(table: Dict[str, Dict[str, Any]], name: str) -> str:
    """What an argument's default is in each recipe, or with each optimizer."""
    values = ((row[name], owner) for owner, row in table.items())
    return 'default: ' + ', '.join(f'{v:.3g} ({o})' if isinstance(v, float) else f'{v} ({o})' for v, o in values)


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def create_parser(description: Optional[str] = None, epilog: Optional[str] = None) -> argparse.ArgumentParser:
    parser = Parser(
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
    arg('--input-key', metavar='NAME', help="of the images in hfds/, wds/ and the like, default: timm's")
    arg('--target-key', metavar='NAME', help="of the labels there, default: timm's")
    arg('--holdout', type=int, default=0, metavar='N', help='validate on N training images instead of --val-split')
    arg('--unreadable', choices=UNREADABLE, default='skip', help='images: skip and count (default), or error')

    arg = parser.add_argument_group('model').add_argument
    arg('--model', default='resnet50', metavar='NAME', help='static (converted) or adaptive; local-dir:, hf-hub: too')
    arg('--pretrained', **FLAG, help="load the model's weights, as local-dir: and hf-hub: always do")
    arg('--initial-checkpoint', metavar='FILE', help='load these weights')
    arg('--static', **FLAG, help='train a static model, without gates')
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
    arg('--gate-loss', choices=['macs', 'rate'],
        help=f'one target for the whole network, or one for each block; {described(RECIPES, "gate_loss")}')
    arg('--gate-loss-weight', type=float, metavar='W', help=described(RECIPES, 'gate_loss_weight'))
    arg('--anneal', type=float, metavar='SHARE',
        help='share of the training in which the target of --gate-loss macs falls from 1, '
        f'{described(RECIPES, "anneal")}')
    arg('--noise-off', type=float, metavar='SHARE',
        help=f'share of the training, at the end, without noise, {described(RECIPES, "noise_off")}')
    arg('--gate-lr-scale', type=float, metavar='F',
        help=f'learning rate of the gates over --lr, after the warm-up, {described(OPTIMIZERS, "gate_lr_scale")}')
    arg('--gate-weight-decay', type=float, metavar='WD', help='default: 0 (distill), --weight-decay (paper)')

    arg = parser.add_argument_group('distillation').add_argument
    arg('--distill-weight', type=float, metavar='W',
        help=f'share of the teacher in the loss, 0 for no teacher, {described(RECIPES, "distill_weight")}')
    arg('--distill-temperature', type=float, default=4., metavar='T', help='default: %(default)s')
    arg('--teacher', metavar='NAME', help='model with weights, default: the parent')

    arg = parser.add_argument_group('optimization').add_argument
    arg('--epochs', type=int, default=12, help='default: %(default)s')
    arg('--batch-size', '-b', type=int, default=128, help='of each process, default: %(default)s')
    arg('--validation-batch-size', type=int, metavar='N', help='default: --batch-size')
    arg('--grad-accum-steps', type=int, default=1, metavar='N', help='batches an update, default: 1')
    arg('--opt', help=f'of timm.optim, {described(RECIPES, "opt")}; others than these need --lr')
    arg('--lr', type=float, help=described(OPTIMIZERS, 'lr'))
    arg('--momentum', type=float, help=described(OPTIMIZERS, 'momentum'))
    arg('--weight-decay', type=float, help=described(OPTIMIZERS, 'weight_decay'))
    arg('--sched', help=f'of timm.scheduler, {described(RECIPES, "sched")}')
    arg('--warmup-epochs', type=int, metavar='N', help=described(RECIPES, 'warmup_epochs'))
    arg('--decay-milestones', type=int, nargs='+', metavar='N', help='epochs, default: 3/7 and 5/7 of all')
    arg('--decay-rate', type=float, default=0.1, help='default: %(default)s')
    arg('--min-lr', type=float, default=0., help='default: %(default)s')
    arg('--clip-grad', type=float, metavar='NORM')
    arg('--clip-mode', choices=['norm', 'value', 'agc'], default='norm', help='default: %(default)s')
    arg('--model-ema', **FLAG, help='keep an average of the weights, and save it')
    arg('--model-ema-decay', type=float, default=0.9998, help='default: %(default)s')

    arg = parser.add_argument_group('augmentation').add_argument
    arg('--crop-padding', type=int, metavar='PX', help='resize, pad, crop and flip only, as for CIFAR')
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
    arg('--amp', **FLAG, help='mixed precision')
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
    """Arguments of a command line, over those of its --config, over those of its recipe and optimizer.

    Raises:
        InputError: A config that cannot be used, or a value out of range.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = create_parser(description, epilog)
    file = parser.parse_known_args(argv)[0].config
    if file:
        argv = config_argv(parser, file) + argv  # of an argument given twice the last one counts
    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe])
    opt = parser.parse_args(argv).opt
    parser.set_defaults(**OPTIMIZERS.get(opt, {**OPTIMIZERS['sgd'], 'lr': None}))
    args = parser.parse_args(argv)
    check_args(args)
    if args.gate_loss == 'rate':
        args.anneal = 0.  # the recipe says what is done
    return args


def config_argv(parser: argparse.ArgumentParser, file: str) -> List[str]:
    """The arguments of a config file as a command line, so that they are checked as those of one.

    Raises:
        InputError: It cannot be read, or holds something else than arguments.
    """
    try:
        config = yaml.safe_load(Path(file).read_text(encoding='utf-8')) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f'--config {file}: {e}') from e
    if isinstance(config, dict) and isinstance(config.get('recipe'), dict):
        config = config['recipe']  # of hub_configs or results.json, beside what else they hold
    if not isinstance(config, dict):
        raise InputError(f'--config {file} must hold arguments by name.')
    config = {str(k).replace('-', '_'): v for k, v in config.items()}
    actions = {action.dest: action for action in parser._actions if action.dest not in ('config', 'help')}
    unknown = sorted(config.keys() - actions.keys())
    if unknown:
        raise InputError(f'--config {file}: no such argument, {", ".join(unknown)}.')
    argv: List[str] = []
    for name, value in config.items():
        argument = f'--{name.replace("_", "-")}'
        if value is None or (value is False and actions[name].nargs == 0):
            continue  # as if not given
        if actions[name].nargs == 0:
            if value is not True:
                raise InputError(f'--config {file}: {argument} must be true or false, not {value!r}.')
            argv.append(argument)
        else:
            argv += [argument, *map(str, value)] if isinstance(value, list) else [f'{argument}={value}']
    try:
        parser.parse_args(argv)
    except InputError as e:
        raise InputError(f'--config {file}: {e}') from e
    return argv


def check_args(args: argparse.Namespace) -> None:
    for allowed, is_allowed, names in RANGES:
        for name in names:
            value = getattr(args, name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(map(is_allowed, values)):
                shown = ' '.join(map(str, values))
                raise InputError(f'--{name.replace("_", "-")} must be {allowed}, not {shown}.')
    if args.teacher and not args.distill_weight:
        raise InputError('--teacher needs a --distill-weight above 0.')
    if args.lr is None:
        raise InputError(f'--lr has no default for --opt {args.opt}, only for {" and ".join(OPTIMIZERS)}.')
    if not args.static and not 0 < args.target_rate < 1:
        raise InputError(f'--target-rate must be in (0, 1), not {args.target_rate}; --static trains without gates.')
    if args.input_size and args.input_size[0] not in (1, 3):
        raise InputError(f'--input-size must have 1 or 3 channels, not {args.input_size[0]}.')
    if args.batch_size % 2 and (args.mixup or args.cutmix):
        raise InputError(f'--batch-size must be even for mixup, not {args.batch_size}.')
    if args.batch_size == 1 and not args.static and args.gate_norm == 'bn':
        raise InputError('--batch-size must be from 2 for gates with a batch norm; --gate-norm none does without.')


def recipe_of(args: argparse.Namespace) -> Dict[str, Any]:
    """What another training needs to compute the same, as --config reads it."""
    names = vars(create_parser().parse_args([]))  # args has more by now, the rank for one
    return {k: v for k, v in vars(args).items() if k in names and k not in NOT_RECIPE}
