"""A small adaptive model and its files."""
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
    """The model as OpenVINO IR."""
    path = tmp_path_factory.mktemp('openvino') / 'm.xml'
    timm_aig.export_openvino(model, path, images=x[:6])
    return path
