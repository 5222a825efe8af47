"""AIGTask: timm's classification task with a loss on the gates and optional distillation."""
from contextlib import nullcontext
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from .blocks import require_gated_blocks, set_gate_offset
from .budget import set_budget_table
from .config import InputError
from .convert import residual_blocks
from .cost import compute_cost
from .loss import AnyBudgetLoss, ComputeTargetLoss
from .passes import forward_gates, use_gate_offset

__all__ = ['AIGTask']


class GatesModule(nn.Module):
    """Returns (output, gates) from forward, the only outputs that DistributedDataParallel sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: torch.Tensor) -> Any:
        return forward_gates(self.model, input)


class AIGTask(ClassificationTask):
    """Classification with an adaptive model: classification loss plus a loss on the gates (paper, section 3.3).

    The eval model and all checkpoints are the adaptive model itself.

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
            model: Adaptive model. Its gate offset becomes 0 and its budgets are dropped: training changes the gates.
            criterion: Classification loss. Created from criterion_kwargs when None.
            criterion_kwargs: Arguments for timm's create_classification_loss() when criterion is None.
            gate_loss: Loss on the gates [B, L]. If None, that of the distill recipe of scripts/finetune.py:
                ComputeTargetLoss with weight 10. Its target MACs share is the mean target rate of all blocks, of which
                those without a gate have rate 1. TargetRateLoss is the paper's, AnyBudgetLoss trains one model for all
                budgets.
            teacher: Model to distill from, usually the static parent, with the same input normalization. It is frozen.
            distill_weight: Share of the distillation in the classification loss, in [0, 1]. The labels have the rest.
            distill_temperature: Softmax temperature of the distillation, above 0 (Hinton et al., arXiv:1503.02531).
            device: Device for task tensors.
            dtype: Dtype for task tensors.
            verbose: Enable info logging.

        Raises:
            InputError: The model has no gated blocks, the teacher shares parameters with it, distill_weight or
                distill_temperature is out of range, or gate_loss is missing where the default does not apply: the model
                has no input size in a pretrained_cfg, or what always runs takes more MACs than the target.
        """
        if not 0 <= distill_weight <= 1:
            raise InputError(f'must be in [0, 1], not {distill_weight!r}.', 'distill_weight')
        if not distill_temperature > 0:
            raise InputError(f'must be above 0, not {distill_temperature!r}.', 'distill_temperature')
        if teacher is not None and not {*map(id, model.parameters())}.isdisjoint(map(id, teacher.parameters())):
            raise InputError('must not share parameters with the model: copy the parent before gate_.', 'teacher')
        require_gated_blocks(model)
        super().__init__(
            GatesModule(model), criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype,
            verbose=verbose)
        self.gate_loss = (gate_loss or _default_gate_loss(model)).to(device=self.device)
        self.teacher = None if teacher is None else teacher.to(device=self.device).eval().requires_grad_(False)
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature
        set_budget_table(model, ())
        set_gate_offset(model, 0.)

    def train(self, mode: bool = True) -> 'AIGTask':
        """Set training mode; the teacher stays in eval."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def compile(self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs) -> Any:
        """Compile the training module and the eval model, each by itself."""
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
            Dictionary of 'loss' (total), 'output' (logits [B, num_classes]), 'task_loss' (classification) and, with a
            teacher, 'kd_loss' (distillation), both before weighting, 'rate_loss' (loss on the gates, part of the
            total), 'block_rates' (execution rate of each gated block, [L] in [0, 1]) and 'execution_rate' (their mean).

        Raises:
            InputError: AnyBudgetLoss with gradient checkpointing.
        """
        gate_loss: Any = self.gate_loss
        any_budget = isinstance(gate_loss, AnyBudgetLoss)
        if any_budget and any(
                getattr(m, 'grad_checkpointing', False) for m in self.trainable_module.modules()):
            raise InputError('must be another with gradient checkpointing, which would run the gates again without '
                             'their offsets: call model.set_grad_checkpointing(False).', 'gate_loss')
        with use_gate_offset(gate_loss.draw_offsets(len(input))) if any_budget else nullcontext():
            output, gates = self.trainable_module(input)
        rate_loss = gate_loss(gates)
        loss = task_loss = self.criterion(output, target)
        parts = {'task_loss': task_loss.detach(), 'rate_loss': rate_loss.detach()}
        if self.teacher is not None:
            kd_loss = self.distillation_loss(input, output)
            loss = (1 - self.distill_weight) * task_loss + self.distill_weight * kd_loss
            parts['kd_loss'] = kd_loss.detach()
        return {
            'loss': loss + rate_loss,
            'output': output,
            **parts,
            'execution_rate': gates.detach().mean(),
            'block_rates': gates.detach().mean(0),
        }

    def distillation_loss(self, input: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """T^2 KL(teacher || model) of logits at temperature T, averaged over the batch.

        Raises:
            InputError: The teacher has other classes.
        """
        assert self.teacher is not None
        with torch.no_grad():
            target = F.log_softmax(self.teacher(input).float() / self.distill_temperature, dim=1)
        if target.shape != output.shape:
            raise InputError(f'must have the classes of the model: its logits are {list(target.shape)}, the '
                             f"model's {list(output.shape)}.", 'teacher')
        output = F.log_softmax(output.float() / self.distill_temperature, dim=1)
        return F.kl_div(output, target, reduction='batchmean', log_target=True) * self.distill_temperature ** 2


def _default_gate_loss(model: nn.Module) -> nn.Module:
    rates = [getattr(block, 'target_rate', 1.) for block in residual_blocks(model).values()]
    try:
        return ComputeTargetLoss(compute_cost(model), sum(rates) / len(rates), weight=10.)
    except ValueError as e:
        raise InputError(f'must be given for this model: {e}', 'gate_loss') from e
