"""Exported ONNX files in ONNX Runtime."""
import os
from pathlib import Path
from typing import Any, Optional, Union

from ..config import InputError

__all__ = ['create_session', 'load_onnx']


def load_onnx(path: Union[str, os.PathLike], threads: Optional[int] = None, spinning: bool = True) -> Any:
    """onnxruntime.InferenceSession of a file of export_onnx, on the CPU. Nothing is written.

    `session.run(None, {'x': x})` returns logits and gates of images x [B, C, H, W] for any B.

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
    return session


def create_session(model: Union[str, bytes], threads: Optional[int] = None, spinning: bool = True) -> Any:
    """onnxruntime.InferenceSession on the CPU of a file, by its path or content. See load_onnx."""
    try:
        import onnxruntime
    except ImportError as e:
        raise ImportError(f"ONNX files need pip install 'timm_aig[export]' ({e}).") from e
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # else it warns that gate_offset, an input, has a default value
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry('session.intra_op.allow_spinning', str(int(spinning)))
    return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
