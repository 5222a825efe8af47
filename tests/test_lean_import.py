"""import timm_aig: what it costs, what it imports and which names it has."""
import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import timm_aig

HEAVY = ('matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'sklearn', 'gradio', 'openvino', 'tensorboard', 'pandas')


@pytest.fixture(scope='module')
def imported():
    """In a new process: modules loaded by the import, names before any is used, function calls over timm's import."""
    program = (
        'import cProfile, json, pstats, sys, timm; profile = cProfile.Profile(); profile.enable(); import timm_aig; '
        'profile.disable(); print(json.dumps([[name.partition(".")[0] for name in sys.modules], dir(timm_aig), '
        'pstats.Stats(profile).total_calls]))')
    done = subprocess.run([sys.executable, '-c', program], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_it_imports_no_heavy_or_optional_package(imported):
    loaded = set(imported[0])
    assert {'torch', 'timm', 'timm_aig'} <= loaded and not loaded & set(HEAVY)


def test_it_costs_at_most_50_ms_over_timm(imported):
    # Counted in calls, which the machine's load does not change: 71,500 of them take 40 ms of timm's 5.5 s on a
    # 2-core EPYC.
    assert imported[2] <= 75_000


def test_dir_has_every_public_name_before_any_is_used(imported):
    assert {*timm_aig.__all__, '__version__'} <= {*imported[1]}
    assert {'list_trained', 'record_gates', 'evaluate', 'AIGTask', 'push_to_hub'} <= {*imported[1]}


def test_every_public_name_can_be_used():
    assert [name for name in timm_aig.__all__ if not hasattr(timm_aig, name)] == []
    assert timm_aig.evaluate.__module__ == 'timm_aig.training.evaluate'


def test_an_editor_finds_every_public_name_where_it_is_imported_from():
    """Editors read import statements, among them those under TYPE_CHECKING, and cannot run __getattr__."""
    tree = ast.parse(Path(timm_aig.__file__).read_text(encoding='utf-8'))
    imports = {alias.name: f'timm_aig.{node.module}' for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
               if node.level for alias in node.names}
    assert {*timm_aig.__all__} <= {*imports}
    for name, path in timm_aig._LAZY.items():
        assert imports[name] == f'timm_aig{path}', name


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(timm_aig, 'no_such_name')
