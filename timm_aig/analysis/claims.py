"""Statistical claims of the paper (section 4) about trained gates, each with a test that may confirm or reject it."""
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
import torch

from .counts import ClassGates, PathStatistics, permutation_p_value, symmetric_likeness

__all__ = ['Claim', 'check_claims']

HOLDS, FAILS, OPEN = 'holds', 'does not hold', 'undecided'
LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    """A tested claim.

    Args:
        claim: The claim in a sentence.
        verdict: 'holds' if p < 0.05, 'does not hold' if the value is at most that of chance, otherwise 'undecided'.
        finding: The measured figures in words.
        figures: The same as numbers. `value` is the tested one, `chance` its mean under permutation.
        p_value: p-value of a one-sided permutation test, None if there is nothing to compare.
    """
    claim: str
    verdict: str
    finding: str
    figures: Dict[str, float]
    p_value: Optional[float] = None


def check_claims(
        gates: ClassGates,
        kinds: Mapping[str, Sequence[int]],
        groups: Mapping[str, Sequence[int]],
        groups_given: bool,
        paths: PathStatistics,
        permutations: int = 999,
        seed: int = 0,
) -> List[Claim]:
    """Test the claims of the paper.

    Args:
        gates: Gates of images that the model was not trained on.
        kinds: Gated blocks of each kind: 'first', 'downsampling', 'last'.
        groups: Classes of each group, only classes with images.
        groups_given: The groups were chosen independently of the model.
        paths: path_statistics of the same images.
        permutations: Permutations in each test. The smallest possible p-value is 1 / (permutations + 1).
        seed: Seed of the permutations.
    """
    rng = np.random.default_rng(seed)
    images, rates = gates.images, gates.rates
    overall = (rates.nan_to_num() * images[:, None]).sum(0) / images.sum()
    classes = [i for group in groups.values() for i in group]
    of_classes = rates[classes].float()
    closeness = -torch.cdist(of_classes, of_classes, p=1).numpy() / rates.shape[1]
    likeness = symmetric_likeness(gates.likeness)[classes][:, classes].numpy()
    claims = [
        _key_blocks(overall.numpy(), kinds, rng, permutations),
        _similar_paths(
            'Classes that the model confuses take similar paths', 'most confused pairs', likeness, .9, closeness, rng,
            permutations)]
    of_class = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    if groups_given:
        same = (of_class[:, None] == of_class).astype(np.float32)
        claims.append(_similar_paths(
            'Classes of one group take similar paths', 'pairs of one group', same, 1., closeness, rng, permutations))
    blocks_run = gates.blocks_run[classes].numpy()
    return [
        *claims, *_counts_by_group(blocks_run, of_class, list(groups), rng, permutations), _path_and_class(paths)]


def _tested(claim: str, finding: str, figures: Dict[str, float], value: float, null: Any) -> Claim:
    """The claim that the value is above those under permutation."""
    null = np.asarray(null)
    figures = {**figures, 'value': float(value)}
    if np.ptp(null) < 1e-12:
        return Claim(claim, OPEN, f'{finding}; every permutation gives the same', figures)
    p = permutation_p_value(value, null)
    verdict = HOLDS if p < LEVEL else FAILS if value <= null.mean() else OPEN
    return Claim(claim, verdict, finding, {**figures, 'chance': float(null.mean())}, p)


def _key_blocks(rates: np.ndarray, kinds: Mapping[str, Sequence[int]], rng: Any, permutations: int) -> Claim:
    """Difference between the mean rates of these kinds and of the other blocks, under permutation of the blocks."""
    claim = 'First, downsampling and last blocks run most'
    key = np.zeros(len(rates), dtype=bool)
    key[[i for blocks in kinds.values() for i in blocks]] = True
    others, n = rates[~key], int(key.sum())
    if not key.any() or key.all():
        return Claim(claim, OPEN, f'{n} of the {len(key)} gated blocks are of these kinds', {})

    def difference(some: np.ndarray) -> Any:
        """Difference to the other blocks, and those under permutation."""
        pool, k = np.concatenate([some, others]), len(some)
        shuffled = np.array([rng.permutation(pool) for _ in range(permutations)])
        return some.mean() - others.mean(), shuffled[:, :k].mean(1) - shuffled[:, k:].mean(1)

    top = int(key[np.argsort(-rates, kind='stable')[:n]].sum())
    figures = {'rate_others': float(others.mean()), 'blocks': n, 'among_most': top}
    parts = []
    for kind, blocks in kinds.items():
        if blocks:
            p = permutation_p_value(*difference(rates[list(blocks)]))
            figures.update({f'rate_{kind}': float(rates[list(blocks)].mean()), f'p_{kind}': p})
            parts.append(f'{kind} {figures[f"rate_{kind}"]:.3f} (p = {p:.2g})')
    finding = (f'mean rate: {", ".join(parts)}, others {others.mean():.3f}; '
               f'blocks of these kinds among the {n} that run most: {top}')
    return _tested(claim, finding, figures, *difference(rates[key]))


def _similar_paths(
        claim: str, similar: str, likeness: np.ndarray, quantile: float, closeness: np.ndarray, rng: Any,
        permutations: int,
) -> Claim:
    """Rank correlation of two measures over pairs of classes, under permutation of the classes (Mantel, 1967).

    Pairs whose likeness is at least its quantile are called `similar` in the finding.
    """
    pairs = np.triu_indices(len(likeness), 1)
    like_pairs, close_pairs = likeness[pairs], closeness[pairs]
    a, b = (_matrix(_centred_ranks(values), pairs) for values in (like_pairs, close_pairs))
    norm = np.sqrt(float(np.vdot(a, a)) * float(np.vdot(b, b)))
    if not norm:
        return Claim(claim, OPEN, f'all {len(like_pairs)} pairs of classes are equal in this', {})
    value = float(np.vdot(a, b)) / norm
    orders = (rng.permutation(len(a)) for _ in range(permutations))
    null = [float(np.vdot(a, b[order][:, order])) / norm for order in orders]
    threshold = np.quantile(like_pairs, quantile)
    like = like_pairs > threshold if threshold == like_pairs.min() else like_pairs >= threshold
    near, far = float(-close_pairs[like].mean()), float(-close_pairs[~like].mean())
    return _tested(
        claim,
        f'rank correlation {value:.2f} over {len(like)} pairs of classes; the rates of a block differ by {near:.3f} in '
        f'the {like.sum()} {similar}, by {far:.3f} in the others',
        {'pairs': len(like), 'like_pairs': int(like.sum()), 'difference_like': near, 'difference_others': far},
        value, null)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks minus their mean. Equal values share a rank."""
    _, inverse, counts = np.unique(values.round(6), return_inverse=True, return_counts=True)
    ranks = counts.cumsum() - (counts - 1) / 2
    return (ranks - (len(values) + 1) / 2)[inverse].astype(np.float32)


def _matrix(values: np.ndarray, pairs: Any) -> np.ndarray:
    """Symmetric matrix of the values of pairs, 0 on the diagonal."""
    matrix = np.zeros((pairs[1].max(initial=0) + 1,) * 2, dtype=np.float32)
    matrix[pairs] = values
    return matrix + matrix.T


def _counts_by_group(
        table: np.ndarray, of_class: np.ndarray, groups: Sequence[str], rng: Any, permutations: int,
) -> List[Claim]:
    """Share of the variance of executed blocks that lies between groups, under permutation of images and of classes.

    table has the images of each class by the number of executed blocks [classes, L + 1], of_class their groups.
    """
    names = ('The number of executed blocks differs by group', 'It differs more than between random groups of classes')
    blocks = np.arange(table.shape[1])
    n, sums = table.sum(1), table @ blocks
    mean = sums.sum() / n.sum()
    total = (table.sum(0) * (blocks - mean) ** 2).sum()
    if len(groups) < 2 or total == 0:
        nothing = f'{len(groups)} groups, {np.count_nonzero(table.sum(0))} different counts'
        return [Claim(name, OPEN, nothing, {}) for name in names]

    def between(group: np.ndarray, n: np.ndarray, sums: np.ndarray) -> float:
        n, sums = np.bincount(group, n), np.bincount(group, sums)
        return float((n * (sums / n - mean) ** 2).sum() / total)

    value = between(of_class, n, sums)
    run = np.repeat(np.tile(blocks, len(table)), table.reshape(-1))  # of each image
    of_image = np.repeat(of_class, n)
    images = [between(of_image, np.ones(len(run)), rng.permutation(run)) for _ in range(permutations)]
    classes = [between(rng.permutation(of_class), n, sums) for _ in range(permutations)]
    means = dict(zip(groups, (np.bincount(of_class, sums) / np.bincount(of_class, n)).tolist()))
    ordered = sorted(means, key=lambda name: means[name])
    shown = ordered if len(ordered) <= 6 else [*ordered[:2], *ordered[-2:]]
    finding = 'mean ' + ', '.join(f'{means[name]:.2f} ({name})' for name in shown)
    figures = {f'blocks_{name}': m for name, m in means.items()}
    return [
        _tested(names[0], f'{finding}; groups explain {value:.1%} of the variance', figures, value, images),
        _tested(names[1], f'{value:.1%} of the variance, random groups {np.mean(classes):.1%}', {}, value, classes)]


def _path_and_class(s: PathStatistics) -> Claim:
    claim = 'The path depends on the class'
    if s.class_entropy - s.chance < 1e-9:
        return Claim(claim, OPEN, f'{s.paths} paths with so few images each that shuffled labels fit as well', {})
    verdict = HOLDS if s.p_value < LEVEL else FAILS if s.mutual_information <= s.chance else OPEN
    return Claim(
        claim, verdict,
        f'it gives {s.mutual_information:.2f} of {s.class_entropy:.2f} bits, {s.chance:.2f} with labels shuffled; '
        f'{s.paths} paths, {s.entropy:.2f} bits',
        {'value': s.mutual_information, 'chance': s.chance}, s.p_value)
