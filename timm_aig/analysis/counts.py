"""Statistics over images: execution rates by class, paths, and classes that the model confuses."""
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn

from ..blocks import require_gated_blocks
from ..convert import residual_blocks

__all__ = [
    'ClassGates', 'PathStatistics', 'block_kinds', 'class_rates', 'cluster_classes', 'extreme_images',
    'path_statistics', 'wilson_interval',
]


@dataclass(frozen=True)
class ClassGates:
    """Gates of N images, counted by the C classes of the images.

    Args:
        labels: Class of each image [N], in [0, C).
        gates: Which of the L gated blocks ran, bool [N, L].
        likeness: Mean probability that the model gives class j for the images of class i, [C, C].
    """
    labels: torch.Tensor
    gates: torch.Tensor
    likeness: torch.Tensor

    @cached_property
    def images(self) -> torch.Tensor:
        """Images of each class, [C]."""
        return self.labels.bincount(minlength=len(self.likeness))

    @cached_property
    def rates(self) -> torch.Tensor:
        """Execution rate of each block for the images of each class, [C, L] in [0, 1]."""
        return class_rates(self.labels, self.gates, len(self.likeness))

    @cached_property
    def blocks_run(self) -> torch.Tensor:
        """Images of each class that ran 0, 1, ..., L blocks, [C, L + 1]."""
        counts = torch.zeros(len(self.likeness), self.gates.shape[1] + 1, dtype=torch.int64)
        return counts.index_put_((self.labels, self.gates.sum(1)), torch.tensor(1), accumulate=True)

    def paths(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The K distinct paths of each class, sorted: class [K], path bool [K, L] and number of images [K]."""
        packed = np.hstack([self.labels.numpy().astype('>u4')[:, None].view(np.uint8), np.packbits(self.gates, axis=1)])
        _, first, counts = np.unique(packed, axis=0, return_index=True, return_counts=True)
        return self.labels[first], self.gates[first], torch.from_numpy(counts)


def class_rates(labels: torch.Tensor, gates: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Execution rates by class, [num_classes, L] in [0, 1], from labels [N] and gates [N, L]. nan without images."""
    return torch.stack([gates[labels == label].double().mean(0) for label in range(num_classes)])


def extreme_images(labels: torch.Tensor, macs: torch.Tensor, label: int, count: int) -> Tuple[List[int], List[int]]:
    """Positions of the images of a class with the fewest and with the most MACs, none in both but an only one.

    Args:
        labels: Class of each image [N].
        macs: MACs of each image [N].
        label: The class.
        count: Maximum number of images of each kind.
    """
    own = (labels == label).nonzero().flatten()
    ascending = own[macs[own].argsort(stable=True)]
    count = min(count, max(1, len(own) // 2))
    return ascending[:count].tolist(), ascending.flip(0)[:count].tolist()


def block_kinds(model: nn.Module) -> Dict[str, List[str]]:
    """Names of the gated blocks among the 'first' and 'last' blocks of the network, and of those 'downsampling'."""
    gated = require_gated_blocks(model)
    blocks = residual_blocks(model)
    names = list(blocks)
    downsampling = [name for name, block in blocks.items() if max(map(_stride, block.modules())) > 1]
    kinds = {'first': names[:1], 'downsampling': downsampling, 'last': names[-1:]}
    return {kind: [name for name in names if name in gated] for kind, names in kinds.items()}


def _stride(module: Any) -> int:
    """Stride of a convolution or pooling, 1 of anything else."""
    stride = getattr(module, 'stride', 1)
    return max(stride) if isinstance(stride, (list, tuple)) else stride


def wilson_interval(successes: torch.Tensor, n: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper end of the 95 % Wilson interval of successes out of n trials, any shape."""
    z = 1.96
    rate = successes.double() / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (rate * (1 - rate) / n + z * z / (4 * n * n)).sqrt()
    return centre - half, centre + half


@dataclass(frozen=True)
class PathStatistics:
    """How many paths there are, and how much the path of an image says about its class, in bits.

    These are plug-in estimates: with many paths and few images of each, entropy comes out too low and mutual
    information too high. `chance` is the mutual information that is measured where there is none.

    Args:
        paths: Number of distinct combinations of blocks.
        entropy: Entropy of the paths.
        class_entropy: Entropy of the classes, the upper limit of the mutual information.
        mutual_information: Mutual information of path and class.
        chance: Its mean over permutations of the labels.
        p_value: p-value of a one-sided permutation test of the mutual information.
    """
    paths: int
    entropy: float
    class_entropy: float
    mutual_information: float
    chance: float
    p_value: float


def path_statistics(
        labels: torch.Tensor,
        gates: torch.Tensor,
        permutations: int = 999,
        seed: int = 0,
) -> PathStatistics:
    """Entropy of the paths and their mutual information with the class, from labels [N] and gates [N, L]."""
    path = np.unique(np.packbits(gates.bool(), axis=1), axis=0, return_inverse=True)[1].reshape(-1)  # number of each
    label = labels.numpy()
    of_path = np.bincount(path)
    entropy, class_entropy = _entropy(of_path), _entropy(np.bincount(label))

    def information(shuffled: np.ndarray) -> float:
        joint = np.unique(path * (label.max() + 1) + shuffled, return_counts=True)[1]
        return entropy + class_entropy - _entropy(joint)

    value = information(label)
    rng = np.random.default_rng(seed)
    null = np.array([information(rng.permutation(label)) for _ in range(permutations)])
    return PathStatistics(
        len(of_path), entropy, class_entropy, value, float(null.mean()), permutation_p_value(value, null))


def permutation_p_value(value: float, null: np.ndarray) -> float:
    """One-sided p-value of a value against those under permutation. The value itself is counted too."""
    return float((1 + (null >= value - 1e-12).sum()) / (1 + len(null)))


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum()) + 0.  # not -0


def symmetric_likeness(likeness: torch.Tensor) -> torch.Tensor:
    """Log of the mean probability that the model confuses two classes, in either direction, [C, C]."""
    return ((likeness + likeness.t()) / 2).float().clamp_(min=1e-12).log_()


def cluster_classes(
        likeness: torch.Tensor,
        names: Sequence[str],
        present: Optional[Sequence[int]] = None,
        count: Optional[int] = None,
) -> Dict[str, List[int]]:
    """Group the classes that the model confuses, by average linkage. The gates play no part in it.

    Args:
        likeness: Mean probability of class j for images of class i, as in ClassGates, [C, C].
        names: Names of the C classes.
        present: Classes to group, all by default.
        count: Number of groups. By default the root of the number of classes, at most 12.

    Returns:
        Classes of each group, largest group first. Its name is that of the class most often confused with the others.
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
    groups: Dict[str, List[int]] = {}
    for number, group in enumerate(sorted(filter(None, members), key=len, reverse=True), 1):
        first = names[group[int(alike[group][:, group].sum(0).argmax())]]
        groups[f'{number}: {first[:14]}' + (f' +{len(group) - 1}' if len(group) > 1 else '')] = group
    return groups
