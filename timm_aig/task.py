"""AIGTask: timm's classification task with a loss on the gates."""
from typing import Any, Callable, Dict, Optional, Union

import torch
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from .blocks import _require_gated_blocks, forward_gates
from .loss import TargetRateLoss

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
            device: Device for task tensors.
            dtype: Dtype for task tensors.
            verbose: Enable info logging.

        Raises:
            ValueError: The model has no gated blocks.
        """
        blocks = _require_gated_blocks(model)
        super().__init__(
            GatesModule(model), criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype,
            verbose=verbose)
        gate_loss = gate_loss or TargetRateLoss([block.target_rate for block in blocks.values()])
        self.gate_loss = gate_loss.to(device=self.device)

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
            that the gates cause) and 'execution_rate' (share of gated blocks run, in [0, 1]), scalars but for output.
        """
        output, gates = self.trainable_module(input)
        rate_loss = self.gate_loss(gates)
        return {
            'loss': self.criterion(output, target) + rate_loss,
            'output': output,
            'rate_loss': rate_loss.detach(),
            'execution_rate': gates.detach().mean(),
        }
