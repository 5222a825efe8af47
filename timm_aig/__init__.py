"""timm_aig: adaptive inference graphs for timm's ResNets. Importing it registers every <arch>_aig with timm."""
from typing import Any

from . import resnet_aig  # noqa: F401, registers the entry points
from .blocks import (
    GatedBasicBlock,
    GatedBottleneck,
    force_gates,
    forward_gates,
    gated_blocks,
    set_execution,
    set_gate_offset,
)
from .budget import BudgetPoint, budget_table, set_budget
from .config import AIGConfig
from .convert import gate_, ungate_
from .cost import Cost, compute_cost, summary
from .gate import Gate
from .inference import optimize_for_inference
from .loss import ComputeTargetLoss, TargetRateLoss
from .version import __version__ as __version__

__all__ = [
    'AIGConfig', 'AIGTask', 'BudgetPoint', 'ComputeTargetLoss', 'Cost', 'Gate', 'GatedBasicBlock', 'GatedBottleneck',
    'TargetRateLoss', 'budget_table', 'calibrate_budget', 'compute_cost', 'export_aoti', 'export_onnx',
    'export_openvino', 'export_program', 'force_gates', 'forward_gates', 'gate_', 'gated_blocks', 'load_onnx',
    'optimize_for_inference', 'optimize_onnx', 'push_to_hub', 'save_pretrained', 'set_budget', 'set_execution',
    'set_gate_offset', 'summary', 'ungate_',
]


def __getattr__(name: str) -> Any:
    if name == 'AIGTask':  # timm.task is slow to import and only training needs it
        from .task import AIGTask
        return AIGTask
    if name == 'calibrate_budget':
        from .calibrate import calibrate_budget
        return calibrate_budget
    if name in ('push_to_hub', 'save_pretrained'):
        from . import hub
        return getattr(hub, name)
    if name in ('export_aoti', 'export_onnx', 'export_openvino', 'export_program'):
        from . import export
        return getattr(export, name)
    if name in ('load_onnx', 'optimize_onnx'):
        from . import onnx_runtime
        return getattr(onnx_runtime, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
