"""Each claim on data that was made to confirm it, to reject it, and to leave it undecided."""
import pytest
import torch
from scipy.stats import spearmanr

from timm_aig.analysis.claims import check_claims
from timm_aig.analysis.counts import ClassGates, path_statistics

KINDS = {'first': [0], 'downsampling': [4, 8], 'last': [11]}
GROUPS = {'a': [0, 1, 2], 'b': [3, 4, 5], 'c': [6, 7]}
NAMES = ('key', 'confused', 'group', 'counts', 'arbitrary', 'path')


def claims(probability, logits=None, groups=GROUPS, kinds=KINDS, given=True, images=60):
    """The claims by short names, for images whose gates open with the probabilities [classes, L] of their class."""
    classes = len(probability)
    labels = torch.arange(classes).repeat(images)
    gates = torch.bernoulli(probability[labels]).bool()
    logits = torch.randn(len(labels), classes) if logits is None else logits[labels]
    likeness = torch.stack([logits[labels == label].double().softmax(1).mean(0) for label in range(classes)])
    counts = ClassGates(labels, gates, likeness)
    found = check_claims(counts, kinds, groups, given, path_statistics(labels, gates, 199), 199)
    names = [name for name in NAMES if given or name != 'group']
    assert len(found) == len(names)
    return dict(zip(names, found)), gates, labels, counts


def grouped(low=.2, high=.8):
    """Rates that are those of the class's group, and logits that confuse classes of one group, or of neighbours."""
    probability = torch.rand(8, 12)
    number = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    logits = -2. * (number[:, None] - number).abs()
    for number, group in enumerate(GROUPS.values()):
        probability[group] = torch.rand(12) * .2 + (low, (low + high) / 2, high)[number] - .1
    return probability, logits


def test_what_was_built_in_is_found():
    probability, logits = grouped()
    probability[:, [0, 4, 8, 11]] = .99
    found, *_ = claims(probability, logits)
    assert {name: claim.verdict for name, claim in found.items()} == dict.fromkeys(NAMES, 'holds')
    assert all(claim.p_value < .05 and claim.figures['value'] > claim.figures['chance'] for claim in found.values())


def test_classes_that_are_told_apart_surely_are_not_all_like():
    logits = 40. * torch.eye(8)
    logits[0, 1] = 39.
    found, *_ = claims(torch.rand(8, 12), logits)
    figures = found['confused'].figures
    assert figures['like_pairs'] == 1 and torch.tensor(list(figures.values())).isfinite().all()


def test_what_is_not_there_is_not_found():
    found, *_ = claims(torch.full((8, 12), .5))
    assert all(claim.p_value > .01 for claim in found.values())
    assert 'holds' not in [found[name].verdict for name in ('key', 'confused', 'group', 'arbitrary')]


def test_the_contrary_does_not_hold():
    probability, _ = grouped()
    probability[:, [0, 4, 8, 11]] = .01
    apart = torch.zeros(8, 8)  # takes classes for those of the other groups
    for group in GROUPS.values():
        for i in group:
            apart[i] = 4.
            apart[i, group] = 0.
    found, *_ = claims(probability, apart)
    assert found['key'].verdict == found['confused'].verdict == 'does not hold'
    assert found['confused'].figures['value'] < -.3 and found['confused'].p_value > .9


def test_the_figures_are_those_of_a_plain_computation():
    found, gates, labels, counts = claims(*grouped())
    rates = gates.double().mean(0)
    key = found['key'].figures
    others = [i for i in range(12) if i not in (0, 4, 8, 11)]
    assert key['rate_downsampling'] == pytest.approx(rates[[4, 8]].mean().item())
    assert key['value'] == pytest.approx((rates[[0, 4, 8, 11]].mean() - rates[others].mean()).item())
    assert key['among_most'] == len({0, 4, 8, 11} & set(rates.argsort(descending=True)[:4].tolist()))

    pairs = [(i, j) for i in range(8) for j in range(i)]
    of_class = torch.stack([gates[labels == i].double().mean(0) for i in range(8)])
    closeness = [-(of_class[i] - of_class[j]).abs().mean().item() for i, j in pairs]
    likeness = [(counts.likeness[i, j] + counts.likeness[j, i]).item() for i, j in pairs]
    assert found['confused'].figures['value'] == pytest.approx(
        spearmanr([round(x, 6) for x in likeness], [round(x, 6) for x in closeness]).statistic, abs=1e-4)
    same = [float(any(i in g and j in g for g in GROUPS.values())) for i, j in pairs]
    assert found['group'].figures['value'] == pytest.approx(
        spearmanr(same, [round(x, 6) for x in closeness]).statistic, abs=1e-4)
    like = [-c for c, s in zip(closeness, same) if s]
    assert found['group'].figures['difference_like'] == pytest.approx(sum(like) / len(like), abs=1e-6)

    run = gates.sum(1).double()
    parts = [run[[int(label) in group for label in labels]] for group in GROUPS.values()]
    between = sum(len(part) * (part.mean() - run.mean()) ** 2 for part in parts)
    share = (between / ((run - run.mean()) ** 2).sum()).item()
    assert found['counts'].figures['value'] == pytest.approx(share, abs=1e-5)
    assert found['counts'].figures['blocks_b'] == pytest.approx(parts[1].mean().item(), abs=1e-5)


def test_there_may_be_nothing_to_compare():
    one_group, no_kinds = {'all': list(range(8))}, dict.fromkeys(KINDS, ())
    found, *_ = claims(torch.ones(8, 12), torch.zeros(8, 8), one_group, no_kinds)
    assert {claim.verdict for name, claim in found.items() if name != 'path'} == {'undecided'}
    assert all(claim.p_value is None for name, claim in found.items() if name != 'path')
    singles, *_ = claims(torch.rand(8, 12), groups={str(i): [i] for i in range(8)})
    assert singles['arbitrary'].verdict == singles['group'].verdict == 'undecided'


def test_paths_that_all_differ_cannot_tell_of_the_class():
    found, *_ = claims(torch.full((8, 40), .5), images=10)
    assert found['path'].verdict == 'undecided' and '80 paths' in found['path'].finding


def test_clusters_of_the_model_are_not_taken_as_evidence_for_themselves():
    found, *_ = claims(*grouped(), given=False)
    assert 'group' not in found


def test_chance_is_called_a_finding_as_seldom_as_the_level_says():
    wrong = [claims(torch.rand(1, 12).expand(8, 12), images=10)[0] for _ in range(30)]
    for name in ('confused', 'group', 'counts', 'arbitrary', 'path'):
        assert sum(found[name].verdict == 'holds' for found in wrong) <= 6  # P(more) = 0.001 at the level of 0.05
