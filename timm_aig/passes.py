"""Forward passes that record the gates' answers, or give others: forward_gates, record_gates, force_gates."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Tuple

import torch
import torch.nn as nn

from .blocks import gated_blocks, require_gated_blocks
from .config import InputError
from .gate import Gate, gate_pass

__all__ = ['GateRecord', 'force_gates', 'forward_gates', 'record_gates']


class GateRecord:
    """The answers of a model's gates in the forward pass of a record_gates block."""

    def __init__(self, model: nn.Module) -> None:
        self.answers: List[Tuple[Gate, torch.Tensor]] = []
        self._gates = [block.gate for block in gated_blocks(model).values()]
        self._forced = gate_pass.forced or {}

    @property
    def gates(self) -> torch.Tensor:
        """Answers [B, L] as 0./1., for the B samples of the pass and the L gated blocks in order. In training they
        carry the straight-through gradient. A static model has L = 0 and B = 0.

        Raises:
            RuntimeError: A gated block did not run exactly once, or re-entrant checkpointing cut the gradient.
        """
        if not self._gates:
            return torch.zeros(0, 0)
        parts: Dict[int, List[torch.Tensor]] = {id(gate): [] for gate in self._gates}
        for gate, z in self.answers:
            if id(gate) in parts:
                parts[id(gate)].append(z)  # several in a row if the model runs its batch in parts
        if len({sum(map(len, answers)) for answers in parts.values()}) != 1 or not all(parts.values()):
            raise RuntimeError('gates are recorded of one forward pass that runs each gated block exactly once, in '
                               'the thread that calls it: not under DataParallel.')
        gates = torch.stack([torch.cat(answers) for answers in parts.values()], dim=1)
        if torch.is_grad_enabled() and not gates.requires_grad and any(map(self._should_have_gradient, self._gates)):
            raise RuntimeError(
                'the gates carry no gradient: re-entrant checkpointing drops it, '
                'call timm.layers.set_reentrant_ckpt(False).')
        return gates

    def _should_have_gradient(self, gate: Gate) -> bool:
        return gate.training and id(gate) not in self._forced and any(p.requires_grad for p in gate.parameters())


@contextmanager
def record_gates(model: nn.Module, sample: bool = False) -> Iterator[GateRecord]:
    """Record what the gates of a model answer in one forward pass, inside a `with` block and in this thread.

    For modules whose forward takes or returns something else than one batch of images, such as a detector::

        with timm_aig.record_gates(detector) as record:
            losses = detector(images, targets)
        rate_loss(record.gates)  # [B, L]

    Args:
        model: Any module with L gated blocks.
        sample: Draw the gates in eval too, as the authors' code does, instead of taking the threshold.
    """
    outer = gate_pass.record, gate_pass.sample
    record = GateRecord(model)
    gate_pass.record, gate_pass.sample = record.answers, sample
    try:
        yield record
    finally:
        gate_pass.record, gate_pass.sample = outer


def forward_gates(model: nn.Module, x: torch.Tensor, sample: bool = False) -> Tuple[Any, torch.Tensor]:
    """Forward pass that also returns what the gates answered.

    Args:
        model: Any module with gated blocks, each run once by its forward.
        x: Input of the model, batch first, [B, C, H, W].
        sample: Draw the gates in eval too, as the authors' code does, instead of taking the threshold.

    Returns:
        The model's own output, and the gates [B, L] as 0./1. for its L gated blocks in order. In training the gates
        carry the straight-through gradient. A static model has L = 0.

    Raises:
        RuntimeError: A gated block did not run exactly once, or re-entrant checkpointing cut the gates' gradient.
    """
    with record_gates(model, sample) as record:
        output = model(x)
    gates = record.gates
    return output, gates if gates.shape[1] else torch.zeros(len(x), 0, device=x.device)


@contextmanager
def force_gates(model: nn.Module, gates: torch.Tensor) -> Iterator[None]:
    """Answer for the gates of a model, inside a `with` block and in this thread. The gates are still computed.

    With gradient checkpointing, gradients are right only if the backward pass is inside the block, in this thread.

    Args:
        model: Model with L gated blocks.
        gates: Which block runs for which sample of the batches to come, bool or 0/1, [B, L].

    Raises:
        InputError: The model is static or `gates` is not [B, L]; inside the block, if an input's batch is not B.
    """
    blocks = require_gated_blocks(model)
    if gates.ndim != 2 or gates.shape[1] != len(blocks):
        raise InputError(f'must be [batch, {len(blocks)}] for {len(blocks)} gated blocks, not {list(gates.shape)}.',
                         'gates')
    outer = gate_pass.forced
    answers = (gates != 0).t()
    gate_pass.forced = {**(outer or {}), **{id(block.gate): z for block, z in zip(blocks.values(), answers)}}
    try:
        yield
    finally:
        gate_pass.forced = outer
