"""Gate: from a block's input to open or closed, for each sample.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503, section 3
"""
import threading
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .compat import in_transform, loaded_by_transformers
from .config import InputError

__all__ = ['Gate']

ALL_OPEN = 1e4  # offset that opens every gate in spite of the noise


class _GatePass(threading.local):
    """Per-thread state of the running forward pass: recording and overrides. Set by passes.py.

    It is not kept on the modules, so a model can be copied, checkpointed, compiled and shared between threads.
    """

    def __init__(self) -> None:  # runs in every thread; instance attributes, since torch.compile guards only those
        self.record: Optional[List[Tuple[int, torch.Tensor, bool]]] = None  # id of a block, its answers, if forced
        self.forced: Optional[Dict[int, torch.Tensor]] = None  # id of a block -> bool [B], answers instead
        self.sample = False  # draw in eval too
        self.offset: Optional[torch.Tensor] = None  # of all gates: a number or one for each sample [B]
        self.rows = slice(None)  # part of the batch that is running
        self.batch: Optional[int] = None  # size of the whole batch if it runs in parts

    def own_rows(self, values: torch.Tensor, count: int, argument: str) -> torch.Tensor:
        """Those of values, one for each image of the whole batch [B], that belong to the `count` images that run."""
        batch = count if self.batch is None else self.batch
        if len(values) != batch:
            raise InputError(f'must be for the {batch} images of the input, not for {len(values)}.', argument)
        return values[self.rows]

    def offset_like(self, logits: torch.Tensor) -> torch.Tensor:
        """The offset, a number or one for each row of logits [B, ...]."""
        assert self.offset is not None
        self.offset = self.offset.to(logits.device)  # once a pass, not once a gate
        offset = self.offset.to(logits.dtype)
        return self.own_rows(offset, len(logits), 'offset') if offset.ndim else offset

    def note(self, block: nn.Module, z: torch.Tensor) -> torch.Tensor:
        """Record and return the answers of a block: those of its gate, z [B], or forced ones.

        The block calls this, not its gate: a forward hook or a module around the gate may have changed z.
        """
        is_forced = self.forced is not None and id(block) in self.forced
        if is_forced:
            z = self.own_rows(self.forced[id(block)], len(z), 'gates').to(z.device, z.dtype)  # type: ignore[index]
        if self.record is not None:
            self.record.append((id(block), z, is_forced))
        return z


gate_pass = _GatePass()


def sample_gate(logits: torch.Tensor, noise: bool = True) -> torch.Tensor:
    """Draw open (1) or closed (0) with probability softmax(logits), the Gumbel-max trick (paper, eq. 3 to 6).

    The forward value is exactly 0 or 1. The gradient is that of softmax(logits + noise) (straight-through).

    Args:
        logits: Closed and open logits [B, 2].
        noise: True draws. False takes the larger logit, as eval does, and keeps the gradient.

    Returns:
        Answers [B], float32 for any dtype of logits but float64, which stays.
    """
    gumbel = torch.zeros_like(logits, dtype=torch.float32)  # float32 noise for half precision too
    if noise:
        # -log(-log(u)) is finite only inside (0, 1): clamp to the smallest normal float32 and the largest below 1
        uniform = torch.rand_like(gumbel).clamp(1.1754944e-38, 1. - 2. ** -24)
        gumbel = -torch.log(-torch.log(uniform))
    noisy = logits + gumbel
    soft = F.softmax(noisy, dim=1)[:, 1]
    hard = (noisy[:, 1] > noisy[:, 0]).to(soft.dtype)
    return hard + (soft - soft.detach())  # this order keeps the value exactly 0 or 1


def runs_eagerly(x: torch.Tensor) -> bool:
    """Whether Python may branch on the values of x. Tracers pass proxies and subclasses of Tensor."""
    return type(x) is torch.Tensor and not (
        torch.jit.is_tracing() or torch.compiler.is_compiling() or in_transform())


def is_on_cpu(x: torch.Tensor) -> bool:
    """Whether Python may read values of x without waiting for an accelerator."""
    return x.device.type == 'cpu'


class _GlobalPool(torch.autograd.Function):
    """x.mean((2, 3)) with an expanded view as its gradient, not a tensor of the size of x."""

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

    Global average pool -> fc1 -> bn -> ReLU -> fc2 -> two logits, of which index 1 is open. Training draws the answer,
    eval takes `open + offset > closed`. A new gate opens with probability 0.87 in training and always in eval.
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
            norm: Norm of the hidden layer: 'bn' (paper), or 'ln', layer norm, or 'none', which train with a batch of 1.

        Raises:
            InputError: Another norm.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = nn.Linear(in_channels, hidden_channels, **dd)
        norms: Dict[str, Any] = {'bn': nn.BatchNorm1d, 'ln': nn.LayerNorm, 'none': nn.Identity}
        if norm not in norms:
            raise InputError(f'must be one of {", ".join(norms)}, not {norm!r}.', 'norm')
        self.bn = norms[norm](hidden_channels, **dd)
        self.fc2 = nn.Linear(hidden_channels, 2, **dd)
        self.noise = True  # False: training takes the larger logit instead of drawing
        self.register_buffer('offset', torch.zeros((), **dd))  # added to the open logit in eval
        self.register_load_state_dict_pre_hook(_before_load)
        self.budgets: Any = ()  # table of set_budget, the same for all gates of a model
        self.init_weights()

    def set_offset(self, offset: float) -> None:
        """Set the logit that eval adds to the open one."""
        self.offset.fill_(min(max(offset, -ALL_OPEN), ALL_OPEN))  # the mean of infinities in an EMA would be nan

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize fc2 and the offset so that P(open) is 0.87 for any input."""
        nn.init.normal_(self.fc2.weight, std=0.001)
        with torch.no_grad():
            self.fc2.bias[0] = 0.1
            self.fc2.bias[1] = 2.0
        self.set_offset(0.)

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Open a gate whose layers transformers has initialized, in from_config or for weights that lack the gates.

        transformers calls this method, by timm's name for it, after it has filled each Linear as a classifier.
        """
        loaded = loaded_by_transformers(self.fc2.weight)
        if not loaded and not self.fc2.bias.any():
            self.init_weights()
        elif loaded and not loaded_by_transformers(self.offset):  # weights of timm_aig before 0.2
            self.set_offset(0.)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Closed and open logits [B, 2] for block inputs [B, C, H, W]."""
        x = self.fc1(self._pool(x))
        return self.fc2(F.relu(self.bn(x)))

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if runs_eagerly(x):
                if len(x) == 1 and self.bn.training and isinstance(self.bn, nn.BatchNorm1d):
                    raise InputError(
                        'a batch of one image cannot train the batch norms of the gates: leave it out, as drop_last '
                        "of a DataLoader does, or make the gates with gate_norm='none'.")
                return _GlobalPool.apply(x)
        return x.mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Answers [B], 1. for open and 0. for closed, for block inputs [B, C, H, W].

        They are float32 for any dtype of x, but float64 in training with float64.
        """
        logits = self.logits(x)
        sample = False
        offset = self.offset
        if not torch.jit.is_scripting():
            sample = gate_pass.sample
            if gate_pass.offset is not None:
                offset = gate_pass.offset_like(logits)
            shifted = (gate_pass.offset is not None) if self.training else sample  # training ignores the own offset
            if shifted:
                logits = torch.stack([logits[:, 0], logits[:, 1] + offset], 1)
        if self.training or sample:
            z = sample_gate(logits, self.noise or sample)
        else:
            z = (logits[:, 1] + offset > logits[:, 0]).float()
        return z


def _before_load(gate: Gate, state_dict: Dict[str, Any], prefix: str, *args: Any) -> None:
    """Keep the gate's offset if the weights have none, as those saved before timm_aig 0.2; drop others' budgets."""
    state_dict.setdefault(f'{prefix}offset', gate.offset)
    weight = state_dict.get(f'{prefix}fc2.weight')
    if gate.budgets and weight is not None and not torch.equal(weight.to(gate.fc2.weight), gate.fc2.weight):
        gate.budgets = ()
