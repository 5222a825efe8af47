"""Which blocks run for which images: counts over a data set of any length, and statistics of them."""
import heapq
from collections import Counter
from dataclasses import dataclass
from math import sqrt
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck

from .blocks import _require_gated_blocks, forward_gates

__all__ = [
    'GateCounts', 'PathStatistics', 'block_kinds', 'cluster_classes', 'execution_rates', 'path_statistics',
    'wilson_interval',
]


class GateCounts:
    """How often each path, that is each combination of gated blocks, ran for the images of each class.

    This is all that is kept of the images, beside sums over each class and the indices of a few.
    """

    def __init__(self, num_classes: int, block_macs: Sequence[int], keep: int = 0) -> None:
        """
        Args:
            num_classes: Number of classes.
            block_macs: MACs of each of the L gated blocks, to tell fast images from slow ones.
            keep: How many of the fastest and of the slowest images of each class to remember.
        """
        self.num_classes = num_classes
        self.block_macs = torch.tensor(block_macs, dtype=torch.float64)
        self.keep = keep
        self.right = 0
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64)
        self._counts: Counter = Counter()  # of label and packed path as bytes
        self._fast: List[List[Tuple[float, int, int]]] = [[] for _ in range(num_classes)]  # heaps: the worst is first
        self._slow: List[List[Tuple[float, int, int]]] = [[] for _ in range(num_classes)]

    def update(
            self,
            gates: torch.Tensor,
            labels: torch.Tensor,
            logits: Optional[torch.Tensor] = None,
            indices: Optional[Sequence[int]] = None,
    ) -> None:
        """Count a batch.

        Args:
            gates: Which blocks ran, 0/1 [B, L].
            labels: [B], in [0, num_classes).
            logits: [B, num_classes], for the likeness of classes.
            indices: Of the images in their data set, for the fastest and slowest ones.

        Raises:
            ValueError: A shape or a label does not fit.
        """
        gates, labels = gates.detach().cpu() != 0, labels.cpu()
        if tuple(gates.shape) != (len(labels), len(self.block_macs)):
            raise ValueError(
                f'gates must be [{len(labels)} labels, {len(self.block_macs)} blocks], not {list(gates.shape)}.')
        if not len(labels):
            return
        if not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f'num_classes is {self.num_classes}, the data has labels from {labels.min()} to {labels.max()}.')
        keys = np.hstack([
            labels.numpy().astype('<u4')[:, None].view(np.uint8), np.packbits(gates.numpy(), axis=1)])
        self._counts.update(key.tobytes() for key in keys)
        if logits is not None:
            if tuple(logits.shape) != (len(labels), self.num_classes):
                raise ValueError(f'logits must be [{len(labels)}, {self.num_classes}], not {list(logits.shape)}.')
            logits = logits.detach().cpu().double()
            self.right += int((logits.argmax(1) == labels).sum())
            self.sums.index_add_(0, labels, logits.softmax(1))
        if indices is not None and self.keep:
            macs = gates.double() @ self.block_macs
            for label, cost, run, index in zip(labels.tolist(), macs.tolist(), gates.sum(1).tolist(), indices):
                for heap, item in ((self._fast[label], (-cost, -index, run)), (self._slow[label], (cost, -index, run))):
                    (heapq.heappush if len(heap) < self.keep else heapq.heappushpop)(heap, item)

    def table(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Paths bool [K, L], labels [K] and number of images [K], in order of label and path."""
        keys = sorted(self._counts)
        rows = np.frombuffer(b''.join(keys), dtype=np.uint8).reshape(len(keys), 4 + -(-len(self.block_macs) // 8))
        labels = rows[:, :4].copy().view('<u4').astype(np.int64).reshape(-1)
        order = np.argsort(labels, kind='stable')
        paths = np.unpackbits(rows[order, 4:], axis=1, count=len(self.block_macs)).astype(bool)
        counts = np.array([self._counts[key] for key in keys], dtype=np.int64)[order]
        return torch.from_numpy(paths), torch.from_numpy(labels[order]), torch.from_numpy(counts)

    @property
    def images(self) -> torch.Tensor:
        """Images of each class, [num_classes]."""
        _, labels, counts = self.table()
        return torch.zeros(self.num_classes, dtype=torch.int64).index_add_(0, labels, counts)

    @property
    def rates(self) -> torch.Tensor:
        """Execution rates [num_classes, L] in [0, 1], nan for a class without images."""
        paths, labels, counts = self.table()
        rows = labels.bincount(minlength=self.num_classes).tolist()  # class by class, to stay small
        runs = [c.double() @ p.double() for p, c in zip(paths.split(rows), counts.split(rows))]
        return torch.stack(runs) / self.images[:, None]

    @property
    def blocks_run(self) -> torch.Tensor:
        """Images of each class that ran 0, 1, ..., L blocks, [num_classes, L + 1]."""
        paths, labels, counts = self.table()
        histogram = torch.zeros(self.num_classes, len(self.block_macs) + 1, dtype=torch.int64)
        return histogram.index_put_((labels, paths.sum(1)), counts, accumulate=True)

    @property
    def likeness(self) -> torch.Tensor:
        """Mean probability that the model gives class j for the images of class i, [num_classes, num_classes]."""
        return self.sums / self.images[:, None]

    def fastest(self, label: int) -> List[Tuple[int, int]]:
        """Index and number of blocks run of the images of a class with the fewest MACs, the earlier one of equals."""
        return [(-index, run) for _, index, run in sorted(self._fast[label], reverse=True)]

    def slowest(self, label: int) -> List[Tuple[int, int]]:
        """The same of those with the most MACs, the slowest first."""
        return [(-index, run) for _, index, run in sorted(self._slow[label], reverse=True)]


def execution_rates(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        num_classes: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """How often each gated block runs for the images of each class, in eval, as the paper's heatmaps show.

    Only counts are kept, so the data may be of any length. The mode of the model is restored.

    Args:
        model: Model with L gated blocks.
        loader: Batches of images [B, C, H, W] and labels [B] in [0, num_classes).
        num_classes: Number of classes.

    Returns:
        Rates [num_classes, L] in [0, 1], nan for a class without images, and the images seen of each class
        [num_classes].

    Raises:
        ValueError: The model is static, or a label is outside [0, num_classes).
    """
    blocks = _require_gated_blocks(model)
    device = next(iter(blocks.values())).gate.fc1.weight.device
    counts = GateCounts(num_classes, [0] * len(blocks))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for images, labels in loader:
                counts.update(forward_gates(model, images.to(device))[1], labels)
    finally:
        model.train(training)
    return counts.rates, counts.images


def block_kinds(model: nn.Module) -> Dict[str, List[str]]:
    """Names of the gated blocks that are 'first' or 'last' of the network or 'downsampling', an empty list for none."""
    gated = _require_gated_blocks(model)
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, (BasicBlock, Bottleneck))}
    names = list(blocks)
    kinds = {
        'first': names[:1], 'downsampling': [name for name, b in blocks.items() if b.stride != 1], 'last': names[-1:]}
    return {kind: [name for name in names if name in gated] for kind, names in kinds.items()}


def wilson_interval(successes: torch.Tensor, n: int, z: float = 1.96) -> Tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper end of Wilson's interval of a share, 95 % for z = 1.96.

    Args:
        successes: Of n independent trials each, any shape.
        n: Above 0.
        z: Quantile of the normal distribution.
    """
    rate = successes.double() / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)).sqrt()
    return centre - half, centre + half


@dataclass(frozen=True)
class PathStatistics:
    """How many paths there are and what they say of the class, in bits.

    All three are plug-in estimates. With many paths and few images of each, entropy comes out too low and mutual
    information too high: `chance` is what the latter is where there is none.

    Args:
        paths: Distinct combinations of blocks.
        entropy: Of the paths.
        class_entropy: Of the classes, the most that a path can tell.
        mutual_information: Between path and class.
        chance: The same with the labels shuffled, mean over the shuffles.
        p_value: Of the mutual information, one-sided permutation test.
    """
    paths: int
    entropy: float
    class_entropy: float
    mutual_information: float
    chance: float
    p_value: float


def path_statistics(counts: GateCounts, permutations: int = 999, seed: int = 0) -> PathStatistics:
    """Entropy of the paths and their mutual information with the class, over all images counted."""
    paths, labels, images = (t.numpy() for t in counts.table())
    _, ids = np.unique(paths, axis=0, return_inverse=True)
    of_path = np.bincount(ids.reshape(-1), images).astype(np.int64)
    of_class = np.bincount(labels, images).astype(np.int64)
    path = np.repeat(ids.reshape(-1), images)  # of each image
    label = np.repeat(labels, images)
    entropy, class_entropy = _entropy(of_path), _entropy(of_class)

    def information(shuffled: np.ndarray) -> float:
        joint = np.unique(path * counts.num_classes + shuffled, return_counts=True)[1]
        return entropy + class_entropy - _entropy(joint)

    value = information(label)
    rng = np.random.default_rng(seed)
    null = np.array([information(rng.permutation(label)) for _ in range(permutations)])
    return PathStatistics(
        len(of_path), entropy, class_entropy, value, float(null.mean()), permutation_p_value(value, null))


def permutation_p_value(value: float, null: np.ndarray) -> float:
    """One-sided p-value of a value among those under permutation, the value itself counted in."""
    return float((1 + (null >= value - 1e-12).sum()) / (1 + len(null)))


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum()) + 0.  # not -0


def symmetric_likeness(likeness: torch.Tensor) -> torch.Tensor:
    """Logarithm of how likely the model takes one of two classes for the other, both directions, [C, C]."""
    return ((likeness + likeness.t()) / 2).float().clamp_(min=1e-12).log_()


def cluster_classes(
        likeness: torch.Tensor,
        names: Sequence[str],
        present: Optional[Sequence[int]] = None,
        count: Optional[int] = None,
) -> Dict[str, List[int]]:
    """Group the classes that the model takes for one another; nothing is known here of which blocks run.

    Average linkage: the two most alike groups become one until `count` are left.

    Args:
        likeness: GateCounts.likeness, [C, C].
        names: Of the C classes.
        present: Classes to group, all by default.
        count: Number of groups, by default the root of the number of classes, at most 12.

    Returns:
        Classes of each group, like ones next to each other, the largest group first, each named after the class that
        is most like the others in it.
    """
    members = [[i] for i in (range(len(names)) if present is None else present)]
    count = count or min(12, round(sqrt(len(members))))
    index = [m[0] for m in members]
    alike = symmetric_likeness(likeness)
    close = alike[index][:, index].numpy()
    np.fill_diagonal(close, -np.inf)
    for _ in range(len(members) - count):
        i, j = sorted(divmod(int(close.argmax()), len(close)))
        a, b = len(members[i]), len(members[j])
        close[i] = close[:, i] = (a * close[i] + b * close[j]) / (a + b)
        close[j] = close[:, j] = close[i, i] = -np.inf
        members[i], members[j] = members[i] + members[j], []
    groups = sorted((m for m in members if m), key=len, reverse=True)

    def name(number: int, group: List[int]) -> str:
        first = names[group[int(alike[group][:, group].sum(0).argmax())]]
        return f'{number}: {first[:14]}' + (f' +{len(group) - 1}' if len(group) > 1 else '')

    return {name(n, group): group for n, group in enumerate(groups, 1)}
