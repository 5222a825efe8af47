"""OpenVINO files compute what the model does."""
import json

import pytest
from exports import GATES, MIXED, assert_agree, expected, offsets

import timm_aig


def test_it_answers_as_the_model_at_any_batch(model, x, openvino_file):
    import openvino

    compiled = openvino.Core().compile_model(openvino_file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for batch in (1, 2, 7, 32):
        for pattern in ([1] * GATES, [0] * GATES, MIXED):
            found = compiled({'x': x[:batch].numpy(), 'gate_offset': offsets(pattern)})
            assert_agree(list(found.values()), expected(model, x[:batch], pattern), atol=1e-3)


def test_two_files_are_written_with_the_metadata(model, openvino_file):
    import openvino

    assert sorted(file.name for file in openvino_file.parent.iterdir()) == ['m.bin', 'm.xml']
    info = openvino.Core().read_model(openvino_file).get_rt_info(['timm_aig', 'gated_blocks']).astype(str)
    assert json.loads(info) == list(timm_aig.gated_blocks(model))


def test_bad_arguments_are_named(model, tmp_path):
    with pytest.raises(timm_aig.InputError, match=r'path must end in \.xml'):
        timm_aig.export_openvino(model, tmp_path / 'm.onnx')
    with pytest.raises(timm_aig.InputError, match='precision must be one of float32, float16, bfloat16'):
        timm_aig.export_openvino(model, tmp_path / 'm.xml', precision='int8')
