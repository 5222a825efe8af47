"""What the scripts share: the form of errors, exit codes, the device, and what they write. Importing this is quick."""
import argparse
import csv
import ctypes
import errno
import io
import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, Iterator, Optional, Sequence, Union

if TYPE_CHECKING:
    import torch

# Flags of arguments that the package calls by another name; else `target_rate` is --target-rate.
FLAGS = {
    'budget': '--budgets', 'checkpoint': 'CHECKPOINT', 'compile': '--torchcompile', 'files': 'IMAGES',
    'folder': '--output', 'least': '--least-budget', 'logits': 'the logits of the model', 'offset': '--gate-offset',
    'path': '--output', 'repo_id': 'REPO', 'root': 'ROOT', 'stages': '--cascade', 'target': '--target-rate'}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class ResultError(Exception):
    """The script ran, but its result cannot be used: exit code 1."""


def sleep_when_idle() -> None:
    """Let threads that wait sleep, not spin: spinning makes small models ten times slower on a busy machine.

    Has an effect only before torch is imported.
    """
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')


def keep_freed_memory() -> None:
    """Keep glibc from giving freed tensors back to the system, which would hand them out again page by page.

    On a CPU a training step of a ResNet-32 at batch 128 takes about 0.8 of the time with it (0.67 s rather than 0.77 to
    0.87, one thread). The process keeps its peak memory. Does nothing without glibc.
    """
    with suppress(AttributeError, OSError, TypeError):  # other C libraries and systems
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 * 2 ** 20)


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
    from timm_aig.export.check import ExportError
    from timm_aig.training.checkpoint import CheckpointError
    from timm_aig.training.trainer import NonFiniteError, Stopped

    codes = {InputError: 2, ResultError: 1, NonFiniteError: 1, ExportError: 1, CheckpointError: 3, OSError: 3}
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


@contextmanager
def blame(argument: Optional[str], value: Any, kind: Any = ValueError) -> Iterator[None]:
    """Turn errors of a kind, or a tuple of kinds, into InputErrors about an argument, unless they name one."""
    from timm_aig import InputError

    try:
        yield
    except kind as e:
        if getattr(e, 'argument', None) not in (None, 'model'):  # a model is named by several flags
            raise
        raise InputError(f'{value}: {reason(e)}', argument) from e


def read_json(path: Union[str, Path], argument: Optional[str] = None) -> Dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        InputError: It cannot be read, or holds something else; `argument` is the one that named it, if one did.
    """
    with blame(argument, path, (OSError, ValueError)):
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError('it must hold an object.')
    return content


def require_model_config(path: Path) -> None:
    """Raise ValueError if a config.json describes no model, or is not written yet: timm's errors do not say so."""
    if not path.is_file():
        if (path.parent / 'checkpoints').is_dir():
            raise ValueError('its training has not ended; finetune.py --resume auto goes on with it.')
        return
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
        if name.startswith('local-dir:'):
            require_model_config(Path(name.partition(':')[2], 'config.json'))
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
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=Path(path).parent).close()  # files are written beside their place, and renamed
    except OSError as e:
        raise OSError(
            f'--{argument} must be a file in a folder to write to, {str(path)!r} is not: {e.strerror}.') from e


def print_table(rows: Sequence[Dict[str, Any]], *text: str) -> None:
    """Print rows of one form below their heads. Columns of text are aligned to the left."""
    lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = (cell.ljust(width) if head in text else cell.rjust(width)
                 for head, cell, width in zip(rows[0], line, widths))
        print('  '.join(cells).rstrip())


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
