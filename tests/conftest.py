"""Fixtures of all tests."""
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn

import timm_aig

pytest_plugins = ['loopback']

torch.set_num_threads(1)  # the nets are small: threads cost more than they bring, ten times more on a busy machine

# One arch for each kind of block; the others stand behind the marker all_archs.
DEFAULT_ARCHS = (
    'resnet18', 'resnet50', 'resnet50d', 'seresnet50', 'ecaresnet26t', 'resnetblur18', 'resnext50_32x4d', 'resnetrs50',
    'resnet50_gn', 'cifar_resnet20',
)


def pytest_generate_tests(metafunc):
    """A test with an argument `parent` runs for every static arch that has an adaptive kin."""
    if 'parent' in metafunc.fixturenames:
        others = sorted(set(timm.list_models(module=('resnet', 'cifar_resnet'))) - set(DEFAULT_ARCHS))
        metafunc.parametrize(
            'parent', [*DEFAULT_ARCHS, *(pytest.param(arch, marks=pytest.mark.all_archs) for arch in others)])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def train_norms():
    """Gives the norms of a model what training gives them, in place.

    A new model would hide errors: the last norm of each residual branch has weight 0, so every branch is 0.
    """
    def _train_norms(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, module in model.named_modules():
                if '.gate' in name or not isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                    continue
                module.weight.uniform_(0.2, 0.6)
                module.bias.uniform_(-0.2, 0.2)
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.1, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
        return model

    return _train_norms


@pytest.fixture
def train_gates():
    """Gives the gates of a model answers that differ between samples and blocks, in place."""
    def _train_gates(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for block in timm_aig.gated_blocks(model).values():
                block.gate.fc1.weight.normal_(std=4.)
                block.gate.fc2.weight.normal_(std=1.)
                block.gate.fc2.bias.zero_()
        return model

    return _train_gates


@pytest.fixture
def run_script(monkeypatch):
    """Runs a script of scripts/ in this process; gives its exit code."""
    def _run_script(name: str, *args) -> int:
        script = Path(__file__).parent.parent / 'scripts' / name
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
        try:
            runpy.run_path(str(script), run_name='__main__')
        except SystemExit as e:
            return e.code or 0
        return 0

    return _run_script
