"""torch.export programs compute what the model does, in processes that have no timm."""
import copy
import resource
import signal
import subprocess
import sys

import pytest
import torch
from exports import MIXED, assert_agree, expected, offsets, small
from torch.nn.utils.parametrizations import weight_norm

import timm_aig


def test_a_program_runs_without_timm_at_any_batch(model, x, tmp_path):
    report = timm_aig.export_program(model, tmp_path / 'm.pt2', images=x[:6])
    assert report['mode'] == 'sparse' and report['gates_changed'] == 0
    offset = torch.from_numpy(offsets(MIXED))
    torch.save((x, [(torch.zeros(len(MIXED)), *expected(model, x)), (offset, *expected(model, x, MIXED)),
                    (-offset.abs(), *expected(model, x, [0] * len(MIXED)))]), tmp_path / 'x.pt')
    program = '''
import sys
sys.modules.update(dict.fromkeys(['timm', 'timm_aig']))
import torch
x, cases = torch.load('x.pt')
module = torch.export.load('m.pt2').module()
for batch in (0, 1, 7, 32):
    for offset, logits, gates in cases:
        found = module(x[:batch], offset)
        assert torch.allclose(found[0], logits[:batch], atol=1e-5) and torch.equal(found[1], gates[:batch])
'''
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('arch', ['resnetv2_18', 'regnety_002', 'convnext_atto', 'vit_tiny_patch16_224'])
def test_other_families_answer_as_the_model_at_any_batch(arch, tmp_path):
    x = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = small(arch, x)
    timm_aig.export_program(model, tmp_path / 'm.pt2', images=x[:4])
    module = torch.export.load(tmp_path / 'm.pt2').module()
    pattern = [i % 3 % 2 for i in range(len(timm_aig.gated_blocks(model)))]
    for batch in (0, 1, 7):
        with torch.no_grad():
            logits, gates = module(x[:batch], torch.from_numpy(offsets(pattern)))
        assert_agree((logits.numpy(), gates.numpy()), expected(model, x[:batch], pattern))


def test_what_training_left_and_large_logits_do_not_matter(model, x, tmp_path):
    model = copy.deepcopy(model)
    weight_norm(model.layer1[0].conv1)
    model.layer2[2] = torch.compile(model.layer2[2], backend='eager')
    model.set_grad_checkpointing()
    for block in timm_aig.gated_blocks(model).values():
        block.gate.fc2.weight.data *= 1e6
    timm_aig.export_program(torch.compile(model, backend='eager'), tmp_path / 'm.pt2', images=x[:6])
    found = torch.export.load(tmp_path / 'm.pt2').module()(x, torch.zeros(len(MIXED)))
    with torch.no_grad():
        logits, gates = timm_aig.forward_gates(model, x)
    assert torch.allclose(found[0], logits, atol=1e-5) and torch.equal(found[1], gates)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_default_dtype_and_device_do_not_matter(dtype, model, x, tmp_path):
    torch.set_default_dtype(dtype)
    try:
        with torch.device('meta'):
            report = timm_aig.export_program(model, tmp_path / 'm.pt2', images=x[:6])
    finally:
        torch.set_default_dtype(torch.float32)
    assert report['gates_changed'] == 0


def test_a_convolution_with_an_adapter_is_exported_with_its_norm(model, x, tmp_path):
    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer
            self.update = copy.deepcopy(layer)

        def forward(self, x):
            return self.base_layer(x) + self.update(x)

    model = copy.deepcopy(model)
    model.layer2[1].conv2 = Adapter(model.layer2[1].conv2)
    assert timm_aig.export_program(model, tmp_path / 'm.pt2', images=x[:6])['gates_changed'] == 0


def test_a_full_disk_is_an_os_error_that_names_the_file(model, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/model.pt2'"):
            timm_aig.export_program(model, tmp_path / 'model.pt2')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
