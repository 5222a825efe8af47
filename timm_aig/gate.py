"""Gate: a block's input -> open or closed, for each sample.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503, section 3
"""
import threading
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .config import InputError

__all__ = ['Gate']


class _GatePass(threading.local):
    """Per-thread state of the running forward pass: recording and overrides. Set by the functions of passes.

    Kept by thread and not on the modules, so that a model can be copied, checkpointed, compiled and shared between
    threads at any moment.
    """

    def __init__(self) -> None:  # in every thread; here and not on the class, since torch.compile guards instances
        self.record: Optional[List[Tuple[Gate, torch.Tensor]]] = None  # each gate that answered and its answers
        self.forced: Optional[Dict[int, torch.Tensor]] = None  # id of a gate -> the answers [B] to give instead, bool
        self.sample = False  # draw in eval too
        self.rows = slice(None)  # the part of the batch that runs now
        self.batch: Optional[int] = None  # size of the whole batch, if it runs in parts

    def forced_answers(self, gate: 'Gate', rows: int) -> Optional[torch.Tensor]:
        """Answers [rows], bool, that force_gates gives for a gate, None if it gives none."""
        if self.forced is None or id(gate) not in self.forced:
            return None
        answers = self.forced[id(gate)]
        batch = rows if self.batch is None else self.batch
        if len(answers) != batch:
            raise InputError(f'must be for the {batch} images of the input, not for {len(answers)}.', 'gates')
        return answers[self.rows]


gate_pass = _GatePass()


def sample_gate(logits: torch.Tensor, noise: bool = True) -> torch.Tensor:
    """Draw open (1) or closed (0) with probability softmax(logits), the Gumbel-max trick (paper, eq. 3 to 6).

    The forward value is exactly 0 or 1, the gradient that of softmax(logits + noise) (straight-through).

    Args:
        logits: Closed and open logits [B, 2].
        noise: Draw; False takes the larger logit, as eval does, and keeps the gradient.

    Returns:
        Answers [B], float32 whatever the dtype of logits (float64 for float64).
    """
    gumbel = torch.zeros_like(logits, dtype=torch.float32)  # also lifts half precision to float32
    if noise:
        # -log(-log(u)) is finite only inside (0, 1): from the smallest normal float32 to the largest below 1.
        uniform = torch.rand_like(gumbel).clamp(1.1754944e-38, 1. - 2. ** -24)
        gumbel = -torch.log(-torch.log(uniform))
    noisy = logits + gumbel
    soft = F.softmax(noisy, dim=1)[:, 1]
    hard = (noisy[:, 1] > noisy[:, 0]).to(soft.dtype)
    return hard + (soft - soft.detach())  # in this order, so that the value stays exactly 0 or 1


def runs_eagerly(x: torch.Tensor) -> bool:
    """Whether Python may branch on x: tracers hand in proxies and subclasses of Tensor."""
    return type(x) is torch.Tensor and not (torch.jit.is_tracing() or torch.compiler.is_compiling())


class _GlobalPool(torch.autograd.Function):
    """x.mean((2, 3)) whose gradient is an expanded view rather than a tensor of the size of x."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return (grad / (ctx.shape[2] * ctx.shape[3]))[:, :, None, None].expand(ctx.shape)


class Gate(nn.Module):
    """Decides from a block's input whether the block runs (paper, section 3.2).

    Global average pool -> fc1 -> bn -> ReLU -> fc2 -> two logits, index 1 for open. In training the answer is drawn,
    in eval it is `open + offset > closed`. A new gate opens with probability 0.87, and in eval for every sample.
    """

    offset: torch.Tensor

    def __init__(
            self,
            in_channels: int,
            hidden_channels: int = 16,
            norm: str = 'bn',
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_channels: Channels of the block's input.
            hidden_channels: Width of the hidden layer.
            norm: Norm of the hidden layer, 'bn' (the paper's) or 'none' (small batches, batch 1).
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(in_channels, hidden_channels, **dd)
        self.bn = nn.BatchNorm1d(hidden_channels, **dd) if norm == 'bn' else nn.Identity()
        self.fc2 = nn.Linear(hidden_channels, 2, **dd)
        self.noise = True  # draw in training, False: threshold as in eval, with the same gradient
        # added to the open logit before the eval threshold
        self.register_buffer('offset', torch.zeros((), **dd))
        self.budgets: Any = ()  # table of set_budget, the same for all gates of a model
        self.init_weights()

    def set_offset(self, offset: float) -> None:
        """Set the logit offset of the eval threshold."""
        self.offset.fill_(offset)

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f'{prefix}offset', self.offset)  # weights saved before the offset was a buffer
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize the last layer: P(open) = 0.87, whatever the input."""
        nn.init.normal_(self.fc2.weight, std=0.001)
        with torch.no_grad():
            self.fc2.bias[0] = 0.1
            self.fc2.bias[1] = 2.0

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Closed and open logits [B, 2] of block inputs [B, C, H, W]."""
        x = self.fc1(self._pool(x))
        return self.fc2(F.relu(self.bn(x)))

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if runs_eagerly(x):
                return _GlobalPool.apply(x)
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Answer for block inputs x.

        Args:
            x: Block inputs [B, C, H, W].

        Returns:
            Answers [B], 1. for open and 0. for closed, float32 whatever the dtype of x (float64 if drawn in float64).
        """
        logits = self.logits(x)
        sample = False
        if not torch.jit.is_scripting():
            sample = gate_pass.sample
        if self.training or sample:
            z = sample_gate(logits, self.noise or sample)
        else:
            z = (logits[:, 1] + self.offset > logits[:, 0]).float()
        if not torch.jit.is_scripting():
            z = self._note(z)
        return z

    def _note(self, z: torch.Tensor) -> torch.Tensor:
        """Serve the force_gates and forward_gates of this thread."""
        forced = gate_pass.forced_answers(self, len(z)) if gate_pass.forced is not None else None
        if forced is not None:
            z = forced.to(z.device, z.dtype)
        if gate_pass.record is not None:
            gate_pass.record.append((self, z))
        return z
