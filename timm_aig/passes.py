"""Record or override the gates of a forward pass: forward_gates, record_gates, force_gates, use_gate_offset."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn

from .blocks import gated_blocks, require_gated_blocks
from .config import InputError
from .gate import ALL_OPEN, Gate, gate_pass, runs_eagerly

__all__ = ['GateRecord', 'force_gates', 'forward_gates', 'record_gates', 'set_pass', 'use_gate_offset']


class GateRecord:
    """Answers of the gated blocks of a model inside a `with record_gates` block."""

    def __init__(self, model: nn.Module) -> None:
        self.answers: List[Tuple[int, torch.Tensor, bool]] = []
        self._blocks = list(gated_blocks(model).values())

    @property
    def gates(self) -> torch.Tensor:
        """Answers [B, L], 0. or 1., of the L gated blocks in order for the B samples of the pass, or of all passes.

        In training they carry the straight-through gradient. For a static model they are [0, 0].

        Raises:
            RuntimeError: A gated block did not run as often as the others, or in training the gates have no gradient:
                the pass ran under no_grad, or re-entrant checkpointing dropped it.
        """
        if not self._blocks:
            return torch.zeros(0, 0)
        parts: Dict[int, List[torch.Tensor]] = {id(block): [] for block in self._blocks}
        for block, z, _ in self.answers:
            if block in parts:
                parts[block].append(z)  # several if the model runs its batch in parts
        if len({sum(map(len, answers)) for answers in parts.values()}) != 1 or not all(parts.values()):
            raise RuntimeError(
                'record_gates needs a forward pass that runs each gated block exactly once, in this thread. '
                'DataParallel runs other threads.')
        gates = torch.stack([torch.cat(answers) for answers in parts.values()], dim=1)
        if torch.is_grad_enabled() and not gates.requires_grad and self._should_have_gradient():
            raise RuntimeError(
                'The gates have no gradient: the pass ran under no_grad, or re-entrant checkpointing dropped it, which '
                'timm.layers.set_reentrant_ckpt(False) switches off.')
        return gates

    def _should_have_gradient(self) -> bool:
        forced = {block for block, _, is_forced in self.answers if is_forced}
        gates = [m for block in self._blocks if id(block) not in forced for m in block.modules()
                 if isinstance(m, Gate) and m.training]
        return any(p.requires_grad for gate in gates for p in gate.parameters())


@contextmanager
def record_gates(model: nn.Module, sample: bool = False) -> Iterator[GateRecord]:
    """Record the gates of one forward pass, inside a `with` block and in this thread.

    For modules whose forward takes more than one batch of images, such as a detector:

        with timm_aig.record_gates(detector) as record:
            losses = detector(images, targets)
        loss = sum(losses.values()) + rate_loss(record.gates)  # gates [B, L]

    Args:
        model: Any module with L gated blocks.
        sample: Draw the gates in eval too, as the authors' code does.
    """
    record = GateRecord(model)
    with set_pass(record=record.answers, sample=sample):
        yield record


def forward_gates(model: nn.Module, x: torch.Tensor, sample: bool = False) -> Tuple[Any, torch.Tensor]:
    """Forward pass that also returns the answers of the gates.

    Args:
        model: Any module with gated blocks that runs each of them once.
        x: Images [B, C, H, W].
        sample: Draw the gates in eval too, as the authors' code does.

    Returns:
        The model's output, and gates [B, L], 0. or 1., of its L gated blocks in order (L = 0 for a static model).
        In training the gates carry the straight-through gradient.

    Raises:
        RuntimeError: A gated block did not run exactly once for each image, or re-entrant checkpointing dropped the
            gradient.
    """
    with record_gates(model, sample) as record:
        output = model(x)
    gates = record.gates
    if not gates.shape[1]:
        return output, torch.zeros(len(x), 0, device=x.device)
    if runs_eagerly(x) and len(gates) != len(x):
        raise RuntimeError(
            f'{len(gates)} of {len(x)} images ran the gates. Of a Cascade, rounds() tells what each image runs.')
    return output, gates


@contextmanager
def force_gates(
        model: nn.Module,
        gates: Optional[torch.Tensor] = None,
        *,
        open: Optional[torch.Tensor] = None,
) -> Iterator[None]:
    """Override the answers of the gates, inside a `with` block and in this thread. The gates still run.

    DataParallel runs the model in other threads, which ignore it.

    Gradient checkpointing runs the gates again: on a CPU run the backward pass inside the block too. On a GPU, where it
    runs in another thread, checkpointing must be off.

    Args:
        model: Model with L gated blocks.
        gates: Answers [B, L], bool or 0/1, for each batch inside the block.
        open: Old name of `gates`.

    Raises:
        InputError: The model is static or `gates` is not [B, L]. Inside the block: a batch is not of size B.
    """
    gates = open if gates is None else gates
    blocks = require_gated_blocks(model)
    if not torch.is_tensor(gates) or gates.ndim != 2 or gates.shape[1] != len(blocks):
        raise InputError(f'must be a tensor [batch, {len(blocks)}] for {len(blocks)} gated blocks, '
                         f'not {list(gates.shape) if torch.is_tensor(gates) else gates!r}.', 'gates')
    answers = {id(block): z for block, z in zip(blocks.values(), (gates != 0).t())}
    with set_pass(forced={**(gate_pass.forced or {}), **answers}):
        yield


@contextmanager
def use_gate_offset(offset: Union[float, torch.Tensor]) -> Iterator[None]:
    """Replace the gate offset of every model, inside a `with` block and in this thread. Training adds it too.

    DataParallel runs the model in other threads, which ignore it.

    Gradient checkpointing runs the gates again: on a CPU run the backward pass inside the block too. On a GPU, where it
    runs in another thread, checkpointing must be off.

    Args:
        offset: Number that the gates add to the open logit, or one for each image of the batch [B].

    Raises:
        InputError: An offset is nan, or it has more than one dimension.
    """
    offset = torch.as_tensor(offset, dtype=torch.float32)
    if offset.ndim > 1 or offset.isnan().any():
        raise InputError(f'must be a number or [B] numbers, not {offset!r:.80}.', 'offset')
    with set_pass(offset=offset.clamp(-ALL_OPEN, ALL_OPEN)):
        yield


@contextmanager
def set_pass(**values: Any) -> Iterator[None]:
    """Set attributes of gate_pass inside a `with` block, and restore them afterwards."""
    outer = {name: getattr(gate_pass, name) for name in values}
    vars(gate_pass).update(values)
    try:
        yield
    finally:
        vars(gate_pass).update(outer)
