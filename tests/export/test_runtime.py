"""load_onnx, and files in processes that have neither torch nor timm."""
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
from exports import GATES, MIXED, PATTERNS, assert_agree, expected, offsets

import timm_aig
from timm_aig.export import layout, runtime
from timm_aig.export.layout import remove_reorders


def test_load_onnx_reads_a_file_in_a_read_only_folder(model, x, sparse_file, tmp_path):
    path = tmp_path / 'folder' / 'm.onnx'
    path.parent.mkdir()
    path.write_bytes(sparse_file[0].read_bytes())
    path.parent.chmod(0o500)
    try:
        session = timm_aig.load_onnx(path, threads=1, spinning=False)
    finally:
        path.parent.chmod(0o700)
    assert_agree(session.run(None, {'x': x[:7].numpy()}), expected(model, x[:7]))
    assert session.get_session_options().intra_op_num_threads == 1
    assert [file.name for file in path.parent.iterdir()] == ['m.onnx']


@pytest.mark.parametrize('pattern', PATTERNS.values(), ids=PATTERNS)
def test_a_session_without_reorders_answers_as_the_model(model, x, sparse_file, pattern):
    plain = runtime.create_session(str(sparse_file[0]))
    session = runtime._without_reorders(plain, sparse_file[0], None, True)
    for batch in (0, 1, 7, 32):
        feeds = {'x': x[:batch].numpy()} | ({} if pattern is None else {'gate_offset': offsets(pattern)})
        assert_agree(session.run(None, feeds), expected(model, x[:batch], pattern))


def test_reorders_are_removed_and_sums_fused(sparse_file, tmp_path):
    runtime.create_session(str(sparse_file[0]), optimized=tmp_path / 'm.onnx')
    graph = onnx.load(tmp_path / 'm.onnx').graph
    before = Counter(node.op_type for node in graph.node)
    assert remove_reorders(graph)
    after = Counter(node.op_type for node in graph.node)
    assert before['ReorderInput'] and not after['ReorderInput'] and not after['ReorderOutput']
    assert after['Conv'] == before['Conv'] and after['Add'] <= 1  # of the offsets


def test_an_operator_that_needs_the_plain_layout_gets_it(x, sparse_file, tmp_path):
    runtime.create_session(str(sparse_file[0]), optimized=tmp_path / 'm.onnx')
    optimized = onnx.load(tmp_path / 'm.onnx')
    node = next(node for node in optimized.graph.node if node.op_type == 'Add' and 'offset' not in str(node.input))
    node.op_type = 'Mul'
    feeds = {'x': x[:7].numpy(), 'gate_offset': offsets(MIXED)}
    wanted = runtime.create_session(optimized.SerializeToString()).run(None, feeds)
    assert remove_reorders(optimized.graph)
    assert [node.op_type for node in optimized.graph.node].count('ReorderOutput') > 0
    for found, expected_ in zip(runtime.create_session(optimized.SerializeToString()).run(None, feeds), wanted):
        np.testing.assert_allclose(found, expected_, rtol=1e-4, atol=1e-5)


def test_load_onnx_falls_back_on_a_plain_session(model, x, sparse_file, monkeypatch):
    def fail(graph):
        raise RuntimeError('another version')

    monkeypatch.setattr(layout, 'remove_reorders', fail)
    assert_agree(timm_aig.load_onnx(sparse_file[0]).run(None, {'x': x[:2].numpy()}), expected(model, x[:2]))


def test_load_onnx_does_not_warn(sparse_file, capfd):
    timm_aig.load_onnx(sparse_file[0])
    assert capfd.readouterr() == ('', '')


def test_load_onnx_names_files_it_cannot_use(sparse_file, tmp_path):
    path = tmp_path / 'm.onnx'
    with pytest.raises(timm_aig.InputError, match='no file'):
        timm_aig.load_onnx(path)
    path.write_bytes(b'no protobuf')
    with pytest.raises(timm_aig.InputError, match='not an ONNX file'):
        timm_aig.load_onnx(path)
    foreign = onnx.load(sparse_file[0])
    foreign.producer_name = 'another'
    onnx.save(foreign, path)
    with pytest.raises(timm_aig.InputError, match='did not write'):
        timm_aig.load_onnx(path)


def test_files_run_without_torch_and_timm(model, x, sparse_file, openvino_file, tmp_path):
    logits, gates = expected(model, x)
    np.savez(tmp_path / 'x.npz', x=x.numpy(), logits=logits.numpy(), gates=gates.numpy())
    program = f'''
import sys
sys.modules.update(dict.fromkeys(['torch', 'timm', 'timm_aig']))
import numpy, onnxruntime, openvino
data = numpy.load('x.npz')
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession({str(sparse_file[0])!r}, options, providers=['CPUExecutionProvider'])
compiled = openvino.Core().compile_model({str(openvino_file)!r}, 'CPU', {{'INFERENCE_PRECISION_HINT': 'f32'}})
for batch in (1, 32):
    x, logits, gates = (data[name][:batch] for name in ('x', 'logits', 'gates'))
    for found in (session.run(None, {{'x': x}}),
                  list(compiled({{'x': x, 'gate_offset': numpy.zeros({GATES}, 'float32')}}).values())):
        assert numpy.allclose(found[0], logits, atol=1e-3) and numpy.array_equal(found[1], gates)
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
