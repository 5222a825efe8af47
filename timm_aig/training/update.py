"""Updater: optimizer updates with accumulation, clipping and loss scaling, and without non-finite gradients."""
from dataclasses import dataclass
from math import isfinite
from typing import Any, List, Optional

import torch
import torch.distributed as dist
from timm.utils import unwrap_model

from ..blocks import gated_blocks
from ..config import InputError

__all__ = ['UpdateConfig', 'Updater', 'in_any_process']

NONFINITE = ('stop', 'skip')


@dataclass(frozen=True)
class UpdateConfig:
    """How the gradients of an update are made and applied.

    Args:
        grad_accum_steps: Batches per update. Their gradients are averaged; the gate loss sees each batch by itself.
        clip_grad: Largest norm of the gradient, None for no clipping.
        nonfinite: 'stop' the training at an update whose loss or gradient is not finite, or 'skip' the update.
    """
    grad_accum_steps: int = 1
    clip_grad: Optional[float] = None
    nonfinite: str = 'stop'

    def __post_init__(self) -> None:
        if self.grad_accum_steps < 1:
            raise InputError(f'must be at least 1, not {self.grad_accum_steps!r}.', 'grad_accum_steps')
        if self.nonfinite not in NONFINITE:
            raise InputError(f'must be one of {", ".join(NONFINITE)}, not {self.nonfinite!r}.', 'nonfinite')


class Updater:
    """Makes updates: begin(), backward() for each batch, finish(). It waits for the device once per update."""

    def __init__(
            self,
            task: Any,
            optimizer: torch.optim.Optimizer,
            config: UpdateConfig,
            amp_dtype: Optional[torch.dtype] = None,
    ) -> None:
        """
        Args:
            task: timm TrainingTask.
            optimizer: Optimizer of its parameters.
            config: Clipping and non-finite updates.
            amp_dtype: Autocast dtype of the forward pass; float16 scales the loss.
        """
        self.task = task
        self.optimizer = optimizer
        self.config = config
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=amp_dtype == torch.float16)
        self.model: Any = unwrap_model(task.get_eval_model())
        self.blocks = gated_blocks(self.model)
        self.parameters = list(task.get_clip_parameters())
        self._buffers: List[torch.Tensor] = []  # the model's buffers before an update that may be skipped

    def begin(self) -> None:
        """Start an update."""
        if self.config.nonfinite == 'skip':
            self._buffers = [buffer.clone() for buffer in self.model.buffers()]

    def backward(self, loss: torch.Tensor, batches: int) -> None:
        """Add the gradients of one batch, divided by the number of batches of the update."""
        finite = loss.detach() * 0 + 1  # NaN if the loss is not finite, to spread that to every gradient
        self.scaler.scale(loss * finite / batches).backward()

    def finish(self, step: int, labels: torch.Tensor, loss: torch.Tensor, rates: torch.Tensor) -> Optional[str]:
        """Apply the gradients if they are finite.

        Args:
            step: Number of updates including this one.
            labels: Labels of all its batches [N].
            loss: Sum of the losses of its batches, used to find the origin of non-finite gradients.
            rates: Sum of the execution rates of its batches [L], used for the same.

        Returns:
            None if the update was done, or what was not finite if it was not.

        Raises:
            InputError: A label is outside [0, num_classes). The weights have not changed.
        """
        self.scaler.unscale_(self.optimizer)
        # gradients are averaged over the processes by now, so that all processes decide alike
        total_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        checks = [value.to(loss) for value in (total_norm, labels.min(), labels.max())]
        norm, lowest, highest = torch.stack(checks).tolist()  # the one time that an update waits for the device
        classes = self.model.num_classes
        if lowest < 0 or highest >= classes:
            raise InputError(
                f'is {classes}: labels must be in [0, {classes}), not from {lowest:.0f} to {highest:.0f}.',
                'num_classes')
        finite = isfinite(norm)
        # float16 gradients overflow until the scale is low enough: an error only if the scale falls below 1
        faulty = not finite and (
            not self.scaler.is_enabled() or self.scaler.get_scale() < 1
            or in_any_process(not isfinite(loss), loss.device))
        problem = self._describe_nonfinite(loss, rates) if faulty else None
        if faulty:
            for buffer, before in zip(self.model.buffers(), self._buffers):
                buffer.copy_(before)
        elif finite:
            if self.config.clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_grad, total_norm)
            self.optimizer.step()  # not scaler.step, which waits for the device again
            self.task.update_ema(step)
        self.scaler.update()
        self.optimizer.zero_grad()
        return problem

    def _describe_nonfinite(self, loss: torch.Tensor, rates: torch.Tensor) -> str:
        bad_rates = [name for name, finite in zip(self.blocks, rates.isfinite().tolist()) if not finite]
        if bad_rates:
            return f'gate {bad_rates[0]} is the first whose output is not finite'
        if not isfinite(loss):  # every gradient is NaN then
            return 'the loss is not finite' + (', the outputs of all gates are' if self.blocks else '')
        bad_gradients = [
            name for name, block in self.blocks.items()
            if any(p.grad is not None and not p.grad.isfinite().all() for p in block.gate.parameters())
        ]
        if bad_gradients:
            return f'the loss is finite, gradients of gates {", ".join(bad_gradients)} are not'
        return 'the loss is finite, gradients outside the gates are not'


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process of a distributed training."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)
