"""FusedConv: a convolution with batch norm, bias and ReLU in one call, and fold, which builds it."""
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct, DropBlock2d, DropPath
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..compat import mkldnn_ops

__all__ = ['Folded', 'FusedConv', 'fold', 'is_plain']

MAX_SHAPES = 1000  # input shapes that a convolution remembers; cleared when full, for images of ever new sizes


class FusedConv(nn.Module):
    """Convolution with bias and optional ReLU. One oneDNN call on a CPU in float32, else plain PyTorch.

    oneDNN converts the weights in every call unless they have the layout it wants, which depends on the shape of the
    input, batch included. So they are packed once for each shape. Shapes with the same layout share the packed weights:
    mostly all shapes of a convolution do.
    """

    def __init__(self, conv: Any, relu: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach(), False)
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.bias = nn.Parameter(bias, False)
        padding, stride, dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
        self.conv_args: Tuple[Any, ...] = (stride, padding, dilation, conv.groups)
        self.fused_args: Tuple[Any, ...] = (padding, stride, dilation, conv.groups)
        self.relu = relu
        self._packed: Dict[torch.Size, torch.Tensor] = {}  # by input shape
        self._layouts: Dict[bytes, torch.Tensor] = {}  # the same tensors by oneDNN's description of their layout

    def __getstate__(self) -> Dict[str, Any]:
        return {**vars(self), '_packed': {}, '_layouts': {}}  # oneDNN tensors can neither be copied nor pickled

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed, self._layouts = {}, {}
        return super()._apply(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._packed_weight(x)
        if weight is not None:
            act = 'relu' if self.relu else 'none'
            return mkldnn_ops._convolution_pointwise(x, weight, self.bias, *self.fused_args, act, [], '')
        x = F.conv2d(x, self.weight, self.bias, *self.conv_args)
        return x.relu_() if self.relu else x

    def add_relu_(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """relu(conv(x) + shortcut), written into shortcut."""
        if torch.compiler.is_compiling():  # the compiler fuses it
            return torch.relu(self(x) + shortcut)
        weight = self._packed_weight(x)
        if weight is not None:
            return mkldnn_ops._convolution_pointwise_(
                shortcut, x, weight, self.bias, *self.fused_args, 'add', 1., 'relu', [], '')
        return shortcut.add_(self(x)).relu_()

    def _packed_weight(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """Weights in the layout that oneDNN wants for inputs of this shape, None where oneDNN does not serve."""
        if mkldnn_ops is None or torch.compiler.is_compiling():
            return None
        if x.device.type != 'cpu' or x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return None
        if torch.is_autocast_enabled('cpu'):  # casts plain convolutions only
            return None
        weight = self._packed.get(x.shape)
        if weight is None:
            weight = mkldnn_ops._reorder_convolution_weight(self.weight, *self.fused_args, list(x.shape))
            layout = mkldnn_ops._get_mkldnn_serialized_md(weight).numpy().tobytes()
            weight = self._layouts.setdefault(layout, weight)  # atomic, threads may share the model
            if len(self._packed) >= MAX_SHAPES:
                self._packed.clear()
            self._packed[x.shape] = weight
        return weight


def fold(*modules: Optional[nn.Module]) -> List[nn.Module]:
    """Fewer modules that compute the same in eval: batch norms and ReLUs move into the convolution before them."""
    folded: List[Any] = []
    todo: List[Any] = list(reversed(modules))
    while todo:
        module, last = todo.pop(), folded[-1] if folded else None
        if isinstance(module, nn.Sequential) or type(module) is ConvNormAct:
            todo += reversed(module._modules.values())
        elif module is None or isinstance(module, (nn.Identity, DropBlock2d, DropPath)):
            continue
        elif type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d) and is_plain(last, nn.Conv2d):
            folded[-1] = fuse_conv_bn_eval(last, module)  # type: ignore[type-var]
            if type(module) is BatchNormAct2d:
                todo += [module.act, module.drop]
        elif type(module) is nn.ReLU and _is_fusible(last):
            folded[-1] = FusedConv(last, relu=True)
        else:
            folded.append(module)
    return [FusedConv(m, relu=False) if _is_fusible(m) else m for m in folded]


class Folded(nn.Sequential):
    """fold(*modules) as a module, empty if no module is left."""

    def __init__(self, *modules: Optional[nn.Module]) -> None:
        super().__init__(*fold(*modules))


def is_plain(module: Any, layer: Any) -> bool:
    """Whether a module is a layer of this very type that computes with its weight: no adapter, no quantized tensor."""
    return type(module) is layer and type(module.weight) is nn.Parameter


def _is_fusible(module: Any) -> bool:
    return is_plain(module, nn.Conv2d) and module.padding_mode == 'zeros' and not isinstance(module.padding, str)
