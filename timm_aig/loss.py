"""Losses on the gates: how often each block runs, or how much compute all of them use.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503, section 3.3
"""
from typing import Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from .cost import Cost

__all__ = ['TargetRateLoss', 'ComputeTargetLoss']


def global_mean(gates: torch.Tensor) -> torch.Tensor:
    """Execution rate of each block over the batches of all processes, differentiable.

    Under DistributedDataParallel, which averages gradients over processes, each process gets the gradient that one
    process would get with the whole batch. Batches of accumulated steps are not pooled: each counts by itself.

    Args:
        gates: Answers [B, L]; B may differ between processes.

    Returns:
        Rates [L] in [0, 1], float32 or float64.
    """
    if gates.ndim != 2 or len(gates) == 0:
        raise ValueError(f'gates must be [batch, blocks] with a batch of at least 1, not {list(gates.shape)}.')
    gates = gates if gates.dtype == torch.float64 else gates.float()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return gates.mean(dim=0)
    own = torch.cat([gates.sum(dim=0), gates.new_tensor([len(gates)])])
    total = own.detach().clone()
    dist.all_reduce(total)
    # every process has this same loss: the gradient that reaches `own` from all of them is that many times its own
    total = total + dist.get_world_size() * (own - own.detach())
    return total[:-1] / total[-1]


class TargetRateLoss(nn.Module):
    """`sum_l (mean_b z_bl - t_l)^2`, the mean over the global batch (paper, eq. 7)."""

    def __init__(self, target_rates: Sequence[float], weight: float = 1., reduction: str = 'sum') -> None:
        """
        Args:
            target_rates: Wanted execution rate of each gated block, L values in [0, 1].
            weight: Factor of the loss.
            reduction: Over the blocks, 'sum' (the paper's) or 'mean' (the authors' code).

        Raises:
            ValueError: A rate outside [0, 1] or an unknown reduction.
        """
        super().__init__()
        self.target_rates = tuple(float(rate) for rate in target_rates)
        if not all(0 <= rate <= 1 for rate in self.target_rates):
            raise ValueError(f'target_rates must be numbers in [0, 1], not {list(target_rates)}.')
        if reduction not in ('sum', 'mean'):
            raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}.")
        self.weight = weight
        self.reduction = reduction

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        """Loss, a scalar, of gates [B, L]."""
        if gates.ndim != 2 or gates.shape[1] != len(self.target_rates):
            raise ValueError(f'gates must be [batch, {len(self.target_rates)}], not {list(gates.shape)}.')
        rates = global_mean(gates)
        errors = (rates - rates.new_tensor(self.target_rates)) ** 2
        return self.weight * (errors.sum() if self.reduction == 'sum' else errors.mean())


class ComputeTargetLoss(nn.Module):
    """`(executed MACs / all MACs - target)^2`, the mean over the global batch: one target for the whole network."""

    def __init__(self, cost: Cost, target: float, weight: float = 1.) -> None:
        """
        Args:
            cost: Of the model, from compute_cost.
            target: Wanted MACs share, in (0, 1].
            weight: Factor of the loss.

        Raises:
            ValueError: A target outside (0, 1], or below what always runs.
        """
        super().__init__()
        least = cost.fixed / cost.total
        if not least <= target <= 1:
            raise ValueError(f'target must be in [{least:.3f}, 1], what always runs and all MACs, not {target!r}.')
        self.cost = cost
        self.target = target
        self.weight = weight

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        """Loss, a scalar, of gates [B, L]."""
        share = self.cost.executed(global_mean(gates)[None]) / self.cost.total
        return self.weight * (share.squeeze(0) - self.target) ** 2
