"""What all scripts share: common arguments, the form of errors, exit codes, the device and the output folder.

Importing this is quick. A script parses its arguments before it imports torch and timm, so --help and a mistyped flag
end at once:

    def parse_args(argv=None):
        parser = create_parser(__doc__, EXAMPLES)
        add_args(parser, 'model', 'pretrained', 'device', 'json')
        return parser.parse_args(argv)

    if __name__ == '__main__':
        parse_args()  # --help and wrong flags end here, before the slow imports

    import torch

    def run(args): ...  # raises InputError, ResultError or OSError

    def main(argv=None):
        return run_script(run, parse_args(argv))

    if __name__ == '__main__':
        sys.exit(main())
"""
import argparse
import csv
import ctypes
import errno
import io
import json
import math
import os
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, NoReturn, Optional, Union

if TYPE_CHECKING:
    import torch

EXIT_CODES = (
    'exit code: 0 done, 1 the result is no good, 2 bad input, 3 output cannot be written, 130 Ctrl-C, 143 SIGTERM')

# Flags of arguments that the package calls by another name; else `target_rate` is --target-rate.
FLAGS = {
    'budget': '--budgets', 'checkpoint': 'CHECKPOINT', 'files': 'IMAGES', 'folder': '--output',
    'least': '--least-budget', 'offset': '--gate-offset', 'path': '--output', 'repo_id': 'REPO', 'root': 'ROOT',
    'stages': '--cascade', 'target': '--target-rate'}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class ResultError(Exception):
    """The script ran, but the result is no good: exit code 1."""


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
    'cascade': dict(nargs='+', metavar='NAME', help='models to run in rounds by confidence, or a saved cascade'),
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
    'workers': dict(flags=('-j',), type=integer(0), default=min(4, os.cpu_count() or 1), metavar='N',
                    help='loader processes (default: %(default)s)'),
    'device': dict(metavar='NAME', help='default: cuda if there is one, else cpu'),
    'threads': dict(type=integer(1), metavar='N', help="CPU threads (default: torch's)"),
    'amp': dict(action='store_true', help='mixed precision'),
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
    parser.add_argument('--split', default=split, metavar='NAME', help='default: %(default)s')
    parser.add_argument(
        '--holdout', type=integer(0), default=0, metavar='N',
        help='only the N images of the split that finetune.py --holdout N does not train on (default: all images)')
    add_args(parser, 'unreadable', 'input_size', 'crop_pct', 'batch_size', 'workers', 'device')


def sleep_when_idle() -> None:
    """Let threads that wait sleep, not spin: spinning makes small models ten times slower on a busy machine.

    Has an effect only before torch is imported.
    """
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


def keep_freed_memory() -> bool:
    """Keep glibc from giving freed tensors back to the system, which would hand them out again page by page.

    On a CPU a training step of a ResNet-32 at batch 128 takes about 0.8 of the time with it (0.67 s rather than 0.77 to
    0.87, one thread). The process keeps its peak memory. Returns whether it took effect, False without glibc.
    """
    if not sys.platform.startswith('linux'):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2 ** 31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, 32 * 2 ** 20))


def error_text(error: BaseException) -> str:
    """An error's message on one line, with the flag in place of the argument's name."""
    text = str(error)
    argument = getattr(error, 'argument', None)
    if argument is not None:
        flag = FLAGS.get(argument, f'--{argument.replace("_", "-")}')
        text = f'{flag} {error.problem}'  # type: ignore[attr-defined]
    return ' '.join(text.rsplit('InputError: ', 1)[-1].split())  # a loader worker puts its traceback in front


def run_script(run: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> int:
    """Call run(args); print an error that the user can mend as one line on stderr. Returns the exit code."""
    from torch import distributed

    from timm_aig import InputError
    from timm_aig.training.checkpoint import CheckpointError
    from timm_aig.training.trainer import NonFiniteError, Stopped

    codes = {InputError: 2, ResultError: 1, NonFiniteError: 1, CheckpointError: 3, OSError: 3}
    try:
        run(args)
    except tuple(codes) as e:
        print(f'error: {error_text(e)}', file=sys.stderr)
        return next(code for kind, code in codes.items() if isinstance(e, kind))
    except Stopped as e:
        print(e, file=sys.stderr)
        return 128 + e.signum
    except KeyboardInterrupt:
        print('error: interrupted.', file=sys.stderr)
        return 130
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


def require(extra: str, *packages: str) -> None:
    """Raise InputError if a package of an extra is missing: before the work rather than after it."""
    from timm_aig import InputError

    for package in packages:
        try:
            import_module(package)
        except ImportError as e:
            raise InputError(f"{e}; install the extra: pip install 'timm_aig[{extra}]' "
                             f"(in a checkout: pip install -e '.[{extra}]').") from e


def reason(error: BaseException) -> str:
    """What an error says, if need be with its kind, and without the advice to unpickle what may be hostile."""
    sentences = [s for s in re.split(r'(?<=\.)\s+', str(error)) if not re.search(r'weights_only\W.*False', s)]
    text = ' '.join(sentences)
    return text if text and not isinstance(error, LookupError) else f'{type(error).__name__}: {text}'.rstrip(': ')


def require_file(path: Union[str, Path], argument: str) -> None:
    """Raise InputError if there is no such file."""
    from timm_aig import InputError

    if not Path(path).is_file():
        raise InputError(f'{path}: there is no such file.', argument)


@contextmanager
def blame(argument: str, value: Any, kind: Any = ValueError) -> Iterator[None]:
    """Turn errors of a kind, or a tuple of kinds, into InputErrors about an argument, unless they name one."""
    from timm_aig import InputError

    try:
        yield
    except kind as e:
        if getattr(e, 'argument', None) not in (None, 'model'):  # a model is named by several flags
            raise
        raise InputError(f'{value}: {reason(e)}', argument) from e


def require_model_config(path: Path) -> None:
    """Raise ValueError if a config.json describes no model: timm's errors do not say so."""
    config = None
    with suppress(ValueError):
        config = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(config, dict) or 'architecture' not in config:
        raise ValueError(f'{path} does not describe a model.')


def create_model(name: str, pretrained: bool = False, argument: str = 'model', **kwargs: Any) -> Any:
    """timm.create_model; also loads the weights of local-dir: and hf-hub: names.

    Raises:
        InputError: There is no such model, or it cannot be loaded; `argument` is the one that named it.
    """
    import timm

    with blame(argument, name, Exception):  # timm, the Hub and the file formats raise all kinds
        if name.startswith('local-dir:') and (path := Path(name.partition(':')[2], 'config.json')).is_file():
            require_model_config(path)
        return timm.create_model(name, pretrained=pretrained or ':' in name, **kwargs)


def open_device(args: argparse.Namespace) -> 'torch.device':
    """The device to run on, of this process under torchrun.

    Sets args.device, and args.distributed, rank, world_size and local_rank.

    Raises:
        InputError: There is no such device.
    """
    import torch
    from timm.utils import init_distributed_device

    from timm_aig import InputError

    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = init_distributed_device(args)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as e:
        raise InputError(f'{args.device}: {str(e).splitlines()[0]}', 'device') from e
    return device


def open_folder(path: Union[str, Path], flag: str = '--output') -> Path:
    """Make the folder that an argument names, before the work rather than after it.

    Raises:
        OSError: It cannot be written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise OSError(f'{flag} must be a folder to write to, {str(folder)!r} is not: {e.strerror}.') from e
    return folder


def check_file(path: Union[str, Path], argument: str) -> None:
    """Check that a file can be written, before the work rather than after it. It is left as it is.

    Raises:
        OSError: It cannot be written to.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()  # files are written beside their place, and renamed
    except OSError as e:
        raise OSError(
            f'--{argument} must be a file in a folder to write to, {str(path)!r} is not: {e.strerror}.') from e


def write_text(path: Union[str, Path], text: str) -> None:
    """Write a text file, whole or not at all."""
    from timm_aig.training.checkpoint import write_atomically

    write_atomically(Path(path), lambda file: file.write(text.encode()))


def write_csv(path: Union[str, Path], head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    text = io.StringIO(newline='')
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(head)
    writer.writerows(rows)
    write_text(path, text.getvalue())
