"""Optimised ONNX files: the same answers, for this machine only."""
import json

import numpy as np
import onnx
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import timm_aig
from timm_aig.export import runtime as onnx_runtime
from timm_aig.export.branches import NCHWC, inline_branches, restore_branches, subgraphs
from timm_aig.export.check import FORCED
from timm_aig.export.passes import create_session


@pytest.fixture(scope='module')
def portable(tmp_path_factory):
    """A branch file of a bottleneck network, whose last convolutions are lifted in the first stages: 16 gates."""
    torch.manual_seed(0)
    model = timm.create_model('resnet50_aig', num_classes=5).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.2, 0.6)
                module.bias.uniform_(-0.2, 0.2)
            elif name.endswith('gate.fc2'):
                module.bias.zero_()
                module.weight.normal_()
    path = tmp_path_factory.mktemp('onnx') / 'm.onnx'
    timm_aig.export_onnx(model, path, images=torch.randn(1, 3, 64, 64))
    return path


@pytest.fixture(scope='module')
def optimized(portable):
    return timm_aig.optimize_onnx(portable)


@pytest.fixture
def copied(portable, tmp_path):
    """A portable file that a test may change."""
    path = tmp_path / 'm.onnx'
    path.write_bytes(portable.read_bytes())
    return path


@pytest.fixture(scope='module')
def sessions(portable, optimized):
    return create_session(portable.read_bytes()), create_session(optimized.read_bytes())


X = np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype=np.float32)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=st.lists(st.booleans(), min_size=16, max_size=16), scale=st.sampled_from([1e-3, 1., 30.]))
def test_it_answers_as_the_portable_file_for_every_pattern(sessions, pattern, scale):
    feed = {'x': X * np.float32(scale), 'gate_offset': np.where(pattern, FORCED, -FORCED).astype(np.float32)}
    expected, found = (session.run(None, feed) for session in sessions)
    assert np.abs(expected[0] - found[0]).max() <= 1e-5 * max(1, np.abs(expected[0]).max())
    assert np.array_equal(expected[1], found[1]) and np.array_equal(found[1][0], np.array(pattern, np.float32))


@settings(max_examples=20, deadline=None)
@given(offset=st.floats(-3, 3, width=32))
def test_its_own_gates_answer_as_the_portable_files(sessions, offset):
    feed = {'x': X, 'gate_offset': np.full(16, offset, np.float32)}
    expected, found = (session.run(None, feed) for session in sessions)
    assert np.array_equal(expected[1], found[1])


def test_branches_hold_what_onnx_runtime_does_for_a_static_graph(optimized):
    graph = onnx.load(optimized).graph
    convs = [node for part in subgraphs(graph) for node in part.node if 'Conv' in node.op_type]
    inside = [node for part in subgraphs(graph)[1:] for node in part.node if 'Conv' in node.op_type]
    assert all(node.op_type == 'Conv' and node.domain == NCHWC for node in convs)
    assert len(inside) >= 3 * 16 - 5  # all of the blocks' convolutions but the lifted ones
    reorders = [node for part in subgraphs(graph) for node in part.node if node.op_type == 'ReorderInput']
    assert [node.input[0] for node in reorders] == ['layout.ramp'], 'a tensor is laid out anew between blocks'


@pytest.mark.parametrize('select', [False, True])
def test_laying_branches_out_and_back_changes_nothing(portable, select):
    model = onnx.load(portable)
    static, branches = inline_branches(model, select)
    assert len(branches) == 16 and not any(node.op_type == 'If' for node in static.graph.node)
    restored = restore_branches(static, branches, model)
    onnx.checker.check_model(restored)
    for graph in subgraphs(restored.graph)[1:]:
        assert all(node.op_type != 'Where' for node in graph.node)
    before, after = (create_session(m.SerializeToString()) for m in (model, restored))
    for sign in (1, -1):
        feed = {'x': X, 'gate_offset': (np.arange(16) % 3 - .5).astype(np.float32) * sign * np.float32(FORCED)}
        assert all(map(np.array_equal, before.run(None, feed), after.run(None, feed)))
    if select:  # the static graph then goes on with what the gates ask for
        shown = create_session(static.SerializeToString()).run(['logits'], {'x': X})[0]
        assert np.allclose(shown, before.run(['logits'], {'x': X})[0], atol=1e-5)


def test_load_makes_the_optimized_file_once(copied):
    first = timm_aig.load_onnx(copied, threads=1, spinning=False)
    made = copied.with_name('m.optimized.onnx')
    before = made.stat()
    second = timm_aig.load_onnx(copied)
    third = timm_aig.load_onnx(made)
    assert made.stat().st_mtime_ns == before.st_mtime_ns
    answers = [session.run(None, {'x': X})[0] for session in (first, second, third)]
    assert np.allclose(answers[0], answers[1]) and np.allclose(answers[0], answers[2])


def test_an_optimized_file_may_have_any_name(copied):
    made = timm_aig.optimize_onnx(copied, copied.with_name('fast.onnx'))
    before = made.read_bytes()
    answer = timm_aig.load_onnx(made).run(None, {'x': X})[0]
    assert np.allclose(answer, timm_aig.load_onnx(copied).run(None, {'x': X})[0]) and made.read_bytes() == before


@pytest.mark.parametrize('key', ['cpu', 'onnxruntime', 'source'])
def test_a_file_made_elsewhere_is_made_again_or_refused(copied, key):
    made = timm_aig.optimize_onnx(copied)
    model = onnx.load(made)
    prop = next(p for p in model.metadata_props if p.key == 'machine')
    prop.value = json.dumps({**json.loads(prop.value), key: 'another'})
    foreign = model.SerializeToString()
    made.write_bytes(foreign)
    timm_aig.load_onnx(copied)
    assert made.read_bytes() != foreign
    made.write_bytes(foreign)
    timm_aig.load_onnx(made)
    assert made.read_bytes() != foreign
    made.write_bytes(foreign)
    copied.unlink()
    if key != 'source':
        with pytest.raises(ValueError, match='another CPU or ONNX Runtime'):
            timm_aig.load_onnx(made)
        assert made.read_bytes() == foreign


def test_a_new_portable_file_makes_the_optimized_one_stale(copied):
    made = timm_aig.optimize_onnx(copied)
    before = made.read_bytes()
    model = onnx.load(copied)
    model.doc_string = 'changed'
    onnx.save(model, copied)
    timm_aig.load_onnx(copied)
    assert made.read_bytes() != before


def test_on_a_cpu_with_other_blocks_it_fails_however_it_is_loaded(optimized):
    model = onnx.load(optimized)
    here = next(i for i in model.graph.initializer if i.name == 'layout.here')
    order = onnx.numpy_helper.to_array(here)
    assert order.tolist().index(1) in (8, 16)
    ramp = np.arange(32, dtype=np.float32).reshape(16, 2)
    blocks = 16 if order.tolist().index(1) == 8 else 8
    other = ramp.reshape(-1, blocks, 2).transpose(0, 2, 1).reshape(-1)
    here.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(other), 'layout.here'))
    with pytest.raises(Exception, match='optimized_for_another_kind_of_CPU'):
        create_session(model.SerializeToString()).run(None, {'x': X})


def test_what_disagrees_is_not_written(copied, monkeypatch):
    def damage(graph):
        weight = next(i for i in graph.initializer if 'fc.weight' in i.name)
        weight.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(weight), weight.name))

    monkeypatch.setattr(onnx_runtime, 'shorten_gates', damage)
    with pytest.raises(RuntimeError, match='disagrees'):
        timm_aig.optimize_onnx(copied)
    assert [file.name for file in copied.parent.iterdir()] == ['m.onnx']


def test_files_it_cannot_use_are_named(optimized, tmp_path):
    path = tmp_path / 'm.onnx'
    path.write_bytes(b'no protobuf')
    with pytest.raises(ValueError, match='not an ONNX file'):
        timm_aig.optimize_onnx(path)
    path.write_bytes(b'')
    with pytest.raises(ValueError, match='not written by timm_aig'):
        timm_aig.load_onnx(path)
    with pytest.raises(ValueError, match='optimized already'):
        timm_aig.optimize_onnx(optimized)
    model = timm.create_model('cifar_resnet20_aig')
    timm_aig.export_onnx(model, path, mode='masked', images=torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="mode 'branch' in float32"):
        timm_aig.optimize_onnx(path)
    assert timm_aig.load_onnx(path).run(None, {'x': np.zeros((2, 3, 16, 16), np.float32)})[0].shape == (2, 10)
    with pytest.raises(FileNotFoundError):
        timm_aig.load_onnx(tmp_path / 'none.onnx')
