"""compat: what stands in for a private name of another package gives the same."""
import importlib
import sys

import pytest
import timm
import torch

from timm_aig import compat


@pytest.fixture
def without():
    """Imports compat anew as if a module did not exist, and restores it."""
    def _without(module: str):
        real = sys.modules.pop(module)
        sys.modules[module] = None
        try:
            return importlib.reload(compat)
        finally:
            sys.modules[module] = real

    yield _without
    importlib.reload(compat)


def test_without_torchs_function_batch_norms_are_the_same(monkeypatch):
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3, eps=.1).train()
    norm(2 + 3 * torch.randn(8, 3, 2, 2))
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    args = (norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    for x in (torch.randn(4, 3, 2, 2), torch.zeros(0, 3, 2, 2)):
        expected = norm.eval()(x)
        assert torch.allclose(compat.batch_norm(x, *args), expected, atol=1e-6)
        monkeypatch.delattr(torch, 'native_batch_norm', raising=False)
        assert torch.allclose(compat.batch_norm(x, *args), expected, atol=1e-6)
        monkeypatch.undo()


def test_recorded_arguments_are_those_that_timm_exports():
    model = timm.create_model('resnet18', num_classes=7)
    compat.set_model_args(model, {**compat.model_args(model), 'target_rate': 0.3})
    assert timm.models.get_model_args(model)['target_rate'] == 0.3
    assert compat.model_args(torch.nn.Linear(1, 1)) == {}


def test_without_timms_function_regnet_weights_in_timms_format_stay_as_they_are(without):
    weights = {'head.fc.bias': torch.zeros(2)}
    assert without('timm.models.regnet').regnet_filter_fn(weights, torch.nn.Module()) == weights
    assert importlib.reload(compat).regnet_filter_fn(dict(weights), torch.nn.Module()) == weights
