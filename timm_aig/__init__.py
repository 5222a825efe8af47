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
from .loss import BlockBoundsLoss, ComputeTargetLoss, SumLoss, TargetRateLoss
from .version import __version__ as __version__

__all__ = [
    'AIGConfig', 'AIGTask', 'BlockBoundsLoss', 'BudgetPoint', 'ComputeTargetLoss', 'Cost', 'Gate', 'GatedBasicBlock',
    'GatedBottleneck', 'SumLoss', 'TargetRateLoss', 'budget_table', 'calibrate_budget', 'compute_cost', 'force_gates',
    'forward_gates', 'gate_', 'gated_blocks', 'optimize_for_inference', 'push_to_hub', 'save_pretrained', 'set_budget',
    'set_execution', 'set_gate_offset', 'summary', 'ungate_',
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
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
