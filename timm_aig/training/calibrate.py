"""calibrate_budget: find the gate offsets that give wanted mean MACs shares on held-out images."""
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count, pairwise
from math import inf
from typing import Any, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.utils import unwrap_model
from tqdm import tqdm

from ..blocks import GatedBlock, gated_blocks, require_gated_blocks, set_gate_offset
from ..budget import BudgetPoint, set_budget_table
from ..config import InputError
from ..cost import Cost, compute_cost
from ..passes import forward_gates
from .accuracy_drop import AccuracyDrop, accuracy_drop
from .evaluate import check_output, eval_mode, split_batch

__all__ = ['BUDGETS', 'Calibration', 'calibrate_budget', 'read_batches']

BUDGETS = (.4, .5, .6, .7, .8, .9, 1.)
DECIMALS = 6  # of an offset

Batch = Tuple[torch.Tensor, Optional[torch.Tensor]]


@dataclass(frozen=True)
class Calibration:
    """Result of calibrate_budget.

    Args:
        table: The budgets asked for, and those added where interpolation would miss the tolerance.
        lowest: MACs share with all gates closed, the lowest budget within reach.
        passes: Number of passes through the calibration images.
        smallest: The smallest budget within max_accuracy_drop, None if that was not asked for.
    """
    table: Tuple[BudgetPoint, ...]
    lowest: float
    passes: int
    smallest: Optional[AccuracyDrop] = None


class OutOfReach(InputError):
    """No gate offset gives a budget."""


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

    One offset moves the thresholds of all gates. What a gate sees depends on the blocks that ran before it, so every
    share is measured in a pass through the images, about 60 in all. Budgets are added where linear interpolation would
    miss the tolerance. The images are kept in memory, augmented once. Only the table of the model changes.

    Args:
        model: Adaptive model, on the device to run on. Calibrate before optimize_for_inference.
        loader: Batches of images [B, C, H, W], or of images and labels [B], best of images that the model was not
            trained on. Images with a negative label are left out.
        budgets: Wanted mean MACs over the MACs of the static parent, each in (0, 1]. 1 opens all gates.
        tolerance: Largest difference between a budget and its measured share.
        max_accuracy_drop: Also find the smallest budget, to the tolerance, whose accuracy is at most this many
            percentage points below the accuracy with all gates open, and add it to the table.
        confidence: Level of the confidence interval of that drop, in (0, 1).
        progress: Show a progress bar on stderr.

    Raises:
        InputError: A static or optimized model, a bad argument, no images, labels that are missing or no class of the
            model, logits that are nan, or a budget out of reach.
    """
    model = unwrap_model(model)
    if not all(isinstance(block, GatedBlock) for block in require_gated_blocks(model).values()):
        raise InputError('is optimized for inference, calibrate the original.', 'model')
    if isinstance(budgets, (int, float)):
        raise InputError(f'must be a list, not {budgets!r}.', 'budgets')
    wanted = sorted({float(budget) for budget in budgets})
    if not all(0 < budget <= 1 for budget in wanted):
        raise InputError(f'must be in (0, 1], not {wanted}.', 'budgets')
    if not wanted and max_accuracy_drop is None:
        raise InputError('must have at least one entry.', 'budgets')
    for name, value in (('tolerance', tolerance), ('confidence', confidence)):
        if not 0 < value < 1:
            raise InputError(f'must be in (0, 1), not {value!r}.', name)
    if max_accuracy_drop is not None and not 0 <= max_accuracy_drop <= 100:
        raise InputError(f'must be from 0 to 100 points, not {max_accuracy_drop!r}.', 'max_accuracy_drop')
    batches = read_batches(loader)
    if max_accuracy_drop is not None and batches[0][1] is None:
        raise InputError('needs a loader that gives labels.', 'max_accuracy_drop')
    cost = compute_cost(model, tuple(batches[0][0].shape[1:]))  # type: ignore[arg-type]
    with _unchanged(model), tqdm(disable=not progress, desc='calibrating', unit='pass') as bar:
        search = _Search(model, batches, cost, tolerance, bar)
        smallest, kept = None, wanted
        if max_accuracy_drop is not None:
            budget, found = search.smallest(max_accuracy_drop, wanted)
            kept = sorted({*wanted, budget})
            smallest = accuracy_drop(found.point(budget), search.all_open.correct, found.correct, confidence)
        points = {budget: search.find(budget).point(budget) for budget in [*kept, *search.between(kept)]}
    table = tuple(points[budget] for budget in sorted(points))
    set_budget_table(model, table)
    return Calibration(table, search.all_closed.share, search.passes, smallest)


def read_batches(loader: Iterable[Any]) -> List[Batch]:
    """The batches of a loader on the CPU, without images that have a negative label.

    Raises:
        InputError: No images, images of several sizes, labels for some batches only, or what split_batch refuses.
    """
    batches: List[Batch] = []
    for batch in loader:
        images, labels = split_batch(batch, 'loader')
        images = images.cpu()
        if labels is not None:
            labels = labels.cpu()
            images, labels = images[labels >= 0], labels[labels >= 0]
        if len(images):
            batches.append((images, labels))
    if not batches:
        raise InputError('the loader gives no images.')
    if len({(images.shape[1:], labels is None) for images, labels in batches}) > 1:
        raise InputError('the loader must give images of one size, all with labels or all without.')
    return batches


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Set a model to eval inside a `with` block, and restore its modes and gate offsets afterwards."""
    offsets = {block.gate: float(block.gate.offset) for block in gated_blocks(model).values()}
    with eval_mode(model):
        try:
            yield
        finally:
            for gate, offset in offsets.items():
                gate.set_offset(offset)


@dataclass(frozen=True)
class _Measurement:
    """One pass through the N images at a gate offset: mean MACs share, open minus closed logits of the L gates [N, L],
    and which images were classified correctly [N] (None without labels)."""
    offset: float
    share: float
    margins: torch.Tensor
    correct: Any

    @property
    def top1(self) -> float:
        return 100 * self.correct.double().mean().item()

    def point(self, budget: float) -> BudgetPoint:
        top1 = None if self.correct is None else round(self.top1, DECIMALS)
        return BudgetPoint(budget, self.offset, round(self.share, DECIMALS), len(self.margins), top1)


class _Search:
    """Measures MACs shares at gate offsets, and finds the offsets of budgets."""

    def __init__(self, model: nn.Module, batches: List[Batch], cost: Cost, tolerance: float, bar: Any) -> None:
        self.model = model
        self.batches = batches
        self.cost = cost
        self.tolerance = tolerance
        self.bar = bar
        self.passes = 0
        self.measured: List[_Measurement] = []
        opened, closed = self._measure(inf), self._measure(-inf)  # below at finite offsets, with 1 to spare
        self.all_open = replace(opened, offset=round(1 + max(0., -opened.margins.min().item()), DECIMALS))
        self.all_closed = replace(closed, offset=round(-1 - max(0., closed.margins.max().item()), DECIMALS))
        self.measured = [self.all_closed, self.all_open]
        self.found = {self.all_closed.share: self.all_closed, 1.: self.all_open}  # by budget

    @torch.no_grad()
    def _measure(self, offset: float) -> _Measurement:
        set_gate_offset(self.model, offset)
        like = next(self.model.parameters())
        gates = [block.gate for block in gated_blocks(self.model).values()]
        logits: List[List[torch.Tensor]] = [[] for _ in gates]
        hooks = [gate.fc2.register_forward_hook(lambda _, args, output, parts=parts: parts.append(output.float().cpu()))
                 for gate, parts in zip(gates, logits)]
        shares, correct = [], []
        try:
            for images, labels in self.batches:
                images = images.to(like.device, like.dtype, memory_format=torch.channels_last)
                output, answers = forward_gates(self.model, images)
                check_output(output, labels)
                shares.append(self.cost.share(answers.cpu()))
                if labels is not None:
                    correct.append(output.argmax(1).cpu() == labels)
        finally:
            for hook in hooks:
                hook.remove()
        self.passes += 1
        self.bar.update()
        margins = torch.stack([torch.cat(parts).diff(dim=1)[:, 0] for parts in logits], 1)
        if not margins.isfinite().all():
            raise InputError('the logits of the gates are not finite.')
        share = torch.cat(shares).mean().item()
        self.measured.append(_Measurement(offset, share, margins, torch.cat(correct) if correct else None))
        return self.measured[-1]

    def find(self, budget: float) -> _Measurement:
        """A measurement within tolerance of a budget. Its offset lies between the offsets of the neighbouring budgets.

        Raises:
            OutOfReach: There is none.
        """
        if budget in self.found:
            return self.found[budget]
        if budget < self.all_closed.share:
            raise OutOfReach(f'must be in reach, not {budget:g}: the range is {self.all_closed.share:.4f}, with all '
                             f'gates closed, to 1.', 'budgets')
        low = self.found[max(b for b in self.found if b < budget)]
        high = self.found[min(b for b in self.found if b > budget)]
        if low.share < budget < high.share:  # start from the narrowest pair of measurements
            known = sorted((m for m in self.measured if low.offset <= m.offset <= high.offset), key=lambda m: m.offset)
            last = max(i for i, m in enumerate(known) if m.share < budget)
            low, high = known[last:last + 2]
        for step in count():
            nearest = min(low, high, key=lambda m: abs(m.share - budget))
            miss = abs(nearest.share - budget)
            if miss <= self.tolerance / 2:  # leaves the other half to interpolation
                break
            offset = self._expected_offset(nearest.margins, budget)
            if step % 2 or not low.offset < offset < high.offset:
                offset = round((low.offset + high.offset) / 2, DECIMALS)
            if not low.offset < offset < high.offset:
                break
            measurement = self._measure(offset)
            low, high = (measurement, high) if measurement.share < budget else (low, measurement)
        if miss > self.tolerance:
            raise OutOfReach(f'must be in reach, not {budget:g}: the nearest MACs shares are {low.share:.4f} and '
                             f'{high.share:.4f}, at offsets that are equal to {DECIMALS} decimals.', 'budgets')
        self.found[budget] = nearest
        return nearest

    def _expected_offset(self, margins: torch.Tensor, budget: float) -> float:
        """Offset that would give a budget if margins [N, L] did not depend on which blocks run."""
        opens_at, order = (-margins).flatten().sort()
        images = len(margins)
        macs = margins.new_tensor(self.cost.blocks, dtype=torch.float64).repeat(images)[order].cumsum(0)
        index = int(torch.searchsorted(macs, (budget * self.cost.static - self.cost.fixed) * images))
        return round(opens_at[max(0, index - 1):index + 1].double().mean().item(), DECIMALS)

    def between(self, budgets: Sequence[float]) -> List[float]:
        """Budgets to add between ascending ones, so that linear interpolation meets the tolerance."""
        added: List[float] = []
        gaps = list(pairwise(budgets))
        while gaps:
            a, b = gaps.pop()
            middle = round((a + b) / 2, 4)
            offset = round((self.find(a).offset + self.find(b).offset) / 2, DECIMALS)
            if (b - a) / 2 > self.tolerance and abs(self._measure(offset).share - middle) > self.tolerance:
                with suppress(OutOfReach):  # the share jumps over it
                    self.find(middle)
                    added.append(middle)
                    gaps += [(a, middle), (middle, b)]
        return added

    def smallest(self, max_drop: float, budgets: Sequence[float]) -> Tuple[float, _Measurement]:
        """The smallest budget, to the tolerance, that loses at most max_drop points of accuracy."""
        def is_within(budget: float) -> bool:
            try:
                return self.all_open.top1 - self.find(budget).top1 <= max_drop + 1e-9
            except OutOfReach:
                return False

        high = next(filter(is_within, budgets), 1.)
        low = max((budget for budget in budgets if budget < high), default=self.all_closed.share)
        while high - low > self.tolerance and (middle := round((low + high) / 2, 4)) not in (low, high):
            low, high = (low, middle) if is_within(middle) else (middle, high)
        return high, self.find(high)
