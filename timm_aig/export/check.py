"""Whether an exported model computes what the model in PyTorch does."""
import hashlib
from contextlib import nullcontext
from math import inf
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Set, Tuple

import numpy as np
import torch
import torch.nn as nn

from ..blocks import gated_blocks
from ..passes import force_gates, forward_gates

__all__ = ['ExportError', 'FORCED', 'Run', 'TOLERANCE', 'check_export', 'file_report', 'own_offsets']

FORCED = inf  # gate offset that opens a gate for every input; its negative closes it
TOLERANCE = {'float32': 1e-4, 'float16': 2e-2}  # of logits, over the largest one where that is above 1

# Logits and gates (None without) of images [B, C, H, W] and gate offsets [L], None for the model's own.
Run = Callable[[np.ndarray, Optional[np.ndarray]], Tuple[np.ndarray, Optional[np.ndarray]]]


class ExportError(RuntimeError):
    """The exported model does not compute what the model does; no file was written."""


def own_offsets(model: nn.Module) -> np.ndarray:
    """Gate offsets [L] of a model."""
    return np.array([float(block.gate.offset) for block in gated_blocks(model).values()], np.float32)


@torch.no_grad()
def check_export(
        run: Run, model: nn.Module, images: torch.Tensor, mode: str, gates: Optional[Sequence[bool]],
        tolerance: Optional[float], exact_gates: bool = True,
) -> Dict[str, Any]:
    """Compare an exported model with the model: with its own gates, all gates open and all closed, at batch 1 and more.

    Logits are compared with those of the model under the gates that `run` returned.

    Args:
        run: The exported model.
        model: In eval.
        images: Normalised [N, C, H, W].
        mode, gates: As in export_onnx.
        tolerance: Largest difference of logits, over the largest logit where that is above 1. If None, any is allowed.
        exact_gates: Every gate must answer as in the model.

    Returns:
        images, patterns (distinct rows of the gates), max_difference of the logits, gates_changed.

    Raises:
        ExportError: The two differ by more.
    """
    count = len(gated_blocks(model))
    difference, changed = 0., 0
    patterns: Set[Tuple[int, ...]] = set()
    for x, offset in _cases(images, forced=bool(count) and mode != 'path'):
        logits, answers = run(x.numpy(), None if offset is None else np.full(count, offset, np.float32))
        answers = np.zeros((len(x), 0)) if answers is None else answers
        found = torch.from_numpy(answers.astype(np.float32))
        if gates is not None:
            expected = torch.tensor(gates, dtype=torch.float32, device='cpu').expand(len(x), -1)
        elif offset is not None:
            expected = torch.full_like(found, float(offset > 0))
        else:
            expected = forward_gates(model, x)[1]
        changed += int((found != expected).sum())
        patterns.update(map(tuple, found.int().tolist()))
        with force_gates(model, found.bool()) if count else nullcontext():
            reference = model(x).numpy()
        error = float(np.abs(logits - reference).max() / max(1., np.abs(reference).max()))
        if not error <= (np.inf if tolerance is None else tolerance):
            raise ExportError(f'logits differ from the model\'s by {error:.2g} of the largest, allowed is {tolerance}.')
        difference = max(difference, error)
    if changed and exact_gates:
        raise ExportError(f'{changed} gates answer otherwise than in the model.')
    return {'images': len(images), 'patterns': len(patterns), 'max_difference': difference, 'gates_changed': changed}


def _cases(images: torch.Tensor, forced: bool) -> Iterator[Tuple[torch.Tensor, Optional[float]]]:
    """Batches and gate offsets to compare on: one image, several, and the rest in batches of 8 with their own gates."""
    several = images[:8] if len(images) > 1 else images.repeat(2, 1, 1, 1)
    for x in (images[:1], several):
        for offset in (None, FORCED, -FORCED) if forced else (None,):
            yield x, offset
    for x in images[8:].split(8) if len(images) > 8 else ():
        yield x, None


def file_report(path: Path, mode: str, precision: str, found: Dict[str, Any], **more: Any) -> Dict[str, Any]:
    """What an export function returns about the file that it wrote and what check_export found."""
    content = path.read_bytes()
    return {
        'path': str(path), 'mode': mode, 'precision': precision, **more, 'bytes': len(content),
        'sha256': hashlib.sha256(content).hexdigest(), **found}
