"""A small adaptive model and its files."""
import subprocess
import sys

import pytest
import timm
import torch
from exports import trained

import timm_aig


@pytest.fixture(scope='package')
def model(x):
    """Nine blocks, five of them gated, one with a downsampling shortcut. Tests must not change it."""
    torch.manual_seed(0)
    rates = [1., .5, .5, .5, 1., .5, 1., 1., .5]
    return trained(timm.create_model('cifar_resnet20_aig', num_classes=5, target_rates=rates), x)


@pytest.fixture(scope='package')
def x():
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='package')
def sparse_file(model, x, tmp_path_factory):
    """The model's ONNX file of mode 'sparse', and the report about it."""
    path = tmp_path_factory.mktemp('sparse') / 'm.onnx'
    return path, timm_aig.export_onnx(model, path, images=x[:6])


@pytest.fixture(scope='package')
def openvino_file(model, x, tmp_path_factory):
    """The model as OpenVINO IR. A process of its own writes it: OpenVINO once crashed one that had run other tests."""
    folder = tmp_path_factory.mktemp('openvino')
    timm_aig.save_pretrained(model, folder / 'model')
    torch.save(x[:6], folder / 'x.pt')
    program = """
import timm, timm_aig, torch
model = timm.create_model('local-dir:model', pretrained=True)
timm_aig.export_openvino(model, 'm.xml', images=torch.load('x.pt'))
"""
    subprocess.run([sys.executable, '-c', program], cwd=folder, check=True, timeout=300)
    (folder / 'file').mkdir()
    return [(folder / name).rename(folder / 'file' / name) for name in ('m.bin', 'm.xml')][1]
