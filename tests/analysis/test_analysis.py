"""What is counted over images, against plain loops and scikit-learn."""
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import mutual_info_score

from timm_aig.analysis.counts import (
    ClassGates,
    block_kinds,
    cluster_classes,
    extreme_images,
    path_statistics,
    wilson_interval,
)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 300), st.integers(0, 60), st.integers(0, 2 ** 31))
def test_rates_histograms_and_paths_are_those_of_a_plain_loop(blocks, classes, images, seed):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randint(0, 2, (images, blocks), generator=generator).bool()
    labels = torch.randint(0, classes, (images,), generator=generator)
    counts = ClassGates(labels, gates, torch.rand(classes, classes))
    for label in range(classes):
        own = labels == label
        assert counts.images[label] == own.sum()
        assert counts.blocks_run[label].tolist() == np.bincount(gates[own].sum(1), minlength=blocks + 1).tolist()
        if own.any():
            assert torch.equal(counts.rates[label], gates[own].double().mean(0))
        else:
            assert counts.rates[label].isnan().all()
    expected = Counter((label, *path) for path, label in zip(gates.tolist(), labels.tolist()))
    of_class, paths, numbers = counts.paths()
    assert [(label, *path) for label, path in zip(of_class.tolist(), paths.tolist())] == sorted(expected)
    assert numbers.tolist() == [expected[key] for key in sorted(expected)]


def test_the_fastest_and_slowest_images_of_a_class_are_different_ones():
    macs = torch.tensor([10, 1, 11, 0, 10, 1, 11])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 0])
    assert extreme_images(labels, macs, 0, 2) == ([3, 1], [6, 2])
    assert extreme_images(labels, macs, 0, 3) == extreme_images(labels, macs, 0, 9) == ([3, 1, 0], [6, 2, 4])
    assert extreme_images(labels, macs, 1, 3) == ([5], [5])
    assert extreme_images(labels, macs, 2, 3) == ([], [])


def test_entropy_and_mutual_information_are_those_of_scikit_learn():
    gates = torch.bernoulli(torch.full((500, 3), .4))
    labels = (gates[:, 0] + torch.bernoulli(torch.full((500,), .3))).long()
    s = path_statistics(labels, gates, permutations=99)
    ids = (gates @ torch.tensor([4., 2., 1.])).long().numpy()
    assert s.paths == len(set(ids.tolist())) == 8
    assert s.entropy == pytest.approx(mutual_info_score(ids, ids) / np.log(2))
    assert s.class_entropy == pytest.approx(mutual_info_score(labels, labels) / np.log(2))
    assert s.mutual_information == pytest.approx(mutual_info_score(ids, labels) / np.log(2))
    assert s.p_value == .01 and 0 < s.chance < .1 < s.mutual_information


def test_mutual_information_of_many_paths_is_what_chance_gives_when_labels_do_not_matter():
    gates = torch.bernoulli(torch.full((300, 9), .5))
    s = path_statistics(torch.arange(300) % 10, gates, permutations=99)
    assert s.mutual_information > 2  # of 3.3 bits, though there is nothing to tell
    assert s.mutual_information == pytest.approx(s.chance, abs=.1) and s.p_value > .05


def test_one_path_says_nothing():
    s = path_statistics(torch.arange(20) % 2, torch.ones(20, 3), permutations=19)
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
    ('res2net50_26w_4s_aig', {}, (['layer1.0'], ['layer2.0', 'layer3.0', 'layer4.0'], ['layer4.2'])),
    ('regnetx_002_aig', {}, (['s1.b1'], ['s1.b1', 's2.b1', 's3.b1', 's4.b1'], ['s4.b7'])),
    ('convnext_atto_aig', {}, (['stages.0.blocks.0'], [], ['stages.3.blocks.1'])),
])
def test_first_downsampling_and_last_blocks_are_those_of_the_network_as_far_as_gated(arch, kwargs, kinds):
    model = timm.create_model(arch, device='meta', **kwargs)
    assert block_kinds(model) == dict(zip(('first', 'downsampling', 'last'), kinds))


MEMORY = '''
import re
import timm
import torch
import matplotlib.figure
import analyze
from timm_aig.analysis.counts import ClassGates, cluster_classes, path_statistics
from timm_aig.analysis.claims import check_claims
from timm_aig.training.evaluate import evaluate
from timm_aig.analysis.figures import plot_blocks_run, plot_execution_rates

def megabytes(key):
    return int(re.search(key + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024

torch.set_num_threads(1)
classes, blocks, names = 1000, 152, [f'class {i}' for i in range(1000)]
probability = torch.rand(classes, blocks)
model = timm.create_model('cifar_resnet8_aig', num_classes=classes)
images = torch.zeros(250, 3, 8, 8)
evaluate(model, [(images, torch.arange(250))])  # what torch loads to run a model is not the analysis's
open('/proc/self/clear_refs', 'w').write('5')  # the peak starts anew
before = megabytes('VmRSS')
loader = ((images, torch.arange(start, start + 250) % classes) for start in range(0, 50000, 250))
e = evaluate(model, loader, likeness=True)
gates = ClassGates(e.labels, torch.cat([torch.bernoulli(probability[part]).bool() for part in e.labels.split(250)]),
                   e.likeness)
groups = cluster_classes(gates.likeness, names)
claims = check_claims(gates, {'first': [0], 'downsampling': [9], 'last': [151]}, groups, True,
                      path_statistics(gates.labels, gates.gates, 19), 19)
folder = analyze.Path('.')
analyze.write_tables(folder, analyze.Seen(e, gates, None, names[:152], {}, names, groups))
plot_execution_rates(gates.rates, names[:152], names, 'a.png', groups=groups)
plot_blocks_run(gates.blocks_run, groups, 'c.png')
assert len(gates.paths()[0]) == 50000 and gates.images.sum() == 50000
print(megabytes('VmHWM') - before)
'''


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs Linux to read the peak memory')
def test_1000_classes_and_152_blocks_of_50000_images_take_less_than_200_mb(tmp_path):
    scripts = Path(__file__).parents[2] / 'scripts'
    code = f'import sys; sys.path[:0] = [{str(scripts)!r}, {str(scripts.parent)!r}]\n{MEMORY}'
    environ = {**os.environ, 'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_THRESHOLD_': '131072'}  # what is alive, not holes
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stderr
    assert 10 < float(done.stdout) < 200
