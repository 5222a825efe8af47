"""GateSchedule: noise and target over a training."""
import math

import pytest
import timm

import timm_aig
from timm_aig import ComputeTargetLoss
from timm_aig.training.schedule import GateSchedule


@pytest.fixture
def model():
    return timm.create_model('cifar_resnet20_aig')


def gates(model):
    return [block.gate for block in timm_aig.gated_blocks(model).values()]


@pytest.mark.parametrize('noise_off,noisy', [(0., [1, 1, 1, 1]), (0.25, [1, 1, 0, 0]), (1., [0, 0, 0, 0])])
def test_the_noise_ends_for_the_last_share_of_the_training(model, noise_off, noisy):
    schedule = GateSchedule(model, noise_off=noise_off)
    for progress, expected in zip((0, 0.74, 0.75, 0.99), noisy):
        schedule.step(progress)
        assert [gate.noise for gate in gates(model)] == [bool(expected)] * 9


def test_the_target_falls_from_1_to_the_losss_own(model):
    compute = ComputeTargetLoss(timm_aig.compute_cost(model, (3, 8, 8)), 0.6)
    schedule = GateSchedule(model, compute, anneal=0.5)
    for progress, target in {0: 1, 0.25: 0.8, 0.5: 0.6, 1: 0.6}.items():
        schedule.step(progress)
        assert compute.target == pytest.approx(target)
    schedule.step(0)  # a moment's setting does not depend on those before
    assert compute.target == 1


def test_without_an_anneal_the_target_is_there_from_the_start(model):
    compute = ComputeTargetLoss(timm_aig.compute_cost(model, (3, 8, 8)), 0.6)
    GateSchedule(model, compute).step(0)
    assert compute.target == pytest.approx(0.6)


@pytest.mark.parametrize('kwargs,message', [
    (dict(anneal=1.1), r'anneal must be in \[0, 1\]'), (dict(anneal=math.nan), r'anneal must be in \[0, 1\]'),
    (dict(noise_off=-0.1), r'noise_off must be in \[0, 1\]'),
])
def test_a_value_out_of_range_is_refused(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        GateSchedule(model, **kwargs)


def test_a_static_model_is_refused():
    with pytest.raises(ValueError, match='no gated blocks'):
        GateSchedule(timm.create_model('cifar_resnet20'))
