"""import timm_aig: what it costs, what it imports and which names it has."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import timm_aig

HEAVY = ('matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'sklearn', 'gradio', 'openvino', 'tensorboard', 'pandas')


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code], check=True, capture_output=True, text=True, env={**os.environ, **env})
    return done.stdout.strip()


def test_it_imports_no_heavy_or_optional_package():
    loaded = run('import sys, timm, timm_aig; print(*{name.partition(".")[0] for name in sys.modules})').split()
    assert {'torch', 'timm', 'timm_aig'} <= set(loaded)
    assert not set(HEAVY) & set(loaded)


def test_it_costs_at_most_50_ms_over_timm():
    # the best of five processor times: other processes do not count, nor does compiling the source, done once
    code = ('import timm, time; start = time.process_time(); import timm_aig; '
            'print(time.process_time() - start)')
    assert min(float(run(code, PYTHONDONTWRITEBYTECODE='')) for _ in range(5)) <= 0.05


def test_dir_has_every_public_name_before_any_is_used():
    names = run('import timm_aig; print(*dir(timm_aig))').split()
    assert {*timm_aig.__all__, '__version__'} <= {*names}
    assert {'list_trained', 'record_gates', 'evaluate', 'AIGTask', 'push_to_hub'} <= {*names}


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
