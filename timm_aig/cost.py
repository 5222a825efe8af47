"""MACs: of each block, of each sample, and a table of them."""
import copy
from dataclasses import dataclass
from typing import Any, Callable, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck
from torch.utils.flop_counter import FlopCounterMode

from .blocks import gated_blocks

__all__ = ['Cost', 'compute_cost', 'summary']


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

    @property
    def static(self) -> int:
        """MACs of the static parent, which has no gates."""
        return self.total - self.gates

    def executed(self, gates: torch.Tensor) -> torch.Tensor:
        """MACs [B] of samples with gates [B, L], differentiable, float64 (float32 on mps, which has no other)."""
        if gates.ndim != 2 or gates.shape[1] != len(self.blocks):
            raise ValueError(f'gates must be [batch, {len(self.blocks)}], not {list(gates.shape)}.')
        dtype = torch.float32 if gates.device.type == 'mps' else torch.float64
        return self.fixed + gates.to(dtype) @ gates.new_tensor(self.blocks, dtype=dtype)

    def share(self, gates: torch.Tensor) -> torch.Tensor:
        """The same over the MACs of the static parent: with all gates open slightly above 1, by the gates' own."""
        return self.executed(gates) / self.static


def compute_cost(model: nn.Module, input_size: Tuple[int, int, int]) -> Cost:
    """Count the MACs of a model, adaptive or static (then all of them are fixed).

    Nothing is computed: the model runs on the meta device, on tensors without data.

    Args:
        model: Model that takes one image batch.
        input_size: Of one image (C, H, W).

    Raises:
        ValueError: input_size is not three numbers above 0, or the model needs data to run, as an optimized one does.
    """
    return _cost(_count_macs(model, input_size), list(gated_blocks(model)))


def summary(
        model: nn.Module,
        input_size: Optional[Tuple[int, int, int]] = None,
        rates: Union[torch.Tensor, Sequence[float], None] = None,
) -> str:
    """A table to print: the residual branch of each block, what else there is, and the totals.

    Args:
        model: A model with timm ResNet blocks, adaptive or static.
        input_size: Of one image (C, H, W), by default that of the model's pretrained_cfg.
        rates: What was measured of the L gated blocks: rates [L] in [0, 1], or gates [N, L] of N images.

    Returns:
        Lines of block, kind, target rate, measured rate, MACs and their share of all. With rates, the last line has
        the MACs of the mean image over those of the static parent.

    Raises:
        ValueError: rates do not fit the model, input_size is missing or not three numbers above 0, or the model needs
            data to run, as an optimized one does.
    """
    gated = gated_blocks(model)
    if rates is not None:
        rates = torch.as_tensor(rates, dtype=torch.float64).cpu()
        rates = rates.mean(0) if rates.ndim == 2 else rates
        if tuple(rates.shape) != (len(gated),) or not ((rates >= 0) & (rates <= 1)).all():
            raise ValueError(
                f'rates must be {len(gated)} numbers in [0, 1] or gates [N, {len(gated)}] with N above 0, '
                f'not {list(rates.shape)} from {rates.min() if rates.numel() else None} to '
                f'{rates.max() if rates.numel() else None}.')
    macs = _count_macs(model, input_size or own_input_size(model))
    cost = _cost(macs, list(gated))
    blocks = {name: m for name, m in model.named_modules() if name in gated or isinstance(m, (BasicBlock, Bottleneck))}
    rest = cost.total
    rows = [('block', 'kind', 'gate', 'target', 'measured', 'MACs', 'share')]
    for name, block in blocks.items():
        own = _branch(macs, name)
        rest -= own
        target = measured_rate = ''
        if name in gated:
            target = f'{block.target_rate:g}' if hasattr(block, 'target_rate') else ''
            if rates is not None:
                measured_rate = f'{rates[list(gated).index(name)]:.3f}'
        rows.append((name, type(block).__name__.removeprefix('Gated'), 'gated' if name in gated else 'always on',
                     target, measured_rate, f'{own:,}', f'{own / cost.total:.1%}'))
    rows.append(('other', 'stem, shortcuts, head, gates', 'always on', '', '', f'{rest:,}', f'{rest / cost.total:.1%}'))
    rows.append(('total', f'{len(gated)} of {len(blocks)} blocks gated', '', '',
                 '' if rates is None or not len(rates) else f'{rates.mean():.3f}', f'{cost.total:,}', '100.0%'))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ['  '.join(cell.ljust(width) if i < 3 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
    rule = ['-' * sum(widths, 2 * (len(widths) - 1))]
    lines = [lines[0], *rule, *lines[1:-1], *rule, lines[-1]]
    if rates is not None:
        lines.append(f'mean image: {cost.executed(rates[None]).item():,.0f} MACs, '
                     f"{cost.share(rates[None]).item():.1%} of the static parent's {cost.static:,}")
    return '\n'.join(lines)


def _branch(macs: Callable[..., int], name: str) -> int:
    """MACs of the residual branch of a block."""
    return macs(name) - macs(f'{name}.gate') - macs(f'{name}.downsample')


def _cost(macs: Callable[..., int], gated: Sequence[str]) -> Cost:
    blocks = tuple(_branch(macs, name) for name in gated)
    return Cost(fixed=macs() - sum(blocks), blocks=blocks, gates=sum(macs(f'{name}.gate') for name in gated))


def own_input_size(model: nn.Module) -> Tuple[int, int, int]:
    """Of the pretrained_cfg, with the channels of the first convolution: timm leaves those of the weights there."""
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if not cfg.get('input_size') or channels is None:
        raise ValueError(f'input_size: {type(model).__name__} does not say its own, give (C, H, W).')
    return (channels, *cfg['input_size'][1:])


def _count_macs(model: nn.Module, input_size: Tuple[int, int, int]) -> Callable[..., int]:
    """Function of a module's name that gives its MACs for one sample, of the model without one."""
    if len(input_size) != 3 or any(size < 1 for size in input_size):
        raise ValueError(f'input_size must be (C, H, W), each above 0, not {tuple(input_size)}.')
    meta = {id(t): t.to('meta') for t in (*model.parameters(), *model.buffers())}
    shapes = copy.deepcopy(model, meta).eval()  # the model itself may be running in another thread
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    x = torch.empty(1, *input_size, device='meta', dtype=dtype)
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            shapes(x)
    except NotImplementedError as e:
        raise ValueError(
            f'model ({type(model).__name__}) does not run on the meta device. Take the original of an optimized one.'
        ) from e
    counts = counter.get_flop_counts()

    def macs(name: str = '') -> int:
        return sum(counts.get(f'{type(model).__name__}.{name}' if name else 'Global', {}).values()) // 2

    return macs
