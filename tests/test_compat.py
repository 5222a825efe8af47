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


def test_recorded_arguments_are_those_that_timm_exports():
    model = timm.create_model('resnet18', num_classes=7)
    compat.set_model_args(model, {**compat.model_args(model), 'target_rate': 0.3})
    assert timm.models.get_model_args(model)['target_rate'] == 0.3
    assert compat.model_args(torch.nn.Linear(1, 1)) == {}


def test_without_timms_function_regnet_weights_in_timms_format_stay_as_they_are(without):
    weights = {'head.fc.bias': torch.zeros(2)}
    assert without('timm.models.regnet').regnet_filter_fn(weights, torch.nn.Module()) == weights
    assert importlib.reload(compat).regnet_filter_fn(dict(weights), torch.nn.Module()) == weights
