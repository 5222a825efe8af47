"""What the scripts share: the device, the output folder, and how bad input ends."""
import argparse
import ctypes
import sys
import tempfile
from pathlib import Path
from typing import Union

import torch
from timm.utils import init_distributed_device

from timm_aig import InputError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def error_text(error: Exception) -> str:
    """A message on one line, with the flag of the argument that it is about, and without the traceback that a loader
    worker puts in front."""
    text = str(error)
    argument = getattr(error, 'argument', None)
    if argument is not None:
        text = f'--{argument.replace("_", "-")} {error.problem}'
    return ' '.join(text.rsplit('InputError: ', 1)[-1].split())


def open_folder(path: Union[str, Path]) -> Path:
    """The folder of --output, made if missing: better known before the work than after it.

    Raises:
        InputError: It cannot be written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise InputError(f'--output must be a folder to write to, {str(folder)!r} is not: {e.strerror}.') from e
    return folder


def open_device(args: argparse.Namespace) -> torch.device:
    """The --device, of this process under torchrun. Sets args.distributed, rank, world_size and local_rank.

    Raises:
        InputError: There is no such device here.
    """
    try:
        device = init_distributed_device(args)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as e:
        raise InputError(f'--device {args.device}: {str(e).splitlines()[0]}') from e
    return device


def keep_freed_memory() -> bool:
    """Keep glibc from giving freed tensors back to the system, which would hand them out again page by page.

    On a CPU a training step of a ResNet-32 at batch 128 takes about 0.8 of the time with it (0.67 s rather than 0.77 to
    0.87, one thread). The process keeps its peak memory. Nothing happens where there is no glibc.

    Returns:
        Whether it took effect.
    """
    if not sys.platform.startswith('linux'):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2 ** 31 - 1)) and bool(mallopt(_M_MMAP_THRESHOLD, 32 * 2 ** 20))
