"""Budget tables: calibrate_budget finds them, set_budget uses them, and they are saved with the model."""
import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from timm.utils import ModelEmaV3

import timm_aig
from timm_aig import (
    BudgetPoint,
    InputError,
    budget_table,
    calibrate_budget,
    compute_cost,
    forward_gates,
    gated_blocks,
    optimize_for_inference,
    save_pretrained,
    set_budget,
    set_gate_offset,
    ungate_,
)
from timm_aig.budget import budget_offset, read_budget_table, set_budget_table
from timm_aig.training.accuracy_drop import drop_interval

TABLE = (BudgetPoint(.4, -2., .401, 50, 80.), BudgetPoint(.6, 0., .599, 50, 90.), BudgetPoint(1., 9., 1.001, 50))


@pytest.fixture
def model(train_norms, train_gates):
    model = train_gates(train_norms(timm.create_model('cifar_resnet20_aig', num_classes=4)))
    with torch.no_grad():
        model.fc.weight.normal_(std=2.)  # predictions that differ
    return model.eval()


@pytest.fixture
def batches():
    """90 images whose brightness and contrast vary, so that gates differ; the last batch is a smaller one."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(90, 3, 8, 8, generator=generator) * torch.rand(90, 1, 1, 1, generator=generator) * 2
    images += torch.randn(90, 3, 1, 1, generator=generator)
    return list(zip(images.split(32), torch.randint(4, (90,), generator=generator).split(32)))


def measure(model, batches):
    """Mean MACs share and accuracy, by a plain loop."""
    cost = compute_cost(model, (3, 8, 8))
    with torch.no_grad():
        outputs, gates = zip(*(forward_gates(model, images) for images, _ in batches))
    labels = torch.cat([labels for _, labels in batches])
    share = cost.executed(torch.cat(gates)).mean().item() / (cost.total - cost.gates)
    return share, 100 * (torch.cat(outputs).argmax(1) == labels).double().mean().item()


def state(model):
    """What a failed calibration must not change."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()],
        [(float(b.gate.offset), b.gate.budgets) for b in gated_blocks(model).values()])


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def test_each_budget_is_met_and_the_table_holds_what_was_measured(model, batches):
    result = calibrate_budget(model, batches, budgets=(.6, .4, .4))
    assert {.4, .6} <= {point.budget for point in result.table} and result.table == budget_table(model)
    for point in result.table:
        assert set_budget(model, point.budget) == point.gate_offset
        share, top1 = measure(model, batches)
        assert abs(share - point.budget) <= .005
        assert (share, top1) == pytest.approx((point.macs_share, point.top1), abs=1e-5) and point.images == 90
    assert len({point.top1 for point in result.table}) > 1
    offsets = [point.gate_offset for point in result.table]
    assert offsets == sorted(offsets)


def test_interpolation_meets_the_budgets_in_between(model, batches):
    calibrate_budget(model, batches, budgets=(.3, 1.), tolerance=.03)
    for budget in np.linspace(.3, 1., 15):
        set_budget(model, budget)
        assert measure(model, batches)[0] == pytest.approx(budget, abs=.05)


def test_budget_1_opens_every_gate(model, batches):
    calibrate_budget(model, batches, budgets=(1.,))
    set_budget(model, 1.)
    with torch.no_grad():
        assert all(forward_gates(model, images)[1].all() for images, _ in batches)


def test_only_the_table_of_the_model_changes(model, batches):
    set_gate_offset(model, .25)
    model.train()
    model.layer1.eval()
    before = state(model)
    calibrate_budget(model, batches, budgets=(.5,))
    assert budget_table(model)
    set_budget_table(model, ())
    assert same(state(model), before)


@pytest.mark.parametrize('budgets, kwargs, message', [
    ((.5, .001), {}, r'budgets must be in reach, not 0\.001: the range is 0\.0\d+, .*, to 1'),
    ((), {}, 'at least one'), (.5, {}, 'budgets must be a list, not 0.5'),
    ((0.,), {}, r'in \(0, 1\]'), ((1.2,), {}, r'in \(0, 1\]'), ((float('nan'),), {}, 'in'),
    ((.5,), dict(tolerance=0), 'tolerance must be'), ((.5,), dict(max_accuracy_drop=-1), 'max_accuracy_drop must be'),
    ((.5,), dict(max_accuracy_drop=1, confidence=95), 'confidence must be'),
])
def test_bad_arguments_and_budgets_out_of_reach_are_errors_that_change_nothing(
        model, batches, budgets, kwargs, message):
    set_budget_table(model, TABLE)
    set_gate_offset(model, .25)
    model.train()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        calibrate_budget(model, batches, budgets=budgets, **kwargs)
    assert same(state(model), before)


@pytest.mark.parametrize('change, message', [
    (lambda images, labels: {'image': images}, 'loader must give batches of images'),
    (lambda images, labels: (images, torch.rand(len(images), 4)), 'loader must give .* labels'),
    (lambda images, labels: (images, labels + 50), r'the model has 4 classes, the data set has a label 5\d'),
    (lambda images, labels: (images * torch.nan, labels), 'logits are not numbers'),
])
def test_batches_that_would_give_a_wrong_table_are_errors(model, batches, change, message):
    with pytest.raises(InputError, match=message):
        calibrate_budget(model, [change(*batch) for batch in batches], [1.])
    assert budget_table(model) == ()


def test_models_that_cannot_be_calibrated_are_errors(model, batches):
    fast = optimize_for_inference(model)
    model.layer3[2].gate.fc2.weight.data.fill_(torch.nan)  # the block is closed, the logits of the model are finite
    for bad, message in ((model, 'logits of the gates are not finite'), (fast, 'optimized'),
                         (timm.create_model('cifar_resnet20'), 'no gated blocks')):
        with pytest.raises(ValueError, match=message):
            calibrate_budget(bad, batches, [1.])


def test_the_default_device_and_the_dtype_do_not_matter(model, batches):
    with torch.device('meta'):
        calibrate_budget(model, batches, [.5])
        top1 = timm_aig.evaluate(model, batches, likeness=True).top1
        gates = forward_gates(optimize_for_inference(model), batches[0][0], sample=True)[1]
    assert budget_table(model) and top1 > 0 and 0 < gates.mean() < 1
    result = calibrate_budget(model.bfloat16(), batches, budgets=(.5,), tolerance=.03)
    assert result.table[0].macs_share == pytest.approx(.5, abs=.03)


def test_a_budget_that_the_share_jumps_over_is_an_error(batches):
    model = timm.create_model('cifar_resnet20_aig', num_classes=4)
    with torch.no_grad():
        for block in gated_blocks(model).values():
            block.gate.fc2.weight.zero_()
    with pytest.raises(ValueError, match=r'must be in reach, not 0\.5: the nearest MACs shares are 0\.0\d+ and 1\.00'):
        calibrate_budget(model, batches, budgets=(.5,))
    assert budget_table(model) == ()


def test_a_calibration_that_is_interrupted_changes_nothing(model, batches, monkeypatch):
    before = state(model)
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return forward_gates(*args)

    monkeypatch.setattr('timm_aig.training.calibrate.forward_gates', interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate_budget(model, batches, budgets=(.5,))
    assert same(state(model), before)


def test_images_without_labels_give_a_table_without_accuracies(model, batches):
    plain = calibrate_budget(model, [images for images, _ in batches], budgets=(.5,)).table
    labelled = calibrate_budget(model, batches, budgets=(.5,)).table
    assert plain[0].top1 is None and 'top1' not in plain[0].to_dict()
    assert plain[0].gate_offset == labelled[0].gate_offset
    with pytest.raises(ValueError, match='max_accuracy_drop needs'):
        calibrate_budget(model, [images for images, _ in batches], max_accuracy_drop=1)
    with pytest.raises(ValueError, match='no images'):
        calibrate_budget(model, [])
    with pytest.raises(ValueError, match='one size'):
        calibrate_budget(model, [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 9)])


def test_images_with_label_minus_1_are_left_out_and_the_loader_is_read_once(model, batches):
    marked = [(torch.cat([images, images + 3]), torch.cat([labels, torch.full_like(labels, -1)]))
              for images, labels in batches]
    result = calibrate_budget(model, iter(marked), budgets=(.5,))  # a second reading would find nothing
    assert result.table == calibrate_budget(model, batches, budgets=(.5,)).table and result.passes > 1


def test_the_smallest_budget_within_an_accuracy_drop_keeps_it(model, batches):
    with torch.no_grad():  # labels of all classes that are right with all gates open
        set_gate_offset(model, 1000.)
        model.fc.bias -= torch.cat([model(images) for images, _ in batches]).mean(0)
        batches = [(images, model(images).argmax(1)) for images, _ in batches]
    result = calibrate_budget(model, batches, budgets=(.3, 1.), tolerance=.02, max_accuracy_drop=5.)
    smallest = result.smallest
    assert smallest.point in result.table and smallest.reference == 100.
    set_budget(model, smallest.point.budget)
    top1 = measure(model, batches)[1]
    assert smallest.drop == pytest.approx(100 - top1) and smallest.drop <= 5
    assert smallest.interval[0] < smallest.drop < smallest.interval[1]
    assert smallest.point.budget > .32  # else nothing is searched for
    lower = calibrate_budget(model, batches, budgets=(smallest.point.budget - .04,), tolerance=.02)
    assert lower.table[0].top1 < 95 <= smallest.point.top1
    strict = calibrate_budget(model, batches, budgets=(), tolerance=.02, max_accuracy_drop=0.)
    assert strict.smallest.drop <= 0 and strict.smallest.point.budget > smallest.point.budget
    assert strict.table == (strict.smallest.point,)


@pytest.mark.parametrize('lost, won, images', [(85, 138, 10000), (3, 1, 90), (0, 0, 50), (40, 10, 200)])
def test_the_interval_of_a_drop_agrees_with_a_bootstrap(lost, won, images):
    draws = np.random.default_rng(0).multinomial(
        images + 2, np.array([lost + .5, won + .5, images - lost - won + 1]) / (images + 2), 200_000)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / (images + 2), (.025, .975)) * 100
    result = drop_interval(lost, won, images, .95)
    assert result == pytest.approx((low, high), abs=120 / images)
    assert drop_interval(won, lost, images, .95) == pytest.approx((-result[1], -result[0]))
    assert drop_interval(lost, won, images, .99)[1] > result[1]


def test_a_budget_that_cannot_be_set_is_an_error_and_leaves_the_offset(model):
    set_gate_offset(model, .25)
    with pytest.raises(ValueError, match='calibrate_budget'):
        set_budget(model, .5)
    set_budget_table(model, TABLE)
    for budget in (.39, 1.01, float('nan'), 0, -1):
        with pytest.raises(ValueError, match=r'0\.4 to 1'):
            set_budget(model, budget)
    with pytest.raises(ValueError, match='no gated blocks'):
        set_budget(timm.create_model('cifar_resnet20'), .5)
    assert {float(b.gate.offset) for b in gated_blocks(model).values()} == {.25}


@settings(deadline=None)
@given(st.data())
def test_interpolation_is_monotone_and_exact_at_the_rows(data):
    n = data.draw(st.integers(1, 8))
    budgets = sorted(data.draw(st.lists(st.floats(.01, 1), min_size=n, max_size=n, unique=True)))
    offsets = sorted(data.draw(st.lists(st.floats(-50, 50), min_size=n, max_size=n)))
    table = [BudgetPoint(b, o, b, 1) for b, o in zip(budgets, offsets)]
    assert [budget_offset(table, b) for b in budgets] == pytest.approx(offsets)
    at = sorted(data.draw(st.lists(st.floats(budgets[0], budgets[-1]), min_size=2, max_size=2)))
    low, high = (budget_offset(table, b) for b in at)
    assert offsets[0] <= low + 1e-9 and low <= high + 1e-9 and high <= offsets[-1] + 1e-9


def test_an_optimized_model_takes_budgets_and_answers_like_the_original(model, batches):
    calibrate_budget(model, batches, budgets=(.3, .6, 1.))
    fast = optimize_for_inference(model)
    assert budget_table(fast) == budget_table(model)
    images = batches[0][0]
    for budget in (.3, .45, 1.):
        assert set_budget(fast, budget) == set_budget(model, budget)
        with torch.no_grad():
            assert torch.equal(forward_gates(fast, images)[1], forward_gates(model, images)[1])


def test_the_table_goes_with_copies_and_is_dropped_by_ungate(model):
    set_budget_table(model, TABLE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module):
        assert budget_table(other) == TABLE
    assert budget_table(ungate_(model)) == () == budget_table(timm_aig.gate_(model))


def test_other_weights_drop_the_table_and_the_same_ones_keep_it(model):
    set_budget_table(model, TABLE)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert budget_table(model) == TABLE
    other = copy.deepcopy(model.state_dict())
    for name, value in other.items():
        if name.endswith('gate.fc2.weight'):
            value += .1
    model.load_state_dict(other)
    assert budget_table(model) == ()


@pytest.mark.parametrize('change, message', [
    (lambda rows: 7, 'must be a list'),
    (lambda rows: rows[::-1], 'must ascend'), (lambda rows: [3], 'must be a list of objects'),
    (lambda rows: [{**rows[0], 'evil': 1}], 'evil'), (lambda rows: [{'budget': .5}], 'gate_offset'),
    *((lambda rows, change=change: [rows[0], {**rows[1], **change}], message) for change, message in [
        (dict(budget=0), 'budget must be'), (dict(budget=1.5), 'budget must be'), (dict(budget='1'), 'must be a list'),
        (dict(gate_offset=float('inf')), 'gate_offset must be'), (dict(gate_offset=float('nan')), 'gate_offset'),
        (dict(gate_offset=-3), 'must ascend'), (dict(gate_offset=None), 'must be a list'),
        (dict(gate_offset=1e300), 'gate_offset must be'),
        (dict(gate_offset=1.1e4), 'gate_offset must be at most 10000'),
    ]),
])
def test_a_wrong_table_is_an_error(change, message):
    rows = [point.to_dict() for point in TABLE]
    with pytest.raises(InputError, match=message):
        read_budget_table(change(rows))


def test_a_table_is_read_back_also_with_the_fields_of_older_versions():
    rows = [point.to_dict() for point in TABLE]
    assert read_budget_table(rows) == TABLE
    assert read_budget_table([{**row, 'block_rates': [.5, 1.]} for row in rows]) == TABLE
    loaded = timm.create_model('cifar_resnet20_aig', gate_budgets=[{**row, 'block_rates': [.5]} for row in rows])
    assert budget_table(loaded) == TABLE


def test_the_table_is_saved_and_loaded_and_gate_offset_moves_only_the_offset(model, tmp_path):
    set_budget_table(model, TABLE)
    set_budget(model, .5)
    save_pretrained(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert budget_table(loaded) == TABLE and next(iter(gated_blocks(loaded).values())).gate.offset == -1
    moved = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, gate_offset=.5)
    assert budget_table(moved) == TABLE and next(iter(gated_blocks(moved).values())).gate.offset == .5
    assert set_budget(timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True), .6) == 0
    set_budget_table(loaded, ())
    save_pretrained(loaded, tmp_path)
    assert 'gate_budgets' not in (tmp_path / 'config.json').read_text()


def test_between_the_smallest_budget_and_its_neighbour_shares_are_within_the_tolerance(model, batches):
    with torch.no_grad():
        set_gate_offset(model, 1000.)
        batches = [(images, model(images).argmax(1)) for images, _ in batches]
    result = calibrate_budget(model, batches, budgets=(1.,), tolerance=.02, max_accuracy_drop=60.)
    smallest = result.smallest.point.budget
    assert smallest < .9 and len(result.table) > 2  # more than the two that were asked for
    for budget in torch.linspace(smallest, 1, 9).tolist():
        set_budget(model, budget)
        assert abs(measure(model, batches)[0] - budget) <= .02 + 1e-6
