"""GateSchedule: how temperature, noise and target of the gates change over a training."""
from typing import Optional, Tuple

import torch.nn as nn

from .blocks import require_gated_blocks
from .loss import ComputeTargetLoss

__all__ = ['GateSchedule']


class GateSchedule:
    """Sets the gates of a model, and the loss on them, to what a moment of the training wants.

    Temperature: exponential from tau[0] to tau[1] while there is noise (LAUDNet, 2308.15949, section 4.1). Target: from
    1, where new gates start, to the loss's own. Noise: off at the end, so that the network trains as it will be run.
    """

    def __init__(
            self,
            model: nn.Module,
            compute_loss: Optional[ComputeTargetLoss] = None,
            tau: Tuple[float, float] = (1., 1.),
            anneal: float = 0.,
            noise_off: float = 0.,
    ) -> None:
        """
        Args:
            model: Adaptive model in training.
            compute_loss: Loss whose target is annealed from 1.
            tau: Temperature at the start and when the noise ends, above 0.
            anneal: Share of the training, from its start, that the target takes, in [0, 1].
            noise_off: Share of the training, at its end, without noise, in [0, 1].

        Raises:
            ValueError: A static model, or a value out of range.
        """
        if not min(tau) > 0:
            raise ValueError(f'tau must be above 0, not {tau!r}.')
        for name, share in (('anneal', anneal), ('noise_off', noise_off)):
            if not 0 <= share <= 1:
                raise ValueError(f'{name} must be in [0, 1], not {share!r}.')
        self.gates = [block.gate for block in require_gated_blocks(model).values()]
        self.compute_loss = compute_loss
        self.target = compute_loss.target if compute_loss is not None else 1.
        self.tau = tau
        self.anneal = anneal
        self.noise_off = noise_off

    def step(self, progress: float) -> None:
        """Set everything for a share of the training done, in [0, 1]."""
        noisy = 1 - self.noise_off
        cooled = min(1., progress / noisy) if noisy else 1.
        for gate in self.gates:
            gate.tau = self.tau[0] * (self.tau[1] / self.tau[0]) ** cooled
            gate.noise = progress < noisy
        annealed = min(1., progress / self.anneal) if self.anneal else 1.
        if self.compute_loss is not None:
            self.compute_loss.target = 1 + (self.target - 1) * annealed
