"""Whether an exported model computes what the model in PyTorch does."""
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
import torch.nn as nn

from ..blocks import gated_blocks
from ..passes import force_gates, forward_gates

__all__ = ['ExportError', 'Run', 'check_export', 'torch_run']

FORCED = 1e4  # offset that opens a gate whatever its logits, its negative closes it

# Logits and gates (None without) of images [B, C, H, W] and gate offsets [L], None for the model's own.
Run = Callable[[np.ndarray, Optional[np.ndarray]], Tuple[np.ndarray, Optional[np.ndarray]]]


class ExportError(RuntimeError):
    """What was exported does not compute what the model does; no file was written."""


def own_offsets(model: nn.Module) -> np.ndarray:
    """Gate offsets [L] of a model."""
    return np.array([float(block.gate.offset) for block in gated_blocks(model).values()], np.float32)


def torch_run(function: Any, model: nn.Module) -> Run:
    """Run of a function of torch tensors x and gate_offset."""
    def run(x: np.ndarray, offset: Optional[np.ndarray]) -> Tuple[np.ndarray, Optional[np.ndarray]]:
        with torch.no_grad():
            offset = own_offsets(model) if offset is None else offset
            logits, gates = function(torch.from_numpy(x), torch.from_numpy(offset))
        return logits.numpy(), gates.numpy()

    return run


@torch.no_grad()
def check_export(
        run: Run,
        model: nn.Module,
        images: torch.Tensor,
        mode: str,
        open: Optional[Sequence[bool]],
        tolerance: Optional[float],
        exact_gates: bool,
) -> Dict[str, Any]:
    """Compare with the model: with the gates' own answers on all images, and with all gates open and closed on one.

    Logits are compared with those of the model with the gates that `run` answered.

    Args:
        run: What was exported.
        model: In eval.
        images: Normalised [N, C, H, W].
        mode: As in export_onnx; 'branch' gets one image at a time.
        open: As in export_onnx.
        tolerance: Of logits, over the largest one where that is above 1. If None, only numbers are asked for.
        exact_gates: No gate may answer otherwise than the model's.

    Raises:
        ExportError: They differ by more.
    """
    count = len(gated_blocks(model))
    cases: List[Tuple[Optional[float], torch.Tensor]] = [(None, images)]
    if count and mode != 'path':
        cases += [(FORCED, images[:1]), (-FORCED, images[:1])]
    difference, changed = 0., 0
    patterns: Set[Tuple[int, ...]] = set()
    for offset, batches in cases:
        for x in batches.split(1) if mode == 'branch' else [batches]:
            forced = None if offset is None else np.full(count, offset, np.float32)
            logits, answers = run(x.numpy(), forced)
            gates = torch.zeros(len(x), 0) if answers is None else torch.from_numpy(answers.astype(np.float32))
            if open is not None:
                expected = torch.tensor([float(bool(o)) for o in open]).expand(len(x), -1)
            elif offset is not None:
                expected = torch.full_like(gates, float(offset > 0))
            else:
                expected = forward_gates(model, x)[1]
            changed += int((gates != expected).sum())
            patterns.update(map(tuple, gates.int().tolist()))
            error = _relative_error(torch.from_numpy(logits.astype(np.float32)), _forced_logits(model, x, gates))
            if not error <= (np.inf if tolerance is None else tolerance):
                raise ExportError(
                    f'logits differ from those of the model by {error:.2g} of the largest, allowed is {tolerance}.')
            difference = max(difference, error)
    if changed and exact_gates:
        raise ExportError(f'{changed} gates answered otherwise than in the model.')
    return {'images': len(images), 'patterns': len(patterns), 'max_difference': difference, 'gates_changed': changed}


def _forced_logits(model: nn.Module, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    if not gates.shape[1]:
        return model(x)
    with force_gates(model, gates.bool()):
        return model(x)


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
