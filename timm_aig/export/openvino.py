"""OpenVINO: the graph of export_onnx as an IR."""
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn

from ..config import InputError
from .check import check_export, file_report, own_offsets
from .model import prepare
from .onnx import check_precision, describe, quantize, to_onnx
from .runtime import compile_openvino

__all__ = ['export_openvino']

PRECISIONS = ('float32', 'float16', 'bfloat16', 'int8')


def export_openvino(
        model: nn.Module,
        path: Union[str, os.PathLike],
        mode: str = 'sparse',
        gates: Optional[Sequence[bool]] = None,
        images: Optional[torch.Tensor] = None,
        precision: str = 'float32',
        calibration: Optional[Iterable[Any]] = None,
        open: Optional[Sequence[bool]] = None,
) -> Dict[str, Any]:
    """Write a model as an OpenVINO IR, <name>.xml and <name>.bin, for any batch size, checked in the CPU plugin.

    Inputs, outputs, modes and metadata (as rt_info `timm_aig`) are export_onnx's, but gate_offset must be given.

    Args:
        model, mode, gates, images, calibration, open: As in export_onnx.
        path: File to write, ending in .xml.
        precision: 'float32'; 'float16' stores weights as such; 'bfloat16' is checked with arithmetic in bfloat16, to
            run with it set INFERENCE_PRECISION_HINT; 'int8' is quantized as by export_onnx.

    Returns:
        As export_onnx, bytes and sha256 of the weights.

    Raises:
        As export_onnx, with a tolerance of 1e-3 in 'float32'.
    """
    try:
        import openvino as ov
    except ImportError as e:
        raise ImportError(f"OpenVINO files need pip install 'timm_aig[export]' ({e}).") from e
    gates = open if gates is None else gates
    check_precision(precision, PRECISIONS, calibration)
    path = Path(path)
    if path.suffix != '.xml':
        raise InputError(f'must end in .xml, not {path.name!r}.', 'path')
    model, images, gates = prepare(path, model, images, mode, gates)
    proto = to_onnx(model, images, mode, gates)
    if calibration is not None:
        proto = quantize(proto, calibration, own_offsets(model))
    describe(proto, model, images, mode, gates, precision)
    metadata = {p.key: p.value for p in proto.metadata_props}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export-') as folder:
        source, file = Path(folder, 'model.onnx'), Path(folder, path.name)
        source.write_bytes(proto.SerializeToString())
        ir = ov.convert_model(source)
        ir.set_rt_info(metadata, ['timm_aig'])
        ov.save_model(ir, file, compress_to_fp16=precision == 'float16')
        compiled = compile_openvino(file, precision)

        def run(x: np.ndarray, offset: Optional[np.ndarray]) -> Tuple[np.ndarray, Optional[np.ndarray]]:
            feeds = {'x': x}
            if len(compiled.inputs) > 1:
                feeds['gate_offset'] = own_offsets(model) if offset is None else offset
            logits, *answers = compiled(feeds).values()
            return logits, answers[0] if answers else None

        tolerance = {'float32': 1e-3, 'int8': None}.get(precision, 2e-2)
        found = check_export(run, model, images, mode, gates, tolerance, exact_gates=precision == 'float32')
        for suffix in ('.bin', '.xml'):
            os.replace(file.with_suffix(suffix), path.with_suffix(suffix))
    return file_report(path.with_suffix('.bin'), mode, precision, found) | {'path': str(path)}
