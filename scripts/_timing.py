"""Time and memory of several ways to run a network, on the same images."""
import ctypes
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Hashable, List, Optional, TypeVar

import numpy as np
import torch
from tqdm import trange

__all__ = ['Run', 'peak_mib', 'sum_up', 'time_runs']

Run = Callable[[torch.Tensor], Any]  # takes images [B, C, H, W]
Name = TypeVar('Name', bound=Hashable)


@torch.inference_mode()
def time_runs(
        runs: Dict[Name, Run], images: torch.Tensor, batch: int, rounds: int,
        context: Callable[[Name, int], ContextManager] = lambda name, start: nullcontext(),
) -> Dict[Name, List[List[float]]]:
    """Seconds of each batch in each round. The runs take turns of 8 images, or of one batch.

    A turn starts with a call that is not timed: else a run would be the faster for sharing weights with the one before.

    Args:
        runs: What to time, by name.
        images: Images [N, C, H, W]. Those that do not fill a batch are left out.
        batch: Images in a batch.
        rounds: How often each run gets all images.
        context: Entered around each call, with the name of the run and the number of the batch's first image.
    """
    synchronize = torch.cuda.synchronize if images.is_cuda else lambda: None

    def seconds(name: Name, start: int) -> float:
        with context(name, start):
            synchronize()
            begin = time.perf_counter()
            runs[name](images[start:start + batch])
            synchronize()
            return time.perf_counter() - begin

    found: Dict[Name, List[List[float]]] = {name: [] for name in runs}
    starts = range(0, len(images) - batch + 1, batch)
    together = max(8 // batch, 1)
    for _ in trange(rounds + 1, desc=f'batch {batch}', unit='round'):
        for times in found.values():
            times.append([])
        for turn in (starts[i:i + together] for i in range(0, len(starts), together)):
            for name in runs:
                seconds(name, turn[0])
                found[name][-1] += [seconds(name, start) for start in turn]
    return {name: times[1:] for name, times in found.items()}  # the first round warms up


def sum_up(rounds: List[List[float]], reference: List[List[float]], batch: int) -> Dict[str, float]:
    """Figures of one run: from its seconds of each batch in each round, and from those of the run it is compared with.
    """
    ratios = [sum(own) / sum(other) for own, other in zip(rounds, reference)]
    single = [statistics.median(turns) for turns in zip(*rounds)]
    p50, p99 = 1e3 * np.quantile(single, (.5, .99), method='inverted_cdf')
    return dict(
        ms_per_image=1e3 * statistics.median(map(sum, rounds)) / (len(single) * batch),
        ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
        p50_ms=p50, p99_ms=p99)


def peak_mib(run: Run, x: torch.Tensor) -> Optional[float]:
    """Memory of run(x) on top of what is in use before it: Linux's high-water mark of the process, else None."""
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
