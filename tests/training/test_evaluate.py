"""evaluate: exact results, in one process and in two."""
import os
import sys

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import DataLoader, TensorDataset

import timm_aig
from timm_aig.training.evaluate import METRICS, evaluate

IMAGES = torch.randn(23, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(23) % 10


@pytest.fixture
def model(train_norms, train_gates):
    return train_gates(train_norms(timm.create_model('cifar_resnet20_aig'))).eval()


def loader(images=IMAGES, labels=LABELS, batch_size=8):
    return DataLoader(TensorDataset(images, labels), batch_size)


def test_results_equal_those_of_a_plain_loop_over_the_images(model):
    cost = timm_aig.compute_cost(model, (3, 8, 8))
    evaluation = evaluate(model, loader(), likeness=True)
    losses, correct, among5, all_gates, given = [], [], [], [], []
    with torch.no_grad():
        for image, label in zip(IMAGES, LABELS):
            logits, gates = timm_aig.forward_gates(model, image[None])
            losses.append(F.cross_entropy(logits, label[None]).item())
            order = logits[0].argsort(descending=True).tolist()
            correct.append(order[0] == label.item())
            among5.append(label.item() in order[:5])
            all_gates.append(tuple(gates[0].tolist()))
            given.append(logits[0].double().softmax(0))
    assert evaluation.loss == pytest.approx(sum(losses) / 23, rel=1e-5)
    assert evaluation.top1 == pytest.approx(100 * sum(correct) / 23)
    assert evaluation.top5 == pytest.approx(100 * sum(among5) / 23)
    assert torch.equal(evaluation.labels, LABELS)
    assert (evaluation.predictions == evaluation.labels).tolist() == correct
    assert torch.equal(evaluation.gates.float(), torch.tensor(all_gates))
    assert 1 < evaluation.paths == len(set(all_gates))
    of_class = [torch.stack(given)[LABELS == label].mean(0) for label in range(10)]
    assert torch.allclose(evaluation.likeness, torch.stack(of_class), rtol=1e-5)
    static = cost.total - cost.gates
    shares = [(cost.fixed + sum(g * b for g, b in zip(gates, cost.blocks))) / static for gates in all_gates]
    assert evaluation.macs_shares(cost).tolist() == pytest.approx(shares)
    rate = sum(map(sum, all_gates)) / (23 * 9)
    assert evaluation.metrics(cost) == pytest.approx(dict(zip(METRICS, (
        100 * sum(correct) / 23, 100 * sum(among5) / 23, rate, sum(shares) / 23, len(set(all_gates))))))


@pytest.mark.parametrize('batch_size', [1, 5, 23])
def test_results_do_not_depend_on_the_batch_size(model, batch_size):
    a, b = evaluate(model, loader(batch_size=batch_size)), evaluate(model, loader())
    assert (a.top1, a.top5) == (b.top1, b.top5) and torch.equal(a.gates, b.gates)


def test_images_without_a_label_are_left_out(model):
    labels = LABELS.clone()
    labels[[0, 9, 10, 22]] = -1
    evaluation = evaluate(model, loader(labels=labels))
    kept = evaluate(model, loader(IMAGES[labels >= 0], LABELS[labels >= 0]))
    assert len(evaluation.labels) == 19
    assert (evaluation.top1, evaluation.top5) == (kept.top1, kept.top5)
    assert torch.equal(evaluation.gates, kept.gates)
    assert evaluation.likeness is None
    alike = evaluate(model, loader(labels=LABELS.clamp(max=3)), likeness=True).likeness
    assert alike[:4].sum(1).tolist() == pytest.approx([1] * 4) and alike[4:].isnan().all()  # no image, no likeness
    with pytest.raises(ValueError, match='no labelled images'):
        evaluate(model, [])


@pytest.mark.parametrize('batch, message', [
    ({'image': IMAGES, 'label': LABELS}, r"loader must give batches of images .*, not dict of \['str', 'str'\]"),
    ((IMAGES, F.one_hot(LABELS).float()), r'not tuple of \[\[23, 3, 8, 8\], \[23, 10\]\]'),
    ((IMAGES, LABELS + .5), 'labels .* that are numbers of classes'),
    ((IMAGES, LABELS[:5]), 'loader must give'),
    ((IMAGES, LABELS, LABELS), 'loader must give'),
    ([IMAGES], 'no labelled images'),
    ((torch.full_like(IMAGES, torch.nan), LABELS), 'logits are not numbers'),
    ((IMAGES, LABELS + 1), 'the model has 10 classes, the data set has a label 10'),
    ((IMAGES, torch.full((23,), -1)), 'no labelled images'),
])
def test_batches_that_give_no_predictions_or_labels_are_errors(model, batch, message):
    with pytest.raises(timm_aig.InputError, match=message):
        evaluate(model, [batch])
    assert not model.training


def test_a_static_model_has_one_path_and_all_macs():
    model = timm.create_model('cifar_resnet20')
    cost = timm_aig.compute_cost(model, (3, 8, 8))
    evaluation = evaluate(model, loader())
    assert evaluation.gates.shape == (23, 0)
    figures = evaluation.metrics(cost)
    assert (figures['execution_rate'], figures['macs_share'], figures['paths']) == (1., 1., 1)


@pytest.mark.parametrize('training', [True, False])
def test_modes_and_statistics_are_as_before_also_after_an_error(model, training):
    model.train(training)
    model.layer1.train(not training)  # fine-tuning with frozen norms
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    model.fc.register_forward_hook(lambda module, *_: seen.append(module.training or model.layer1.training))
    evaluate(model, loader())
    assert set(seen) == {False}
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError):
        evaluate(model, (1 / 0 for _ in range(1)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('device', [None, 'meta', torch.device('meta')])
def test_the_device_is_that_of_the_models_parameters_or_the_one_that_is_named(device):
    seen = []

    class Loader:
        def __iter__(self):
            image = torch.empty(1, 3, 8, 8)
            image.to = lambda device, *args, **kwargs: seen.append(device) or 1 / 0
            return iter([(image, torch.zeros(1))])

    with pytest.raises(ZeroDivisionError):
        evaluate(timm.create_model('cifar_resnet20', device='meta'), Loader(), device=device)
    assert seen == [torch.device('meta')]


def test_gates_can_be_drawn_and_autocast_changes_the_logits_a_little(model):
    plain, drawn = evaluate(model, loader()), evaluate(model, loader(), sample=True)
    assert not torch.equal(drawn.gates, plain.gates)
    half = evaluate(model, loader(), amp_dtype=torch.bfloat16)
    assert plain.loss != half.loss and plain.loss == pytest.approx(half.loss, rel=0.05)


def run_process(rank, folder, model):
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo' if sys.platform == 'linux' else 'lo0'
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    dataset = TensorDataset(IMAGES, LABELS)
    sampler = OrderedDistributedSampler(dataset, num_replicas=2, rank=rank)
    evaluation = evaluate(model, DataLoader(dataset, 4, sampler=sampler), likeness=True)
    torch.save(vars(evaluation), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_return_the_results_of_one_for_a_number_of_images_that_does_not_divide(model, tmp_path):
    mp.start_processes(run_process, args=(str(tmp_path), model), nprocs=2, start_method='fork')
    one = evaluate(model, loader(), likeness=True)
    for rank in (0, 1):
        two = torch.load(tmp_path / f'{rank}.pt')
        assert len(two['labels']) == 23
        assert (two['top1'], two['top5']) == (one.top1, one.top5)
        assert torch.allclose(two['likeness'], one.likeness)
        assert two['loss'] == pytest.approx(one.loss, rel=1e-6)
        for name in ('labels', 'predictions', 'gates', 'positions'):  # in the order of the images
            assert torch.equal(two[name], getattr(one, name))


def test_a_model_in_half_precision_is_evaluated(model):
    expected = evaluate(model, loader(IMAGES.bfloat16().float()))
    found = evaluate(model.bfloat16(), loader())
    assert found.loss == pytest.approx(expected.loss, rel=.05) and len(found.labels) == len(expected.labels)
