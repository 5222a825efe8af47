"""Thresholds of a cascade: what each choice gives on images for which the answers of all stages are known."""
from dataclasses import dataclass
from itertools import product
from typing import Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch

__all__ = ['CascadePoint', 'StageAnswers', 'best_points', 'compare_thresholds', 'run_thresholds']

CANDIDATES = 10_000  # combinations of thresholds to compare


class StageAnswers(NamedTuple):
    """What one stage answers for N images: largest probability, 1 if correct, and MACs, float64 [N] each."""
    confidence: torch.Tensor
    right: torch.Tensor
    macs: torch.Tensor


@dataclass(frozen=True)
class CascadePoint:
    """Thresholds and budgets of a cascade, and what they gave on the calibration images.

    Args:
        thresholds: Of all stages but the last, in [0, 1].
        budgets: Of all stages, None for a stage without one.
        macs_share: Mean MACs over those of the largest static model.
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
