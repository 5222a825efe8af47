"""Exported files: they compute what the model does, skip what it skips, and stand alone."""
import hashlib
import json
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn

import timm_aig
from timm_aig.export import onnx as export
from timm_aig.export.check import FORCED
from timm_aig.export.onnx import ExportError

PATTERNS = [[1] * 9, [0] * 9, [1, 0, 0, 1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1, 0, 1, 0]]


@pytest.fixture
def model(train_norms, train_gates):
    """cifar_resnet20_aig as after training, 9 gated blocks."""
    return train_gates(train_norms(timm.create_model('cifar_resnet20_aig', num_classes=5))).eval()


@pytest.fixture
def x():
    return torch.randn(6, 3, 16, 16)


@pytest.fixture
def small(train_norms, train_gates):
    """With one gate, for what takes long to compile."""
    model = timm.create_model('cifar_resnet20_aig', num_classes=5, target_rates=[1.] * 4 + [.5] + [1.] * 4)
    return train_gates(train_norms(model)).eval()


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def offsets(pattern):
    return np.where(np.array(pattern) > 0, FORCED, -FORCED).astype(np.float32)


def expected(model, x, pattern=None):
    """Logits and gates in PyTorch, with gates as in the pattern, masked so that it shares no code with skipping."""
    timm_aig.set_execution(model, 'masked')
    with torch.no_grad():
        if pattern is None:
            return timm_aig.forward_gates(model, x)
        with timm_aig.force_gates(model, torch.tensor([pattern] * len(x))):
            return timm_aig.forward_gates(model, x)


def close(found, wanted, atol=1e-5):
    return all(np.allclose(f, w.numpy(), atol=atol) for f, w in zip(found, wanted))


def test_a_branch_file_gives_the_models_logits_and_gates(model, x, tmp_path):
    report = timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x)
    run = session(tmp_path / 'm.onnx')
    wanted = expected(model, x)
    assert len(wanted[1].unique(dim=0)) > 1, 'the gates must differ, or this shows little'
    for i in range(len(x)):
        assert close(run.run(None, {'x': x[i:i + 1].numpy()}), [w[i:i + 1] for w in wanted])
    for pattern in PATTERNS:
        found = run.run(None, {'x': x[:1].numpy(), 'gate_offset': offsets(pattern)})
        assert close(found, expected(model, x[:1], pattern))
    content = (tmp_path / 'm.onnx').read_bytes()
    assert report['sha256'] == hashlib.sha256(content).hexdigest() and report['bytes'] == len(content)
    assert report['gates_changed'] == 0 and report['patterns'] >= 3


def test_a_closed_block_is_not_computed(model, x, tmp_path):
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x[:1])
    proto = onnx.load(tmp_path / 'm.onnx')
    poisoned = next(i for i in proto.graph.initializer if 'layer2.blocks.1.' in i.name and list(i.dims[2:]) == [3, 3])
    poisoned.CopyFrom(onnx.numpy_helper.from_array(np.full(poisoned.dims, np.nan, np.float32), poisoned.name))
    run = session(proto.SerializeToString())
    pattern = [1] * 9
    assert np.isnan(run.run(None, {'x': x[:1].numpy(), 'gate_offset': offsets(pattern)})[0]).all()
    pattern[4] = 0  # layer2.1
    assert np.isfinite(run.run(None, {'x': x[:1].numpy(), 'gate_offset': offsets(pattern)})[0]).all()


def test_a_masked_file_takes_any_batch(model, x, tmp_path):
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked', images=x)
    run = session(tmp_path / 'm.onnx')
    for batch in (1, 3, 6):
        assert close(run.run(None, {'x': x[:batch].numpy()}), expected(model, x[:batch]))
    found = run.run(None, {'x': x.numpy(), 'gate_offset': offsets(PATTERNS[2])})
    assert close(found, expected(model, x, PATTERNS[2]))
    assert 'If' not in {node.op_type for node in onnx.load(tmp_path / 'm.onnx').graph.node}


def test_a_path_file_has_only_the_blocks_of_its_path(model, x, tmp_path):
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='path', open=PATTERNS[2], images=x)
    assert close(session(tmp_path / 'm.onnx').run(None, {'x': x.numpy()}), expected(model, x, PATTERNS[2]))
    nodes = [node.op_type for node in onnx.load(tmp_path / 'm.onnx').graph.node]
    # stem, two in each of the five open blocks, the shortcut of the two downsampling blocks
    assert nodes.count('Conv') == 1 + 2 * sum(PATTERNS[2]) + 2 and 'If' not in nodes


def test_a_static_model_is_exported_masked(model, x, tmp_path):
    timm_aig.ungate_(model)
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked', images=x)
    run = session(tmp_path / 'm.onnx')
    assert [output.name for output in run.get_outputs()] == ['logits']
    with torch.no_grad():
        assert close(run.run(None, {'x': x.numpy()}), [model(x)])


def test_the_files_default_offset_is_the_models(model, x, tmp_path):
    timm_aig.set_gate_offset(model, 0.7)
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked', images=x)
    run = session(tmp_path / 'm.onnx')
    wanted = expected(model, x)
    assert close(run.run(None, {'x': x.numpy()}), wanted)
    timm_aig.set_gate_offset(model, 0.)
    assert not torch.equal(expected(model, x)[1], wanted[1])
    assert close(run.run(None, {'x': x.numpy(), 'gate_offset': np.zeros(9, np.float32)}), expected(model, x))


def test_the_model_is_left_alone(model, x, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked', images=x)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_file_says_what_its_user_needs(tmp_path):
    model = timm.create_model('cifar_resnet32_aig.fmnist_t06', pretrained=True)
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked')
    values = {p.key: p.value for p in onnx.load(tmp_path / 'm.onnx').metadata_props}
    assert json.loads(values['labels'])[9] == 'Ankle boot'
    assert json.loads(values['input_size']) == [1, 28, 28] and json.loads(values['mean']) == [0.286]
    assert json.loads(values['gated_blocks']) == list(timm_aig.gated_blocks(model))
    assert values['architecture'] == 'cifar_resnet32_aig' and values['mode'] == 'masked'
    budgets = dict(json.loads(values['budgets']))
    assert budgets[.5] == timm_aig.set_budget(model, .5)


def test_the_file_says_it_of_a_model_with_other_channels_than_its_weights(tmp_path):
    model = timm.create_model('cifar_resnet20_aig', in_chans=1)
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked')
    values = {p.key: p.value for p in onnx.load(tmp_path / 'm.onnx').metadata_props}
    assert json.loads(values['input_size']) == [1, 32, 32] and json.loads(values['mean']) == [0.5]


def test_files_run_without_torch_and_timm(model, x, tmp_path):
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x)
    timm_aig.optimize_onnx(tmp_path / 'm.onnx')
    timm_aig.export_openvino(model, tmp_path / 'm.xml', images=x)
    np.savez(tmp_path / 'x.npz', x=x[:1].numpy(), logits=expected(model, x[:1])[0].numpy())
    program = '''
import sys
sys.modules.update(dict.fromkeys(['torch', 'timm', 'timm_aig']))
import numpy, onnxruntime, openvino
data = numpy.load('x.npz')
for file in ('m.onnx', 'm.optimized.onnx'):
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    assert numpy.allclose(session.run(['logits'], {'x': data['x']})[0], data['logits'], atol=1e-5)
compiled = openvino.Core().compile_model('m.xml', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
found = compiled({'x': data['x'], 'gate_offset': numpy.zeros(9, 'float32')})['logits']
assert numpy.allclose(found, data['logits'], atol=1e-3)
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('bad', [
    np.zeros((1, 3, 16, 17), np.float32), np.zeros((2, 3, 16, 16), np.float32), np.zeros((1, 3, 16, 16), np.float64)])
def test_the_runtime_refuses_other_inputs(small, x, tmp_path, bad):
    timm_aig.export_onnx(small, tmp_path / 'm.onnx', images=x[:1])
    with pytest.raises(Exception, match=r'Got invalid dimensions|Unexpected input data type'):
        session(tmp_path / 'm.onnx').run(None, {'x': bad})


def test_half_precision_keeps_its_interface(model, x, tmp_path):
    full = timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x)
    half = timm_aig.export_onnx(model, tmp_path / 'h.onnx', images=x, precision='float16')
    assert half['bytes'] < 0.7 * full['bytes']
    found = session(tmp_path / 'h.onnx').run(None, {'x': x[:1].numpy(), 'gate_offset': offsets(PATTERNS[2])})
    assert found[0].dtype == np.float32 and close(found, expected(model, x[:1], PATTERNS[2]), atol=0.02)


def test_int8_keeps_branches(model, x, tmp_path):
    full = timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x)
    quantized = timm_aig.export_onnx(model, tmp_path / 'q.onnx', images=x, precision='int8', calibration=[x])
    assert quantized['bytes'] < 0.6 * full['bytes']
    nodes = onnx.load(tmp_path / 'q.onnx').graph.node
    assert [node.op_type for node in nodes].count('If') == 9
    assert not any(node.op_type == 'Where' for node in nodes)
    run = session(tmp_path / 'q.onnx')
    for pattern in PATTERNS:
        found = run.run(None, {'x': x[:1].numpy(), 'gate_offset': offsets(pattern)})
        wanted = expected(model, x[:1], pattern)
        assert np.array_equal(found[1], wanted[1].numpy())
        assert np.abs(found[0] - wanted[0].numpy()).max() < 0.1 * max(1, wanted[0].abs().max())


def test_openvino_gives_the_models_logits_and_gates(model, x, tmp_path):
    import openvino

    report = timm_aig.export_openvino(model, tmp_path / 'm.xml', images=x)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['m.bin', 'm.xml'] and report['gates_changed'] == 0
    compiled = openvino.Core().compile_model(tmp_path / 'm.xml', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for pattern in PATTERNS:
        found = compiled({'x': x[:1].numpy(), 'gate_offset': offsets(pattern)})
        assert close(list(found.values()), expected(model, x[:1], pattern), atol=1e-4)
    info = openvino.Core().read_model(tmp_path / 'm.xml').get_rt_info(['timm_aig', 'gated_blocks']).astype(str)
    assert json.loads(info) == list(timm_aig.gated_blocks(model))


def test_a_torch_program_runs_without_timm(model, x, tmp_path):
    timm_aig.export_program(model, tmp_path / 'm.pt2', images=x)
    wanted = expected(model, x[:1], PATTERNS[2])
    torch.save((x[:1], torch.from_numpy(offsets(PATTERNS[2])), *wanted), tmp_path / 'x.pt')
    program = '''
import sys
sys.modules.update(dict.fromkeys(['timm', 'timm_aig']))
import torch
x, offset, logits, gates = torch.load('x.pt')
found = torch.export.load('m.pt2').module()(x, offset)
assert torch.allclose(found[0], logits, atol=1e-5) and torch.equal(found[1], gates)
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_aoti_package_gives_the_models_logits_and_gates(small, x, tmp_path):
    timm_aig.export_aoti(small, tmp_path / 'm.pt2', images=x[:2])
    run = torch._inductor.aoti_load_package(str(tmp_path / 'm.pt2'))
    for pattern in ([1], [0]):
        found = run(x[:1], torch.from_numpy(offsets(pattern)))
        assert close([f.numpy() for f in found], expected(small, x[:1], pattern))


def test_what_disagrees_is_not_written(small, x, tmp_path, monkeypatch):
    (tmp_path / 'm.onnx').write_bytes(b'an older file')
    original = export._onnx

    def damaged(*args):
        proto = original(*args)
        weight = next(i for i in proto.graph.initializer if 'fc.weight' in i.name)
        weight.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(weight), weight.name))
        return proto

    monkeypatch.setattr(export, '_onnx', damaged)
    with pytest.raises(ExportError, match='logits differ'):
        timm_aig.export_onnx(small, tmp_path / 'm.onnx', images=x[:1])
    with pytest.raises(ExportError, match='logits differ'):
        timm_aig.export_openvino(small, tmp_path / 'm.xml', images=x[:1])
    assert [file.name for file in tmp_path.iterdir()] == ['m.onnx']
    assert (tmp_path / 'm.onnx').read_bytes() == b'an older file'


@pytest.mark.parametrize('change, match', [
    (dict(mode='fast'), 'mode must be one of branch, masked, path'),
    (dict(precision='int4'), 'precision must be one of float32, float16, int8'),
    (dict(precision='int8'), 'calibration'),
    (dict(calibration=[torch.zeros(1, 3, 16, 16)]), 'calibration'),
    (dict(open=[1] * 9), "mode 'path' go together"),
    (dict(mode='path'), "mode 'path' go together"),
    (dict(mode='path', open=[1] * 8), '9 gated blocks'),
    (dict(images=torch.zeros(3, 16, 16)), r'images must be \[N, C, H, W\]'),
])
def test_bad_arguments_are_named(model, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        timm_aig.export_onnx(model, tmp_path / 'm.onnx', **change)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported_are_refused(model, x, tmp_path):
    path = tmp_path / 'm.onnx'
    with pytest.raises(ValueError, match='timm ResNet'):
        timm_aig.export_onnx(nn.Sequential(nn.Conv2d(3, 3, 1)), path)
    with pytest.raises(ValueError, match='export the one it was made from'):
        timm_aig.export_onnx(timm_aig.optimize_for_inference(model), path)
    with pytest.raises(ValueError, match="'masked' exports a static model"):
        timm_aig.export_onnx(timm_aig.ungate_(model), path)
    with pytest.raises(ValueError, match=r'must end in \.xml'):
        timm_aig.export_openvino(model, path)


def test_every_kind_of_block_is_exported_and_optimized(parent, train_norms, train_gates, tmp_path):
    model = train_gates(train_norms(timm.create_model(f'{parent}_aig'))).eval()
    x = torch.randn(2, 3, 64, 64)
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x)
    count = len(timm_aig.gated_blocks(model))
    generator = np.random.default_rng(0)
    for path in (tmp_path / 'm.onnx', timm_aig.optimize_onnx(tmp_path / 'm.onnx')):
        run = session(path)
        for _ in range(3):
            pattern = generator.integers(0, 2, count).tolist()
            found = run.run(None, {'x': x[:1].numpy(), 'gate_offset': offsets(pattern)})
            wanted = expected(model, x[:1], pattern)
            assert close(found, wanted, atol=1e-4 * max(1, wanted[0].abs().max().item()))
