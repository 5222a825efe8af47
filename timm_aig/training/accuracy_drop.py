"""AccuracyDrop: what a budget costs in accuracy, with a confidence interval."""
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Tuple

import torch

from ..budget import BudgetPoint

__all__ = ['AccuracyDrop', 'accuracy_drop', 'drop_interval']


@dataclass(frozen=True)
class AccuracyDrop:
    """The smallest budget within an accuracy drop, on the calibration images.

    Args:
        point: The budget, with its accuracy.
        reference: Accuracy with all gates open, percent.
        drop: reference - point.top1, percentage points.
        interval: drop_interval of it. Does not include that the budget was chosen on the same images.
        confidence: Level of the interval.
    """
    point: BudgetPoint
    reference: float
    drop: float
    interval: Tuple[float, float]
    confidence: float


def accuracy_drop(
        point: BudgetPoint,
        reference: torch.Tensor,
        correct: torch.Tensor,
        confidence: float,
) -> AccuracyDrop:
    """Compare a budget with all gates open, on the same N images.

    Args:
        point: The budget.
        reference: Which images are classified correctly with all gates open, bool [N].
        correct: Which images are classified correctly at the budget, bool [N].
        confidence: Level of the interval, in (0, 1).
    """
    lost, won, images = int((reference & ~correct).sum()), int((correct & ~reference).sum()), len(correct)
    interval = drop_interval(lost, won, images, confidence)
    return AccuracyDrop(
        point, 100 * reference.double().mean().item(), 100 * (lost - won) / images, interval, confidence)


def drop_interval(lost: int, won: int, images: int, confidence: float) -> Tuple[float, float]:
    """Confidence interval of the accuracy drop from one model to another on the same images, percentage points.

    Agresti and Min, Statistics in Medicine 24, 2005: Wald's interval with half an observation added to each of the four
    cells, which keeps its level for few images.

    Args:
        lost: Images that only the first model classifies correctly.
        won: Images that only the second model classifies correctly.
        images: Number of images.
        confidence: Level of the interval, in (0, 1).
    """
    lost_, won_, n = lost + .5, won + .5, images + 2
    drop = (lost_ - won_) / n
    spread = NormalDist().inv_cdf((1 + confidence) / 2) * sqrt(lost_ + won_ - (lost_ - won_) ** 2 / n) / n
    return 100 * (drop - spread), 100 * (drop + spread)
