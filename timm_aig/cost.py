"""MACs: of each block, of each sample."""
from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .blocks import gated_blocks

__all__ = ['Cost', 'compute_cost']


@dataclass(frozen=True)
class Cost:
    """MACs of one forward pass for one sample, convolutions and matrix products.

    Args:
        fixed: What always runs: stem, head, shortcuts, blocks without a gate, gates.
        blocks: Residual branch of each of the L gated blocks.
        gates: The gates themselves, counted in fixed.
    """
    fixed: int
    blocks: Tuple[int, ...]
    gates: int

    @property
    def total(self) -> int:
        """MACs with all gates open."""
        return self.fixed + sum(self.blocks)

    def executed(self, gates: torch.Tensor) -> torch.Tensor:
        """MACs [B] of samples with gates [B, L], differentiable, float64."""
        if gates.ndim != 2 or gates.shape[1] != len(self.blocks):
            raise ValueError(f'gates must be [batch, {len(self.blocks)}], not {list(gates.shape)}.')
        return self.fixed + gates.double() @ gates.new_tensor(self.blocks, dtype=torch.float64)


def compute_cost(model: nn.Module, input_size: Tuple[int, int, int]) -> Cost:
    """Count the MACs of a model, adaptive or static (then all of them are fixed).

    Nothing is computed: the model runs on the meta device, on tensors without data.

    Args:
        model: Model that takes one image batch.
        input_size: Of one image (C, H, W).

    Raises:
        ValueError: input_size is not three numbers above 0.
    """
    if len(input_size) != 3 or any(size < 1 for size in input_size):
        raise ValueError(f'input_size must be (C, H, W), each above 0, not {tuple(input_size)}.')
    tensors = {k: v.to('meta') for k, v in [*model.named_parameters(), *model.named_buffers()]}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.empty(1, *input_size, device='meta', dtype=dtype)
    modes = [(module, module.training) for module in model.modules()]
    counter = FlopCounterMode(display=False)
    model.eval()
    try:
        with torch.no_grad(), counter:
            torch.func.functional_call(model, tensors, x)
    finally:
        for module, training in modes:
            module.training = training
    counts = counter.get_flop_counts()

    def macs(name: str) -> int:
        return sum(counts.get(f'{type(model).__name__}.{name}' if name else 'Global', {}).values()) // 2

    names = list(gated_blocks(model))
    gates = [macs(f'{name}.gate') for name in names]
    blocks = [macs(name) - gate - macs(f'{name}.downsample') for name, gate in zip(names, gates)]
    return Cost(fixed=macs('') - sum(blocks), blocks=tuple(blocks), gates=sum(gates))
