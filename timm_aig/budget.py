"""set_budget: one checkpoint at many budgets. A table of gate offsets, measured by calibrate_budget, and its use."""
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import isfinite
from typing import Any, Dict, Optional, Sequence, Tuple

import torch.nn as nn

from .blocks import _require_gated_blocks, gated_blocks, set_gate_offset

__all__ = ['BudgetPoint', 'budget_offset', 'budget_table', 'read_budget_table', 'set_budget', 'set_budget_table']

LARGEST_OFFSET = 65536.
LONGEST_TABLE = 256


@dataclass(frozen=True)
class BudgetPoint:
    """One row of a table of budgets: what calibrate_budget measured.

    Args:
        budget: Wanted mean MACs over those of the static parent, in (0, 1].
        gate_offset: Offset of the gates that gives it.
        macs_share: Mean MACs share that it gave on the calibration images.
        images: Number of calibration images.
        top1: Accuracy on them, percent; None if they had no labels.

    Raises:
        ValueError: A field has a value that is not allowed.
    """
    budget: float
    gate_offset: float
    macs_share: float
    images: int
    top1: Optional[float] = None

    def __post_init__(self) -> None:
        for name, low, high in (
                ('budget', 0, 1), ('gate_offset', -LARGEST_OFFSET, LARGEST_OFFSET), ('macs_share', 0, 2),
                ('images', 1, 2 ** 53), ('top1', 0, 100)):
            value = getattr(self, name)
            if name == 'top1' and value is None:
                continue
            kinds = (int,) if name == 'images' else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not isfinite(value) \
                    or not low <= value <= high or (name == 'budget' and value == 0):
                what = 'whole number' if name == 'images' else 'number'
                raise ValueError(f'{name} must be a {what} {"above" if name == "budget" else "from"} {low:g} '
                                 f'to {high:g}, not {str(value)[:80]!r}.')

    def to_dict(self) -> Dict[str, Any]:
        """Fields that differ from None as plain JSON types."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def read_budget_table(rows: Any) -> Tuple[BudgetPoint, ...]:
    """A table from its JSON form, a list of objects with BudgetPoint's fields.

    Raises:
        ValueError: It has another form, or budgets or offsets that do not ascend.
    """
    if not isinstance(rows, (list, tuple)) or len(rows) > LONGEST_TABLE:
        raise ValueError(f'gate_budgets must be a list of at most {LONGEST_TABLE} objects.')
    known = [f.name for f in fields(BudgetPoint)]
    points = []
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not set(known) - {'top1'} <= set(row) <= set(known):
            raise ValueError(f'gate_budgets[{i}] must be an object of {", ".join(known)} (top1 may be missing).')
        try:
            points.append(BudgetPoint(**row))
        except ValueError as e:
            raise ValueError(f'gate_budgets[{i}]: {e}') from e
    _require_ascending(points)
    return tuple(points)


def _require_ascending(points: Sequence[BudgetPoint]) -> None:
    for a, b in pairwise(points):
        if a.budget >= b.budget or a.gate_offset > b.gate_offset:
            raise ValueError(f'gate_budgets must ascend, budget {b.budget:g} at offset {b.gate_offset:g} follows '
                             f'{a.budget:g} at {a.gate_offset:g}.')


def budget_table(model: nn.Module) -> Tuple[BudgetPoint, ...]:
    """The calibrated budgets of a model, ascending; empty if it was not calibrated or is static."""
    return next((block.gate.budgets for block in gated_blocks(model).values()), ())


def set_budget_table(model: nn.Module, points: Sequence[BudgetPoint]) -> None:
    """Give a model a table of budgets, or with () take it away. Its gate offset stays.

    Raises:
        ValueError: The model is static, or the points do not ascend.
    """
    _require_ascending(points)
    for block in _require_gated_blocks(model).values():
        block.gate.budgets = tuple(points)


def budget_offset(table: Sequence[BudgetPoint], budget: float) -> float:
    """Gate offset for a budget, by linear interpolation between the two budgets of a table next to it.

    Raises:
        ValueError: The budget is outside of the table.
    """
    low, high = table[0], table[-1]
    if not low.budget <= budget <= high.budget:  # nor for nan
        span = f'{low.budget:g}' if len(table) == 1 else f'{low.budget:g} to {high.budget:g}'
        raise ValueError(f'budget must be in the range that was calibrated, {span}, not {budget!r}: '
                         f'timm_aig.calibrate_budget extends it.')
    for a, b in pairwise(table):
        if budget <= b.budget:
            return a.gate_offset + (b.gate_offset - a.gate_offset) * (budget - a.budget) / (b.budget - a.budget)
    return low.gate_offset


def set_budget(model: nn.Module, budget: float) -> float:
    """Let a calibrated model spend a share of the MACs of its static parent, in the mean over images like those it
    was calibrated on. Works on what optimize_for_inference returns too.

    Args:
        model: Model with a table of calibrate_budget, loaded or its own.
        budget: Mean MACs over those of the static parent.

    Returns:
        The gate offset that was set.

    Raises:
        ValueError: The model is static, was not calibrated, or the budget is outside of its table. The model is
            unchanged then.
    """
    _require_gated_blocks(model)
    table = budget_table(model)
    if not table:
        raise ValueError('model has no calibrated budgets, call timm_aig.calibrate_budget on held-out images first.')
    offset = budget_offset(table, budget)
    set_gate_offset(model, offset)
    return offset
