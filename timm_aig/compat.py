"""Names of other packages that are private or undocumented and have no public counterpart.

Each entry says what needs it and what happens in a version that lacks it: the slower public way, never a crash.
`nn.Module._modules` is used where it is needed: torch's own containers rely on it.
"""
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict

import torch
import torch.nn as nn
from torch.autograd import forward_ad

# ---- torch

# A convolution with bias, ReLU and sum in one oneDNN call, as torch.compile emits it, for models optimized for
# inference on a CPU. None: these models run plain convolutions.
mkldnn_ops: Any = torch.ops.mkldnn
if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in (
        '_convolution_pointwise', '_convolution_pointwise_', '_reorder_convolution_weight',
        '_get_mkldnn_serialized_md')):
    mkldnn_ops = None


def one_graph(x: torch.Tensor) -> Any:
    """Context of optimize_for_inference(compile=True) for a call with x [B, ...]: torch.compile makes one graph for any
    B, although the number of open rows depends on values. Without the names: a graph for each block and batch size."""
    dynamo = torch._dynamo
    if not hasattr(dynamo, 'maybe_mark_dynamic') or not hasattr(dynamo.config, 'capture_dynamic_output_shape_ops'):
        return nullcontext()
    dynamo.maybe_mark_dynamic(x, 0)
    return dynamo.config.patch(capture_dynamic_output_shape_ops=True)


def batch_norm(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, weight: Any, bias: Any, eps: float) -> Any:
    """F.batch_norm in eval, but for its question whether the batch is empty, to which exporters have no answer.

    Without the name: two operations, which few runtimes fold into the convolution before."""
    if hasattr(torch, 'native_batch_norm'):
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0., eps)[0]
    scale = weight * (var + eps).rsqrt()
    return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]


def in_transform() -> bool:
    """True inside the transforms of torch.func and forward-mode AD, for which a custom autograd.Function has no rule.

    Without the names: False, and they end in torch's error about that.
    """
    level = getattr(getattr(torch._C, '_functorch', None), 'maybe_current_level', lambda: None)()
    return level is not None or getattr(forward_ad, '_current_level', -1) >= 0


def has_forward_hooks(module: nn.Module) -> bool:
    """True if a module has forward hooks, or a forward of its own as accelerate gives it, which an optimized model
    would lose. Without the names: False."""
    return 'forward' in vars(module) or any(
        getattr(module, name, None) for name in ('_forward_hooks', '_forward_pre_hooks'))


# ---- timm

try:
    # The blocks of EfficientNets and MobileNets. Without them: these networks have no adaptive counterparts.
    from timm.models import _efficientnet_blocks as efficientnet_blocks
except ImportError:
    efficientnet_blocks = None


try:
    # Converts weights in the format of RegNet's authors. Without it: these do not load, timm's do.
    from timm.models.regnet import _filter_fn as _convert_regnet
except ImportError:
    _convert_regnet = dict


def regnet_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Any]:
    """filter_fn of RegNets."""
    return _convert_regnet(state_dict)


def model_args(model: nn.Module) -> Dict[str, Any]:
    """Keyword arguments that timm.create_model recorded for exports. Without the record: none."""
    return dict(getattr(model, '_model_args', {}))


def set_model_args(model: nn.Module, args: Dict[str, Any]) -> None:
    """Replace that record, so that an export of a gated model names its gates. Without it: nothing reads this."""
    vars(model)['_model_args'] = args


# ---- transformers


def loaded_by_transformers(tensor: torch.Tensor) -> bool:
    """Whether a tensor has the mark of one that from_pretrained read from a file, for gates that a file lacks.

    Without the mark: False, and a gate whose biases are not 0 stays as it is.
    """
    return getattr(tensor, '_is_hf_initialized', False)


# ---- huggingface_hub


def hub_client_factory() -> Callable[[], Any]:
    """The function that makes huggingface_hub's HTTP clients: hub_timeout limits its clients, then restores it.

    Without the private name: plain clients, which ignore a factory set by huggingface_hub.set_client_factory.
    """
    from huggingface_hub import get_session, utils
    plain = partial(type(get_session()), follow_redirects=True, timeout=None)
    return getattr(getattr(utils, '_http', None), '_GLOBAL_CLIENT_FACTORY', plain)
