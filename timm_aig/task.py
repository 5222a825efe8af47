"""AIGTask: timm's classification task with a loss on the gates and, if asked for, distillation."""
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from .blocks import require_gated_blocks
from .loss import TargetRateLoss
from .passes import forward_gates

__all__ = ['AIGTask']


class GatesModule(nn.Module):
    """Returns (output, gates) from forward, since DistributedDataParallel sees no other output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: torch.Tensor) -> Any:
        return forward_gates(self.model, input)


class AIGTask(ClassificationTask):
    """Classification of an adaptive model: classification loss plus the loss on its gates (paper, section 3.3).

    The eval model, and so every checkpoint, is the adaptive model itself.

    Example:

        ```python
        task = AIGTask(model, criterion_kwargs=dict(smoothing=0.1))
        result = task(input, target)
        result['loss'].backward()
        ```
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: Optional[Union[nn.Module, Callable]] = None,
            criterion_kwargs: Optional[Dict[str, Any]] = None,
            gate_loss: Optional[nn.Module] = None,
            teacher: Optional[nn.Module] = None,
            distill_weight: float = 0.5,
            distill_temperature: float = 4.,
            device: Optional[torch.device] = None,
            dtype: Optional[torch.dtype] = None,
            verbose: bool = True,
    ) -> None:
        """
        Args:
            model: Adaptive model.
            criterion: Classification loss. Created from criterion_kwargs when None.
            criterion_kwargs: Arguments for timm's create_classification_loss() when criterion is None.
            gate_loss: Loss of the gates [B, L], TargetRateLoss of the model's own target rates when None.
            teacher: Frozen model to distil from, usually the static parent, with the same input normalization.
            distill_weight: Share of distillation in the classification loss, in [0, 1], the labels have the rest.
            distill_temperature: Softmax temperature of the distillation, above 0 (Hinton et al., 1503.02531).
            device: Device for task tensors.
            dtype: Dtype for task tensors.
            verbose: Enable info logging.

        Raises:
            ValueError: The model has no gated blocks, or distill_weight or distill_temperature is out of range.
        """
        if not 0 <= distill_weight <= 1 or not distill_temperature > 0:
            raise ValueError(
                f'distill_weight must be in [0, 1] and distill_temperature above 0, '
                f'not {distill_weight!r} and {distill_temperature!r}.')
        blocks = require_gated_blocks(model)
        super().__init__(
            GatesModule(model), criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype,
            verbose=verbose)
        gate_loss = gate_loss or TargetRateLoss([block.target_rate for block in blocks.values()])
        self.gate_loss = gate_loss.to(device=self.device)
        self.teacher = None if teacher is None else teacher.to(device=self.device).eval().requires_grad_(False)
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature

    def train(self, mode: bool = True) -> 'AIGTask':
        """Set training mode; the teacher stays in eval."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> Any:
        """Compile the module that trains and, by itself, the model that is evaluated."""
        self.eval_model = torch.compile(self.get_eval_model(), backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module: Any = torch.compile(
            self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """The adaptive model, or its EMA copy."""
        module = super().get_eval_model(module=module, ema=ema)
        inner = unwrap_model(module) if module is not None else None
        return inner.model if isinstance(inner, GatesModule) else module

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Forward pass and losses.

        Args:
            input: Images [B, C, H, W].
            target: Labels [B], or soft targets [B, num_classes].

        Returns:
            Dictionary of 'loss' (to train on), 'output' (logits [B, num_classes]), 'rate_loss' (the part of the loss
            that the gates cause), 'execution_rate' (share of gated blocks run) and 'block_rates' (the same of each
            block, [L]), rates in [0, 1].
        """
        output, gates = self.trainable_module(input)
        rate_loss = self.gate_loss(gates)
        loss = self.criterion(output, target)
        if self.teacher is not None:
            loss = (1 - self.distill_weight) * loss + self.distill_weight * self.distillation_loss(input, output)
        return {
            'loss': loss + rate_loss,
            'output': output,
            'rate_loss': rate_loss.detach(),
            'execution_rate': gates.detach().mean(),
            'block_rates': gates.detach().mean(0),
        }

    def distillation_loss(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """T^2 KL(teacher || model) of logits at temperature T, the mean over the batch."""
        assert self.teacher is not None
        with torch.no_grad():
            target = F.log_softmax(self.teacher(input).float() / self.distill_temperature, dim=1)
        output = F.log_softmax(output.float() / self.distill_temperature, dim=1)
        return F.kl_div(output, target, reduction='batchmean', log_target=True) * self.distill_temperature ** 2
