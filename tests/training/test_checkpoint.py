"""Checkpoints: damaged ones are refused and replaced by the one before, none is lost."""
import copy
import os
import pickle
import random
import resource
import signal

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from timm_aig.training.checkpoint import CheckpointError, Checkpoints, rng_state, set_rng_state, write_atomically

IDENTITY = {'architecture': 'resnet18_aig', 'lr': 0.1, 'scale': [0.2, 1.0], 'clip_grad': None}


def state(step):
    return {'state_dict': {'weight': torch.full((40, 10), float(step)), 'steps': torch.tensor(step)}, 'step': step,
            'sums': {'loss': 0.1 * step}, 'local': [{'rng': rng_state(), 'unreadable': [3]}]}


def assert_same(a, b):
    assert torch.equal(a['state_dict']['weight'], b['state_dict']['weight'])
    assert a['step'] == b['step'] and a['sums'] == b['sums'] and a['local'][0]['unreadable'] == [3]
    assert torch.equal(a['local'][0]['rng']['torch'], b['local'][0]['rng']['torch'])
    assert a['local'][0]['rng']['python'] == b['local'][0]['rng']['python']


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, IDENTITY)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_the_last_checkpoint_is_loaded_as_it_was_saved_and_two_are_kept(checkpoints):
    assert checkpoints.load_last() == (None, [])
    states = [state(step) for step in (0, 5, 12)]
    for each in states:
        checkpoints.save(each['step'], each)
    assert names(checkpoints) == ['checkpoint-00000005.pt', 'checkpoint-00000012.pt']
    loaded, problems = checkpoints.load_last()
    assert_same(loaded, states[2])
    assert problems == []


def test_a_truncated_checkpoint_is_refused_and_the_one_before_is_loaded(checkpoints):
    checkpoints.save(1, state(1))
    path = checkpoints.save(2, state(2))
    whole = path.read_bytes()
    sizes = sorted({0, 1, 3, 4, 30, len(whole) - 1, len(whole) - 22, *random.Random(0).sample(range(len(whole)), 60)})
    for size in sizes:
        path.write_bytes(whole[:size])
        loaded, problems = checkpoints.load_last()
        assert loaded['step'] == 1, size
        problem, = problems
        assert problem.startswith(f'{path} is damaged or not a checkpoint') and '\n' not in problem
        assert path.read_bytes() == whole[:size]


@pytest.fixture(scope='module')
def one_checkpoint(tmp_path_factory):
    checkpoints = Checkpoints(tmp_path_factory.mktemp('flips'), IDENTITY)
    written = state(7)
    path = checkpoints.save(7, written)
    return checkpoints, path, path.read_bytes(), written


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_is_refused_or_harmless(one_checkpoint, data):
    checkpoints, path, whole, written = one_checkpoint
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    try:
        loaded = checkpoints.load(path)
    except CheckpointError:
        return
    assert_same(loaded, written)


def test_a_flipped_bit_of_a_weight_is_refused(one_checkpoint):
    checkpoints, path, whole, _ = one_checkpoint
    weights = whole.index(torch.full((3,), 7.).numpy().tobytes())
    path.write_bytes(whole[:weights] + b'\x01' + whole[weights + 1:])
    with pytest.raises(CheckpointError, match='damaged'):
        checkpoints.load(path)
    path.write_bytes(whole)
    checkpoints.load(path)


def test_without_an_intact_checkpoint_the_error_names_all(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, state(step)).write_bytes(b'')
    with pytest.raises(CheckpointError, match=r'no checkpoint can be read.*-00000002.pt.*-00000001.pt'):
        checkpoints.load_last()
    assert [path.stat().st_size for path in checkpoints.files()] == [0, 0]


@pytest.mark.parametrize('field,value', [
    ('architecture', 'resnet50_aig'), ('lr', 0.2), ('scale', [0.3, 1.0]), ('clip_grad', 1.0), ('new', 1)])
def test_a_checkpoint_of_another_training_is_refused_even_if_an_older_one_fits(checkpoints, field, value):
    other = Checkpoints(checkpoints.folder, {**IDENTITY, field: value})
    checkpoints.save(1, state(1))
    path = other.save(2, state(2))
    with pytest.raises(CheckpointError, match=f'belongs to another training: {field} was .* and is now ') as error:
        checkpoints.load_last()
    assert repr(value) in str(error.value)
    assert path in checkpoints.files()


@pytest.mark.parametrize('content', [{'state_dict': {}}, [1, 2], 'text', {'format': 'timm_aig-training-1'}])
def test_a_file_of_another_format_is_refused(checkpoints, content):
    torch.save(content, checkpoints.folder / 'checkpoint-00000001.pt')
    with pytest.raises(CheckpointError, match='not a training checkpoint of this version of timm_aig'):
        checkpoints.load_last()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('zipped', [True, False])
def test_code_in_a_checkpoint_is_not_run(checkpoints, tmp_path, zipped):
    bait = tmp_path / 'bait'
    path = checkpoints.folder / 'checkpoint-00000002.pt'
    content = {**state(2), 'format': 'timm_aig-training-2', 'identity': IDENTITY, 'step': Malicious(bait)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    checkpoints.save(1, state(1))
    loaded, problems = checkpoints.load_last()
    assert loaded['step'] == 1 and len(problems) == 1
    assert not bait.exists()
    if zipped:
        torch.load(path, weights_only=False)  # proves that the file contains code
        assert bait.exists()


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_two_that_are_kept(checkpoints):
    for step in (10, 20):
        checkpoints.save(step, state(step))
    checkpoints.files()[0].write_bytes(b'damaged')
    checkpoints.save(15, state(15))  # resumed from 10
    assert [path.name[-5:-3] for path in checkpoints.files()] == ['20', '15', '10']
    checkpoints.files()[1].write_bytes(b'damaged too')
    assert checkpoints.load_last()[0]['step'] == 10
    for step in (20, 25):
        checkpoints.save(step, state(step))
    assert [path.name[-5:-3] for path in checkpoints.files()] == ['25', '20']


def test_the_temporary_file_of_a_killed_process_is_removed(checkpoints):
    left = checkpoints.folder / '.checkpoint-00000003.pt.12345.tmp'
    left.write_bytes(b'half')
    checkpoints.save(4, state(4))
    assert names(checkpoints) == ['checkpoint-00000004.pt']


def test_on_a_full_disk_the_earlier_checkpoint_stays_and_nothing_else(checkpoints):
    checkpoints.save(1, state(1))
    before = checkpoints.files()[0].read_bytes()
    big = {**state(2), 'big': torch.zeros(1_000_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit in (0, 1, 100_000, 1_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=r'cannot write .*checkpoint-00000002.pt: .*File too large'):
                checkpoints.save(2, big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
    assert names(checkpoints) == ['checkpoint-00000001.pt']
    assert checkpoints.files()[0].read_bytes() == before
    checkpoints.save(2, big)


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_a_disk_that_fails_late_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / 'file'
    path.write_text('old')

    def fail(*args):
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        write_atomically(path, lambda file: file.write(b'new'))
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    calls = []
    originals = {name: getattr(os, name) for name in ('fsync', 'replace')}
    for name in originals:
        monkeypatch.setattr(os, name, lambda *args, name=name: (calls.append(name), originals[name](*args)))
    write_atomically(tmp_path / 'file', lambda file: file.write(b'new'))
    assert calls == ['fsync', 'replace', 'fsync']


def test_set_rng_state_restores_all_random_generators():
    np.random.standard_normal()  # caches a second draw
    random.gauss(0, 1)  # caches one too
    saved = copy.deepcopy(rng_state())

    def draw():
        return [random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.randn(3).tolist()]

    first = draw()
    assert draw() != first
    set_rng_state(saved)
    assert draw() == first
