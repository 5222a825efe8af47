"""GateSchedule: how noise and target of the gates change over a training."""
from typing import Optional

import torch.nn as nn

from ..blocks import require_gated_blocks
from ..loss import ComputeTargetLoss

__all__ = ['GateSchedule']


class GateSchedule:
    """Sets the gates of a model, and the loss on them, to what a moment of the training wants.

    Target: from 1, where new gates start, to the loss's own. Noise: off at the end, so that the network trains as it
    will be run.
    """

    def __init__(
            self,
            model: nn.Module,
            compute_loss: Optional[ComputeTargetLoss] = None,
            anneal: float = 0.,
            noise_off: float = 0.,
    ) -> None:
        """
        Args:
            model: Adaptive model in training.
            compute_loss: Loss whose target is annealed from 1.
            anneal: Share of the training, from its start, that the target takes, in [0, 1].
            noise_off: Share of the training, at its end, without noise, in [0, 1].

        Raises:
            ValueError: A static model, or a value out of range.
        """
        for name, share in (('anneal', anneal), ('noise_off', noise_off)):
            if not 0 <= share <= 1:
                raise ValueError(f'{name} must be in [0, 1], not {share!r}.')
        self.gates = [block.gate for block in require_gated_blocks(model).values()]
        self.compute_loss = compute_loss
        self.target = compute_loss.target if compute_loss is not None else 1.
        self.anneal = anneal
        self.noise_off = noise_off

    def step(self, progress: float) -> None:
        """Set everything for a share of the training done, in [0, 1]."""
        for gate in self.gates:
            gate.noise = progress < 1 - self.noise_off
        annealed = min(1., progress / self.anneal) if self.anneal else 1.
        if self.compute_loss is not None:
            self.compute_loss.target = 1 + (self.target - 1) * annealed
