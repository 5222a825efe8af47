"""MACs of a model: of each block, of each sample, and a table of them."""
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from timm.models import FeatureHookNet
from torch.utils._python_dispatch import TorchDispatchMode  # documented in PyTorch's notes on extending it
from torch.utils.flop_counter import flop_registry

from .blocks import family_of, gated_blocks
from .config import InputError
from .convert import copy_module, residual_blocks
from .passes import set_pass

__all__ = ['Cost', 'compute_cost', 'own_input_size', 'summary']

ROW = '{:24}  {:28}  {:>9}  {:>8}  {:>15}  {:>6}'  # of a summary


@dataclass(frozen=True)
class Cost:
    """MACs of one forward pass for one sample: convolutions, matrix products and attention.

    Args:
        fixed: What always runs: stem, head, shortcuts, blocks without a gate, gates.
        blocks: Residual branch of each of the L gated blocks.
        gates: The gates, which are part of fixed.
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
        """MACs [B] of samples with gates or rates [B, L]. Differentiable, float64 (float32 on mps).

        Raises:
            InputError: `gates` is not [B, L].
        """
        if gates.ndim != 2 or gates.shape[1] != len(self.blocks):
            raise InputError(f'must be [batch, {len(self.blocks)}], not {list(gates.shape)}.', 'gates')
        dtype = torch.float32 if gates.device.type == 'mps' else torch.float64
        return self.fixed + gates.to(dtype) @ gates.new_tensor(self.blocks, dtype=dtype)

    def share(self, gates: torch.Tensor) -> torch.Tensor:
        """executed(gates) over the MACs of the static parent, [B]: slightly above 1 with all gates open."""
        return self.executed(gates) / self.static


def compute_cost(model: nn.Module, input_size: Optional[Tuple[int, int, int]] = None) -> Cost:
    """Count the MACs of a model. All MACs of a static model are fixed.

    A copy of the model runs on the meta device, without data. Other threads may run models meanwhile.

    Args:
        model: Adaptive or static model that takes a batch of images.
        input_size: Image size (C, H, W). Default: own_input_size(model).

    Raises:
        InputError: An input_size that the model does not take, none for a model without a pretrained_cfg, or a model
            that needs data to run, as an optimized one does.
    """
    return _cost(_count_macs(model, input_size), gated_blocks(model))


def summary(
        model: nn.Module,
        input_size: Optional[Tuple[int, int, int]] = None,
        rates: Optional[Sequence[float]] = None,
) -> str:
    """Table of a model's blocks and their MACs, to print.

    Args:
        model: Adaptive or static model of a supported family.
        input_size: Image size (C, H, W). Default: own_input_size(model).
        rates: Measured execution rates [L] of the L gated blocks, such as Evaluation.block_rates.

    Returns:
        A line per block with its kind, target rate, measured rate, MACs and their share of the total, then the rest of
        the model and the total. With rates, the last line compares the mean image with the static parent.

    Raises:
        InputError: Not L rates, or as in compute_cost.
    """
    gated = gated_blocks(model)
    if rates is not None and len(rates) != len(gated):
        raise InputError(f'must be {len(gated)}, one for each gated block, not {len(rates)}.', 'rates')
    macs = _count_macs(model, input_size)
    cost = _cost(macs, gated)
    measured = {} if rates is None else dict(zip(gated, map(float, rates)))
    blocks = {**residual_blocks(model), **gated}
    rest = cost.total

    def line(name: str, kind: str, target: str, own: int) -> str:
        rate = f'{measured[name]:.3f}' if name in measured else ''
        return ROW.format(name, kind, target, rate, f'{own:,}', f'{own / cost.total:.1%}')

    lines = [ROW.format('block', 'kind', 'target', 'measured', 'MACs', 'share')]
    for name in [name for name, _ in model.named_modules() if name in blocks]:
        own = _branch(macs, name, blocks[name])
        rest -= own
        target = f'{gated[name].target_rate:g}' if name in gated else 'always on'
        lines.append(line(name, type(blocks[name]).__name__.removeprefix('Gated'), target, own))
    lines.append(line('other', 'stem, shortcuts, head, gates', 'always on', rest))
    lines.append(line('total', f'{len(gated)} of {len(blocks)} blocks gated', '', cost.total))
    if rates is not None:
        executed = cost.executed(torch.as_tensor(rates)[None]).item()
        lines.append(f"mean image: {executed:,.0f} MACs, {executed / cost.static:.1%} of the static parent's "
                     f'{cost.static:,}')
    return '\n'.join(lines)


def own_input_size(model: nn.Module) -> Tuple[int, int, int]:
    """Image size (C, H, W) of a model: pretrained_cfg's size with the model's own in_chans.

    Raises:
        InputError: The model has no pretrained_cfg with an input_size, or no convolution.
    """
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    in_chans = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if not cfg.get('input_size') or in_chans is None:
        raise InputError(
            f'must be given as (C, H, W): {type(model).__name__} has no pretrained_cfg with its own.', 'input_size')
    return (in_chans, *resolve_input_data_config(model, {'mean': 0., 'std': 1.})['input_size'][1:])


def _cost(macs: Callable[..., int], gated: Dict[str, Any]) -> Cost:
    blocks = tuple(_branch(macs, name, block) for name, block in gated.items())
    return Cost(fixed=macs() - sum(blocks), blocks=blocks, gates=sum(macs(f'{name}.gate') for name in gated))


def _branch(macs: Callable[..., int], name: str, block: Any) -> int:
    """MACs of the residual branch of a block."""
    shortcut = getattr(family_of(block), 'shortcut_name', 'downsample')
    return macs(name) - macs(f'{name}.gate') - macs(f'{name}.{shortcut}')


class _MacCounter(TorchDispatchMode):
    """MACs of each module of a model, by name.

    FlopCounterMode hooks every module of the process, and so counts what other threads run. A dispatch mode acts in its
    own thread only.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.macs: Counter = Counter()
        self._running: List[str] = []  # '' is the model itself
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), prepend=True)
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, *args: Any) -> None:
        self._running.append(name)

    def _leave(self, *args: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count_flops = flop_registry.get(func.overloadpacket)
        if count_flops is not None:
            macs = count_flops(*args, **(kwargs or {}), out_val=out) // 2
            self.macs.update(dict.fromkeys(self._running, macs))
        return out


def _count_macs(model: nn.Module, input_size: Optional[Tuple[int, int, int]]) -> Callable[..., int]:
    """A function from a module's name to its MACs for one sample; without a name, those of the whole model."""
    size = own_input_size(model) if input_size is None else input_size
    if not isinstance(size, (list, tuple)) or len(size) != 3 or any(length < 1 for length in size):
        raise InputError(f'must be (C, H, W), each above 0, not {size}.', 'input_size')
    meta = {id(t): t.to('meta') for t in (*model.parameters(), *model.buffers())}
    shapes = copy_module(model, meta).eval()  # the model itself may be running in another thread
    if not any(isinstance(module, FeatureHookNet) for module in shapes.modules()):
        for module in shapes.modules():
            module._forward_hooks.clear()  # the user's own
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    counter = _MacCounter(shapes)
    try:
        # inference mode would not split up conv2d
        with torch.inference_mode(False), torch.no_grad(), set_pass(offset=None, record=None), counter:
            shapes(torch.empty(1, *size, device='meta', dtype=dtype))
    except NotImplementedError as e:
        raise InputError(
            f'({type(model).__name__}) does not run on the meta device. Take the original of an optimized one, or of '
            f'a quantized one.',
            'model') from e
    except (AssertionError, RuntimeError) as e:  # other channels, less pixels than a kernel has, not a ViT's img_size
        raise InputError(f'{size} cannot be run by the model: {e}', 'input_size') from e
    return lambda name='': counter.macs[name]
