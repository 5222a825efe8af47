"""Arguments that the scripts share, named as in timm's scripts.

Importing this is quick: a script parses its arguments before it imports torch and timm, so that --help and a mistyped
flag end at once.
"""
import argparse
import math
import os
import re
import sys
from typing import Any, Callable, NoReturn, Optional

# Those that this process may use: in a container or a job of Slurm fewer than the machine has.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
EXIT_CODES = (
    'exit code: 0 done, 1 the result cannot be used, 2 bad input, 3 output cannot be written, 130 Ctrl-C, 143 SIGTERM')


def integer(low: int, high: float = math.inf) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""
    allowed = f'a whole number from {low}' + (f' to {high}' if high < math.inf else '')

    def parse(text: str) -> int:
        if not re.fullmatch(r'[+-]?\d+', text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f'must be {allowed}, not {text!r}.')
        return int(text)

    return parse


def number(interval: str = '(-inf, inf)') -> Callable[[str], float]:
    """An argparse type: a number in an interval, '(0, 1]' for one that excludes 0 and includes 1."""
    low, high = map(float, interval[1:-1].split(','))
    allowed = 'a number' if interval == '(-inf, inf)' else f'a number in {interval}'

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or (value == low and interval[0] == '[') or (value == high and interval[-1] == ']')):
            raise argparse.ArgumentTypeError(f'must be {allowed}, not {text!r}.')
        return value

    return parse


# Arguments that several scripts have, named as in timm's scripts.
ARGUMENTS = {
    'model': dict(metavar='NAME', help='timm model, local-dir:FOLDER or hf-hub:USER/NAME'),
    'cascade': dict(nargs='+', metavar='NAME', help='models to try in order until one is sure, or a saved cascade'),
    'pretrained': dict(action='store_true', help='load weights; local-dir: and hf-hub: always do'),
    'data_dir': dict(metavar='DIR', help='root of the data set'),
    'dataset': dict(default='folder', metavar='NAME',
                    help='folder, torch/..., hfds/..., hfids/..., tfds/... or wds/... (default: %(default)s)'),
    'dataset_download': dict(action='store_true', help='let timm download the data set to --data-dir'),
    'input_key': dict(metavar='NAME', help="column of the images in hfds/, wds/ and the like (default: timm's)"),
    'target_key': dict(metavar='NAME', help="column of the labels (default: timm's)"),
    'unreadable': dict(choices=('skip', 'error'), default='skip',
                       help='skip and count unreadable images, or stop with an error (default: %(default)s)'),
    'input_size': dict(type=integer(1), nargs=3, metavar=('C', 'H', 'W'),
                       help="channels, height and width (default: the model's)"),
    'crop_pct': dict(type=number('(0, inf)'), metavar='X', help="share of an image that the evaluation crops "
                     "(default: the model's)"),
    'batch_size': dict(flags=('-b',), type=integer(1), default=128, metavar='N',
                       help='images in a batch, of each process (default: %(default)s)'),
    'workers': dict(flags=('-j',), type=integer(0), default=min(4, CPUS), metavar='N',
                    help='loader processes (default: %(default)s)'),
    'device': dict(metavar='NAME', help='default: cuda if there is one, else cpu'),
    'threads': dict(type=integer(1), metavar='N', help="CPU threads (default: torch's)"),
    'amp': dict(action='store_true', help='mixed precision; slow on CPUs without instructions for it'),
    'gate_offset': dict(type=number('[-inf, inf]'), metavar='X',
                        help="added to each gate's open logit; more opens more gates (default: the model's)"),
    'budgets': dict(type=number('(0, 1]'), nargs='+', metavar='X', help='MACs shares'),
    'images': dict(metavar='DIR', help='folder of images (default: noise)'),
    'num_images': dict(type=integer(1), metavar='N', help='number of images (default: %(default)s)'),
    'rounds': dict(metavar='N', help='timing rounds (default: %(default)s)'),
    'seed': dict(type=integer(0, 2 ** 31 - 1), default=0, metavar='N', help='default: %(default)s'),
    'output': dict(metavar='DIR', help='folder to write (default: %(default)s)'),
    'json': dict(action='store_true', help='print JSON rather than a table'),
}


class Parser(argparse.ArgumentParser):
    """Prints errors as run_script does: one line, without the usage."""
    source = ''  # in front of an error: the flag and file that the arguments come from

    def error(self, message: str) -> NoReturn:
        message = re.sub(r'^argument ([^/:]+)[^:]*: ', r'\1 ', message)
        print(f'error: {self.source}{message}', file=sys.stderr)
        sys.exit(2)


def create_parser(description: Optional[str], examples: str) -> Parser:
    """A parser whose help ends in the examples and the exit codes."""
    return Parser(
        description=description, epilog=f'{examples}\n\n{EXIT_CODES}',
        formatter_class=argparse.RawDescriptionHelpFormatter)


def add_args(group: Any, *names: str, **changes: Any) -> None:
    """Add arguments of ARGUMENTS to a parser or group of it, with changes such as default=32."""
    for name in names:
        options = {**ARGUMENTS[name], **changes}
        group.add_argument(f'--{name.replace("_", "-")}', *options.pop('flags', ()), **options)


def add_evaluation_args(parser: Any, split: str = 'validation', cascade: bool = False) -> None:
    """Add the arguments of a script that runs a model on a data set."""
    model = parser.add_mutually_exclusive_group(required=True)
    add_args(model, 'model')
    if cascade:
        add_args(model, 'cascade')
    add_args(parser, 'pretrained', 'data_dir', 'dataset', 'dataset_download', 'input_key', 'target_key')
    parser.add_argument('--split', metavar='NAME', help=f'default: {split}; with --holdout train')
    parser.set_defaults(default_split=split)
    parser.add_argument(
        '--holdout', type=integer(0), default=0, metavar='N',
        help='only the N training images that finetune.py --holdout N does not train on (default: all images)')
    add_args(parser, 'unreadable', 'input_size', 'crop_pct', 'batch_size', 'workers', 'device')
