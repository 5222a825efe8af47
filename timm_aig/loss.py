"""Losses on the gates: the execution rate of each block, or the MACs share of the network at one or all budgets.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503, section 3.3
"""
from itertools import pairwise
from typing import TYPE_CHECKING, Any, List, Optional, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from .config import InputError
from .gate import ALL_OPEN

if TYPE_CHECKING:
    from .cost import Cost

__all__ = ['AnyBudgetLoss', 'ComputeTargetLoss', 'TargetRateLoss']


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
        if isinstance(target_rates, (int, float)):
            raise InputError(f'must be a list, one for each gated block, not {target_rates!r}.', 'target_rates')
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
            cost: 'Cost',
            target: float,
            weight: float = 1.,
            process_group: Optional[Any] = None,
    ) -> None:
        """
        Args:
            cost: MACs of the model, from compute_cost.
            target: Target share of the model's own MACs, in (0, 1].
            weight: Factor of the loss.
            process_group: Processes that share the global batch, as for DistributedDataParallel. Default: all.

        Raises:
            InputError: A target above 1, or below the MACs share of what always runs.
        """
        super().__init__()
        _require_reachable(cost, target, 'target')
        self.cost = cost
        self.target = target
        self.weight = weight
        self.process_group = process_group
        self.annealed = 1.  # share of the way from 1, all MACs, to the target

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        """Scalar loss of gates [B, L]."""
        share = self.cost.executed(global_mean(gates, self.process_group)[None]) / self.cost.total
        target = 1 + (self.target - 1) * self.annealed
        return self.weight * (share.squeeze(0) - target) ** 2


class AnyBudgetLoss(nn.Module):
    """Trains one model for all budgets at once.

    Each batch is split into groups. A group has an offset on the logits of its gates, and a target for its mean share
    of the MACs: both rise with its position in [0, 1], on a line. The first group always has the least budget and the
    last has all gates open; the positions between are drawn, one from each of as many equal parts of [0, 1].

    AIGTask applies the offsets, see use_gate_offset.
    """

    def __init__(
            self,
            cost: 'Cost',
            least: float = 0.3,
            weight: float = 30.,
            groups: int = 4,
            largest_offset: float = 6.,
            process_group: Optional[Any] = None,
    ) -> None:
        """
        Args:
            cost: MACs of the model, from compute_cost.
            least: Target share of the model's own MACs in the first group, in (0, 1).
            weight: Factor of the loss.
            groups: Number of groups, at least 3. A batch has at least one image for each.
            largest_offset: Offsets go from minus this to plus this, but for the last group, whose gates are all open.
            process_group: Processes that share the global batch, as for DistributedDataParallel. Default: all.

        Raises:
            InputError: A least share above 1, or below the MACs share of what always runs, or fewer than three groups.
        """
        super().__init__()
        _require_reachable(cost, least, 'least')
        if groups < 3:
            raise InputError(f'must be at least 3, not {groups!r}.', 'groups')
        self.cost = cost
        self.least = least
        self.weight = weight
        self.groups = groups
        self.largest_offset = largest_offset
        self.process_group = process_group
        self.annealed = 1.  # share of the way from all MACs to the targets
        self.targets: List[float] = []  # of all groups but the last

    def draw_offsets(self, batch_size: int) -> torch.Tensor:
        """Draw the offsets [B] and the targets of a batch. forward must be called for the same batch next.

        Raises:
            InputError: A batch with fewer images than groups.
        """
        if batch_size < self.groups:
            raise InputError(
                f'must be at least {self.groups}, one image for each budget, not {batch_size}.', 'batch_size')
        positions = (torch.arange(self.groups) + torch.rand(self.groups)) / self.groups
        if dist.is_available() and dist.is_initialized():  # groups are of the global batch
            positions = _broadcast(positions, self.process_group)
        positions[0] = 0.
        self.targets = (1 - self.annealed * (1 - self.least) * (1 - positions[:-1])).tolist()
        offsets = self.annealed * self.largest_offset * (2 * positions - 1)
        offsets[-1] = ALL_OPEN
        return offsets.repeat_interleave(torch.tensor(group_sizes(batch_size, self.groups)))

    def forward(self, gates: torch.Tensor) -> torch.Tensor:
        """Scalar loss of the gates [B, L] of the batch of the last draw_offsets."""
        shares = torch.stack([
            self.cost.executed(global_mean(part, self.process_group)[None]).squeeze(0) / self.cost.total
            for part in gates.split(group_sizes(len(gates), self.groups))[:-1]])
        return self.weight * ((shares - shares.new_tensor(self.targets)) ** 2).mean()


def group_sizes(batch: int, groups: int) -> List[int]:
    """Number of images of a batch in each group of AnyBudgetLoss."""
    bounds = [-(-i * batch // groups) for i in range(groups + 1)]
    return [stop - start for start, stop in pairwise(bounds)]


def _broadcast(positions: torch.Tensor, process_group: Optional[Any]) -> torch.Tensor:
    """The positions of the first process of the group."""
    device = 'cuda' if dist.get_backend(process_group) == 'nccl' else 'cpu'
    shared = positions.to(device)
    dist.broadcast(shared, dist.get_global_rank(process_group, 0) if process_group else 0, group=process_group)
    return shared.cpu()


def _require_reachable(cost: 'Cost', target: float, argument: str) -> None:
    least = cost.fixed / cost.total
    if not least <= target <= 1:
        raise InputError(f'must be in [{least:.3f}, 1], from what always runs to all MACs, not {target!r}.', argument)
