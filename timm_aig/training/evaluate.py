"""evaluate: accuracy of a model, adaptive or static, and the answers of its gates, exact over all processes."""
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import unwrap_model
from tqdm import tqdm

from ..config import InputError
from ..cost import Cost
from ..passes import forward_gates

__all__ = ['METRICS', 'Evaluation', 'check_output', 'eval_mode', 'evaluate', 'split_batch']

METRICS = ('top1', 'top5', 'execution_rate', 'macs_share', 'paths')


@dataclass(frozen=True)
class Evaluation:
    """Results of a model on the N labelled images of a data set.

    Args:
        loss: Mean cross-entropy.
        top1: Accuracy, percent.
        top5: Share of images with their label among the five largest logits, percent.
        labels: Label of each image, [N].
        predictions: Class with the largest logit, [N].
        gates: Which of the L gated blocks ran, bool [N, L].
        positions: Index of each image in the loader's order, ascending, [N].
        likeness: Mean probability of class j over the images of class i, float64 [C, C], nan for a class without
            images. None unless asked for.
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
        """MACs of each image over the MACs of the static parent, [N]."""
        return cost.share(self.gates)

    def metrics(self, cost: Cost) -> Dict[str, float]:
        """Values for METRICS: percentages, rates in [0, 1], and the number of paths."""
        rate = self.block_rates.mean().item() if self.gates.shape[1] else 1.
        return dict(zip(METRICS, (self.top1, self.top5, rate, self.macs_shares(cost).mean().item(), self.paths)))


def split_batch(batch: Any, argument: str) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Images [B, C, H, W] and labels [B] of what a loader gives. Labels are None where it gives images only.

    Raises:
        InputError: Something else, such as a dictionary or soft labels. It blames `argument`.
    """
    parts = [batch] if isinstance(batch, torch.Tensor) else batch
    if isinstance(parts, (list, tuple)) and 1 <= len(parts) <= 2 and isinstance(parts[0], torch.Tensor):
        images = parts[0]
        labels = torch.zeros(len(images), dtype=torch.long) if len(parts) == 1 else parts[1]
        labels = labels if isinstance(labels, torch.Tensor) else torch.as_tensor(labels, device='cpu')
        if images.ndim == 4 and labels.shape == images.shape[:1] and (labels == labels.long()).all():
            return images, labels.long() if len(parts) == 2 else None
    shapes = [list(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
    raise InputError(
        f'must give batches of images [B, C, H, W], or of images and labels [B] that are numbers of classes, '
        f'not {type(batch).__name__} of {shapes}.', argument)


def check_output(output: torch.Tensor, labels: Optional[torch.Tensor]) -> None:
    """Check logits [B, num_classes] before they become predictions.

    Raises:
        InputError: A logit is nan, or the model has no class for a label.
    """
    if output.isnan().any():
        raise InputError('are not numbers: an image or a weight is nan or too large.', 'logits')
    if labels is not None and len(labels) and labels.max() >= output.shape[1]:
        raise InputError(f'the model has {output.shape[1]} classes, the data set has a label {labels.max()}.')


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to eval inside a `with` block. Afterwards each module has its own mode again, as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def evaluate(
        model: nn.Module,
        loader: Iterable[Any],
        device: Optional[torch.device] = None,
        amp_dtype: Optional[torch.dtype] = None,
        sample: bool = False,
        likeness: bool = False,
) -> Evaluation:
    """Run a model in eval on all images of a loader. The modes of its modules are restored.

    In a distributed run each process has a shard, and every process returns the results of all images. Images that a
    sampler repeats to fill its shards are left out, as are images without a label (-1).

    Args:
        model: Model that takes images [B, C, H, W] and returns logits [B, num_classes].
        loader: Batches of images and labels [B].
        device: Device to run on. Default: the device of the model's parameters.
        amp_dtype: Dtype for autocast. Default: no autocast.
        sample: Draw the gates, as the authors' code does in its tests, instead of taking the threshold.
        likeness: Also compute Evaluation.likeness.

    Raises:
        InputError: No labelled images, labels that are no class of the model, or logits that are nan.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device='cpu'))
    device, dtype = torch.device(device or like.device), like.dtype
    limit = evaluation_sample_limit(getattr(loader, 'loader', loader))  # PrefetchLoader hides its loader
    distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    evaluator = ClassificationEvaluator(device)
    parts: List[Any] = []
    sums: Any = 0.
    seen = 0
    with eval_mode(model):
        for batch in tqdm(loader, 'evaluate', unit='batch', leave=False, disable=True if rank else None):
            images, batch_labels = split_batch(batch, 'loader')
            images = images.to(device, dtype, memory_format=torch.channels_last)
            labels = torch.full((len(images),), -1, device=device) if batch_labels is None else batch_labels
            labels = labels.to(device)
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                output, gates = forward_gates(unwrap_model(model), images, sample)
            check_output(output, labels)
            positions = torch.arange(seen, seen + len(labels), device=device)
            seen += len(labels)
            keep = labels >= 0
            if limit is not None:
                keep &= positions < limit
            output, labels = output[keep], labels[keep]
            evaluator.update(output, labels)
            if likeness:
                batch_sums = torch.zeros(output.shape[1], output.shape[1], dtype=torch.float64, device='cpu')
                sums += batch_sums.index_add_(0, labels.cpu(), output.cpu().softmax(1, torch.float64))
            positions = positions[keep] * world + rank  # timm's sampler gives every world-th image to a process
            parts.append([t.cpu() for t in (labels, output.argmax(1), gates[keep].bool(), positions)])
    if distributed:
        shards: List[Any] = [None] * world
        dist.all_gather_object(shards, (parts, sums))
        parts = [part for shard, _ in shards for part in shard]
        sums = sum(shard_sums for _, shard_sums in shards)
    if not any(len(part[0]) for part in parts):
        raise InputError('the data set has no labelled images.')
    figures = evaluator.compute(distributed)
    columns = [torch.cat(column) for column in zip(*parts)]
    order = columns[-1].argsort()
    labels, predictions, gates, positions = (column[order] for column in columns)
    return Evaluation(
        figures['loss'], figures['top1'], figures['top5'], labels, predictions, gates, positions,
        sums / labels.bincount(minlength=len(sums))[:, None] if likeness else None)
