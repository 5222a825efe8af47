"""AIGConfig: which blocks of a network are gated, their target rates and the form of their gates.

Also InputError, the exception for bad arguments.
"""
from dataclasses import asdict, dataclass, fields
from typing import Any, Dict, List, Optional, Sequence, Tuple

__all__ = ['AIGConfig', 'InputError']

GATE_NORMS = ('bn', 'ln', 'none')


class InputError(ValueError):
    """A bad argument. The message names it and says what it was and what is allowed."""

    def __init__(self, problem: str, argument: Optional[str] = None) -> None:
        """
        Args:
            problem: Message without the argument's name.
            argument: Python name of the argument, which scripts show as a flag. None if it is no single argument.
        """
        super().__init__(problem if argument is None else f'{argument} {problem}')
        self.problem = problem
        self.argument = argument


def _paper_schedule(stages: Sequence[int], bottleneck: bool, t: float) -> List[float]:
    """Target rate of each block, given the number of blocks in each stage (paper, section 4.2). See AIGConfig."""
    if bottleneck and tuple(stages) == (3, 4, 6, 3):
        return [1., 1., .8, 1., t, t, t, 1., t, t, t, t, t, 1., .7, 1.]
    if bottleneck and tuple(stages) == (3, 4, 23, 3):
        return [1.] * 8 + [t] * 25
    rates = [1.] * stages[0]
    for depth in stages[1:]:
        rates += [1.] + [t] * (depth - 1)
    rates[-1] = 1.
    return rates


@dataclass(frozen=True)
class AIGConfig:
    """How to make a network adaptive.

    The schedule 'paper' (section 4.2) leaves blocks that always run without a gate. With t = target_rate, the published
    schedules are `[1, 1, .8, 1, t, t, t, 1, t, t, t, t, t, 1, .7, 1]` for ResNet-50 and `[1] * 8 + [t] * 25` for
    ResNet-101. The 0.8 and 0.7 belong to that of ResNet-50 and do not depend on t. Other networks get the rule behind
    these: the first stage, the first block of each stage and the last block always run.

    Args:
        target_rate: What training aims for, in (0, 1]: a share of the MACs (ComputeTargetLoss), or of the samples that
            run a gated block (TargetRateLoss).
        schedule: None gates every block at target_rate. 'paper' gates some of them, see above.
        target_rates: One rate for each block of the network in order, instead of target_rate and schedule. A block
            with rate 1 always runs and has no gate.
        gate_channels: Hidden width of a gate.
        gate_norm: Norm of a gate's hidden layer, 'bn' (paper), 'ln' (layer norm) or 'none'. None takes the family's
            own: 'ln' for ConvNeXt and vision transformers, 'bn' for the others.
        version: Version of this format.

    Raises:
        InputError: A field has a bad value.
    """
    target_rate: float = 0.6
    schedule: Optional[str] = None
    target_rates: Optional[Tuple[float, ...]] = None
    gate_channels: int = 16
    gate_norm: Optional[str] = None
    version: int = 1

    def __post_init__(self) -> None:
        _check_rate('target_rate', self.target_rate)
        if self.schedule not in (None, 'paper'):
            raise InputError(f"must be None or 'paper', not {self.schedule!r}.", 'schedule')
        if self.target_rates is not None:
            if not isinstance(self.target_rates, (list, tuple)):
                raise InputError(f'must be a list of rates, not {self.target_rates!r}.', 'target_rates')
            for i, rate in enumerate(self.target_rates):
                _check_rate(f'target_rates[{i}]', rate)
            object.__setattr__(self, 'target_rates', tuple(self.target_rates))
        if not isinstance(self.gate_channels, int) or self.gate_channels < 1:
            raise InputError(f'must be a whole number above 0, not {self.gate_channels!r}.', 'gate_channels')
        if self.gate_norm not in (None, *GATE_NORMS):
            raise InputError(f'must be None or one of {", ".join(GATE_NORMS)}, not {self.gate_norm!r}.', 'gate_norm')
        if self.version != 1:
            raise InputError(f'must be 1, not {self.version!r}: a newer timm_aig wrote this config.', 'version')

    def block_rates(self, stages: Sequence[int], bottleneck: bool = True) -> Tuple[float, ...]:
        """Target rate of each block of a network, 1 for blocks that always run.

        Args:
            stages: Number of blocks in each stage.
            bottleneck: True for Bottleneck blocks, False for BasicBlock.

        Raises:
            InputError: `target_rates` has a different length than the network has blocks.
        """
        if self.target_rates is not None:
            if len(self.target_rates) != sum(stages):
                raise InputError(
                    f'has {len(self.target_rates)} rates, the network has {sum(stages)} blocks.', 'target_rates')
            return self.target_rates
        if self.schedule == 'paper':
            return tuple(_paper_schedule(stages, bottleneck, self.target_rate))
        return (self.target_rate,) * sum(stages)

    def to_dict(self) -> Dict[str, Any]:
        """Fields that are not None, as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


AIG_ARGS = tuple(f.name for f in fields(AIGConfig) if f.name != 'version')  # also keywords of the entry points


def _check_rate(argument: str, rate: Any) -> None:
    if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise InputError(f'must be a number in (0, 1], not {rate!r}.', argument)
