"""Gated residual blocks: run only for the samples whose gate is open. Families of models derive theirs in models/."""
from itertools import groupby
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
import torch.nn as nn

from .config import InputError
from .gate import Gate, gate_pass, is_on_cpu, runs_eagerly

__all__ = [
    'GatedBlock', 'GatedBranch', 'family_of', 'gate_class', 'gated_blocks', 'gated_form_of', 'set_execution',
    'set_gate_offset']

EXECUTIONS = ('auto', 'masked', 'sparse')

Rows = Union[Sequence[int], torch.Tensor]

SLICE_NUMEL = 2 ** 17  # elements per sample from which, on a CPU, gathering costs more than running slices in place


# Gated classes, by the class of a residual block, or for a branch by (class of its block, name in the block, class).
GATED: Dict[Any, Any] = {}


class GatedBlock(nn.Module):
    """Base of the gated blocks: `y = act(shortcut(x) + z(x) * residual(x))` (paper, eq. 2).

    A family derives from it and from its own block, and registers that with `@gated_form_of(Block)`.

    Modifications:
        * takes the submodules of the block it is built from, and so its keys
        * `gate` answers for each sample whether the residual branch runs
        * masked execution computes the branch for every sample and multiplies it by z. It is used for training,
          tracing, scripting, compiling and on the meta device
        * sparse execution computes the branch of open samples only. It is used in eval without grad
    """

    block_cls: Type[nn.Module]  # what it is built from
    shortcut_name = 'downsample'  # child that closed samples run too, if there is one
    act_name: Optional[str] = None  # child that is the activation after the sum, None without
    bottleneck = False  # three convolutions; the paper's schedules depend on it
    stage_cls: Type[nn.Module] = nn.Sequential  # of stages: runs its children in order, and nothing else
    gate_norm = 'bn'  # of the gate's hidden layer, unless the config has another
    adds_in_place = False  # its own sum is `y += shortcut`, which has y's dtype under autocast, not `y + shortcut`
    model_classes: Tuple[Type[nn.Module], ...] = ()  # networks of these blocks that micro-batches make faster on a CPU
    stem: Tuple[Tuple[str, ...], ...] = ()  # children of such a network that follow each other and can be fused

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any: ...  # the block's attributes

    def __init__(self, block: nn.Module, gate: Gate, target_rate: float, relu_input: bool = False) -> None:
        """
        Args:
            block: The block to take over.
            gate: Gate for the block's input.
            target_rate: See AIGConfig.
            relu_input: The activation after the sum does not change the input, since there is none or both end in a
                ReLU: a closed block with an identity shortcut returns its input.
        """
        nn.Module.__init__(self)
        vars(self).update(vars(block), _modules=block._modules.copy())
        self.gate = gate
        self.target_rate = target_rate
        self.relu_input = relu_input
        self.execution = 'auto'

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        """Residual branch: the block's forward up to the shortcut. This is what a closed gate skips."""
        raise NotImplementedError

    def shortcut_of(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the residual branch; x itself for an identity shortcut."""
        return x if self.downsample is None else self.downsample(x)

    def branches(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Residual branch and shortcut. A block whose branches share a norm runs it once, for its statistics."""
        return self.residual(x), self.shortcut_of(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        """Activation after the sum of shortcut and residual."""
        return x

    @staticmethod
    def layers(block: Any) -> Optional[List[Any]]:
        """Layers whose sequence is the residual branch in eval, for optimize_for_inference; None if it is no sequence.

        Such a block has a child or attribute `downsample`, a Module or None, for its shortcut.
        """
        return None

    @staticmethod
    def in_channels(block: Any) -> Optional[int]:
        """Channels of the block's input, None for a block that cannot be gated."""
        return next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels  # of conv1, or inside of it

    @torch.jit.ignore
    def ungated(self) -> nn.Module:
        """The block that this was built from, with the same submodules but no gate."""
        state = {k: v for k, v in vars(self).items() if k not in ('target_rate', 'relu_input', 'execution')}
        state['_modules'] = {k: v for k, v in self._modules.items() if k != 'gate'}
        block = self.block_cls.__new__(self.block_cls)
        nn.Module.__init__(block)
        vars(block).update(state)
        return block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.gate(x)
        if not torch.jit.is_scripting():
            z = gate_pass.note(self, z)
            if self._runs_sparse(x):
                return run_open_rows(self, x, open_rows(z))  # closed samples are skipped here
        y, shortcut = self.branches(x)
        if not torch.jit.is_scripting():
            y = self._as_in_sum(y, shortcut)
            if runs_eagerly(x):
                return self.last_act(_AddMasked.apply(shortcut.to(y.dtype), y, z.to(y.dtype)))
        y = y * z.to(y.dtype).view(-1, 1, 1, 1)
        y += shortcut
        return self.last_act(y)

    def _runs_sparse(self, x: torch.Tensor) -> bool:
        if self.training or self.execution == 'masked' or not runs_eagerly(x) or x.is_meta:
            return False
        return self.execution == 'sparse' or not torch.is_grad_enabled()

    def add_residual(self, x: torch.Tensor, shortcut: torch.Tensor, overwrite: bool) -> torch.Tensor:
        """act(residual(x) + shortcut). `overwrite`: the result may be written into shortcut."""
        y = self._as_in_sum(self.residual(x), shortcut)
        y += shortcut
        return self.last_act(y)

    @torch.jit.ignore
    def _as_in_sum(self, y: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        return y if self.adds_in_place else y.to(torch.promote_types(y.dtype, shortcut.dtype))


class GatedBranch(GatedBlock):
    """Base of a gated residual branch, a module to whose output its caller adds the shortcut: `y = z(x) * residual(x)`.

    The attention and the MLP of a transformer block are such branches, with tokens [B, N, C] for input and output.
    """

    gate_norm = 'ln'

    def residual(
            self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False) -> torch.Tensor:
        raise NotImplementedError

    def shortcut_of(self, x: torch.Tensor) -> Any:
        return None  # its caller has it

    @staticmethod
    def in_channels(block: Any) -> Optional[int]:
        return next(m for m in block.modules() if isinstance(m, nn.Linear)).in_features

    def forward(
            self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False) -> torch.Tensor:
        z = self.gate(x.transpose(1, 2).unsqueeze(-1))  # the gate pools [B, C, N, 1]
        if not torch.jit.is_scripting():
            z = gate_pass.note(self, z)
            if attn_mask is None and self._runs_sparse(x):  # a mask may be one for each sample
                return self._run_open_rows(x, z, is_causal)
        y = self.residual(x, attn_mask, is_causal)
        return y * z.to(y.dtype).view(-1, 1, 1)

    @torch.jit.ignore
    def _run_open_rows(self, x: torch.Tensor, z: torch.Tensor, is_causal: bool) -> torch.Tensor:
        rows = open_rows(z)
        if len(rows) == len(x):
            return self.residual(x, None, is_causal)
        y = torch.zeros_like(x)
        if not len(rows):
            return y
        index = torch.as_tensor(rows, device=x.device)
        out = self.residual(x.index_select(0, index), None, is_causal)  # closed samples are skipped here
        return y.to(out.dtype).index_copy(0, index, out)


def gated_form_of(block_cls: type, holder: Optional[type] = None, name: str = '') -> Callable[[Any], Any]:
    """Class decorator: a GatedBlock for the blocks of a class, or a GatedBranch for a child of the blocks `holder`."""
    def register(cls: Any) -> Any:
        cls.block_cls = block_cls
        GATED[block_cls if holder is None else (holder, name, block_cls)] = cls
        return cls

    return register


def family_of(block: nn.Module) -> Any:
    """The gated class of a residual block, gated or not; None for a branch without a gate."""
    return GATED.get(type(block), type(block) if isinstance(block, GatedBlock) else None)


def gate_class(parent: nn.Module, name: str) -> Any:
    """The gated class for a child of a module, None if it is no residual block or branch that can be gated."""
    child = parent._modules[name]
    cls = GATED.get(type(child)) or GATED.get((type(parent), name, type(child)))
    return cls if cls is None or cls.in_channels(child) is not None else None


class _AddMasked(torch.autograd.Function):
    """shortcut + z * y for shortcut and y [B, C, H, W] and z [B]. Has half the memory traffic of two operations."""

    @staticmethod
    def forward(shortcut: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(shortcut, y, z.view(-1, 1, 1, 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        _, y, z = inputs
        ctx.save_for_backward(y, z)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        y, z = ctx.saved_tensors
        channels_last = y.is_contiguous(memory_format=torch.channels_last)
        # flatten in the memory format of y, where it is a view
        rows, grad_rows = ((t.permute(0, 2, 3, 1) if channels_last else t).flatten(1) for t in (y, grad))
        return grad, grad * z.view(-1, 1, 1, 1), torch.linalg.vecdot(grad_rows, rows)


def open_rows(z: torch.Tensor) -> Rows:
    """Indices of the open samples in answers z [B]: a list on a CPU, a tensor on an accelerator.

    On an accelerator, nonzero is the one point at which a block waits for the device.
    """
    if is_on_cpu(z):
        return [row for row, answer in enumerate(z.tolist()) if answer]
    return z.nonzero().flatten()


def run_open_rows(block: Any, x: torch.Tensor, rows: Rows, owned: bool = False) -> torch.Tensor:
    """Sparse execution of a block: the residual branch of the open samples, and no other.

    Args:
        block: Has `shortcut_of(x)`, `relu_input`, `last_act(y)` and `add_residual(x, shortcut, overwrite)`.
        x: Block inputs [B, C, H, W].
        rows: Indices of the open samples, ascending, as open_rows returns them.
        owned: Nothing else holds x, so the output may overwrite it.

    Returns:
        Block outputs [B, C', H', W'] in the memory format of x, or x itself if no sample changes.
    """
    shortcut = block.shortcut_of(x)
    owned = owned or shortcut is not x
    if len(x) == len(rows) > 0:
        return block.add_residual(x, shortcut, owned)
    unchanged = shortcut is x and block.relu_input  # a closed block returns its input
    if unchanged and not len(rows):
        return x
    y = shortcut if owned else shortcut.clone()
    if not len(rows):
        return block.last_act(y)
    if is_on_cpu(x) and x[0].numel() >= SLICE_NUMEL and not torch.is_grad_enabled():
        return _run_slices(block, x, y, rows, unchanged)
    index = torch.as_tensor(rows, device=x.device)
    out = block.add_residual(_take_rows(x, index), _take_rows(shortcut, index), True)
    return _put_rows(y if unchanged else block.last_act(y), index, out.to(y.dtype))


def _run_slices(block: Any, x: torch.Tensor, y: torch.Tensor, rows: Any, unchanged: bool) -> torch.Tensor:
    """run_open_rows without gathering: each run of neighbouring open samples is a slice of x and writes into y."""
    stop = 0
    for is_open, neighbours in groupby(range(len(x)), set(rows).__contains__):
        count = len(list(neighbours))
        start, stop = stop, stop + count
        if is_open or not unchanged:
            part = y[start:stop]
            out = block.add_residual(x[start:stop], part, True) if is_open else block.last_act(part)
            if out is not part:
                part.copy_(out)
    return y


def _take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index] in the memory format of x. index_select alone would return contiguous rows."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return x.index_select(0, index)


def _put_rows(y: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Replace the rows of y at index, in place where autograd allows it."""
    if y.requires_grad or rows.requires_grad:
        return y.index_copy(0, index, rows)
    if y.is_contiguous(memory_format=torch.channels_last):
        y.permute(0, 2, 3, 1).index_copy_(0, index, rows.permute(0, 2, 3, 1))
        return y
    return y.index_copy_(0, index, rows)


def gated_blocks(model: nn.Module) -> Dict[str, Any]:
    """Gated blocks of a model in order, by module name ('layer2.1'). A static model has none."""
    return {
        name: m for name, m in model.named_modules()
        # the gate may be any module around a Gate; a wrapper that only forwards a block's attributes is no block
        if m._modules.get('gate') is not None and hasattr(type(m), 'add_residual')}


def require_gated_blocks(model: nn.Module) -> Dict[str, Any]:
    """gated_blocks, but an InputError for a static model."""
    blocks = gated_blocks(model)
    if not blocks:
        raise InputError(
            f'({type(model).__name__}) has no gated blocks, convert it with timm_aig.gate_ first.', 'model')
    return blocks


def set_execution(model: nn.Module, mode: str) -> None:
    """Choose how the gated blocks of a model run in eval. Training, tracing and compiling are always masked.

    Args:
        model: Adaptive model.
        mode: 'auto' runs sparse without grad and masked with grad, 'sparse' and 'masked' always run that way. Batch
            norms that are back in training mode, so with statistics of the batch, need 'masked'.

    Raises:
        InputError: An unknown mode, a static model, or an optimized model, which is always sparse.
    """
    if mode not in EXECUTIONS:
        raise InputError(f'must be one of {", ".join(EXECUTIONS)}, not {mode!r}.', 'mode')
    blocks = require_gated_blocks(model)
    if not all(isinstance(block, GatedBlock) for block in blocks.values()):
        raise InputError('is optimized for inference and always sparse, set the execution of the original.', 'model')
    for block in blocks.values():
        block.execution = mode


def set_gate_offset(model: nn.Module, offset: float) -> None:
    """Set the logit that the gates add to the open one in eval: above 0 more gates open, below 0 fewer.

    The offset is part of the state dict. Infinite ones become -1e4 and 1e4, which close and open all gates.

    Raises:
        InputError: The offset is nan or the model is static.
    """
    offset = float(offset)
    if offset != offset:
        raise InputError('must be a number, not nan.', 'offset')
    for block in require_gated_blocks(model).values():
        block.gate.set_offset(offset)
