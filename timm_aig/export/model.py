"""A model in the form that exporters take: one graph in which a closed sample is a row left out of the batch."""
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import resolve_input_data_config
from timm.models.resnet import ResNet
from timm.utils import unwrap_model

from ..blocks import GATED, gated_blocks
from ..config import InputError
from ..convert import plain_copy
from ..inference import InferenceBlock, InferenceModel, optimize_for_inference
from ..inference.gate import can_fold

__all__ = ['MODES', 'ExportModel', 'prepare']

MODES = ('sparse', 'masked', 'path')


class ExportBlock(nn.Module):
    """A residual block in the form that exporters take.

    Modifications of InferenceBlock:
        * sparse: the residual branch gets the open rows of the batch, see InferenceBlock.run_rows
        * masked: the residual branch gets the whole batch and is multiplied by the gates
        * path: always open or always closed, without a gate
    """

    def __init__(self, block: Any, mode: str, is_open: bool) -> None:
        super().__init__()
        self.block = block
        self.mode = mode
        self.gate = None if mode == 'path' else block.gate
        self.is_open = is_open  # for a block without a gate

    def forward(self, x: torch.Tensor, pooled: Any, threshold: Any) -> Tuple[torch.Tensor, Any, Any]:
        """
        Args:
            x: Block inputs [B, C, H, W].
            pooled: Their global average pool [B, C], or None if it is not known.
            threshold: Bias of the gate's score plus gate offset, [1].

        Returns:
            Outputs, their pool or None, and the gate's scores [B], above 0 for open samples, or None without a gate.
        """
        block = self.block
        if self.gate is None:
            return block.run_rows(x, None)[0] if self.is_open else block.last_act(block.shortcut_of(x)), None, None
        pooled = x.mean((2, 3)) if pooled is None else pooled
        hidden = F.relu(F.linear(pooled, self.gate.weight1, self.gate.bias1))
        score = F.relu(F.linear(hidden, self.gate.weight2, threshold)).squeeze(1).float()
        if self.mode == 'masked':
            z = (score > 0).to(x.dtype).view(-1, 1, 1, 1)
            return block.last_act(block.residual(x) * z + block.shortcut_of(x)), None, score
        return (*block.run_rows(x, score, pooled), score)


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
        for parent in list(optimized.modules()):
            if hasattr(parent, 'inplace'):
                parent.inplace = False
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv1d):
                    setattr(parent, name, _Conv1d(child))
                elif type(child) is nn.BatchNorm2d:  # behind a convolution with an adapter
                    setattr(parent, name, _Affine(child))
        blocks: List[Any] = [m for m in optimized.modules() if isinstance(m, InferenceBlock)]
        gated = [block for block in blocks if block.gate is not None]
        is_open = dict(zip(gated, gates or ()))
        self.blocks = nn.ModuleList(ExportBlock(block, mode, bool(is_open.get(block, True))) for block in blocks)
        self.model = optimized
        self.has_gates = bool(gated)
        self.takes_offset = self.has_gates and mode != 'path'
        self.register_buffer('bias', torch.cat([torch.zeros(0, device='cpu'), *(block.gate.bias2 for block in gated)]))
        self.register_buffer('pattern', torch.tensor([float(bool(gate)) for gate in gates or ()], device='cpu'))
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
        model = self.model
        y = model.maxpool(model.act1(model.bn1(model.conv1(x.to(self.dtype)))))
        offset = 0. if gate_offset is None else gate_offset.to(self.dtype)
        thresholds = iter(torch.split(self.bias + offset, 1))
        pooled, scores = None, []
        for block in self.blocks:
            y, pooled, score = block(y, pooled, None if block.gate is None else next(thresholds))
            if score is not None:
                scores.append(score)
        logits = model.forward_head(y).float()
        if scores:
            return logits, (torch.stack(scores, 1) > 0).float()
        return (logits, self.pattern.float().expand(x.shape[0], -1)) if self.has_gates else logits


class _Conv1d(nn.Module):
    """A Conv1d, of EcaModule, as a Conv2d, which torch.export can trace with 0 rows."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.weight, self.bias, self.padding = conv.weight, conv.bias, conv.padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x[:, :, None], self.weight[:, :, None], self.bias, padding=(0, *self.padding)).squeeze(2)


class _Affine(nn.Module):
    """A BatchNorm2d in eval that torch.export can trace with 0 rows."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
        self.scale = nn.Parameter(scale[:, None, None])
        self.shift = nn.Parameter((norm.bias.detach() - norm.running_mean * scale)[:, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


def prepare(
        model: nn.Module, images: Optional[torch.Tensor], mode: str, gates: Optional[Sequence[bool]],
) -> Tuple[nn.Module, torch.Tensor, Optional[List[bool]]]:
    """Check what an export function was given.

    Returns:
        A plain copy of the model in eval on the CPU in float32, images [N, C, H, W] to check the export on, and gates.

    Raises:
        InputError: An argument that is not allowed.
    """
    if mode not in MODES:
        raise InputError(f'must be one of {", ".join(MODES)}, not {mode!r}.', 'mode')
    if isinstance(model, InferenceModel):
        raise InputError('is optimized for inference, export the one it was made from.', 'model')
    model = unwrap_model(model)
    if not isinstance(model, ResNet):
        raise InputError(f'must be a timm ResNet, adaptive or static, not {type(model).__name__}.', 'model')
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
    for name, block in model.named_modules():
        if name.startswith('layer') and name.count('.') == 1 and type(block) not in (*GATED, *GATED.values()):
            raise InputError(f'has a {type(block).__name__} at {name}, which is not a block of timm.', 'model')
        if type(block) in GATED.values() and not can_fold(block.gate):
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
            model(images[:1])
    except RuntimeError as e:  # such as other channels
        raise InputError(f'cannot be run by the model: {e}', 'images') from e
    return model, images, gates
