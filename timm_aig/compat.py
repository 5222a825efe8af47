"""Names of other packages that are private or undocumented and have no public counterpart.

Each entry says what needs it and what happens in a version that lacks it: the slower public way, never a crash.
"""
from typing import Any

import torch
import torch.nn as nn

# ---- torch

# A convolution with bias, ReLU and sum in one oneDNN call, as torch.compile emits it, for models optimized for
# inference on a CPU. None: these models run plain convolutions.
mkldnn_ops: Any = torch.ops.mkldnn
if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in (
        '_convolution_pointwise', '_convolution_pointwise_', '_reorder_convolution_weight',
        '_get_mkldnn_serialized_md')):
    mkldnn_ops = None


def has_forward_hooks(module: nn.Module) -> bool:
    """True if a module has forward hooks, which an optimized model would lose. Without the names: False."""
    return any(getattr(module, name, None) for name in ('_forward_hooks', '_forward_pre_hooks'))
