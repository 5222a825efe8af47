"""calibrate_budget: the gate offsets that give wanted mean MACs shares, found on held-out images."""
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import NormalDist
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.utils import unwrap_model
from tqdm import tqdm

from ..blocks import GatedBlock, gated_blocks, require_gated_blocks, set_gate_offset
from ..budget import LONGEST_TABLE, BudgetPoint, set_budget_table
from ..cost import Cost, compute_cost
from ..passes import forward_gates

__all__ = ['BUDGETS', 'AccuracyDrop', 'Calibration', 'calibrate_budget']

BUDGETS = (.4, .5, .6, .7, .8, .9, 1.)
DECIMALS = 6  # of an offset

Batch = Tuple[torch.Tensor, Optional[torch.Tensor]]


@dataclass(frozen=True)
class AccuracyDrop:
    """The smallest budget that keeps an accuracy, on the calibration images.

    Args:
        point: The budget, with its accuracy.
        reference: Accuracy with all gates open, percent.
        drop: reference - point.top1, points.
        interval: Confidence interval of the drop, points (Agresti and Min, 2005, for proportions of the same images).
            The budget was chosen on these images too, which it leaves out of account.
        confidence: Of the interval.
    """
    point: BudgetPoint
    reference: float
    drop: float
    interval: Tuple[float, float]
    confidence: float


@dataclass(frozen=True)
class Calibration:
    """What calibrate_budget found.

    Args:
        table: The budgets asked for, and those added between them where interpolation would miss.
        lowest: MACs share with all gates closed: no budget below it can be reached.
        passes: Runs through the calibration images.
        smallest: The answer to max_accuracy_drop, None if it was not asked for.
    """
    table: Tuple[BudgetPoint, ...]
    lowest: float
    passes: int
    smallest: Optional[AccuracyDrop] = None


class Unreachable(ValueError):
    """No offset gives a budget."""


def calibrate_budget(
        model: nn.Module,
        loader: Iterable[Any],
        budgets: Sequence[float] = BUDGETS,
        *,
        tolerance: float = 0.005,
        max_accuracy_drop: Optional[float] = None,
        confidence: float = 0.95,
        progress: bool = False,
) -> Calibration:
    """Find the gate offsets that give mean MACs shares, and store them as the model's table for set_budget.

    One offset moves the thresholds of all gates. What a gate sees depends on the blocks that ran before it, so shares
    are measured in whole passes, where the margins of the last pass tell to look next. Budgets are added in between
    where linear interpolation would miss the tolerance: 50 to 80 passes in all. The images are kept in memory,
    augmented once. Nothing but the table changes in the model.

    Args:
        model: Adaptive model, on the device to run on. Calibrate it before optimize_for_inference.
        loader: Batches of images [B, C, H, W], or of these and labels [B], best of images that the model was not
            trained on. Images with a label below 0 are left out.
        budgets: Wanted mean MACs over those of the static parent, each in (0, 1]. 1 stands for all gates open.
        tolerance: Largest difference of a measured share to its budget.
        max_accuracy_drop: Also find the smallest budget whose accuracy is at most so many points below that with all
            gates open, in steps of `tolerance`, and add it to the table.
        confidence: Of the interval of that drop, in (0, 1).
        progress: Show a bar on stderr.

    Raises:
        ValueError: A static or optimized model, a wrong argument, no images, labels that are missing, or a budget that
            no offset reaches: the message tells what can be reached. The model is unchanged then.
    """
    model = unwrap_model(model)
    if not all(isinstance(block, GatedBlock) for block in require_gated_blocks(model).values()):
        raise ValueError('model is optimized for inference, calibrate the one it was made from.')
    wanted = _checked(budgets, tolerance, max_accuracy_drop, confidence)
    batches = _cached(loader)
    if max_accuracy_drop is not None and batches[0][1] is None:
        raise ValueError('max_accuracy_drop needs a loader that gives labels.')
    cost = compute_cost(model, tuple(batches[0][0].shape[1:]))  # type: ignore[arg-type]
    with _unchanged(model), tqdm(disable=not progress, desc='calibrating', unit='pass') as bar:
        search = _Search(model, batches, cost, tolerance, bar)
        for budget in wanted:
            search.find(budget)
        search.refine()
        rows = dict(search.rows)
        smallest = None
        if max_accuracy_drop is not None:
            budget = search.smallest(max_accuracy_drop)
            rows[budget] = search.rows[budget]
            smallest = _accuracy_drop(_point(budget, rows[budget]), search.open, rows[budget], confidence)
    table = tuple(_point(budget, rows[budget]) for budget in sorted(rows))
    set_budget_table(model, table)
    return Calibration(table, search.lowest, search.passes, smallest)


def _checked(
        budgets: Sequence[float],
        tolerance: float,
        max_accuracy_drop: Optional[float],
        confidence: float,
) -> List[float]:
    """The budgets, ascending."""
    wanted = sorted({float(budget) for budget in budgets})
    if not all(0 < budget <= 1 for budget in wanted):
        raise ValueError(f'budgets must be in (0, 1], not {wanted}.')
    if len(wanted) > LONGEST_TABLE:
        raise ValueError(f'budgets must be at most {LONGEST_TABLE}, not {len(wanted)}.')
    if not wanted and max_accuracy_drop is None:
        raise ValueError('budgets must have at least one entry.')
    if not 0 < tolerance < 1:
        raise ValueError(f'tolerance must be in (0, 1), not {tolerance!r}.')
    if max_accuracy_drop is not None and not (max_accuracy_drop >= 0 and isfinite(max_accuracy_drop)):
        raise ValueError(f'max_accuracy_drop must be a number of points from 0, not {max_accuracy_drop!r}.')
    if not 0 < confidence < 1:
        raise ValueError(f'confidence must be in (0, 1), not {confidence!r}.')
    return wanted


def _cached(loader: Iterable[Any]) -> List[Batch]:
    batches: List[Batch] = []
    for batch in loader:
        images, labels = (batch, None) if isinstance(batch, torch.Tensor) else (batch[0], batch[1])
        images = images.cpu()
        if labels is not None:
            labels = torch.as_tensor(labels).cpu()
            images, labels = images[labels >= 0], labels[labels >= 0]
        if len(images):
            batches.append((images, labels))
    if not batches:
        raise ValueError('loader gives no images.')
    if len({(images.shape[1:], labels is None) for images, labels in batches}) > 1:
        raise ValueError('loader must give images of one size, all with labels or all without.')
    return batches


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Eval, and afterwards the modes and gate offsets of before."""
    modes = [(module, module.training) for module in model.modules()]
    gates = [(block.gate, block.gate.offset.item()) for block in gated_blocks(model).values()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for gate, offset in gates:
            gate.set_offset(offset)


class _Probe(NamedTuple):
    """One pass through the N images: MACs share in the mean, right answers [N], open minus closed logits [N, L],
    execution rates [L]."""
    offset: float
    share: float
    right: Optional[torch.Tensor]
    margins: torch.Tensor
    rates: torch.Tensor


class _Search:
    """Passes through the calibration images, and the offsets found for budgets."""

    def __init__(self, model: nn.Module, batches: List[Batch], cost: Cost, tolerance: float, bar: Any) -> None:
        self.model = model
        self.batches = batches
        self.tolerance = tolerance
        self.bar = bar
        self.cost = cost
        self.lowest = cost.fixed / cost.static
        self.passes = 0
        self.probes: List[_Probe] = []  # by offset, the last with all gates open
        self.rows: Dict[float, _Probe] = {}  # by budget; their offsets ascend with it
        widest = self._probe(inf)
        needed = max(0., -widest.margins.min().item())
        self.open = widest._replace(offset=round(needed + 1, DECIMALS))  # leaves new images some room
        self.probes = [self.open]

    @torch.no_grad()
    def _probe(self, offset: float) -> _Probe:
        set_gate_offset(self.model, offset)
        like = next(self.model.parameters())
        gates = [block.gate for block in gated_blocks(self.model).values()]
        margins: List[List[torch.Tensor]] = [[] for _ in gates]
        right: List[torch.Tensor] = []
        ran = torch.zeros(len(gates), dtype=torch.float64)

        def note(gate: Any, args: Any, into: List[torch.Tensor]) -> None:
            logits = gate.logits(args[0]).float()
            into.append((logits[:, 1] - logits[:, 0]).cpu())

        hooks = [gate.register_forward_pre_hook(lambda g, args, into=into: note(g, args, into))
                 for gate, into in zip(gates, margins)]
        try:
            for images, labels in self.batches:
                output, answers = forward_gates(
                    self.model, images.to(like.device, like.dtype, memory_format=torch.channels_last))
                ran += answers.double().sum(0).cpu()
                if labels is not None:
                    right.append(output.argmax(1).cpu() == labels)
        finally:
            for hook in hooks:
                hook.remove()
        self.passes += 1
        self.bar.update()
        stacked = torch.stack([torch.cat(parts) for parts in margins], 1)
        rates = ran / len(stacked)
        share = self.cost.share(rates[None]).item()
        probe = _Probe(offset, share, torch.cat(right) if right else None, stacked, rates)
        self.probes = sorted([*self.probes, probe], key=lambda p: p.offset)
        return probe

    def find(self, budget: float) -> _Probe:
        """A probe within tolerance of a budget; its offset lies between those of the budgets next to it.

        Raises:
            Unreachable: There is none.
        """
        if budget not in self.rows:
            self.rows[budget] = self._find(budget)
        return self.rows[budget]

    def _find(self, budget: float) -> _Probe:
        if budget == 1:
            return self.open
        if budget < self.lowest:
            raise Unreachable(f'budget {budget:g} is out of reach: with all gates closed {self.lowest:.4f} of the MACs '
                              f'run, the range is {self.lowest:.4f} to 1.')
        below = max((b for b in self.rows if b < budget), default=None)
        above = min((b for b in self.rows if b > budget), default=None)
        low = None if below is None else self.rows[below]
        high = self.open if above is None else self.rows[above]
        if low is not None and low.share >= budget:
            return low
        if high.share <= budget:
            return high
        for probe in self.probes:
            if (low is None or low.offset <= probe.offset) and probe.offset <= high.offset and probe.share <= budget:
                low = probe
        high = next(p for p in self.probes if p.share > budget and (low is None or p.offset > low.offset))
        for step in range(200):
            nearest = min((p for p in (low, high) if p is not None), key=lambda p: abs(p.share - budget))
            if abs(nearest.share - budget) <= self.tolerance / 2:  # the other half is for what lies between two budgets
                return nearest
            floor = high.offset - 2. ** step if low is None else low.offset
            if low is not None and high.share - low.share < 8 * self.tolerance:
                part = (budget - low.share) / (high.share - low.share)
                offset = round(low.offset + part * (high.offset - low.offset), DECIMALS)
            else:
                offset = self._expected_offset(nearest.margins, budget)
            if step % 3 == 2 or not (-inf if low is None else floor) < offset < high.offset:
                offset = floor if low is None else round((floor + high.offset) / 2, DECIMALS)
            if offset in (high.offset, None if low is None else low.offset):
                if abs(nearest.share - budget) <= self.tolerance:
                    return nearest
                break
            probe = self._probe(offset)
            low, high = (probe, high) if probe.share <= budget else (low, probe)
        shares = ' and '.join(f'{p.share:.4f}' for p in (low, high) if p is not None)
        raise Unreachable(f'budget {budget:g} is out of reach: the nearest MACs shares are {shares}, the gates tip '
                          f'together between offsets that are the same to {DECIMALS} decimals.')

    def _expected_offset(self, margins: torch.Tensor, budget: float) -> float:
        """Offset that would give a budget if the margins [N, L] did not depend on the blocks that run."""
        opens_at, order = (-margins).flatten().sort()
        macs = torch.tensor(self.cost.blocks, dtype=torch.float64).repeat(len(margins))[order].cumsum(0)
        wanted = (budget * self.cost.static - self.cost.fixed) * len(margins)
        at = int(torch.searchsorted(macs, wanted))
        near = opens_at[max(0, at - 1):at + 1].double().mean() if at < len(opens_at) else opens_at[-1] + 1
        return round(near.item(), DECIMALS)

    def _expected_share(self, probe: _Probe, offset: float) -> float:
        """MACs share at an offset not far from a probe's, by its margins."""
        rates = (probe.margins + offset > 0).double().mean(0)
        return self.cost.share(rates[None]).item()

    def refine(self) -> None:
        """Add budgets between those found until linear interpolation between neighbours meets the tolerance."""
        gaps = list(zip(sorted(self.rows), sorted(self.rows)[1:]))
        while gaps and len(self.rows) < LONGEST_TABLE:
            a, b = gaps.pop()
            low, high = self.rows[a], self.rows[b]
            if b - a <= 2 * self.tolerance or low.offset == high.offset:
                continue
            middle = round((a + b) / 2, 4)
            offset = (low.offset + high.offset) / 2
            share = (self._expected_share(low, offset) + self._expected_share(high, offset)) / 2
            if abs(share - middle) > self.tolerance:
                try:
                    self.find(middle)
                except Unreachable:  # nothing lies between
                    continue
                gaps += [(a, middle), (middle, b)]

    def smallest(self, max_drop: float) -> float:
        """The smallest budget, to the tolerance, whose accuracy is at most max_drop points below that of all open."""
        def keeps(budget: float) -> bool:
            try:
                return _top1(self.open) - _top1(self.find(budget)) <= max_drop + 1e-9
            except Unreachable:
                return False

        fails, passes = self.lowest, 1.
        for budget in sorted(self.rows):
            if keeps(budget):
                passes = budget
                break
            fails = budget
        self.find(passes)  # no row yet if none of them keeps it
        while passes - fails > self.tolerance:
            middle = round((fails + passes) / 2, 4)
            if middle in (fails, passes):
                break
            fails, passes = (fails, middle) if keeps(middle) else (middle, passes)
        return passes


def _top1(probe: _Probe) -> float:
    assert probe.right is not None
    return 100 * probe.right.double().mean().item()


def _point(budget: float, probe: _Probe) -> BudgetPoint:
    top1 = None if probe.right is None else round(_top1(probe), DECIMALS)
    return BudgetPoint(
        budget, probe.offset, round(probe.share, DECIMALS), len(probe.margins), top1,
        tuple(round(rate, 4) for rate in probe.rates.tolist()))


def _accuracy_drop(point: BudgetPoint, reference: _Probe, probe: _Probe, confidence: float) -> AccuracyDrop:
    assert reference.right is not None and probe.right is not None
    lost, won = (int((a & ~b).sum()) for a, b in ((reference.right, probe.right), (probe.right, reference.right)))
    drop = 100 * (lost - won) / len(probe.right)
    return AccuracyDrop(
        point, _top1(reference), drop, drop_interval(lost, won, len(probe.right), confidence), confidence)


def drop_interval(lost: int, won: int, images: int, confidence: float) -> Tuple[float, float]:
    """Confidence interval, in points, of an accuracy's drop, from the images that only one of two models is right on.

    Agresti and Min, Statistics in Medicine 24, 2005: Wald's interval with half an observation more in each of the four
    cells, which holds its level for few images too.
    """
    lost_, won_, n = lost + .5, won + .5, images + 2
    drop = (lost_ - won_) / n
    spread = NormalDist().inv_cdf((1 + confidence) / 2) * sqrt(lost_ + won_ - (lost_ - won_) ** 2 / n) / n
    return 100 * (drop - spread), 100 * (drop + spread)
