"""OpenVINO files compute what the model does."""
import json
import subprocess
import sys

import pytest
import torch
from exports import GATES, MIXED, assert_agree, expected, offsets, small

import timm_aig
from timm_aig.export.runtime import openvino_core


def test_it_answers_as_the_model_at_any_batch(model, x, openvino_file):
    compiled = openvino_core().compile_model(openvino_file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for batch in (1, 2, 7, 32):
        for pattern in ([1] * GATES, [0] * GATES, MIXED):
            found = compiled({'x': x[:batch].numpy(), 'gate_offset': offsets(pattern)})
            assert_agree(list(found.values()), expected(model, x[:batch], pattern), atol=1e-3)


@pytest.mark.parametrize('arch', [
    'resnetv2_18', 'resnetv2_50', 'regnety_002', 'convnext_atto', 'vit_tiny_patch16_224',
    'torchvision BasicBlock'])
def test_other_families_answer_as_the_model_at_any_batch(arch, tmp_path):
    x = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = small(arch, x)
    timm_aig.export_openvino(model, tmp_path / 'm.xml', images=x[:4])
    compiled = openvino_core().compile_model(tmp_path / 'm.xml', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    count = len(timm_aig.gated_blocks(model))
    for batch in (1, 2, 7):
        for pattern in ([1] * count, [0] * count, [i % 3 % 2 for i in range(count)]):
            found = compiled({'x': x[:batch].numpy(), 'gate_offset': offsets(pattern)})
            assert_agree(list(found.values()), expected(model, x[:batch], pattern), atol=1e-3)


def test_two_files_are_written_with_the_metadata(model, openvino_file):
    assert sorted(file.name for file in openvino_file.parent.iterdir()) == ['m.bin', 'm.xml']
    info = openvino_core().read_model(openvino_file).get_rt_info(['timm_aig', 'gated_blocks']).astype(str)
    assert json.loads(info) == list(timm_aig.gated_blocks(model))


def test_bad_arguments_are_named(model, tmp_path):
    with pytest.raises(timm_aig.InputError, match=r'path must end in \.xml'):
        timm_aig.export_openvino(model, tmp_path / 'm.onnx')
    with pytest.raises(timm_aig.InputError, match='precision must be one of float32, float16, bfloat16, int8'):
        timm_aig.export_openvino(model, tmp_path / 'm.xml', precision='int4')
    with pytest.raises(timm_aig.InputError, match="calibration is for precision 'int8', which needs it"):
        timm_aig.export_openvino(model, tmp_path / 'm.xml', precision='int8')


def test_int8_skips_closed_blocks_too(model, x, openvino_file, tmp_path):
    report = timm_aig.export_openvino(model, tmp_path / 'm.xml', images=x[:6], precision='int8', calibration=[x])
    assert report['bytes'] < 0.6 * openvino_file.with_suffix('.bin').stat().st_size
    compiled = openvino_core().compile_model(tmp_path / 'm.xml', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for pattern in ([1] * GATES, [0] * GATES, MIXED):
        found = compiled({'x': x[:7].numpy(), 'gate_offset': offsets(pattern)})
        assert_agree(list(found.values()), expected(model, x[:7], pattern), atol=0.1)


def test_signals_reach_a_process_after_several_models_were_released(openvino_file):
    program = """
import gc, signal, openvino
from timm_aig.export.runtime import openvino_core

signal.signal(signal.SIGUSR1, lambda *args: print('alive'))
compiled = [core.compile_model('m.xml', 'CPU') for core in (openvino_core(), openvino.Core(), openvino_core())]
while compiled:
    compiled.pop(0)
    gc.collect()
    signal.raise_signal(signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=openvino_file.parent, capture_output=True, text=True,
                          check=False)
    assert (done.returncode, done.stdout) == (0, 'alive\n' * 3)
