"""timm_aig: adaptive inference graphs for timm's models. Importing it registers every <arch>_aig with timm."""
from importlib import import_module
from typing import TYPE_CHECKING, Any, List

__version__ = '0.2.0'

from .blocks import gated_blocks, set_execution, set_gate_offset
from .budget import BudgetPoint, budget_table, set_budget
from .config import AIGConfig, InputError
from .convert import gate_, ungate_
from .gate import Gate
from .loss import AnyBudgetLoss, ComputeTargetLoss, TargetRateLoss
from .models import GatedBasicBlock, GatedBottleneck, list_trained  # registers the entry points
from .passes import force_gates, forward_gates, record_gates, use_gate_offset

if TYPE_CHECKING:
    from .cascade import Cascade
    from .cost import Cost, compute_cost, summary
    from .export.onnx import export_onnx
    from .export.openvino import export_openvino
    from .export.program import export_program
    from .export.runtime import load_onnx
    from .hub.push import push_to_hub
    from .hub.save import save_pretrained
    from .inference import optimize_for_inference
    from .task import AIGTask
    from .training.calibrate import calibrate_budget
    from .training.evaluate import evaluate

__all__ = [
    'AIGConfig', 'AIGTask', 'AnyBudgetLoss', 'BudgetPoint', 'Cascade', 'ComputeTargetLoss', 'Cost', 'Gate',
    'GatedBasicBlock', 'GatedBottleneck', 'InputError', 'TargetRateLoss', 'budget_table', 'calibrate_budget',
    'compute_cost', 'evaluate', 'export_onnx', 'export_openvino', 'export_program', 'force_gates', 'forward_gates',
    'gate_', 'gated_blocks', 'list_trained', 'load_onnx', 'optimize_for_inference', 'push_to_hub', 'record_gates',
    'save_pretrained', 'set_budget', 'set_execution', 'set_gate_offset', 'summary', 'ungate_', 'use_gate_offset',
]

_LAZY = {  # slow to import: imported at first use
    'AIGTask': '.task',
    'Cascade': '.cascade',
    'Cost': '.cost',
    'calibrate_budget': '.training.calibrate',
    'compute_cost': '.cost',
    'evaluate': '.training.evaluate',
    'export_onnx': '.export.onnx',
    'export_openvino': '.export.openvino',
    'export_program': '.export.program',
    'load_onnx': '.export.runtime',
    'optimize_for_inference': '.inference',
    'push_to_hub': '.hub.push',
    'save_pretrained': '.hub.save',
    'summary': '.cost',
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> List[str]:
    return [*__all__, '__version__']
