"""Which blocks run for the images of which classes, and statistics of it."""
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck

from ..blocks import require_gated_blocks

__all__ = [
    'ClassGates', 'PathStatistics', 'block_kinds', 'class_rates', 'cluster_classes', 'extreme_images',
    'path_statistics', 'wilson_interval',
]


@dataclass(frozen=True)
class ClassGates:
    """Which of the L gated blocks ran for N images, by the C classes of the images.

    Args:
        labels: [N], in [0, C).
        gates: bool [N, L].
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
        """Execution rate of each block for the images of each class, as the paper's heatmaps show it, [C, L]."""
        return class_rates(self.labels, self.gates, len(self.likeness))

    @cached_property
    def blocks_run(self) -> torch.Tensor:
        """Images of each class that ran 0, 1, ..., L blocks, [C, L + 1]."""
        counts = torch.zeros(len(self.likeness), self.gates.shape[1] + 1, dtype=torch.int64)
        return counts.index_put_((self.labels, self.gates.sum(1)), torch.tensor(1), accumulate=True)

    def paths(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Class [K], path bool [K, L] and number of images [K] of each path that ran for a class, in this order."""
        packed = np.hstack([self.labels.numpy().astype('>u4')[:, None].view(np.uint8), np.packbits(self.gates, axis=1)])
        _, first, counts = np.unique(packed, axis=0, return_index=True, return_counts=True)
        return self.labels[first], self.gates[first], torch.from_numpy(counts)


def class_rates(labels: torch.Tensor, gates: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Execution rates [num_classes, L] in [0, 1] of labels [N] and gates [N, L], nan for a class without images."""
    return torch.stack([gates[labels == label].double().mean(0) for label in range(num_classes)])


def extreme_images(labels: torch.Tensor, macs: torch.Tensor, label: int, count: int) -> Tuple[List[int], List[int]]:
    """Positions of the images of a class with the fewest MACs, and with the most, the earlier one of equals first.

    Args:
        labels: [N].
        macs: Of each image, [N].
        label: The class.
        count: How many of each, at most.
    """
    own = (labels == label).nonzero().flatten()
    fast, slow = (own[macs[own].argsort(stable=True, descending=d)[:count]].tolist() for d in (False, True))
    return fast, slow


def block_kinds(model: nn.Module) -> Dict[str, List[str]]:
    """Names of the gated blocks that are 'first' or 'last' of the network or 'downsampling', an empty list for none."""
    gated = require_gated_blocks(model)
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


def path_statistics(
        labels: torch.Tensor,
        gates: torch.Tensor,
        permutations: int = 999,
        seed: int = 0,
) -> PathStatistics:
    """Entropy of the paths and their mutual information with the class, of labels [N] and gates [N, L]."""
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
        likeness: Of ClassGates, [C, C].
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
