"""Cascade: models, or one adaptive model at several budgets, in rounds by the confidence of the answer.

Paper: `Wisdom of Committees: An Overlooked Approach To Faster and More Accurate Models` -
https://arxiv.org/abs/2012.01988
"""
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .budget import budget_offset, budget_table
from .config import InputError
from .cost import Cost, compute_cost
from .passes import forward_gates, use_gate_offset
from .training.data import label_names_of

if TYPE_CHECKING:
    from .training.thresholds import CascadePoint

__all__ = ['Cascade', 'Rounds', 'confidence']

_logger = logging.getLogger(__name__)

Stage = Union[nn.Module, Tuple[nn.Module, Optional[float]]]


class Rounds(NamedTuple):
    """Answers of a cascade for B images.

    Args:
        logits: Of the last stage that saw the image, [B, num_classes].
        stages: How many stages saw it, [B], from 1.
        macs: MACs of all of them, float64 [B] (float32 on mps).
    """
    logits: torch.Tensor
    stages: torch.Tensor
    macs: torch.Tensor


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Largest class probability, [B] in [0, 1], of logits [B, num_classes]."""
    return logits.float().softmax(1).amax(1)


class Cascade(nn.Module):
    """Runs an image through one model after the other until an answer is sure.

    An image goes on to the next stage while its largest class probability is below the stage's threshold. The next
    stage gets only these images. Its answer replaces the one before.

        cascade = timm_aig.Cascade([small, large])             # any two classifiers with the same classes
        cascade = timm_aig.Cascade([(model, .5), (model, 1.)])  # an adaptive model at two calibrated budgets
        cascade.calibrate(loader, macs=.5)
        logits = cascade(x)
    """

    def __init__(self, stages: Sequence[Stage], thresholds: Union[float, Sequence[float]] = 0.9) -> None:
        """
        Args:
            stages: Models, or pairs of an adaptive model and one of its calibrated budgets. All take the same images
                and give logits of the same classes.
            thresholds: One for each stage but the last, or the same for all, in [0, 1]. 0 stops all images.

        Raises:
            InputError: Fewer than two stages, stages with other classes, a bad threshold, or a budget that its model is
                not calibrated for.
        """
        super().__init__()
        if not isinstance(stages, (list, tuple)) or len(stages) < 2:
            raise InputError(f'must be a list of at least two, not {stages!r:.80}.', 'stages')
        pairs = [stage if isinstance(stage, (list, tuple)) else (stage, None) for stage in stages]
        for stage in pairs:
            if len(stage) != 2 or not isinstance(stage[0], nn.Module):
                raise InputError(f'must be models or pairs of a model and a budget, not {stage!r:.80}.', 'stages')
        models = list(dict.fromkeys(model for model, _ in pairs))
        classes = [getattr(model, 'num_classes', None) for model in models]
        if len({*classes} - {None}) > 1:
            raise InputError(f'must have the same classes, not {", ".join(map(str, classes))}.', 'stages')
        configs = [getattr(model, 'pretrained_cfg', None) or {} for model in models]
        if len({tuple(label_names_of(model)) for model in models} - {()}) > 1:
            raise InputError('must have their classes in the same order.', 'stages')
        for name in ('mean', 'std'):
            values = {tuple(config[name]) for config in configs if config.get(name)}
            if len(values) > 1:
                _logger.warning('The models of the cascade differ in the %s of their images: %s.', name, values)
        self.models = nn.ModuleList(models)  # one model may be in several stages
        self.order = [models.index(model) for model, _ in pairs]
        self.set_budgets([budget for _, budget in pairs])
        self.set_thresholds(thresholds)
        self._costs: Dict[Any, List[Cost]] = {}  # of the models, by input size

    @property
    def num_classes(self) -> Optional[int]:
        """Number of classes, None if the models do not say."""
        models: Any = self.models
        return next((model.num_classes for model in models if hasattr(model, 'num_classes')), None)

    def set_thresholds(self, thresholds: Union[float, Sequence[float]]) -> None:
        """Set the threshold of each stage but the last, or one for all."""
        count = len(self.order) - 1
        values = [thresholds] * count if isinstance(thresholds, (int, float)) else list(thresholds)
        if len(values) != count or not all(0 <= value <= 1 for value in values):
            raise InputError(f'must be {count} in [0, 1], not {thresholds!r}.', 'thresholds')
        self.thresholds = tuple(map(float, values))

    def set_budgets(self, budgets: Sequence[Optional[float]]) -> None:
        """Set the budget of each stage; None leaves a model's own gate offset."""
        if len(budgets) != len(self.order):
            raise InputError(f'must be {len(self.order)}, one for each stage, not {budgets!r}.', 'budgets')
        for stage, budget in enumerate(budgets):
            self._offset(stage, budget)
        self.budgets = tuple(budgets)

    @property
    def offsets(self) -> Tuple[Optional[float], ...]:
        """Gate offset of each stage, None for a model's own."""
        return tuple(self._offset(stage, budget) for stage, budget in enumerate(self.budgets))

    def _offset(self, stage: int, budget: Optional[float]) -> Optional[float]:
        if budget is None:
            return None
        table = budget_table(self.models[self.order[stage]])
        if not table:
            raise InputError(f'has {budget!r} for a stage without calibrated budgets.', 'budgets')
        return budget_offset(table, budget)

    def costs(self, input_size: Optional[Tuple[int, int, int]] = None) -> List[Cost]:
        """MACs of each stage's model. Raises as compute_cost does."""
        if input_size not in self._costs:
            self._costs[input_size] = [compute_cost(model, input_size) for model in self.models]
        return [self._costs[input_size][index] for index in self.order]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        return self._run(x, None)[0]

    def rounds(self, x: torch.Tensor) -> Rounds:
        """Logits, number of stages and MACs of images [B, C, H, W].

        Raises:
            InputError: A model whose MACs cannot be counted, such as an optimized one.
        """
        costs = self.costs(tuple(x.shape[1:]))  # type: ignore[arg-type]
        logits, seen = self._run(x, costs)
        stages = torch.zeros(len(x), dtype=torch.long, device=x.device)
        macs = torch.zeros(len(x), dtype=seen[0][1].dtype, device=x.device)
        for rows, executed in seen:
            stages.index_add_(0, rows, torch.ones_like(rows))
            macs.index_add_(0, rows, executed)
        return Rounds(logits, stages, macs)

    def calibrate(self, loader: Iterable[Any], **kwargs: Any) -> List['CascadePoint']:
        """Choose the thresholds on held-out images, for `macs=` or `accuracy=`. See training/thresholds.py."""
        from .training.thresholds import calibrate_cascade

        return calibrate_cascade(self, loader, **kwargs)

    def save_pretrained(self, folder: Union[str, os.PathLike]) -> Path:
        """Save the models, each once, and the stages. See hub/cascade.py."""
        from .hub.cascade import save_cascade

        return save_cascade(self, folder)

    @classmethod
    def from_pretrained(cls, name: Union[str, os.PathLike], **kwargs: Any) -> 'Cascade':
        """Load a saved cascade from a folder, 'local-dir:folder' or 'hf-hub:user/name'. See hub/cascade.py."""
        from .hub.cascade import load_cascade

        return load_cascade(name, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Publish the cascade on the Hub, return the URL of the commit. See hub/cascade.py."""
        from .hub.cascade import push_cascade

        return push_cascade(self, repo_id, **kwargs)

    def _run(
            self, x: torch.Tensor, costs: Optional[List[Cost]],
    ) -> Tuple[torch.Tensor, List[Tuple[torch.Tensor, torch.Tensor]]]:
        """Logits, and for each stage that ran its rows of the batch and, with costs, their MACs."""
        rows = torch.arange(len(x), device=x.device)
        seen = []
        logits = x.new_empty(0)
        for stage, threshold in enumerate((*self.thresholds, None)):
            part = x if len(rows) == len(x) else x[rows]
            answers, executed = self.run_stage(stage, part, costs)
            logits = answers if stage == 0 else logits.index_copy(0, rows, answers.to(logits.dtype))
            seen.append((rows, executed))
            if threshold is not None:
                rows = rows[confidence(answers) < threshold]
            if not len(rows):
                break
        return logits, seen

    def run_stage(
            self, stage: int, x: torch.Tensor, costs: Optional[List[Cost]],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Logits of a stage for all images [B, C, H, W], and with costs the MACs of each [B]."""
        model, offset = self.models[self.order[stage]], self._offset(stage, self.budgets[stage])
        with nullcontext() if offset is None else use_gate_offset(offset):
            if costs is None:
                return model(x), x.new_empty(0)
            logits, gates = forward_gates(model, x)
        return logits, costs[stage].executed(gates)
