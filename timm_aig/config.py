"""AIGConfig: which blocks of a ResNet are gated, how often they should run, and what their gates look like.

And InputError, which every module raises for a value that it cannot use.
"""
from dataclasses import asdict, dataclass, fields
from typing import Any, Dict, List, Optional, Sequence, Tuple

__all__ = ['AIGConfig', 'InputError']

GATE_NORMS = ('bn', 'none')
SCHEDULES = ('paper',)


class InputError(ValueError):
    """A value that cannot be used. The message says which, what it was and what is allowed."""

    def __init__(self, problem: str, argument: Optional[str] = None) -> None:
        """
        Args:
            problem: What is wrong, without the argument's name.
            argument: Its Python name, which scripts show as a flag. None if no single argument is at fault.
        """
        super().__init__(problem if argument is None else f'{argument} {problem}')
        self.problem = problem
        self.argument = argument


def _paper_schedule(stages: Sequence[int], bottleneck: bool, t: float) -> List[float]:
    """Target rate of each block for stages of so many blocks (paper, section 4.2).

    Networks of the shape of ResNet-50 and ResNet-101 as published. Others by the rule behind them: the first stage,
    the first block of each stage and the last block always run.
    """
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
    """How to make a ResNet adaptive.

    Args:
        target_rate: Share of samples that should run a gated block, in (0, 1].
        schedule: None, every block is gated at target_rate; 'paper', as in the paper, some blocks always run.
        target_rates: One rate for each block of the network, in order, instead of the two above. A block with
            rate 1 always runs and gets no gate.
        gate_channels: Hidden width of a gate.
        gate_norm: Norm of a gate's hidden layer, 'bn' or 'none'.
        version: Version of this format.

    Raises:
        ValueError: A field has a value that is not allowed.
    """
    target_rate: float = 0.6
    schedule: Optional[str] = None
    target_rates: Optional[Tuple[float, ...]] = None
    gate_channels: int = 16
    gate_norm: str = 'bn'
    version: int = 1

    def __post_init__(self) -> None:
        _check_rate('target_rate', self.target_rate)
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise ValueError(f'schedule must be None or one of {", ".join(SCHEDULES)}, not {self.schedule!r}.')
        if self.target_rates is not None:
            if isinstance(self.target_rates, (str, bytes)) or not isinstance(self.target_rates, Sequence):
                raise ValueError(f'target_rates must be a list of rates, not {self.target_rates!r}.')
            for i, rate in enumerate(self.target_rates):
                _check_rate(f'target_rates[{i}]', rate)
            object.__setattr__(self, 'target_rates', tuple(self.target_rates))
        if not _is_int(self.gate_channels) or self.gate_channels < 1:
            raise ValueError(f'gate_channels must be a whole number above 0, not {self.gate_channels!r}.')
        if self.gate_norm not in GATE_NORMS:
            raise ValueError(f'gate_norm must be one of {", ".join(GATE_NORMS)}, not {self.gate_norm!r}.')
        if self.version != 1:
            raise ValueError(f'version must be 1, not {self.version!r}: a newer timm_aig wrote this config.')

    def block_rates(self, stages: Sequence[int], bottleneck: bool = True) -> Tuple[float, ...]:
        """Target rate of each block of a network, 1 for one that always runs.

        Args:
            stages: Number of blocks in each stage.
            bottleneck: The blocks are Bottleneck, not BasicBlock.

        Raises:
            ValueError: `target_rates` has another length than the network has blocks.
        """
        if self.target_rates is not None:
            if len(self.target_rates) != sum(stages):
                raise ValueError(
                    f'target_rates has {len(self.target_rates)} rates, the network has {sum(stages)} blocks.')
            return self.target_rates
        if self.schedule == 'paper':
            return tuple(_paper_schedule(stages, bottleneck, self.target_rate))
        return (self.target_rate,) * sum(stages)

    def to_dict(self) -> Dict[str, Any]:
        """Fields that differ from None as plain JSON types."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> 'AIGConfig':
        """Inverse of to_dict.

        Raises:
            ValueError: An unknown field, or a value that is not allowed.
        """
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f'unknown AIGConfig field {", ".join(unknown)}, known are {", ".join(known)}.')
        return cls(**values)


AIG_ARGS = tuple(f.name for f in fields(AIGConfig) if f.name != 'version')  # also keywords of the entry points


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_rate(name: str, rate: Any) -> None:
    if not (_is_int(rate) or isinstance(rate, float)) or not 0 < rate <= 1:
        raise ValueError(f'{name} must be a number in (0, 1], not {rate!r}.')
