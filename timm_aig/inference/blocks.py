"""InferenceBlock and InferenceStage: residual blocks that compute the open samples only, in place where possible."""
from typing import Any, Optional, Tuple

import torch
import torch.nn as nn

from ..blocks import Rows, family_of, open_rows, run_open_rows
from ..gate import gate_pass
from .fused import Folded, FusedConv, fold
from .gate import InferenceGate, can_fold, pool

__all__ = ['InferenceBlock', 'InferenceStage', 'run_rows']


class InferenceBlock(nn.Module):
    """A residual block, gated or not, of a family that gives its layers, for eval.

    Modifications:
        * batch norms and ReLUs are folded into convolutions
        * the last convolution adds the shortcut and applies the last ReLU
        * only the samples whose gate is open run the residual branch
        * a layer or gate that cannot be folded, as one with an adapter or quantized weights, is kept
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        family = family_of(block)
        self.last_act: nn.Module = getattr(block, family.act_name)
        steps = fold(*family.layers(block))
        fused = type(self.last_act) is nn.ReLU and isinstance(steps[-1], FusedConv)
        self.last_conv: Any = steps.pop() if fused else None
        self.branch = nn.Sequential(*steps)
        downsample = Folded(block.downsample)
        self.downsample = downsample if len(downsample) else None  # nothing is left of an identity
        self.relu_input = getattr(block, 'relu_input', False)
        gate: Any = getattr(block, 'gate', None)
        self.gate: Any = InferenceGate(gate) if can_fold(gate) else gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return run_rows(self, x, self.answers(x, None)[0])[0]
        return run_open_rows(self, x, self.open_rows(x, None)[0])

    def answers(self, x: torch.Tensor, pooled: Any) -> Tuple[Optional[torch.Tensor], Any]:
        """Answers z [B] of the gate, None without one, and the mean [B, C] of x over its pixels if it is known."""
        if not isinstance(self.gate, InferenceGate):
            return None if self.gate is None else gate_pass.note(self, self.gate(x)), pooled
        pooled = x.mean((2, 3)) if pooled is None else pooled
        return self.gate.answers(self, pooled, 1.), pooled

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.branch(x)
        return x if self.last_conv is None else self.last_conv(x)

    def open_rows(self, x: torch.Tensor, pooled: Any) -> Tuple[Rows, Any]:
        """Indices of the samples that run, and pool(x) if it is known: given, or computed for the gate."""
        if self.gate is None:
            return range(len(x)), pooled
        if not isinstance(self.gate, InferenceGate):
            return open_rows(gate_pass.note(self, self.gate(x))), pooled
        pooled = pool(x) if pooled is None else pooled
        return self.gate.open_rows(self, *pooled), pooled

    def shortcut_of(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.downsample is None else self.downsample(x)

    def add_residual(self, x: torch.Tensor, shortcut: torch.Tensor, overwrite: bool) -> torch.Tensor:
        """act(residual(x) + shortcut), see run_open_rows."""
        x = self.branch(x)
        if self.last_conv is not None:
            return self.last_conv.add_relu_(x, shortcut if overwrite else shortcut.clone())
        return self.last_act(x.add_(shortcut) if x.dtype == shortcut.dtype else x + shortcut)  # under autocast


class InferenceStage(nn.Sequential):
    """InferenceBlocks in a row. Later blocks write into the first one's output; an unchanged input is pooled once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        owned = False
        pooled: Any = None
        block: Any
        if torch.compiler.is_compiling():
            for block in self:
                x, pooled = run_rows(block, x, *block.answers(x, pooled))
            return x
        for block in self:
            rows, pooled = block.open_rows(x, pooled)
            y = run_open_rows(block, x, rows, owned)
            if len(rows) or block.downsample is not None or not block.relu_input:
                pooled = None
            owned = owned or y is not x
            x = y
        return x


def run_rows(block: Any, x: torch.Tensor, z: Optional[torch.Tensor], pooled: Any = None) -> Tuple[torch.Tensor, Any]:
    """run_open_rows in a form that torch.export and torch.compile trace: take rows, compute, put them back.

    It does not branch on values: the residual branch gets any number of rows, also none.

    Args:
        block: As in run_open_rows, or a GatedBranch.
        x: Block inputs [B, C, H, W], or [B, N, C] of a branch.
        z: Not 0 for each sample that runs the residual branch, [B]; None for all, not for a GatedBranch.
        pooled: Mean [B, C] of x over its pixels, None if it is not known.

    Returns:
        Outputs, and their mean if it is known.
    """
    shortcut = block.shortcut_of(x)
    if z is None:
        return block.last_act(block.residual(x) + shortcut), None
    index = z.nonzero().view(-1)
    rows = x.index_select(0, index)
    if shortcut is None:
        return torch.zeros_like(x).index_copy(0, index, block.residual(rows)), None
    if shortcut is x and block.relu_input:  # closed samples, and their pool, stay as they are
        rows = block.last_act(block.residual(rows) + rows)
        if pooled is not None:
            pooled = pooled.index_copy(0, index, rows.mean((2, 3)))
        return x.index_copy(0, index, rows), pooled
    rows = block.residual(rows) + shortcut.index_select(0, index)
    return block.last_act(shortcut.index_copy(0, index, rows)), None
