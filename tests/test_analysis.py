"""Tests of timm_aig.analysis."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import mutual_info_score

import timm_aig
from timm_aig.analysis import (
    GateCounts,
    block_kinds,
    cluster_classes,
    execution_rates,
    path_statistics,
    wilson_interval,
)


@pytest.fixture
def model():
    return timm.create_model('cifar_resnet20_aig', num_classes=3)


def random_batches(labels, batch_size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(labels), 3, 8, 8, generator=generator)
    return list(zip(images.split(batch_size), torch.tensor(labels).split(batch_size)))


def test_rates_are_the_means_of_the_gates_of_each_class(model):
    opened = torch.tensor([[1, 0], [0, 0], [1, 1], [1, 0]]).bool().repeat(1, 5)[:, :9]
    batches = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 0, 2, 2]))] * 3
    with timm_aig.force_gates(model, opened):
        rates, counts = execution_rates(model, batches, num_classes=3)
    assert counts.tolist() == [6, 0, 6]
    assert torch.equal(rates[0], opened[:2].double().mean(0))
    assert torch.equal(rates[2], opened[2:].double().mean(0))


def test_rates_do_not_depend_on_the_batches(model):
    for block in timm_aig.gated_blocks(model).values():
        torch.nn.init.normal_(block.gate.fc2.weight)
        torch.nn.init.zeros_(block.gate.fc2.bias)
    labels = [0, 1, 2, 1, 0, 2, 2]
    images = torch.cat([images for images, _ in random_batches(labels)])
    with torch.no_grad():
        _, gates = timm_aig.forward_gates(model.eval(), images)
    assert 0 < gates.mean() < 1
    for batch_size in (1, 4, 7):
        rates, counts = execution_rates(model, random_batches(labels, batch_size), num_classes=3)
        assert torch.equal(rates[0], gates[[0, 4]].double().mean(0))
        assert counts.tolist() == [2, 2, 3]


def test_a_class_without_images_has_no_rate(model):
    rates, counts = execution_rates(model, random_batches([0, 2]), num_classes=3)
    assert counts.tolist() == [1, 0, 1]
    assert rates[1].isnan().all() and not rates[[0, 2]].isnan().any()


@pytest.mark.parametrize('training', [True, False])
def test_the_model_keeps_its_mode_and_its_statistics(model, training):
    model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    execution_rates(model, random_batches([0, 1]), num_classes=3)
    assert model.training is training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('label', [-1, 3])
def test_a_label_outside_the_classes_is_refused(model, label):
    with pytest.raises(ValueError, match='num_classes is 3'):
        execution_rates(model, random_batches([0, label]), num_classes=3)


def test_a_static_model_is_refused():
    with pytest.raises(ValueError, match='no gated blocks'):
        execution_rates(timm.create_model('cifar_resnet20'), [], num_classes=10)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 300), st.integers(0, 60), st.integers(1, 17), st.integers(0, 2 ** 31))
def test_the_counts_are_those_of_a_plain_loop_whatever_the_batches(blocks, classes, images, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randint(0, 2, (images, blocks), generator=generator)
    labels = torch.randint(0, classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    counts = GateCounts(classes, range(1, blocks + 1))
    for start in range(0, images, batch_size):
        batch = slice(start, start + batch_size)
        counts.update(gates[batch], labels[batch], logits[batch])
    for label in range(classes):
        own = labels == label
        assert counts.images[label] == own.sum()
        assert counts.blocks_run[label].tolist() == np.bincount(gates[own].sum(1), minlength=blocks + 1).tolist()
        if own.any():
            assert torch.allclose(counts.rates[label], gates[own].double().mean(0))
            assert torch.allclose(counts.likeness[label], logits[own].double().softmax(1).mean(0))
        else:
            assert counts.rates[label].isnan().all()
    assert counts.right == (logits.argmax(1) == labels).sum()
    paths, path_labels, numbers = counts.table()
    rows = [(label, *path) for path, label in zip(paths.int().tolist(), path_labels.tolist())]
    expected = sorted({(label, *path) for path, label in zip(gates.tolist(), labels.tolist())})
    assert sorted(rows) == expected and numbers.sum() == images


def test_the_fastest_and_slowest_images_are_kept_as_indices_the_earlier_of_equals():
    gates = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 1], [1, 1]])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 0])
    counts = GateCounts(3, [10, 1], keep=3)
    for start in (0, 2, 5):
        end = {0: 2, 2: 5, 5: 7}[start]
        counts.update(gates[start:end], labels[start:end], indices=range(100 + start, 100 + end))
    assert counts.fastest(0) == [(103, 0), (101, 1), (100, 1)]
    assert counts.slowest(0) == [(102, 2), (106, 2), (100, 1)]
    assert counts.fastest(1) == counts.slowest(1) == [(105, 1)]
    assert counts.fastest(2) == []


@pytest.mark.parametrize('gates, labels, logits, error', [
    (torch.ones(2, 3), [0, 1], None, r'gates must be \[2 labels, 4 blocks\], not \[2, 3\]'),
    (torch.ones(3, 4), [0, 1], None, 'gates must be'),
    (torch.ones(2, 4), [0, 5], None, 'num_classes is 5, the data has labels from 0 to 5'),
    (torch.ones(2, 4), [0, 1], torch.ones(2, 6), r'logits must be \[2, 5\]'),
])
def test_what_does_not_fit_is_refused(gates, labels, logits, error):
    with pytest.raises(ValueError, match=error):
        GateCounts(5, [1] * 4).update(gates, torch.tensor(labels), logits)


def counted(gates, labels, classes, logits=None):
    counts = GateCounts(classes, [1] * gates.shape[1])
    counts.update(gates, labels, logits)
    return counts


def test_entropy_and_mutual_information_are_those_of_scikit_learn():
    gates = torch.bernoulli(torch.full((500, 3), .4))
    labels = (gates[:, 0] + torch.bernoulli(torch.full((500,), .3))).long()
    s = path_statistics(counted(gates, labels, 4), permutations=99)
    ids = (gates @ torch.tensor([4., 2., 1.])).long().numpy()
    assert s.paths == len(set(ids.tolist())) == 8
    assert s.entropy == pytest.approx(mutual_info_score(ids, ids) / np.log(2))
    assert s.class_entropy == pytest.approx(mutual_info_score(labels, labels) / np.log(2))
    assert s.mutual_information == pytest.approx(mutual_info_score(ids, labels) / np.log(2))
    assert s.p_value == .01 and 0 < s.chance < .1 < s.mutual_information


def test_mutual_information_of_many_paths_is_what_chance_gives_when_labels_do_not_matter():
    gates = torch.bernoulli(torch.full((300, 9), .5))
    s = path_statistics(counted(gates, torch.arange(300) % 10, 10), permutations=99)
    assert s.mutual_information > 2  # of 3.3 bits, though there is nothing to tell
    assert s.mutual_information == pytest.approx(s.chance, abs=.1) and s.p_value > .05


def test_one_path_says_nothing():
    s = path_statistics(counted(torch.ones(20, 3), torch.arange(20) % 2, 2), permutations=19)
    assert (s.paths, s.entropy, s.class_entropy, s.p_value) == (1, 0, 1, 1)
    assert s.mutual_information == pytest.approx(0) == s.chance


def test_classes_that_are_confused_form_groups_named_after_their_middle():
    likeness = torch.full((7, 7), .01)
    for group in ([0, 3, 5], [1, 4], [2]):
        for i in group:
            likeness[i, group] = .2
    likeness[3, 0] = likeness[3, 5] = .3
    likeness[6] = float('nan')  # no images
    groups = cluster_classes(likeness, list('abcdefg'), present=range(6), count=3)
    assert {name: sorted(group) for name, group in groups.items()} == {
        '1: d +2': [0, 3, 5], '2: b +1': [1, 4], '3: c': [2]}


@pytest.mark.parametrize('classes, groups', [(1, 1), (2, 1), (10, 3), (100, 10), (400, 12)])
def test_every_class_is_in_one_of_a_few_groups_even_if_all_have_one_name(classes, groups):
    likeness = torch.rand(classes, classes)
    found = cluster_classes(likeness, ['crane'] * classes)
    assert len(found) == groups and sorted(i for group in found.values() for i in group) == list(range(classes))


def test_the_interval_is_wilsons():
    low, high = wilson_interval(torch.tensor([0, 81, 263]), 263)
    assert low.tolist() == pytest.approx([0, .2553, .9856], abs=1e-4)  # Newcombe (1998), table I, for 81 of 263
    assert high.tolist() == pytest.approx([.0144, .3662, 1], abs=1e-4)


@pytest.mark.parametrize('arch, kwargs, kinds', [
    ('cifar_resnet20_aig', {}, (['layer1.0'], ['layer2.0', 'layer3.0'], ['layer3.2'])),
    ('cifar_resnet20_aig', {'schedule': 'paper'}, ([], [], [])),
    ('resnet50_aig', {}, (['layer1.0'], ['layer2.0', 'layer3.0', 'layer4.0'], ['layer4.2'])),
])
def test_first_downsampling_and_last_blocks_are_those_of_the_network_as_far_as_gated(arch, kwargs, kinds):
    model = timm.create_model(arch, device='meta', **kwargs)
    assert block_kinds(model) == dict(zip(('first', 'downsampling', 'last'), kinds))


MEMORY = '''
import re
import torch
import matplotlib.figure
import analyze
from timm_aig.analysis import GateCounts, cluster_classes, path_statistics
from timm_aig.claims import check_claims
from timm_aig.figures import plot_block_rates, plot_blocks_run, plot_execution_rates

def megabytes(key):
    return int(re.search(key + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024

torch.set_num_threads(1)
classes, blocks, names = 1000, 152, [f'class {i}' for i in range(1000)]
probability = torch.rand(classes, blocks)
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts anew
before = megabytes('VmRSS')
counts = GateCounts(classes, [1] * blocks, keep=5)
for start in range(0, 50000, 250):
    labels = torch.arange(start, start + 250) % classes
    gates = torch.bernoulli(probability[labels])
    counts.update(gates, labels, torch.randn(250, classes), range(start, start + 250))
groups = cluster_classes(counts.likeness, names)
claims = check_claims(counts, {'first': [0], 'downsampling': [9], 'last': [151]}, groups, True,
                      path_statistics(counts, 19), 19)
folder = analyze.Path('.')
analyze.write_tables(folder, counts, names[:152], groups, names)
plot_execution_rates(counts.rates, names[:152], names, 'a.png', groups=groups)
plot_block_rates(counts.rates, counts.images, names[:152], 'b.png')
plot_blocks_run(counts.blocks_run, groups, 'c.png')
assert len(counts.table()[0]) == 50000 and counts.images.sum() == 50000
print(megabytes('VmHWM') - before)
'''


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs Linux to read the peak memory')
def test_1000_classes_and_152_blocks_of_50000_images_take_less_than_200_mb(tmp_path):
    scripts = Path(__file__).parents[1] / 'scripts'
    code = f'import sys; sys.path[:0] = [{str(scripts)!r}, {str(scripts.parent)!r}]\n{MEMORY}'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 10 < float(done.stdout) < 200
