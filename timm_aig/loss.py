"""Losses on the gates: the execution rate of each block, or the MACs share of the network.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503, section 3.3
"""
from typing import Any, Optional, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from .config import InputError
from .cost import Cost

__all__ = ['TargetRateLoss', 'ComputeTargetLoss']


def global_mean(gates: torch.Tensor, process_group: Optional[Any] = None) -> torch.Tensor:
    """Differentiable execution rate of each block over the batches of all processes.

    DistributedDataParallel averages gradients over processes, so each process gets the gradient that one process
    would get with the whole batch. Steps of gradient accumulation are not pooled.

    Args:
        gates: Answers [B, L]. B may differ between processes, and be 0 in some.
        process_group: Process group to average over, as for DistributedDataParallel. Default: all processes.

    Returns:
        Rates [L] in [0, 1], float32 or float64.

    Raises:
        InputError: gates is not [B, L] or B is 0 in all processes.
    """
    if gates.ndim != 2:
        raise InputError(f'must be [batch, blocks], not {list(gates.shape)}.', 'gates')
    gates = gates if gates.dtype == torch.float64 else gates.float()
    processes = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
    if processes == 1:
        _require_images(len(gates))
        return gates.mean(dim=0)
    own = torch.cat([gates.sum(dim=0), gates.new_tensor([len(gates)])])
    total = own.detach().clone()
    dist.all_reduce(total, group=process_group)
    if len(gates) == 0:  # other processes may have images, and wait for this one above
        _require_images(total[-1].item())
    # the loss is the same in all processes, so the sum of its gradients to `own` is `processes` times one of them
    total = total + processes * (own - own.detach())
    return total[:-1] / total[-1]


def _require_images(count: float) -> None:
    if not count:
        raise InputError('must be [batch, blocks] with a batch of at least 1, not 0.', 'gates')


class TargetRateLoss(nn.Module):
    """`sum_l (mean_b z_bl - t_l)^2` with the mean over the global batch (paper, eq. 7)."""

    def __init__(
            self,
            target_rates: Sequence[float],
            weight: float = 1.,
            reduction: str = 'sum',
            process_group: Optional[Any] = None,
    ) -> None:
        """
        Args:
            target_rates: Target execution rate of each gated block, L values in [0, 1].
            weight: Factor of the loss.
            reduction: Reduction over blocks: 'sum' (paper) or 'mean' (authors' code).
            process_group: Processes that share the global batch, as for DistributedDataParallel. Default: all.

        Raises:
            InputError: A rate outside [0, 1] or an unknown reduction.
        """
        super().__init__()
        self.target_rates = tuple(float(rate) for rate in target_rates)
        if not all(0 <= rate <= 1 for rate in self.target_rates):
            raise InputError(f'must be numbers in [0, 1], not {list(target_rates)}.', 'target_rates')
        if reduction not in ('sum', 'mean'):
            raise InputError(f"must be 'sum' or 'mean', not {reduction!r}.", 'reduction')
        self.weight = weight
        self.reduction = reduction
        self.process_group = process_group

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        """Scalar loss of gates [B, L]."""
        if gates.ndim != 2 or gates.shape[1] != len(self.target_rates):
            raise InputError(f'must be [batch, {len(self.target_rates)}], not {list(gates.shape)}.', 'gates')
        rates = global_mean(gates, self.process_group)
        errors = (rates - rates.new_tensor(self.target_rates)) ** 2
        return self.weight * (errors.sum() if self.reduction == 'sum' else errors.mean())


class ComputeTargetLoss(nn.Module):
    """`(executed MACs / all MACs - target)^2` with the mean over the global batch: one target for the network."""

    def __init__(
            self,
            cost: Cost,
            target: float,
            weight: float = 1.,
            process_group: Optional[Any] = None,
    ) -> None:
        """
        Args:
            cost: MACs of the model, from compute_cost.
            target: Target MACs share, in (0, 1].
            weight: Factor of the loss.
            process_group: Processes that share the global batch, as for DistributedDataParallel. Default: all.

        Raises:
            InputError: A target above 1, or below the MACs share of what always runs.
        """
        super().__init__()
        least = cost.fixed / cost.total
        if not least <= target <= 1:
            raise InputError(
                f'must be in [{least:.3f}, 1], from what always runs to all MACs, not {target!r}.', 'target')
        self.cost = cost
        self.target = target
        self.weight = weight
        self.process_group = process_group

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        """Scalar loss of gates [B, L]."""
        share = self.cost.executed(global_mean(gates, self.process_group)[None]) / self.cost.total
        return self.weight * (share.squeeze(0) - self.target) ** 2
