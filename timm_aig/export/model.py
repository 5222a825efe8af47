"""A model in the form that exporters take: one graph in which a closed sample is a row left out of the batch."""
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import resolve_input_data_config
from timm.utils import unwrap_model
from torch.nn.utils.fusion import fuse_linear_bn_eval
from torch.overrides import TorchFunctionMode

from ..blocks import gated_blocks
from ..compat import batch_norm
from ..config import InputError
from ..convert import plain_copy
from ..inference import InferenceModel, InferenceStage, optimize_for_inference, run_rows
from ..inference.gate import is_plain_gate, open_minus_closed

__all__ = ['MODES', 'ExportModel', 'prepare']

MODES = ('sparse', 'masked', 'path')


class ExportBlock(nn.Module):
    """A gated block or branch in the form that exporters take.

    Modifications:
        * sparse: the residual branch gets the open rows of the batch, see run_rows
        * masked: the residual branch gets the whole batch and is multiplied by the gates
        * path: always open or always closed, without a gate
        * the gate has one output, open minus closed logit
    """

    def __init__(self, block: Any, gate: Any, mode: str, is_open: bool, state: SimpleNamespace) -> None:
        super().__init__()
        self.block = block
        self.mode = mode
        self.is_open = is_open  # in mode 'path'
        self.state = state  # of ExportModel
        has_bn = isinstance(gate.bn, (nn.BatchNorm1d, nn.SyncBatchNorm))
        fc1 = fuse_linear_bn_eval(gate.fc1, gate.bn) if has_bn else gate.fc1
        self.hidden = nn.Sequential(fc1, nn.Identity() if has_bn else gate.bn, nn.ReLU())
        self.weight = nn.Parameter(open_minus_closed(gate)[0])

    def forward(
            self, x: torch.Tensor, attn_mask: Optional[torch.Tensor] = None, is_causal: bool = False) -> torch.Tensor:
        """Block outputs for inputs [B, C, H, W], or [B, N, C] of a branch. No classifier gives its branches a mask."""
        block, state = self.block, self.state
        if self.mode != 'path':
            pooled = state.pooled if state.output is x else None
            pooled = x.mean((2, 3) if x.ndim == 4 else 1) if pooled is None else pooled
            score = F.relu(F.linear(self.hidden(pooled), self.weight, state.thresholds.pop(0))).squeeze(1).float()
            state.scores.append(score)
        if self.mode == 'sparse':
            state.output, state.pooled = run_rows(block, x, score, pooled)
            return state.output
        shortcut = block.shortcut_of(x)
        if not self.is_open:
            return torch.zeros_like(x) if shortcut is None else block.last_act(shortcut)
        y = block.residual(x)
        if self.mode == 'masked':
            y = y * (score > 0).to(y.dtype).view(-1, *[1] * (y.ndim - 1))
        return block.last_act(y if shortcut is None else y + shortcut)


class ExportModel(nn.Module):
    """A model with `x` and `gate_offset` for inputs, `logits` and `gates` for outputs."""
    bias: torch.Tensor
    pattern: torch.Tensor

    def __init__(
            self, model: Any, mode: str, gates: Optional[Sequence[bool]] = None, dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            model, mode, gates: As in export_onnx.
            dtype: Of weights and arithmetic. Inputs and outputs are float32.
        """
        super().__init__()
        optimized: Any = optimize_for_inference(model).model
        # of a pass: thresholds [1] of the gates to come, scores [B] of those before, last output of a block, its pool
        self.state = SimpleNamespace()
        own = [block.gate for block in gated_blocks(model).values()]
        is_open = [True] * len(own) if gates is None else list(gates)
        blocks: Dict[Any, nn.Module] = {
            block: ExportBlock(block, gate, mode, gate_is_open, self.state)
            for block, gate, gate_is_open in zip(gated_blocks(optimized).values(), own, is_open)}
        for parent in list(optimized.modules()):
            for name in {'inplace', 'grad_checkpointing'}.intersection(vars(parent)):
                setattr(parent, name, False)
            for name, child in list(parent.named_children()):
                if child in blocks:
                    setattr(parent, name, blocks[child])
                elif isinstance(child, InferenceStage):
                    setattr(parent, name, nn.Sequential(*(blocks.get(block, block) for block in child)))
                elif isinstance(child, nn.Conv1d):
                    setattr(parent, name, _Conv1d(child))
        self.model = optimized
        self.has_gates = bool(own)
        self.takes_offset = self.has_gates and mode != 'path'
        bias = [open_minus_closed(gate)[1] for gate in own]
        self.register_buffer('bias', torch.cat([torch.zeros(0, device='cpu'), *bias]))
        self.register_buffer('pattern', torch.tensor([float(gate) for gate in is_open], device='cpu'))
        self.dtype = dtype
        self.to(dtype).to(memory_format=torch.contiguous_format)

    def forward(self, x: torch.Tensor, gate_offset: Optional[torch.Tensor] = None) -> Any:
        """
        Args:
            x: Normalised images [B, C, H, W].
            gate_offset: Logit offset of each gate, [L].

        Returns:
            Logits [B, num_classes], and gates [B, L] if the model has gated blocks.
        """
        offset = 0. if gate_offset is None else gate_offset.to(self.dtype)
        # torch 2.9 cannot split an empty tensor
        thresholds = list((self.bias + offset).split(1)) if self.has_gates else []
        vars(self.state).update(thresholds=thresholds, scores=[], output=None)
        with _NormsOfRows():
            logits = self.model(x.to(self.dtype)).float()
        if self.takes_offset:
            return logits, (torch.stack(self.state.scores, 1) > 0).float()
        return (logits, self.pattern.float().expand(x.shape[0], -1)) if self.has_gates else logits


class _Conv1d(nn.Module):
    """A Conv1d, of EcaModule, as a Conv2d, which torch.export can trace with 0 rows."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.weight, self.bias, self.padding = conv.weight, conv.bias, conv.padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, padding=(0, *self.padding)).squeeze(2)


class _NormsOfRows(TorchFunctionMode):
    """Batch norms without PyTorch's question whether the batch is empty, to which torch.export has no answer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and not kwargs['training']:  # in training: of standardized weights
            x, mean, var = args
            return batch_norm(x, mean, var, kwargs['weight'], kwargs['bias'], kwargs['eps'])
        return func(*args, **kwargs)


def prepare(
        path: Union[str, os.PathLike],
        model: nn.Module,
        images: Optional[torch.Tensor],
        mode: str,
        gates: Optional[Sequence[bool]],
) -> Tuple[nn.Module, torch.Tensor, Optional[List[bool]]]:
    """Check what an export function was given.

    Returns:
        A plain copy of the model in eval on the CPU in float32, images [N, C, H, W] to check the export on, and gates.

    Raises:
        InputError: An argument that is not allowed.
    """
    if not Path(path).parent.is_dir():
        raise InputError(f'must be in a folder that exists, not {os.fspath(path)!r}.', 'path')
    if mode not in MODES:
        raise InputError(f'must be one of {", ".join(MODES)}, not {mode!r}.', 'mode')
    if isinstance(model, InferenceModel):
        raise InputError('is optimized for inference, export the one it was made from.', 'model')
    model = unwrap_model(model)
    blocks = gated_blocks(model)
    if not blocks and mode != 'masked':
        raise InputError("has no gated blocks; mode 'masked' exports a static model.", 'model')
    if (gates is not None) != (mode == 'path'):
        raise InputError("is for mode 'path', which needs it.", 'gates')
    if gates is not None:
        values = torch.as_tensor(gates, dtype=torch.float32, device='cpu')  # a list, or a row of forward_gates
        if values.shape != (len(blocks),) or not ((values == 0) | (values == 1)).all():
            raise InputError(
                f'must have a value, 0 or 1, for each of the {len(blocks)} gated blocks, not {gates!r:.80}.', 'gates')
        gates = values.bool().tolist()
    model = plain_copy(model).cpu().float()
    for name, block in gated_blocks(model).items():
        if not is_plain_gate(block.gate):
            raise InputError(f'has a gate at {name} that is more than its layers: merge adapters, remove hooks, and '
                             f'take the model before it is quantized.', 'model')
    if images is None:
        size = resolve_input_data_config(model)['input_size']
        images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0), device='cpu')
    if images.ndim != 4 or not len(images):
        raise InputError(f'must be [N, C, H, W] with N at least 1, not {list(images.shape)}.', 'images')
    images = images.cpu().float().contiguous()
    try:
        with torch.no_grad():
            logits = model(images[:1])
    except (AssertionError, RuntimeError) as e:  # such as other channels
        raise InputError(f'cannot be run by the model: {e}', 'images') from e
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise InputError(f'({type(model).__name__}) must return logits [B, num_classes] and nothing else.', 'model')
    return model, images, gates
