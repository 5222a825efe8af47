"""calibrate_cascade: choose the thresholds of a cascade on held-out images."""
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

from ..cascade import Cascade, confidence
from ..config import InputError
from .calibrate import Batch, read_batches
from .evaluate import check_output, eval_mode

__all__ = [
    'CascadePoint', 'StageAnswers', 'answer_images', 'best_points', 'calibrate_cascade', 'compare_thresholds',
    'run_thresholds']

CANDIDATES = 10_000  # combinations of thresholds to compare


class StageAnswers(NamedTuple):
    """Answers of one stage for N images: largest probability, 1 if correct, and MACs, float64 [N] each."""
    confidence: torch.Tensor
    right: torch.Tensor
    macs: torch.Tensor


@dataclass(frozen=True)
class CascadePoint:
    """Thresholds and budgets of a cascade, and its results on the calibration images.

    Args:
        thresholds: Of all stages but the last, in [0, 1].
        budgets: Of all stages, None for a stage without one.
        macs_share: Mean MACs over those of the largest model without gates.
        top1: Accuracy, percent.
        images: Number of images.
    """
    thresholds: Tuple[float, ...]
    budgets: Tuple[Optional[float], ...]
    macs_share: float
    top1: float
    images: int


def run_thresholds(stages: Sequence[StageAnswers], thresholds: Sequence[float]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Correctness and MACs of each image, float64 [N], in a cascade of stages whose answers are known."""
    right, macs = stages[0].right.clone(), stages[0].macs.clone()
    unsure = torch.ones_like(right, dtype=torch.bool)
    for stage, threshold, following in zip(stages, thresholds, stages[1:]):
        unsure &= stage.confidence < threshold
        macs += following.macs * unsure
        right = torch.where(unsure, following.right, right)
    return right, macs


def compare_thresholds(
        stages: Sequence[StageAnswers], budgets: Sequence[Optional[float]], largest: float,
) -> List[CascadePoint]:
    """Cascades of stages whose answers are known, for thresholds at quantiles of their confidences.

    Args:
        stages: Answers of each stage.
        budgets: Of each stage.
        largest: MACs that macs_share is over.
    """
    steps = round(CANDIDATES ** (1 / (len(stages) - 1)))
    quantiles = torch.linspace(0, 1, steps, dtype=torch.float64)
    candidates = [
        [*stage.confidence.quantile(quantiles, interpolation='lower').unique().tolist(), 1.] for stage in stages[:-1]]
    points = []
    for thresholds in product(*candidates):
        right, macs = run_thresholds(stages, thresholds)
        points.append(CascadePoint(
            thresholds, tuple(budgets), macs.mean().item() / largest, 100 * right.mean().item(), len(right)))
    return points


def best_points(points: Iterable[CascadePoint]) -> List[CascadePoint]:
    """The points that no other one beats in both accuracy and MACs, by ascending MACs."""
    best: List[CascadePoint] = []
    for point in sorted(points, key=lambda point: (point.macs_share, -point.top1)):
        if not best or point.top1 > best[-1].top1:
            best.append(point)
    return best


@torch.no_grad()
def answer_images(
        run: Callable[[torch.Tensor], Tuple[torch.Tensor, torch.Tensor]], batches: Sequence[Batch],
        device: torch.device, title: Optional[str] = None, dtype: Optional[torch.dtype] = None,
) -> StageAnswers:
    """Run a stage on all images.

    Args:
        run: Function from images [B, C, H, W] to logits [B, num_classes] and MACs [B].
        batches: Images and labels [B].
        device: Where the images run.
        title: Text before a progress bar on stderr, None for no bar.
        dtype: Of the images, None leaves it.

    Raises:
        InputError: A logit is nan, or a label has no class.
    """
    found = []
    for images, labels in tqdm(batches, title, disable=title is None, leave=False):
        logits, macs = run(images.to(device, dtype, memory_format=torch.channels_last))
        logits = logits.cpu()
        check_output(logits, labels)
        found.append(torch.stack([
            confidence(logits).double(), (logits.argmax(1) == labels).double(), macs.cpu().double()]))
    return StageAnswers(*torch.cat(found, 1))


def calibrate_cascade(
        cascade: Cascade,
        loader: Iterable[Any],
        *,
        macs: Optional[float] = None,
        accuracy: Optional[float] = None,
        budgets: Optional[Sequence[Sequence[Optional[float]]]] = None,
        progress: bool = False,
) -> List[CascadePoint]:
    """Choose the thresholds of a cascade, and the budgets if several are given, on held-out images.

    Every stage runs on every image once for each of its budgets. Accuracies and MACs of all combinations of thresholds
    follow from these answers. The images are kept in memory.

    Args:
        cascade: On the device to run on. Its thresholds and budgets change.
        loader: Batches of images [B, C, H, W] and labels [B] that no model was trained on. Images with a negative label
            are left out.
        macs: Most mean MACs, over those of the largest model without gates. The most accurate cascade within is set.
        accuracy: Least accuracy, percent. The cascade with the fewest MACs that has it is set.
        budgets: Budgets to try for each stage, (None,) for a stage without. Default: the present ones.
        progress: Show a progress bar on stderr.

    Returns:
        The cascades that no other one beats in both, by ascending MACs.

    Raises:
        InputError: Neither or both of macs and accuracy, images without labels, or no cascade is within it. The cascade
            is unchanged.
    """
    if (macs is None) == (accuracy is None):
        raise InputError('must be given, or accuracy, not both.', 'macs')
    batches = read_batches(loader)
    if batches[0][1] is None:
        raise InputError('must give labels.', 'loader')
    like = next(cascade.parameters())
    costs = cascade.costs(tuple(batches[0][0].shape[1:]))  # type: ignore[arg-type]
    before = cascade.budgets
    tried = [(budget,) for budget in before] if budgets is None else [tuple(some) for some in budgets]
    answers: Dict[Tuple[int, Optional[float]], StageAnswers] = {}
    try:
        with eval_mode(cascade):
            for stage, some in enumerate(tried):
                for budget in some:
                    cascade.set_budgets([budget if i == stage else None for i in range(len(tried))])
                    answers[stage, budget] = answer_images(
                        partial(cascade.run_stage, stage, costs=costs), batches, like.device,
                        f'stage {stage + 1}' if progress else None, like.dtype)
    finally:
        cascade.set_budgets(before)
    largest = max(cost.static for cost in costs)
    best = best_points(point for combination in product(*tried) for point in compare_thresholds(
        [answers[key] for key in enumerate(combination)], combination, largest))
    within = [p for p in best if (p.macs_share <= macs if macs is not None else p.top1 >= (accuracy or 0.))]
    if not within:
        raise InputError(
            f'is out of reach: the range is {best[0].macs_share:.4f}, {best[0].top1:.2f} % to '
            f'{best[-1].macs_share:.4f}, {best[-1].top1:.2f} %.', 'accuracy' if macs is None else 'macs')
    chosen = within[-1 if macs is not None else 0]
    cascade.set_thresholds(chosen.thresholds)
    cascade.set_budgets(chosen.budgets)
    return best
