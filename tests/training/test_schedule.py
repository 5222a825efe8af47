"""GateSchedule: gate noise and MACs targets over a training."""
import math

import pytest
import timm

import timm_aig
from timm_aig import AnyBudgetLoss, ComputeTargetLoss, InputError
from timm_aig.training.schedule import GateSchedule


@pytest.fixture
def model():
    return timm.create_model('cifar_resnet20_aig')


def gates(model):
    return [block.gate for block in timm_aig.gated_blocks(model).values()]


@pytest.mark.parametrize('noise_off,noisy', [(0., [1, 1, 1, 1]), (0.25, [1, 1, 0, 0]), (1., [0, 0, 0, 0])])
def test_the_last_share_of_the_training_has_no_noise(model, noise_off, noisy):
    schedule = GateSchedule(model, noise_off=noise_off)
    for progress, expected in zip((0, 0.74, 0.75, 0.99), noisy):
        schedule.step(progress)
        assert [gate.noise for gate in gates(model)] == [bool(expected)] * 9


@pytest.mark.parametrize('kind', [ComputeTargetLoss, AnyBudgetLoss])
def test_the_targets_fall_from_1_to_those_of_the_loss(model, kind):
    loss = kind(timm_aig.compute_cost(model, (3, 8, 8)), 0.6)
    schedule = GateSchedule(model, loss, anneal=0.5)
    for progress, annealed in {0: 0, 0.25: 0.5, 0.5: 1, 1: 1, 0.1: 0.2}.items():  # not of earlier steps
        schedule.step(progress)
        assert loss.annealed == pytest.approx(annealed)
    GateSchedule(model, loss).step(0)
    assert loss.annealed == 1  # constant without annealing


@pytest.mark.parametrize('argument,share', [('anneal', 1.1), ('anneal', math.nan), ('noise_off', -0.1)])
def test_a_share_out_of_range_is_refused(model, argument, share):
    with pytest.raises(InputError, match=rf'{argument} must be in \[0, 1\], not {share}'):
        GateSchedule(model, **{argument: share})
    with pytest.raises(ValueError, match='no gated blocks'):
        GateSchedule(timm.create_model('cifar_resnet20'))


def test_after_the_training_the_gates_draw_again(model):
    schedule = GateSchedule(model, noise_off=.5)
    schedule.step(.9)
    assert not any(gate.noise for gate in gates(model))
    schedule.finish()
    assert all(gate.noise for gate in gates(model))
