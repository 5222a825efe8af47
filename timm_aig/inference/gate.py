"""InferenceGate: a gate in few calls, for eval."""
from typing import Any, List, Tuple

import torch
import torch.nn as nn
from torch.nn.utils.fusion import fuse_linear_bn_eval

from ..blocks import Rows, open_rows
from ..compat import has_forward_hooks
from ..gate import Gate, gate_pass, is_on_cpu
from .fused import is_plain

__all__ = ['InferenceGate', 'can_fold', 'is_plain_gate', 'open_minus_closed', 'pool']


class InferenceGate(Gate):
    """A gate in as few calls as possible: between large convolutions each short call costs 20 to 100 us.

    Modifications:
        * the batch norm is folded into fc1
        * fc2 has one output, open minus closed logit
        * for a single sample on a CPU, Python computes ReLU and fc2
    """

    def __init__(self, gate: Gate) -> None:
        nn.Module.__init__(self)
        fc1 = gate.fc1 if isinstance(gate.bn, nn.Identity) else fuse_linear_bn_eval(gate.fc1, gate.bn)
        self.weight1 = nn.Parameter(fc1.weight.detach(), False)
        self.bias1 = nn.Parameter(fc1.bias.detach(), False)
        weight2, bias2 = open_minus_closed(gate)
        self.weight2, self.bias2 = nn.Parameter(weight2, False), nn.Parameter(bias2, False)
        self.units = list(zip(self.bias1.tolist(), self.weight2[0].tolist()))  # bias and output weight of hidden units
        self.score = self.bias2.item()
        self.register_buffer('offset', gate.offset.detach().clone())
        self.threshold = -self.score - self.offset.item()
        self.budgets = gate.budgets

    def set_offset(self, offset: float) -> None:
        super().set_offset(offset)
        self.threshold = -self.score - self.offset.item()

    def answers(self, block: nn.Module, pooled: torch.Tensor, scale: float) -> torch.Tensor:
        """Answers [B] of a block's gate, from its inputs as returned by pool."""
        scores = self.scores(pooled, scale)
        offset = self.offset if gate_pass.offset is None else gate_pass.offset_like(scores)
        if gate_pass.sample:
            threshold = torch.rand_like(scores).logit() - offset
        else:
            threshold = -offset
        return gate_pass.note(block, (scores > threshold).float())

    def scores(self, pooled: torch.Tensor, scale: float) -> torch.Tensor:
        """Open minus closed logit [B], float32."""
        hidden = torch.addmm(self.bias1, pooled, self.weight1.t(), alpha=scale).relu()
        return (torch.mv(hidden, self.weight2[0]) + self.bias2).float()

    def open_rows(self, block: nn.Module, pooled: torch.Tensor, scale: float) -> Rows:
        """Indices of the samples that run a block, as open_rows of blocks.py returns them."""
        if gate_pass.sample or not is_on_cpu(pooled):
            return open_rows(self.answers(block, pooled, scale))
        scores = self._host_scores(pooled, scale)
        if gate_pass.offset is not None and gate_pass.offset.ndim:  # one for each sample
            offsets = gate_pass.offset_like(pooled).tolist()
            answers = [score + self.score + offset > 0 for score, offset in zip(scores, offsets)]
        else:
            threshold = self.threshold if gate_pass.offset is None else -self.score - gate_pass.offset.item()
            answers = [score > threshold for score in scores]
        if gate_pass.forced is not None or gate_pass.record is not None:
            answers = gate_pass.note(block, torch.tensor(answers, dtype=torch.float32, device=pooled.device)).tolist()
        return [row for row, answer in enumerate(answers) if answer]

    def _host_scores(self, pooled: torch.Tensor, scale: float) -> List[float]:
        """Open minus closed logit of each sample, without fc2's bias."""
        if len(pooled) != 1:
            hidden = torch.addmm(self.bias1, pooled, self.weight1.t(), alpha=scale).relu_()
            return (hidden @ self.weight2[0]).tolist()
        score = 0.
        for unit, (bias, weight) in zip((self.weight1 * pooled).sum(1).tolist(), self.units):
            unit = unit * scale + bias
            if unit > 0:
                score += unit * weight
        return [score]


def open_minus_closed(gate: Gate) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weight [1, gate_channels] and bias [1] of fc2 with one output, open minus closed logit."""
    weight, bias = gate.fc2.weight.detach(), gate.fc2.bias.detach()
    return weight[1:] - weight[:1], bias[1:] - bias[:1]


def can_fold(gate: Any) -> bool:
    """Whether InferenceGate computes what a gate does."""
    return is_plain_gate(gate) and type(gate.bn) in (nn.Identity, nn.BatchNorm1d, nn.SyncBatchNorm)


def is_plain_gate(gate: Any) -> bool:
    """Whether a gate is a Gate of plain layers, without adapters or hooks."""
    return (type(gate) is Gate and is_plain(gate.fc1, nn.Linear) and is_plain(gate.fc2, nn.Linear)
            and not any(map(has_forward_hooks, gate.modules())))


def pool(x: torch.Tensor) -> Tuple[torch.Tensor, float]:
    """Global average pool of x [B, C, H, W] as a tensor [B, C] and a factor for it.

    The factor saves a call: the sum stays undivided. In half precision, where a sum may overflow, it is 1.
    """
    if x.dtype != torch.float32:
        return x.mean((2, 3)), 1.
    return x.sum((2, 3)), 1 / (x.shape[2] * x.shape[3])
