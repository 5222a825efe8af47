"""Cascade: an image goes on to the next model while the answer is not sure."""
import json

import pytest
import timm
import torch
import torch.nn as nn

import timm_aig
from timm_aig.budget import set_budget_table
from timm_aig.cascade import Cascade


class Answers(nn.Module):
    """Gives a table's logits for images that hold their row's number, and counts the images it saw."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))
        self.conv = nn.Conv2d(1, 4, 1, bias=False)  # something to count: 16 MACs for 2 x 2 pixels
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return self.table[x[:, 0, 0, 0].long()] + 0 * self.conv(x).sum((1, 2, 3))[:, None]


X = torch.arange(4.).view(4, 1, 1, 1).expand(4, 1, 2, 2)
SURE, UNSURE = [9., 0., 0.], [0.5, 0., 0.]


@pytest.fixture
def pair():
    return Answers([SURE, UNSURE, SURE, UNSURE]), Answers([[0., 9., 0.]] * 4)


@pytest.fixture
def adaptive():
    """A calibrated adaptive model and its images."""
    torch.manual_seed(0)
    model = timm.create_model('cifar_resnet8_aig', in_chans=1).eval()
    for block in timm_aig.gated_blocks(model).values():
        nn.init.normal_(block.gate.fc2.weight, std=2.)
        nn.init.constant_(block.bn2.weight, 1.)
        block.gate.set_offset(-2.)
    x = torch.randn(40, 1, 32, 32)
    timm_aig.calibrate_budget(model, [x], budgets=(.6, .8, 1.), tolerance=.05)
    return model, x


def test_only_unsure_images_go_on_and_get_the_next_answer(pair):
    cascade = Cascade(pair, 0.9)
    logits = cascade(X)
    assert logits.argmax(1).tolist() == [0, 1, 0, 1]
    assert torch.equal(logits[1::2], pair[1](X[1::2]))
    assert pair[0].seen == [4] and pair[1].seen == [2, 2]


def test_the_next_stage_does_not_run_if_all_are_sure(pair):
    assert Cascade(pair, 0.)(X).argmax(1).tolist() == [0] * 4
    assert pair[1].seen == []


def test_an_empty_batch_has_no_answers(pair):
    assert Cascade(pair)(X[:0]).shape == (0, 3)


def test_macs_count_every_stage_that_an_image_went_through(pair):
    rounds = Cascade(pair, 0.9).rounds(X)
    assert rounds.stages.tolist() == [1, 2, 1, 2]
    assert rounds.macs.tolist() == [16, 32, 16, 32]
    assert torch.equal(rounds.logits, Cascade(pair, 0.9)(X))


def test_three_stages_go_on_one_by_one(pair):
    last = Answers([[0., 0., 9.]] * 4)
    middle = Answers([[0., 9., 0.], [0., 9., 0.], [0., 9., 0.], UNSURE])
    rounds = Cascade([pair[0], middle, last], [0.9, 0.5]).rounds(X)
    assert rounds.logits.argmax(1).tolist() == [0, 1, 0, 2] and rounds.stages.tolist() == [1, 2, 1, 3]


def test_any_timm_models_make_a_cascade():
    small, large = (timm.create_model(name, num_classes=5).eval() for name in ('mobilenetv3_small_050', 'resnet18'))
    x = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        first, second = small(x), large(x)
        threshold = first.softmax(1).amax(1).sort().values[3].item()
        logits = Cascade([small, large], threshold).eval()(x)
    unsure = first.softmax(1).amax(1) < threshold
    assert unsure.sum() == 3
    assert torch.equal(logits[~unsure], first[~unsure])
    assert torch.allclose(logits[unsure], second[unsure], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('optimize', [False, True])
def test_one_model_runs_at_a_budget_in_each_stage(adaptive, optimize):
    model, x = adaptive
    expected = []
    for budget in (.6, 1.):
        timm_aig.set_budget(model, budget)
        expected.append(model(x))
    timm_aig.set_gate_offset(model, -100.)  # the cascade's budgets count
    model = timm_aig.optimize_for_inference(model) if optimize else model
    threshold = expected[0].softmax(1).amax(1).median().item()
    cascade = Cascade([(model, .6), (model, 1.)], threshold).eval()
    unsure = expected[0].softmax(1).amax(1) < threshold
    assert torch.allclose(cascade(x), torch.where(unsure[:, None], expected[1], expected[0]), atol=1e-5)
    assert len(cascade.models) == 1
    assert {float(block.gate.offset) for block in timm_aig.gated_blocks(model).values()} == {-100.}


@torch.no_grad()
def test_macs_of_an_adaptive_stage_are_those_of_its_open_blocks(adaptive):
    model, x = adaptive
    cost = timm_aig.compute_cost(model, (1, 32, 32))
    timm_aig.set_budget(model, .6)
    gates = timm_aig.forward_gates(model, x)[1]
    assert 0 < gates.mean() < 1
    assert torch.equal(Cascade([(model, .6), (model, 1.)], 0.).rounds(x).macs, cost.executed(gates))


def labelled(pair, labels):
    return [(X[:2], torch.tensor(labels[:2])), (X[2:], torch.tensor(labels[2:]))]


def test_calibrate_finds_the_fewest_macs_for_an_accuracy(pair):
    cascade = Cascade(pair, 1.)
    points = cascade.calibrate(labelled(pair, [0, 1, 0, 1]), accuracy=100.)
    assert points[-1].top1 == 100 and points[-1].macs_share == 1.5 and points[-1].images == 4
    assert [point.macs_share for point in points] == sorted(point.macs_share for point in points)
    assert cascade.rounds(X).stages.tolist() == [1, 2, 1, 2]


def test_calibrate_finds_the_best_accuracy_within_macs(pair):
    cascade = Cascade(pair, 1.)
    cascade.calibrate(labelled(pair, [0, 1, 0, 1]), macs=1.)
    assert cascade.rounds(X).macs.mean() == 16 and cascade(X).argmax(1).tolist() == [0] * 4


def test_calibrate_measures_what_the_cascade_then_does(adaptive):
    model, x = adaptive
    labels = torch.randint(10, (40,), generator=torch.Generator().manual_seed(1))
    cascade = Cascade([(model, .6), (model, 1.)])  # not in eval itself
    before = {name: value.clone() for name, value in cascade.state_dict().items()}
    cascade.models[0].train()
    points = cascade.calibrate([(x, labels)], macs=1.2, budgets=[(.6, .8), (.8, 1.)])
    chosen = next(p for p in points if p.thresholds == cascade.thresholds and p.budgets == cascade.budgets)
    assert cascade.training and all(torch.equal(value, before[name]) for name, value in cascade.state_dict().items())
    with torch.no_grad():
        rounds = cascade.eval().rounds(x)
    static = timm_aig.compute_cost(model, (1, 32, 32)).static
    assert rounds.macs.mean().item() / static == pytest.approx(chosen.macs_share)
    assert 100 * (rounds.logits.argmax(1) == labels).double().mean().item() == pytest.approx(chosen.top1)


def test_a_goal_out_of_reach_leaves_the_cascade_unchanged(pair):
    cascade = Cascade(pair, .5)
    for goal in (dict(accuracy=100.), dict(macs=.1)):
        with pytest.raises(timm_aig.InputError, match='out of reach: the range is'):
            cascade.calibrate(labelled(pair, [2, 2, 0, 1]), **goal)
    assert cascade.thresholds == (.5,)
    with pytest.raises(timm_aig.InputError, match='not both'):
        cascade.calibrate(labelled(pair, [0, 1, 0, 1]))


def test_calibrate_leaves_out_images_without_a_label_and_refuses_what_has_none(pair):
    cascade = Cascade(pair, .5)
    points = cascade.calibrate([(X, torch.tensor([0, 1, -1, -1]))], accuracy=100.)
    assert points[-1].images == 2
    for loader, problem in (
            ([X], 'loader must give labels'), ([], 'gives no images'), ([{'x': X}], 'must give batches'),
            ([(X, torch.tensor([0, 1, 0, 9]))], 'a label 9')):
        with pytest.raises(timm_aig.InputError, match=problem):
            cascade.calibrate(loader, macs=2.)


def test_bad_arguments_are_named(pair, adaptive):
    for bad, problem in (
            (dict(stages=pair[:1]), 'stages must be a list of at least two'),
            (dict(stages=pair[0], thresholds=pair[1]), 'stages must be a list of at least two'),
            (dict(stages=['resnet18', 'resnet50']), 'stages must be models or pairs of a model and a budget'),
            (dict(stages=pair, thresholds=[.5, .5]), r'thresholds must be 1 in \[0, 1\]'),
            (dict(stages=pair, thresholds=float('nan')), 'thresholds'),
            (dict(stages=[(pair[0], .5), pair[1]]), 'without calibrated budgets'),
            (dict(stages=[(adaptive[0], .1), pair[1]]), 'budget must be from'),
            (dict(stages=[timm.create_model('cifar_resnet8', num_classes=n) for n in (2, 3)]), 'classes, not 2, 3')):
        with pytest.raises(timm_aig.InputError, match=problem):
            Cascade(**bad)


def test_models_that_order_their_classes_differently_are_refused_and_other_images_are_said(caplog):
    models = [timm.create_model('cifar_resnet8', num_classes=3) for _ in range(2)]
    models[1].pretrained_cfg = dict(models[1].pretrained_cfg, mean=(0., 0., 0.))
    for model in models:
        model.pretrained_cfg = dict(model.pretrained_cfg, label_names=['a', 'b', 'c'])
    Cascade(models)
    assert 'differ in the mean of their images' in caplog.text and 'std' not in caplog.text
    models[1].pretrained_cfg['label_names'] = {'1': 'b', '0': 'a', '2': 'c'}  # as timm allows
    Cascade(models)
    models[1].pretrained_cfg['label_names'] = {'0': 'c', '1': 'b', '2': 'a'}
    with pytest.raises(timm_aig.InputError, match='stages must have their classes in the same order'):
        Cascade(models)


@torch.no_grad()
def test_a_cascade_is_loaded_from_a_folder_with_a_colon_in_its_name(tmp_path):
    models = [timm.create_model('cifar_resnet8', num_classes=3) for _ in range(2)]
    Cascade(models, .7).save_pretrained(tmp_path / 'run:1')
    for name in (tmp_path / 'run:1', f'local-dir:{tmp_path}/run:1'):
        assert Cascade.from_pretrained(name).thresholds == (.7,)


@torch.no_grad()
def test_a_saved_cascade_loads_with_each_model_once(adaptive, tmp_path):
    model, x = adaptive
    small = timm.create_model('cifar_resnet8', in_chans=1).eval()
    cascade = Cascade([small, (model, .6), (model, 1.)], [.2, .3]).eval()
    cascade.save_pretrained(tmp_path)
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob('*.*'))
    assert files == ['config.json', 'model_1/config.json', 'model_1/model.safetensors',
                     'model_2/config.json', 'model_2/model.safetensors']
    for name in (tmp_path, f'local-dir:{tmp_path}'):
        loaded = Cascade.from_pretrained(name)  # in eval
        assert loaded.thresholds == (.2, .3) and loaded.budgets == (None, .6, 1.)
        assert torch.equal(loaded(x), cascade(x))


def test_a_config_that_is_no_cascade_is_named(tmp_path):
    with pytest.raises(timm_aig.InputError, match='is not a saved cascade'):
        Cascade.from_pretrained(tmp_path)
    elsewhere, incomplete = {'model': '../model', 'budget': None, 'threshold': .5}, {'model': 'model_1'}
    unlimited = {**elsewhere, 'model': 'model_1', 'threshold': None}
    cascades = [json.dumps({'cascade': {'stages': [stage, stage]}}) for stage in (elsewhere, incomplete, unlimited)]
    for content in ('no json', '{}', *cascades):
        (tmp_path / 'config.json').write_text(content)
        with pytest.raises(timm_aig.InputError, match='is not a saved cascade'):
            Cascade.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_cascade_that_was_there(adaptive, tmp_path):
    model, _ = adaptive
    small, other = (timm.create_model('cifar_resnet8', in_chans=1).eval() for _ in range(2))
    cascade = Cascade([small, (model, .6)], .9).eval()
    cascade.save_pretrained(tmp_path)
    broken = timm.create_model('cifar_resnet8', in_chans=1)
    torch.nn.init.constant_(broken.fc.weight, float('nan'))
    with pytest.raises(ValueError, match='finite'):
        Cascade([other, broken], .1).save_pretrained(tmp_path)
    loaded = Cascade.from_pretrained(tmp_path)
    assert loaded.thresholds == (.9,) and torch.equal(loaded.models[0].fc.weight, small.fc.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'model_1', 'model_2']


def test_a_budget_is_that_of_the_models_present_table(adaptive, tmp_path):
    model, x = adaptive
    cascade = Cascade([(model, .6), (model, 1.)], .3).eval()
    set_budget_table(model, [timm_aig.BudgetPoint(b, o, b, 9) for b, o in ((.6, -1.), (1., 50.))])
    assert cascade.offsets == (-1., 50.)
    cascade.save_pretrained(tmp_path)
    loaded = Cascade.from_pretrained(tmp_path)
    assert loaded.offsets == cascade.offsets and torch.equal(loaded(x), cascade(x))


def test_the_gates_of_a_cascade_are_not_those_of_all_its_images(pair, adaptive):
    model, x = adaptive
    first = timm.create_model('cifar_resnet8', in_chans=1).eval()
    with torch.no_grad():
        threshold = first(x).softmax(1).amax(1).median().item()
    cascade = Cascade([first, model], threshold).eval()
    reached = int((cascade.rounds(x).stages > 1).sum())
    assert 0 < reached < len(x)
    with pytest.raises(RuntimeError, match=rf'{reached} of {len(x)} images ran the gates. Of a Cascade, rounds'):
        timm_aig.forward_gates(cascade, x)


def test_stages_in_half_precision_are_calibrated(adaptive):
    model, x = adaptive
    cascade = Cascade([timm.create_model('cifar_resnet8', in_chans=1), model], .5).eval().bfloat16()
    assert cascade.calibrate([(x, torch.arange(len(x)) % 10)], macs=2.)
