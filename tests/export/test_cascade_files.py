"""Cascades in ONNX Runtime and OpenVINO answer as the model does."""
import copy
import json
import shutil

import numpy as np
import pytest
import timm
import torch

import timm_aig
from timm_aig.budget import set_budget_table
from timm_aig.export.cascade import CascadeRunner, export_cascade, load_exported_cascade


@pytest.fixture(scope='module')
def adaptive(model):
    model = copy.deepcopy(model)
    set_budget_table(model, [timm_aig.BudgetPoint(b, o, b, 9) for b, o in ((.5, -1.), (1., 100.))])
    return model


def thresholds(models, x):
    """Of each model, midway between the confidences of two images, with half of the images below."""
    with torch.no_grad():
        return [model(x).softmax(1).amax(1).sort().values[15:17].mean().item() for model in models]


def assert_answers(runner, cascade, x):
    with torch.no_grad():
        expected = cascade.rounds(x)
    assert len(set(expected.stages.tolist())) > 1
    for batch in (1, 7, 32):
        logits, stages = runner(x[:batch].numpy())
        np.testing.assert_allclose(logits, expected.logits[:batch].numpy(), atol=1e-3)
        assert stages.tolist() == expected.stages[:batch].tolist()


def test_onnx_files_answer_as_the_cascade(adaptive, x, tmp_path):
    torch.manual_seed(1)
    small = timm.create_model('cifar_resnet8', num_classes=5).eval()
    torch.nn.init.normal_(small.fc.weight)
    cascade = timm_aig.Cascade(
        [small, (adaptive, .5), (adaptive, 1.)], thresholds([small, adaptive], x)).eval()
    reports = export_cascade(cascade, tmp_path, images=x[:6])
    assert [report['mode'] for report in reports] == ['masked', 'sparse']
    assert sorted(file.name for file in tmp_path.iterdir()) == ['cascade.json', 'model_1.onnx', 'model_2.onnx']
    assert_answers(load_exported_cascade(tmp_path, threads=1), cascade, x)


def test_openvino_files_answer_as_the_cascade(adaptive, x, openvino_file, tmp_path):
    cascade = timm_aig.Cascade([(adaptive, .5), (adaptive, 1.)], thresholds([adaptive], x)).eval()
    for suffix in ('.xml', '.bin'):
        shutil.copyfile(openvino_file.with_suffix(suffix), tmp_path / f'model_1{suffix}')
    gates = len(timm_aig.gated_blocks(adaptive))
    (tmp_path / 'cascade.json').write_text(json.dumps({'stages': [
        {'file': 'model_1.xml', 'threshold': cascade.thresholds[0], 'gate_offset': [-1.] * gates},
        {'file': 'model_1.xml', 'threshold': None, 'gate_offset': [100.] * gates}]}))
    assert_answers(load_exported_cascade(tmp_path, threads=1), cascade, x)


@pytest.mark.parametrize('images,found', [
    (np.zeros((1, 3, 32, 32), np.uint8), 'uint8'), (np.zeros((1, 3, 32, 32)), 'float64'),
    (torch.zeros(1, 3, 32, 32), r'torch\.float32'), ([[0.]], 'list')])
def test_images_of_another_type_are_refused(images, found):
    runner = CascadeRunner([lambda feeds: [np.zeros((1, 5), np.float32)]] * 2, [.5], [None, None])
    with pytest.raises(timm_aig.InputError, match=f'x must be a NumPy array of float32, not {found}'):
        runner(images)


def test_bad_arguments_are_named(adaptive, tmp_path):
    with pytest.raises(timm_aig.InputError, match='runtime must be one of onnx, openvino'):
        export_cascade(timm_aig.Cascade([adaptive, adaptive]), tmp_path, 'tvm')
    with pytest.raises(timm_aig.InputError, match=r'folder must hold the cascade\.json'):
        load_exported_cascade(tmp_path)
    (tmp_path / 'cascade.json').write_text('{"stages": [{}]}')
    with pytest.raises(timm_aig.InputError, match=r'folder must hold the cascade\.json'):
        load_exported_cascade(tmp_path)
