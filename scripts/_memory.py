"""Peak memory of a pass: --memory of benchmark.py."""
import ctypes
from pathlib import Path
from typing import Any, Callable, Optional

import torch

__all__ = ['peak_mib']


def peak_mib(run: Callable[[torch.Tensor], Any], x: torch.Tensor) -> Optional[float]:
    """Memory of run(x) on top of the memory in use before it, from Linux's high-water mark of the process."""
    def status(key: str) -> float:
        line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) / 1024

    try:
        ctypes.CDLL('libc.so.6').malloc_trim(0)  # gives back what earlier passes freed
        Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
        before = status('VmRSS')
        run(x)
        return status('VmHWM') - before
    except OSError:
        return None
