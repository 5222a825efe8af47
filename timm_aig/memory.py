"""keep_freed_memory: let a process keep the memory of freed tensors for the next ones."""
import ctypes
import sys

__all__ = ['keep_freed_memory']

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


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
