"""Budgets: the table of gate offsets that calibrate_budget measured, and set_budget, which uses it."""
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Dict, Optional, Sequence, Tuple

import torch.nn as nn

from .blocks import gated_blocks, require_gated_blocks, set_gate_offset
from .config import InputError
from .gate import ALL_OPEN

__all__ = ['BudgetPoint', 'budget_offset', 'budget_table', 'read_budget_table', 'set_budget', 'set_budget_table']


@dataclass(frozen=True)
class BudgetPoint:
    """One row of a budget table, as measured by calibrate_budget.

    Args:
        budget: Wanted mean MACs over the MACs of the static parent, in (0, 1].
        gate_offset: Gate offset that gives it.
        macs_share: Mean MACs share measured on the calibration images.
        images: Number of calibration images.
        top1: Accuracy on them, percent. None without labels.

    Raises:
        InputError: `budget` or `gate_offset` is out of range.
    """
    budget: float
    gate_offset: float
    macs_share: float
    images: int
    top1: Optional[float] = None

    def __post_init__(self) -> None:
        if not 0 < self.budget <= 1:
            raise InputError(f'must be in (0, 1], not {self.budget!r}.', 'budget')
        if not abs(self.gate_offset) <= ALL_OPEN:  # also if it is nan
            raise InputError(f'must be at most {ALL_OPEN:g}, not {self.gate_offset!r}.', 'gate_offset')

    def to_dict(self) -> Dict[str, Any]:
        """The fields that are not None, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_budget_table(rows: Any) -> Tuple[BudgetPoint, ...]:
    """Read a table from its JSON form, a list of objects with the fields of BudgetPoint.

    Raises:
        InputError: Another form, a bad field, or budgets or offsets that do not ascend.
    """
    try:
        points = tuple(
            BudgetPoint(**{k: v for k, v in row.items() if k != 'block_rates'})  # which older versions saved
            for row in rows)
    except (AttributeError, TypeError) as e:
        raise InputError(f'must be a list of objects with the fields of BudgetPoint: {e}', 'gate_budgets') from e
    _require_ascending(points)
    return points


def _require_ascending(points: Sequence[BudgetPoint]) -> None:
    for a, b in pairwise(points):
        if a.budget >= b.budget or a.gate_offset > b.gate_offset:
            raise InputError(f'must ascend: budget {b.budget:g} at offset {b.gate_offset:g} follows {a.budget:g} at '
                             f'{a.gate_offset:g}.', 'gate_budgets')


def budget_table(model: nn.Module) -> Tuple[BudgetPoint, ...]:
    """The calibrated budgets of a model, ascending. Empty for a model that is static or not calibrated."""
    return next((block.gate.budgets for block in gated_blocks(model).values()), ())


def set_budget_table(model: nn.Module, points: Sequence[BudgetPoint]) -> None:
    """Replace the budget table of a model; () removes it. The gate offset stays as it is.

    Raises:
        InputError: The model is static, or the points do not ascend.
    """
    _require_ascending(points)
    for block in require_gated_blocks(model).values():
        block.gate.budgets = tuple(points)


def budget_offset(table: Sequence[BudgetPoint], budget: float) -> float:
    """Gate offset for a budget, interpolated linearly between its two neighbours in the table.

    Raises:
        InputError: The budget is outside the table.
    """
    low, high = table[0], table[-1]
    if not low.budget <= budget <= high.budget:  # also if it is nan
        span = f'{low.budget:g}' if len(table) == 1 else f'from {low.budget:g} to {high.budget:g}'
        raise InputError(f'must be {span}, as calibrated, not {budget!r}. timm_aig.calibrate_budget extends the range.',
                         'budget')
    for a, b in pairwise(table):
        if a.budget <= budget < b.budget:
            return a.gate_offset + (b.gate_offset - a.gate_offset) * (budget - a.budget) / (b.budget - a.budget)
    return high.gate_offset


def set_budget(model: nn.Module, budget: float) -> float:
    """Set the gate offset with which a calibrated model spends a share of its static parent's MACs.

    The share is a mean over images like those it was calibrated on. Works for optimized models too.

    Args:
        model: Model with a table of calibrate_budget, its own or loaded.
        budget: Mean MACs over the MACs of the static parent.

    Returns:
        The gate offset that was set.

    Raises:
        InputError: The model is static or not calibrated, or the budget is outside its table. The model is unchanged.
    """
    require_gated_blocks(model)
    table = budget_table(model)
    if not table:
        raise InputError('has no calibrated budgets, call timm_aig.calibrate_budget on held-out images first.', 'model')
    offset = budget_offset(table, budget)
    set_gate_offset(model, offset)
    return offset
