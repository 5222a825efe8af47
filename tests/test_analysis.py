"""Tests of timm_aig.analysis."""
import math
import sys

import pytest
import timm
import torch
from PIL import Image

import timm_aig
from timm_aig.analysis import execution_rates, plot_accuracy_macs, plot_execution_rates, plot_rates_over_epochs


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


def test_the_heatmap_is_a_png_and_nothing_else_is_left(tmp_path):
    rates = torch.rand(3, 4)
    rates[1] = math.nan
    path = plot_execution_rates(rates, list('abcd'), ['x', '$y$', '$z'], tmp_path / 'rates.png', downsampling=['b'])
    with Image.open(path) as image:
        image.load()
        assert image.format == 'PNG' and min(image.size) > 200
    assert [file.name for file in tmp_path.iterdir()] == ['rates.png']


def test_the_heatmap_of_a_thousand_classes_stays_of_a_readable_size(tmp_path):
    names = [str(i) for i in range(1000)]
    path = plot_execution_rates(torch.rand(1000, 9), names[:9], names, tmp_path / 'rates.png')
    with Image.open(path) as image:
        assert max(image.size) < 5000


def test_names_that_do_not_fit_the_rates_are_refused(tmp_path):
    with pytest.raises(ValueError, match='3 class_names'):
        plot_execution_rates(torch.rand(2, 4), list('abcd'), list('xyz'), tmp_path / 'rates.png')
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ImportError, match=r"pip install 'timm_aig\[train\]'"):
        plot_execution_rates(torch.rand(1, 1), ['a'], ['x'], tmp_path / 'rates.png')


@pytest.mark.parametrize('epochs,blocks', [(1, 1), (20, 33), (300, 9)])
def test_the_rates_over_epochs_are_a_png_and_nothing_else_is_left(tmp_path, epochs, blocks):
    rates = torch.rand(epochs, blocks)
    rates[0] = math.nan
    path = plot_rates_over_epochs(rates, [f'layer1.{i}' for i in range(blocks)], tmp_path / 'rates.png')
    with Image.open(path) as image:
        image.load()
        assert image.format == 'PNG' and min(image.size) > 200
    assert [file.name for file in tmp_path.iterdir()] == ['rates.png']


@pytest.mark.parametrize('count,static', [(1, None), (1, ('static parent', 1., 94.)), (30, ('static parent', 1., 94.))])
def test_accuracy_against_macs_is_a_png_and_nothing_else_is_left(tmp_path, count, static):
    points = [(f'epoch {i + 1}', 1 - i / 100, 90 + i / 10) for i in range(count)]
    path = plot_accuracy_macs(points, static, tmp_path / 'accuracy.png')
    with Image.open(path) as image:
        image.load()
        assert image.format == 'PNG' and min(image.size) > 200
    assert [file.name for file in tmp_path.iterdir()] == ['accuracy.png']
