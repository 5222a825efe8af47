"""The arguments of a fine-tuning, and the recipes and optimizers that set their defaults."""
import argparse
import ast
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import yaml
from _args import Parser, add_args, create_parser, integer, number

# Defaults that a recipe sets; --config and the command line override them.
RECIPES: Dict[str, Dict[str, Any]] = {
    'any': dict(
        gate_loss='budgets', gate_loss_weight=30., anneal=0.4, noise_off=0.4, distill_weight=0.5, gate_weight_decay=0.,
        opt='muon', sched='cosine', warmup_epochs=1),
    'distill': dict(
        gate_loss='macs', gate_loss_weight=10., anneal=1 / 3, noise_off=0.6, distill_weight=0.5, gate_weight_decay=0.,
        opt='muon', sched='cosine', warmup_epochs=1),
    'paper': dict(
        gate_loss='rate', gate_loss_weight=2., anneal=0., noise_off=0., distill_weight=0., gate_weight_decay=None,
        opt='sgd', sched='multistep', warmup_epochs=0),
}

# Defaults that an optimizer sets. Other optimizers take those of SGD and need --lr. Muon's weight decay is decoupled
# from the gradient.
OPTIMIZERS: Dict[str, Dict[str, Any]] = {
    'muon': dict(lr=0.01, gate_lr_scale=0.3, momentum=0.95, weight_decay=0.02),
    'sgd': dict(lr=0.1, gate_lr_scale=1., momentum=0.9, weight_decay=5e-4),
}

# Where and how a training runs, not what it computes: left out of a recipe.
NOT_RECIPE = (
    'checkpoint_interval', 'config', 'data_dir', 'dataset_download', 'device', 'experiment', 'json', 'output', 'resume',
    'tensorboard', 'val_interval', 'workers')

# Boolean flag; --no-x overrides the config file.
FLAG: Dict[str, Any] = dict(action=argparse.BooleanOptionalAction, default=False)


def default_of(table: Dict[str, Dict[str, Any]], name: str) -> str:
    """The default of an argument in each recipe, or with each optimizer, for its help."""
    values = ((row[name], owner) for owner, row in table.items())
    shown = (f'{value:.3g} ({owner})' if isinstance(value, float) else f'{value} ({owner})' for value, owner in values)
    return f'(default: {", ".join(shown)})'


def keyword(text: str) -> str:
    """An argparse type: NAME=VALUE."""
    if not re.fullmatch(r'[A-Za-z_]\w*=.+', text):
        raise argparse.ArgumentTypeError(f'must be NAME=VALUE, not {text!r}.')
    return text


def model_kwargs_of(args: argparse.Namespace) -> Dict[str, Any]:
    """--model-kwargs by name. As in timm's train.py, a VALUE is a Python literal or else a string."""
    kwargs: Dict[str, Any] = {}
    for name, _, value in (text.partition('=') for text in args.model_kwargs or ()):
        try:
            kwargs[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            kwargs[name] = value
    return kwargs


def create_training_parser(description: Optional[str], examples: str) -> Parser:
    parser = create_parser(description, examples)
    parser.add_argument('--config', metavar='FILE',
                        help='YAML or JSON of arguments; of a file of hub_configs or results.json its recipe')
    parser.add_argument('--recipe', choices=RECIPES, default='distill', help='default: %(default)s')

    group = parser.add_argument_group('data')
    arg = group.add_argument
    add_args(group, 'data_dir', 'dataset', 'input_key', 'target_key', 'unreadable')
    add_args(group, 'dataset_download', **FLAG)
    arg('--train-split', default='train', metavar='NAME', help='default: %(default)s')
    arg('--val-split', default='validation', metavar='NAME', help='default: %(default)s')
    arg('--holdout', type=integer(0), default=0, metavar='N',
        help='validate on N images of --train-split, left out of the training, instead of --val-split')

    group = parser.add_argument_group('model')
    arg = group.add_argument
    add_args(group, 'model', default='resnet50')
    add_args(group, 'pretrained', **FLAG)
    arg('--initial-checkpoint', metavar='FILE', help='load these weights')
    arg('--static', **FLAG, help='train a static model, without gates')
    arg('--model-kwargs', type=keyword, nargs='+', metavar='NAME=VALUE',
        help='arguments of the model, such as img_size=32 patch_size=4 of a vision transformer')
    arg('--num-classes', type=integer(1), metavar='N', help="default: the model's")
    add_args(group, 'input_size', 'crop_pct')
    arg('--mean', type=number(), nargs='+', metavar='X', help="mean of each channel (default: the model's)")
    arg('--std', type=number('(0, inf)'), nargs='+', metavar='X',
        help="standard deviation of each channel (default: the model's)")
    arg('--interpolation', metavar='NAME', help="default: the model's")
    arg('--drop', type=number('[0, 1)'), default=0., metavar='P', help='dropout rate before the classifier')
    arg('--drop-path', type=number('[0, 1)'), default=0., metavar='P', help='stochastic depth rate')

    group = parser.add_argument_group('gates', "Defaults: those of --model's tag or folder, else those shown.")
    arg = group.add_argument
    arg('--target-rate', type=number('(0, 1)'), metavar='T',
        help='share of the MACs (--gate-loss macs) or of the images of each block (rate) to aim at (default: 0.6)')
    arg('--schedule', choices=['paper'], help="let the paper's blocks always run (default: gate every block)")
    arg('--gate-channels', type=integer(1), metavar='N', help='hidden width of a gate (default: 16)')
    arg('--gate-norm', choices=['bn', 'ln', 'none'],
        help="norm of its hidden layer (default: ln for ConvNeXt and vision transformers, else bn)")

    arg = parser.add_argument_group('training of the gates').add_argument
    arg('--gate-loss', choices=['budgets', 'macs', 'rate'],
        help='all budgets at once, one target for the whole network, or one for each block '
             f'{default_of(RECIPES, "gate_loss")}')
    arg('--least-budget', type=number('(0, 1)'), default=0.3, metavar='T',
        help='smallest share of the MACs to aim at with --gate-loss budgets (default: %(default)s)')
    arg('--gate-loss-weight', type=number('[0, inf)'), metavar='W',
        help=f'weight of the gate loss {default_of(RECIPES, "gate_loss_weight")}')
    arg('--anneal', type=number('[0, 1]'), metavar='SHARE',
        help='first share of the training, in which the targets of macs and budgets fall from 1 '
             f'{default_of(RECIPES, "anneal")}')
    arg('--noise-off', type=number('[0, 1]'), metavar='SHARE',
        help=f'last share of the training, in which the gates have no noise {default_of(RECIPES, "noise_off")}')
    arg('--gate-lr-scale', type=number('(0, inf)'), metavar='F',
        help=f'factor on --lr for the gates {default_of(OPTIMIZERS, "gate_lr_scale")}')
    arg('--gate-weight-decay', type=number('[0, inf)'), metavar='WD',
        help='weight decay of the gates (default: 0 (any, distill), --weight-decay (paper))')

    arg = parser.add_argument_group('distillation').add_argument
    arg('--distill-weight', type=number('[0, 1]'), metavar='W',
        help=f'share of the teacher in the loss, 0 for no teacher {default_of(RECIPES, "distill_weight")}')
    arg('--distill-temperature', type=number('(0, inf)'), default=4., metavar='T', help='default: %(default)s')
    arg('--teacher', metavar='NAME', help='model with weights (default: the static parent)')

    group = parser.add_argument_group('optimization')
    arg = group.add_argument
    arg('--epochs', type=integer(1), default=12, metavar='N', help='default: %(default)s')
    add_args(group, 'batch_size')
    arg('--grad-accum-steps', type=integer(1), default=1, metavar='N', help='batches in an update (default: 1)')
    arg('--opt', metavar='NAME', help=f'timm optimizer {default_of(RECIPES, "opt")}')
    arg('--lr', type=number('(0, inf)'), metavar='LR', help=f'learning rate {default_of(OPTIMIZERS, "lr")}')
    arg('--momentum', type=number('[0, 1)'), metavar='M', help=default_of(OPTIMIZERS, 'momentum')[1:-1])
    arg('--weight-decay', type=number('[0, inf)'), metavar='WD', help=default_of(OPTIMIZERS, 'weight_decay')[1:-1])
    arg('--sched', metavar='NAME', help=f'timm scheduler {default_of(RECIPES, "sched")}')
    arg('--warmup-epochs', type=integer(0), metavar='N', help=default_of(RECIPES, 'warmup_epochs')[1:-1])
    arg('--decay-milestones', type=integer(0), nargs='+', metavar='N',
        help='epochs at which multistep lowers the learning rate (default: 3/7 and 5/7 of all)')
    arg('--decay-rate', type=number('(0, inf)'), default=0.1, metavar='F', help='by this factor (default: %(default)s)')
    arg('--min-lr', type=number('[0, inf)'), default=0., metavar='LR', help='last learning rate (default: %(default)s)')
    arg('--clip-grad', type=number('(0, inf)'), metavar='NORM', help='largest norm of a gradient (default: no limit)')
    arg('--keep', choices=['best', 'last'], default='best',
        help='epoch to save: the most accurate on the validation images that keeps to --target-rate, or the last '
             '(default: %(default)s)')
    arg('--calibrate', type=integer(0), default=0, metavar='N',
        help='then find the gate offset that gives --target-rate, or those of several budgets with --gate-loss '
             'budgets, on N training images (default: 0, do not)')
    arg('--model-ema', **FLAG, help='keep a moving average of the weights, and save it')
    arg('--model-ema-decay', type=number('[0, 1]'), default=0.9998, metavar='X', help='default: %(default)s')

    arg = parser.add_argument_group('augmentation').add_argument
    arg('--crop-padding', type=integer(0), metavar='PX',
        help='resize, pad, crop and flip only, as for CIFAR, and --crop-pct 1')
    arg('--scale', type=number('(0, 1]'), nargs=2, default=[0.08, 1.], metavar=('MIN', 'MAX'),
        help='area of random resized crops (default: %(default)s)')
    arg('--ratio', type=number('(0, inf)'), nargs=2, default=[3 / 4, 4 / 3], metavar=('MIN', 'MAX'),
        help='aspect ratio of random resized crops (default: 3/4 4/3)')
    arg('--hflip', type=number('[0, 1]'), default=0.5, metavar='P', help='horizontal flips (default: %(default)s)')
    arg('--color-jitter', type=number('[0, inf)'), default=0.4, metavar='F', help='default: %(default)s')
    arg('--aa', metavar='POLICY', help="AutoAugment policy, such as 'rand-m9-mstd0.5'")
    arg('--reprob', type=number('[0, 1]'), default=0., metavar='P', help='random erasing (default: %(default)s)')
    arg('--mixup', type=number('[0, inf)'), default=0., metavar='ALPHA', help='default: %(default)s')
    arg('--cutmix', type=number('[0, inf)'), default=0., metavar='ALPHA', help='default: %(default)s')
    arg('--smoothing', type=number('[0, 1)'), default=0., metavar='P', help='label smoothing (default: %(default)s)')

    group = parser.add_argument_group('running')
    arg = group.add_argument
    add_args(group, 'device', 'workers', 'seed')
    add_args(group, 'amp', **FLAG)
    arg('--amp-dtype', choices=['bfloat16', 'float16'], default='bfloat16', help='default: %(default)s')
    arg('--torchcompile', metavar='BACKEND', nargs='?', const='inductor', help='compile the model')
    arg('--nonfinite', choices=['stop', 'skip'], default='stop',
        help='stop at a loss or gradient that is not finite, or skip the update (default: %(default)s)')
    add_args(group, 'output', default='output/finetune')
    arg('--experiment', metavar='NAME', help='subfolder of --output (default: model, recipe and target rate)')
    arg('--resume', metavar='auto', choices=['auto'], help='resume from the last checkpoint in it, if there is one')
    arg('--checkpoint-interval', type=integer(0), default=0, metavar='N',
        help='updates between checkpoints inside an epoch (default: 0, only after each epoch)')
    arg('--val-interval', type=integer(1), default=1, metavar='N',
        help='epochs between validations (default: %(default)s)')
    arg('--tensorboard', **FLAG, help='write curves, also of each gate')
    add_args(group, 'json', **FLAG)
    return parser


def parse_training_args(
        argv: Optional[List[str]], description: Optional[str] = None, examples: str = '',
) -> argparse.Namespace:
    """Arguments of the command line, over those of --config, over those of the recipe and the optimizer."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = create_training_parser(description, examples)
    command = shlex.join(['scripts/finetune.py', *argv])
    file = parser.parse_known_args(argv)[0].config
    if file:
        argv = config_argv(parser, file) + argv  # the last value of an argument counts
    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe])
    opt = parser.parse_args(argv).opt
    parser.set_defaults(**OPTIMIZERS.get(opt, {**OPTIMIZERS['sgd'], 'lr': None}))
    args = parser.parse_args(argv)
    if args.teacher and not args.distill_weight:
        parser.error('--teacher needs a --distill-weight above 0.')
    if args.lr is None:
        parser.error(f'--lr has no default for --opt {args.opt}, only for {" and ".join(OPTIMIZERS)}.')
    if args.batch_size % 2 and (args.mixup or args.cutmix):
        parser.error(f'--batch-size must be even for mixup, not {args.batch_size}.')
    if args.calibrate and (args.static or args.gate_loss == 'rate'):
        parser.error('--calibrate is for adaptive models and --gate-loss macs or budgets.')
    if args.gate_loss == 'rate':
        args.anneal = 0.  # has no effect, and the recipe must say so
    args.command = command
    return args


def config_argv(parser: Parser, file: str) -> List[str]:
    """The arguments of a config file as a command line, checked."""
    parser.source = f'--config {file}: '
    try:
        config = yaml.safe_load(Path(file).read_text(encoding='utf-8')) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        parser.error(' '.join(str(e).split()))
    if isinstance(config, dict) and isinstance(config.get('recipe'), dict):
        config = config['recipe']  # of hub_configs or results.json
    if not isinstance(config, dict):
        parser.error('must hold arguments by name.')
    config = {str(name).replace('-', '_'): value for name, value in config.items()}
    unknown = sorted(config.keys() - vars(parser.parse_args([])).keys() | config.keys() & {'config'})
    if unknown:
        parser.error(f'no such argument, {", ".join(unknown)}.')
    argv: List[str] = []
    for name, value in config.items():
        flag = name.replace('_', '-')
        if isinstance(value, bool):
            argv.append(f'--{flag}' if value else f'--no-{flag}')
        elif isinstance(value, list):
            argv += [f'--{flag}', *map(str, value)]
        elif value is not None:  # None: not given
            argv.append(f'--{flag}={value}')
    parser.parse_args(argv)
    parser.source = ''
    return argv


def recipe_of(args: argparse.Namespace) -> Dict[str, Any]:
    """What another training needs to compute the same, for --config."""
    names = vars(create_training_parser(None, '').parse_args([]))  # args holds more, such as the rank
    return {k: v for k, v in vars(args).items() if k in names and k not in NOT_RECIPE}
