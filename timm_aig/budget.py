"""set_budget: one checkpoint at many budgets. A table of gate offsets, measured by calibrate_budget, and its use."""
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any, Dict, Optional, Sequence, Tuple

import torch.nn as nn

from .blocks import gated_blocks, require_gated_blocks, set_gate_offset

__all__ = ['BudgetPoint', 'budget_offset', 'budget_table', 'read_budget_table', 'set_budget', 'set_budget_table']

LARGEST_OFFSET = 65536.
LONGEST_TABLE = 256
MOST_BLOCKS = 4096
OPTIONAL = ('top1', 'block_rates')


@dataclass(frozen=True)
class BudgetPoint:
    """One row of a table of budgets: what calibrate_budget measured.

    Args:
        budget: Wanted mean MACs over those of the static parent, in (0, 1].
        gate_offset: Offset of the gates that gives it.
        macs_share: Mean MACs share that it gave on the calibration images.
        images: Number of calibration images.
        top1: Accuracy on them, percent; None if they had no labels.
        block_rates: Execution rate of each of the L gated blocks on them, in [0, 1].

    Raises:
        ValueError: A field has a value that is not allowed.
    """
    budget: float
    gate_offset: float
    macs_share: float
    images: int
    top1: Optional[float] = None
    block_rates: Optional[Tuple[float, ...]] = None

    def __post_init__(self) -> None:
        for name, low, high in (
                ('budget', 0, 1), ('gate_offset', -LARGEST_OFFSET, LARGEST_OFFSET), ('macs_share', 0, 2),
                ('images', 1, 2 ** 53), ('top1', 0, 100)):
            value = getattr(self, name)
            if name == 'top1' and value is None:
                continue
            kinds = (int,) if name == 'images' else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high \
                    or (name == 'budget' and value == 0):
                what = 'whole number' if name == 'images' else 'number'
                raise ValueError(f'{name} must be a {what} {"above" if name == "budget" else "from"} {low:g} '
                                 f'to {high:g}, not {str(value)[:80]!r}.')
        rates = self.block_rates
        if rates is not None:
            if not isinstance(rates, (list, tuple)) or len(rates) > MOST_BLOCKS or not all(
                    isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate <= 1 for rate in rates):
                raise ValueError(f'block_rates must be a list of rates from 0 to 1, not {str(rates)[:80]!r}.')
            object.__setattr__(self, 'block_rates', tuple(rates))

    def to_dict(self) -> Dict[str, Any]:
        """Fields that differ from None as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


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
        if not isinstance(row, dict) or not set(known) - {*OPTIONAL} <= set(row) <= set(known):
            raise ValueError(f'gate_budgets[{i}] must be an object of {", ".join(known)}, of which '
                             f'{" and ".join(OPTIONAL)} may be missing.')
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
        ValueError: The model is static, the points do not ascend or are too many, or they are of another number of
            blocks.
    """
    if len(points) > LONGEST_TABLE:
        raise ValueError(f'gate_budgets must have at most {LONGEST_TABLE} points, not {len(points)}.')
    _require_ascending(points)
    blocks = require_gated_blocks(model)
    for point in points:
        if point.block_rates is not None and len(point.block_rates) != len(blocks):
            raise ValueError(f'gate_budgets: budget {point.budget:g} has {len(point.block_rates)} block_rates, the '
                             f'model {len(blocks)} gated blocks.')
    for block in blocks.values():
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
        if a.budget <= budget < b.budget:
            return a.gate_offset + (b.gate_offset - a.gate_offset) * (budget - a.budget) / (b.budget - a.budget)
    return high.gate_offset


def set_budget(model: nn.Module, budget: float) -> float:
    """Let a calibrated model spend a share of the MACs of its static parent, in the mean over images like those it was
    calibrated on. What optimize_for_inference makes of it takes budgets too.

    Args:
        model: Model with a table of calibrate_budget, its own or loaded.
        budget: Mean MACs over those of the static parent.

    Returns:
        The gate offset that was set.

    Raises:
        ValueError: The model is static, was not calibrated, or the budget is out of range. The model is
            unchanged then.
    """
    require_gated_blocks(model)
    table = budget_table(model)
    if not table:
        raise ValueError('model has no calibrated budgets, call timm_aig.calibrate_budget on held-out images first.')
    offset = budget_offset(table, budget)
    set_gate_offset(model, offset)
    return offset
