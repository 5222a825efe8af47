"""Importing the package is cheap: nothing but timm comes along."""
import os
import subprocess
import sys

HEAVY = ('matplotlib', 'onnx', 'onnxruntime', 'onnxscript', 'sklearn', 'gradio', 'openvino', 'tensorboard', 'pandas')


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code], check=True, capture_output=True, text=True, env={**os.environ, **env})
    return done.stdout.strip()


def test_importing_it_imports_no_heavy_or_optional_package():
    loaded = run('import sys, timm, timm_aig; print(*{name.partition(".")[0] for name in sys.modules})').split()
    assert {'torch', 'timm', 'timm_aig'} <= set(loaded)
    assert not set(HEAVY) & set(loaded)


def test_importing_it_costs_at_most_50_ms_over_timm():
    # Processor time, the best of five: what other processes of the machine do does not count, nor does compiling the
    # source, which Python does once.
    code = ('import timm, time; start = time.process_time(); import timm_aig; '
            'print(time.process_time() - start)')
    assert min(float(run(code, PYTHONDONTWRITEBYTECODE='')) for _ in range(5)) <= 0.05


def test_every_public_name_is_there():
    assert run(
        'import timm_aig; print([n for n in timm_aig.__all__ if not hasattr(timm_aig, n)], timm_aig.__version__ > "")'
    ) == '[] True'


def test_an_unknown_name_is_an_attribute_error():
    assert run('import timm_aig; print(hasattr(timm_aig, "no_such_name"))') == 'False'
