"""evaluate: accuracy of a model, adaptive or static, and what its gates answered, exact over all processes."""
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task.evaluator import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import unwrap_model
from tqdm import tqdm

from ..cost import Cost
from ..passes import forward_gates

__all__ = ['METRICS', 'Evaluation', 'evaluate']

METRICS = ('top1', 'top5', 'execution_rate', 'macs_share', 'paths')


@dataclass(frozen=True)
class Evaluation:
    """What a model did with the N labelled images of a data set.

    Args:
        loss: Mean cross-entropy.
        top1: Accuracy, percent.
        top5: Share of images whose label is among the five largest logits, percent.
        labels: [N].
        predictions: Class of the largest logit, [N].
        gates: Which of the L gated blocks ran, bool [N, L].
        positions: Of the images in what the loader reads, ascending, [N].
        likeness: Mean probability that the model gives class j for the images of class i, float64 [C, C], nan for a
            class without images. None unless asked for.
    """
    loss: float
    top1: float
    top5: float
    labels: torch.Tensor
    predictions: torch.Tensor
    gates: torch.Tensor
    positions: torch.Tensor
    likeness: Optional[torch.Tensor] = None

    @property
    def block_rates(self) -> torch.Tensor:
        """Execution rate of each gated block, [L] in [0, 1]."""
        return self.gates.double().mean(0)

    @property
    def paths(self) -> int:
        """Number of distinct combinations of blocks that ran."""
        return len(self.gates.unique(dim=0)) if self.gates.shape[1] else 1

    def macs_shares(self, cost: Cost) -> torch.Tensor:
        """MACs of each image over those of the static parent, [N]."""
        return cost.share(self.gates)

    def metrics(self, cost: Cost) -> Dict[str, float]:
        """The figures of a table, by METRICS: percent, rates in [0, 1], and a count."""
        rate = self.block_rates.mean().item() if self.gates.shape[1] else 1.
        return dict(zip(METRICS, (self.top1, self.top5, rate, self.macs_shares(cost).mean().item(), self.paths)))


@torch.no_grad()
def evaluate(
        model: nn.Module,
        loader: Iterable[Any],
        device: Optional[torch.device] = None,
        amp_dtype: Optional[torch.dtype] = None,
        sample: bool = False,
        likeness: bool = False,
) -> Evaluation:
    """Run a model in eval on all images of a loader. Its mode is restored.

    In a distributed run each process has a shard, and all of them return the whole: images that a sampler repeats to
    fill its shards are left out, as are those without a label (-1).

    Args:
        model: Takes images [B, C, H, W], returns logits [B, num_classes].
        loader: Batches of images and labels [B].
        device: Where to run, CPU by default.
        amp_dtype: Autocast to it.
        sample: Draw the gates, as the authors' code does in its tests, instead of taking the threshold.
        likeness: Measure the likeness of classes too.

    Raises:
        ValueError: No labelled images, or a label that the model has no class for.
    """
    device = device or torch.device('cpu')
    evaluator = ClassificationEvaluator(device)
    limit, seen = evaluation_sample_limit(getattr(loader, 'loader', loader)), 0  # PrefetchLoader hides its loader
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    parts, sums = [], torch.zeros(())
    training = model.training
    model.eval()
    try:
        for images, labels in tqdm(loader, 'evaluate', unit='batch', leave=False, disable=True if rank else None):
            images = images.to(device, memory_format=torch.channels_last)
            labels = labels.to(device)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                output, gates = forward_gates(unwrap_model(model), images, sample)
            if len(labels) and labels.max() >= output.shape[1]:
                raise ValueError(f'the model has {output.shape[1]} classes, the data set has a label {labels.max()}.')
            keep, own = labels >= 0, torch.arange(seen, seen + len(labels), device=device)
            if limit is not None:
                keep &= own < limit
            seen += len(labels)
            output, labels = output[keep], labels[keep]
            evaluator.update(output, labels)
            if likeness:
                sums = sums if sums.ndim else torch.zeros(2 * output.shape[1:], dtype=torch.float64)
                sums.index_add_(0, labels.cpu(), output.cpu().softmax(1, torch.float64))
            positions = own[keep] * world + rank  # timm's sampler deals them out in turn
            parts.append([t.cpu() for t in (labels, output.argmax(1), gates[keep].bool(), positions)])
    finally:
        model.train(training)
    if distributed:
        shards: list = [None] * world
        dist.all_gather_object(shards, (parts, sums))
        parts = [part for shard, _ in shards for part in shard]
        sums = sum(other for _, other in shards)
    if not sum(len(labels) for labels, *_ in parts):
        raise ValueError('the data set has no labelled images.')
    figures = evaluator.compute(distributed)
    columns = [torch.cat(part) for part in zip(*parts)]
    order = columns[-1].argsort()
    labels, predictions, gates, positions = (column[order] for column in columns)
    alike = sums / labels.bincount(minlength=len(sums))[:, None] if likeness else None
    return Evaluation(
        figures['loss'], figures['top1'], figures['top5'], labels, predictions, gates, positions, alike)
