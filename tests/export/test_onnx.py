"""ONNX files compute what the model does, skip what it skips, and stand alone."""
import copy
import hashlib
import json

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn as nn
from exports import FAMILIES, GATES, MIXED, PATTERNS, assert_agree, expected, offsets, session, small, trained

import timm_aig
from timm_aig.export import onnx as export
from timm_aig.export.check import ExportError


@pytest.mark.parametrize('batch', [0, 1, 2, 7, 32])
@pytest.mark.parametrize('name', PATTERNS)
def test_a_sparse_file_answers_as_the_model_at_any_batch(model, x, sparse_file, name, batch):
    pattern = PATTERNS[name]
    feeds = {'x': x[:batch].numpy()} | ({} if pattern is None else {'gate_offset': offsets(pattern)})
    wanted = expected(model, x[:batch], pattern)
    assert_agree(session(sparse_file[0]).run(None, feeds), wanted)
    if name == 'own' and batch > 1:
        assert len(wanted[1].unique(dim=0)) > 1, 'the gates must differ, or this shows little'


def test_the_report_describes_the_file(sparse_file):
    path, report = sparse_file
    content = path.read_bytes()
    assert report['sha256'] == hashlib.sha256(content).hexdigest() and report['bytes'] == len(content)
    assert report['gates_changed'] == 0 and report['patterns'] >= 3 and report['images'] == 6
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_closed_block_is_not_computed(x, sparse_file):
    proto = onnx.load(sparse_file[0])
    poisoned = next(i for i in proto.graph.initializer if 'layer1.2.' in i.name and list(i.dims[2:]) == [3, 3])
    poisoned.CopyFrom(onnx.numpy_helper.from_array(np.full(poisoned.dims, np.nan, np.float32), poisoned.name))
    run = session(proto.SerializeToString())
    for is_open in (True, False):
        pattern = [1, int(is_open), 1, 1, 1]
        logits = run.run(None, {'x': x[:3].numpy(), 'gate_offset': offsets(pattern)})[0]
        assert np.isnan(logits).all() == is_open and np.isfinite(logits).all() != is_open


@pytest.fixture(scope='module')
def masked_file(model, x, tmp_path_factory):
    path = tmp_path_factory.mktemp('masked') / 'm.onnx'
    timm_aig.export_onnx(model, path, mode='masked', images=x[:2])
    return path


def test_a_masked_file_takes_any_batch(model, x, masked_file):
    run = session(masked_file)
    for batch in (1, 3, 6):
        assert_agree(run.run(None, {'x': x[:batch].numpy()}), expected(model, x[:batch]))
    assert_agree(run.run(None, {'x': x.numpy(), 'gate_offset': offsets(MIXED)}), expected(model, x, MIXED))
    assert 'GatherND' not in {node.op_type for node in onnx.load(masked_file).graph.node}


@pytest.mark.parametrize(
    'argument', [dict(gates=MIXED), dict(open=torch.tensor(MIXED).float()), dict(gates=np.array(MIXED))])
def test_a_path_file_has_only_the_blocks_of_its_path(model, x, tmp_path, argument):
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='path', images=x[:2], **argument)
    proto = onnx.load(tmp_path / 'm.onnx')
    assert_agree(session(tmp_path / 'm.onnx').run(None, {'x': x.numpy()}), expected(model, x, MIXED))
    # stem, two in each of the open and ungated blocks, the shortcuts of the two downsampling blocks
    assert [node.op_type for node in proto.graph.node].count('Conv') == 1 + 2 * (sum(MIXED) + 9 - GATES) + 2
    assert json.loads({p.key: p.value for p in proto.metadata_props}['gates']) == [bool(gate) for gate in MIXED]


def test_a_static_model_is_exported_masked(x, tmp_path):
    model = trained(timm.create_model('cifar_resnet20'), x)
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked', images=x[:2])
    run = session(tmp_path / 'm.onnx')
    assert [output.name for output in run.get_outputs()] == ['logits']
    with torch.no_grad():
        assert np.allclose(run.run(None, {'x': x.numpy()})[0], model(x).numpy(), atol=1e-4)


def test_the_default_offset_is_the_models_and_the_model_is_left_alone(x, tmp_path):
    model = trained(timm.create_model('cifar_resnet20_aig', target_rates=[1.] * 7 + [.5] * 2), x).train()
    timm_aig.set_gate_offset(model, 0.7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked', images=x[:2])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    run, model = session(tmp_path / 'm.onnx'), model.eval()
    wanted = expected(model, x)
    assert_agree(run.run(None, {'x': x.numpy()}), wanted)
    timm_aig.set_gate_offset(model, 0.)
    assert not torch.equal(expected(model, x)[1], wanted[1])
    assert_agree(run.run(None, {'x': x.numpy(), 'gate_offset': np.zeros(2, np.float32)}), expected(model, x))


def test_the_file_says_what_its_user_needs(tmp_path):
    model = timm.create_model('cifar_resnet32_aig.fmnist_t06', pretrained=True)
    names = model.pretrained_cfg['label_names']
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': {str(i): name for i, name in enumerate(names)}}
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', mode='masked')
    values = {p.key: p.value for p in onnx.load(tmp_path / 'm.onnx').metadata_props}
    assert json.loads(values['labels'])[9] == 'Ankle boot'
    assert json.loads(values['input_size']) == [1, 28, 28] and json.loads(values['mean']) == [0.286]
    assert (values['interpolation'], values['crop_mode']) == ('bicubic', 'center')
    assert json.loads(values['gated_blocks']) == list(timm_aig.gated_blocks(model))
    assert values['architecture'] == 'cifar_resnet32_aig' and values['mode'] == 'masked'
    assert dict(json.loads(values['budgets']))[.5] == timm_aig.set_budget(model, .5)


def test_half_precision_keeps_its_interface(model, x, sparse_file, tmp_path):
    half = timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x[:6], precision='float16')
    assert half['bytes'] < 0.7 * sparse_file[1]['bytes']
    found = session(tmp_path / 'm.onnx').run(None, {'x': x.numpy(), 'gate_offset': offsets(MIXED)})
    assert found[0].dtype == np.float32
    assert_agree(found, expected(model, x, MIXED), atol=0.02)


def test_int8_skips_closed_blocks_too(model, x, sparse_file, tmp_path):
    report = timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x[:6], precision='int8',
                                  calibration=[(x, torch.arange(len(x)))])
    assert report['bytes'] < 0.6 * sparse_file[1]['bytes']
    graph = onnx.load(tmp_path / 'm.onnx').graph
    weights = [onnx.numpy_helper.to_array(i) for i in graph.initializer if len(i.dims) == 4]
    assert all(w.dtype == np.int8 and np.abs(w).max() <= 64 for w in weights), 'else AVX2 saturates'
    types = [node.op_type for node in graph.node]
    assert types.count('QuantizeLinear') >= 1 + 2 * 9 and types.count('NonZero') == GATES
    run = session(tmp_path / 'm.onnx')
    for pattern in ([1] * GATES, [0] * GATES, MIXED):
        for batch in (1, 7):
            found = run.run(None, {'x': x[:batch].numpy(), 'gate_offset': offsets(pattern)})
            assert_agree(found, expected(model, x[:batch], pattern), atol=0.1)


@pytest.mark.parametrize('arch', FAMILIES)
def test_every_kind_of_block_is_exported(arch, tmp_path):
    x = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = small(arch, x)
    timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x[:4])
    count = len(timm_aig.gated_blocks(model))
    for run in (session(tmp_path / 'm.onnx'), timm_aig.load_onnx(tmp_path / 'm.onnx', threads=1)):
        assert [len(output) for output in run.run(None, {'x': x[:0].numpy()})] == [0, 0]
        for batch in (1, 2, 7, 32):
            images = x.repeat(5, 1, 1, 1)[:batch]
            for pattern in (None, [1] * count, [0] * count, [i % 3 % 2 for i in range(count)]):
                feeds = {'x': images.numpy()} | ({} if pattern is None else {'gate_offset': offsets(pattern)})
                assert_agree(run.run(None, feeds), expected(model, images, pattern))
    assert len(expected(model, x)[1].unique(dim=0)) > 1, 'the gates must differ, or this shows little'


@pytest.mark.parametrize('arch', ['resnetv2_18', 'convnext_atto', 'vit_tiny_patch16_224', 'torchvision BasicBlock'])
@pytest.mark.parametrize('mode', ['masked', 'path'])
def test_other_families_have_the_other_modes(arch, mode, tmp_path):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = small(arch, x)
    pattern = [i % 3 % 2 for i in range(len(timm_aig.gated_blocks(model)))]
    timm_aig.export_onnx(
        model, tmp_path / 'm.onnx', mode=mode, images=x[:2], gates=pattern if mode == 'path' else None)
    found = session(tmp_path / 'm.onnx').run(None, {'x': x.numpy()})
    assert_agree(found, expected(model, x, pattern if mode == 'path' else None))
    assert 'NonZero' not in {node.op_type for node in onnx.load(tmp_path / 'm.onnx').graph.node}


def test_a_file_that_disagrees_is_not_written(model, x, sparse_file, tmp_path, monkeypatch):
    (tmp_path / 'm.onnx').write_bytes(b'an older file')
    damaged = onnx.load(sparse_file[0])
    del damaged.metadata_props[:]
    weight = next(i for i in damaged.graph.initializer if 'fc.weight' in i.name)
    weight.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(weight), weight.name))
    monkeypatch.setattr(export, 'to_onnx', lambda *args: damaged)
    with pytest.raises(ExportError, match='logits differ'):
        timm_aig.export_onnx(model, tmp_path / 'm.onnx', images=x[:1])
    assert [file.name for file in tmp_path.iterdir()] == ['m.onnx']
    assert (tmp_path / 'm.onnx').read_bytes() == b'an older file'


@pytest.mark.parametrize('change, match', [
    (dict(path='missing/m.onnx'), "path must be in a folder that exists, not 'missing/m.onnx'"),
    (dict(mode='branch'), 'mode must be one of sparse, masked, path'),
    (dict(precision='int4'), 'precision must be one of float32, float16, int8'),
    (dict(precision='int8'), 'calibration is for precision'),
    (dict(calibration=[torch.zeros(1, 3, 16, 16)]), 'calibration is for precision'),
    (dict(precision='int8', calibration=torch.zeros(2, 3, 16, 16)), 'calibration must give batches of images'),
    (dict(gates=MIXED), "gates is for mode 'path'"),
    (dict(mode='path'), "gates is for mode 'path'"),
    (dict(mode='path', gates=[1] * 4), '5 gated blocks'),
    (dict(mode='path', gates=[.5, 1, 1, 1, 1]), 'a value, 0 or 1, for each of the 5 gated blocks'),
    (dict(images=torch.zeros(3, 16, 16)), r'images must be \[N, C, H, W\]'),
    (dict(images=torch.zeros(1, 1, 16, 16)), r'images cannot be run by the model: .*3 channels'),
])
def test_bad_arguments_are_named(model, tmp_path, change, match):
    with pytest.raises(timm_aig.InputError, match=match):
        timm_aig.export_onnx(model, **{'path': tmp_path / 'm.onnx', **change})
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported_are_refused(model, tmp_path):
    path = tmp_path / 'm.onnx'
    with pytest.raises(timm_aig.InputError, match=r'\(Sequential\) has no residual blocks that timm_aig knows'):
        timm_aig.export_onnx(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), path, mode='masked')
    with pytest.raises(timm_aig.InputError, match=r'must return logits \[B, num_classes\] and nothing else'):
        timm_aig.export_onnx(timm.create_model('cifar_resnet20_aig', features_only=True), path)
    with pytest.raises(timm_aig.InputError, match='export the one it was made from'):
        timm_aig.export_onnx(timm_aig.optimize_for_inference(model), path)
    with pytest.raises(timm_aig.InputError, match="'masked' exports a static model"):
        timm_aig.export_onnx(timm.create_model('cifar_resnet20'), path)
    changed = copy.deepcopy(model)
    changed.layer1[1].gate.fc1 = nn.Sequential(changed.layer1[1].gate.fc1, nn.Tanh())
    with pytest.raises(timm_aig.InputError, match=r'has a gate at layer1.1 that is more than its layers: merge'):
        timm_aig.export_onnx(changed, path)
