"""GateSchedule: gate noise and MACs targets over a training."""
from typing import Union

import torch.nn as nn

from ..blocks import require_gated_blocks
from ..config import InputError
from ..loss import AnyBudgetLoss, ComputeTargetLoss

__all__ = ['GateSchedule']


class GateSchedule:
    """Schedule of the gate noise and of the MACs targets.

    The targets fall linearly from 1, where new gates start, to those of the loss. The noise is turned off for the
    end of the training, so that the gates decide as in eval.
    """

    def __init__(
            self,
            model: nn.Module,
            compute_loss: Union[ComputeTargetLoss, AnyBudgetLoss, None] = None,
            anneal: float = 0.,
            noise_off: float = 0.,
    ) -> None:
        """
        Args:
            model: Adaptive model.
            compute_loss: Loss whose targets are annealed, None for no annealing.
            anneal: Share of the training, at its start, over which the targets fall, in [0, 1].
            noise_off: Share of the training, at its end, without noise, in [0, 1].

        Raises:
            InputError: The model is static, or a share is out of range.
        """
        for name, share in (('anneal', anneal), ('noise_off', noise_off)):
            if not 0 <= share <= 1:
                raise InputError(f'must be in [0, 1], not {share!r}.', name)
        self.gates = [block.gate for block in require_gated_blocks(model).values()]
        self.compute_loss = compute_loss
        self.anneal = anneal
        self.noise_off = noise_off

    def step(self, progress: float) -> None:
        """Set noise and target for a progress in [0, 1], the finished share of the training."""
        for gate in self.gates:
            gate.noise = progress < 1 - self.noise_off
        if self.compute_loss is not None:
            self.compute_loss.annealed = min(1., progress / self.anneal) if self.anneal else 1.

    def finish(self) -> None:
        """Let the gates draw again, for another training of the model."""
        for gate in self.gates:
            gate.noise = True
