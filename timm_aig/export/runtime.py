"""Exported files in ONNX Runtime and OpenVINO."""
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Union

import numpy as np

from ..config import InputError
from .check import FORCED, TOLERANCE

__all__ = ['compile_openvino', 'create_session', 'load_onnx', 'open_exported', 'openvino_core']


def load_onnx(path: Union[str, os.PathLike], threads: Optional[int] = None, spinning: bool = True) -> Any:
    """onnxruntime.InferenceSession of a file of export_onnx, on the CPU.

    Mode 'sparse' runs faster in it than in a session of one's own, see layout.py; the file itself is left alone.
    `session.run(None, {'x': x})` returns logits and gates of float32 images x [B, C, H, W] for any B.

    Args:
        path: File to load.
        threads: Threads to run with, ONNX Runtime's default if None.
        spinning: Threads wait actively. Faster, unless other work shares the CPU.

    Raises:
        InputError: There is no such file, or export_onnx did not write it.
        ImportError: The `export` extra is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f'must be a file of export_onnx, there is no file {path}.', 'path')
    try:
        session = create_session(str(path), threads, spinning)
    except ImportError:
        raise
    except Exception as e:  # ONNX Runtime's own classes
        raise InputError(f'must be a file of export_onnx, {path} is not an ONNX file.', 'path') from e
    if session.get_modelmeta().producer_name != 'timm_aig':
        raise InputError(f'must be a file of export_onnx, which did not write {path}.', 'path')
    return _without_reorders(session, path, threads, spinning) or session


def _without_reorders(session: Any, path: Path, threads: Optional[int], spinning: bool) -> Any:
    """A faster session of a file, None if there is none or if it disagrees with `session` on noise."""
    offsets = [value for value in session.get_overridable_initializers() if value.name == 'gate_offset']
    if not offsets or session.get_modelmeta().custom_metadata_map.get('mode') != 'sparse':
        return None
    try:
        import onnx

        from .layout import remove_reorders

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, 'optimized.onnx')
            create_session(str(path), optimized=file)
            model = onnx.load(file)
        if not remove_reorders(model.graph):
            return None
        faster = create_session(model.SerializeToString(), threads, spinning)
        x = np.random.default_rng(0).standard_normal((2, *session.get_inputs()[0].shape[1:]), np.float32)
        for offset in (FORCED, -FORCED):
            feeds = {'x': x, 'gate_offset': np.full(offsets[0].shape, offset, np.float32)}
            (expected, _), (found, _) = session.run(None, feeds), faster.run(None, feeds)
            if not np.abs(found - expected).max() <= TOLERANCE['float32'] * max(1., np.abs(expected).max()):
                return None
    except Exception:  # no package onnx, no room in /tmp, another version of ONNX Runtime's own operators
        return None
    return faster


def create_session(
        model: Union[str, bytes], threads: Optional[int] = None, spinning: bool = True,
        optimized: Optional[Path] = None,
) -> Any:
    """onnxruntime.InferenceSession on the CPU of a file, by its path or content. See load_onnx.

    Args:
        optimized: File to write the optimised graph to.
    """
    try:
        import onnxruntime
    except ImportError as e:
        raise ImportError(f"ONNX files need pip install 'timm_aig[export]' ({e}).") from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # else it warns that gate_offset, an input, has a default value
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry('session.intra_op.allow_spinning', str(int(spinning)))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])


@cache
def openvino_core() -> Any:
    """The openvino.Core of this process, which is never released.

    A CPU plugin of OpenVINO replaces the signal stack of its thread, and on release puts back the one before. Two that
    are released in the order of their creation leave a stack that is no longer mapped: the next signal kills the
    process (seen in OpenVINO 2026.4).

    Raises:
        ImportError: The `export` extra is not installed.
    """
    try:
        import openvino
    except ImportError as e:
        raise ImportError(f"OpenVINO files need pip install 'timm_aig[export]' ({e}).") from e
    return openvino.Core()


def compile_openvino(path: Path, precision: str = 'float32', threads: Optional[int] = None) -> Any:
    """openvino.CompiledModel of a file of export_openvino, on the CPU. See open_exported."""
    hint = 'bf16' if precision == 'bfloat16' else 'f32'
    config = {'INFERENCE_PRECISION_HINT': hint, **({'INFERENCE_NUM_THREADS': threads} if threads else {})}
    return openvino_core().compile_model(path, 'CPU', config)


def open_exported(
        path: Path, threads: Optional[int] = None, spinning: bool = True, precision: str = 'float32',
) -> Callable[[Dict[str, np.ndarray]], Any]:
    """Function from the inputs of an .onnx or .xml file, by name, to its outputs in order.

    Args:
        path, threads, spinning: See load_onnx.
        precision: As it was exported with.
    """
    if path.suffix == '.onnx':
        session = load_onnx(path, threads, spinning)
        return lambda feeds: session.run(None, feeds)
    compiled = compile_openvino(path, precision, threads)
    return lambda feeds: list(compiled(feeds).values())
