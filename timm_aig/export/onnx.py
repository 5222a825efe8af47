"""ONNX: a model as one portable file for any batch size, in which a closed block is not computed."""
import itertools
import json
import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config

from .. import __version__
from ..blocks import gated_blocks
from ..budget import budget_table
from ..config import InputError
from ..training.checkpoint import write_atomically
from ..training.data import label_names_of
from ..training.evaluate import split_batch
from .check import FORCED, TOLERANCE, check_export, file_report, own_offsets
from .model import ExportModel, prepare
from .program import trace
from .runtime import create_session

__all__ = ['check_precision', 'describe', 'export_onnx', 'quantize', 'to_onnx']

OPSET = 20
PRECISIONS = ('float32', 'float16', 'int8')


def export_onnx(
        model: nn.Module,
        path: Union[str, os.PathLike],
        mode: str = 'sparse',
        gates: Optional[Sequence[bool]] = None,
        images: Optional[torch.Tensor] = None,
        precision: str = 'float32',
        calibration: Optional[Iterable[Any]] = None,
        open: Optional[Sequence[bool]] = None,
) -> Dict[str, Any]:
    """Write a model as an ONNX file (opset 20) for any batch size, checked in ONNX Runtime before it gets its name.

    Inputs are `x` [B, C, H, W], normalised as in training, and `gate_offset` [L], the logit offset of each of the L
    gates, which may be left out for the model's own. Outputs are `logits` and `gates` [B, L], 0. or 1. Batch norms are
    folded. The file's metadata hold labels, mean, std, input size, the names of the gated blocks and, of a calibrated
    model, `budgets`: pairs of a MACs share and the gate offset that gives it, the same for all gates.

    Args:
        model: Classifier of a family that gate_ knows, adaptive, or static for mode 'masked'. It is not changed.
        path: File to write.
        mode: 'sparse', a block is computed for the open rows of the batch only; 'masked', a block is computed for the
            whole batch and multiplied by its gate; 'path', a static network of the blocks in `gates`, without
            gate_offset.
        gates: Which of the L gated blocks run, for mode 'path'.
        images: Normalised images [N, C, H, W] of the size to export for, to check the file on. Four of noise if None.
        precision: 'float32'; 'float16', weights and arithmetic, with float32 inputs and outputs; 'int8', convolutions
            by onnxruntime's static quantization.
        calibration: Batches of normalised images, or of images and labels, for 'int8'.
        open: Former name of `gates`.

    Returns:
        path, mode, precision, opset, bytes, sha256, and what the check found: images, patterns (distinct rows of the
        gates), max_difference of the logits to the model's with the same gates, gates_changed (answers that differ).

    Raises:
        InputError: An argument that is not allowed, or a model that cannot be exported.
        ExportError: The file disagrees with the model: in 'float32' by a gate or 1e-4 of the largest logit, in
            'float16' by 2e-2 of it. Of 'int8' the differences are only reported.
        ImportError: The `export` extra is not installed.
    """
    gates = open if gates is None else gates
    check_precision(precision, PRECISIONS, calibration)
    model, images, gates = prepare(path, model, images, mode, gates)
    path = Path(path)
    proto = to_onnx(model, images, mode, gates, torch.float16 if precision == 'float16' else torch.float32)
    if calibration is not None:
        proto = quantize(proto, calibration, own_offsets(model))
    if any(value.name == 'gate_offset' for value in proto.graph.input):
        import onnx

        proto.graph.initializer.append(onnx.numpy_helper.from_array(own_offsets(model), 'gate_offset'))
    describe(proto, model, images, mode, gates, precision)
    content = proto.SerializeToString()
    session = create_session(content)

    def run(x: np.ndarray, offset: Optional[np.ndarray]) -> Tuple[np.ndarray, Optional[np.ndarray]]:
        logits, *answers = session.run(None, {'x': x} if offset is None else {'x': x, 'gate_offset': offset})
        return logits, answers[0] if answers else None

    found = check_export(
        run, model, images, mode, gates, TOLERANCE.get(precision), exact_gates=precision == 'float32')
    write_atomically(path, lambda file: file.write(content))
    return file_report(path, mode, precision, found, opset=OPSET)


def to_onnx(
        model: nn.Module, images: torch.Tensor, mode: str, gates: Optional[Sequence[bool]],
        dtype: torch.dtype = torch.float32,
) -> Any:
    """onnx.ModelProto of a model, whose `gate_offset` has no default. See ExportModel for the arguments."""
    try:
        from onnxscript import opset20
    except ImportError as e:
        raise ImportError(f"ONNX files need pip install 'timm_aig[export]' ({e}).") from e

    op: Any = opset20

    # Arguments have the names of torch's schemas: torch 2.9 takes its own translation if they do not fit.
    def mean(self, dim, keepdim: bool = False, dtype=None):
        if len(self.shape) == 4 and sorted(d % 4 for d in dim) == [2, 3]:  # has a kernel for blocked channels
            pooled = op.GlobalAveragePool(self)
            return pooled if keepdim else op.Flatten(pooled)
        return op.ReduceMean(self, constant(*dim), keepdims=int(keepdim))

    def constant(*values):
        return op.Constant(value_ints=list(values))

    def column(index):
        return op.Reshape(index, constant(-1, 1))

    def group_norm(input, num_groups: int, weight, bias, eps: float = 1e-5, cudnn_enabled: bool = True):
        shape = input.shape[1:]  # torch's translation needs a row
        ones, zeros = (op.CastLike(op.Constant(value_floats=[value] * num_groups), input) for value in (1., 0.))
        parts = op.Reshape(input, constant(-1, num_groups, math.prod(shape) // num_groups))
        normed = op.Reshape(op.InstanceNormalization(parts, ones, zeros, epsilon=eps), constant(-1, *shape))
        weight, bias = (op.Reshape(values, constant(-1, 1, 1)) for values in (weight, bias))
        return op.Add(op.Mul(normed, weight), bias)

    aten = torch.ops.aten
    table: Any = {
        aten.mean.dim: mean,
        aten.group_norm.default: group_norm,
        aten.nonzero.default: lambda self: column(op.NonZero(self)),  # of z [B]
        aten.index_select.default: lambda self, dim, index: op.GatherND(self, column(index)),
        aten.index_copy.default: lambda self, dim, index, source: op.ScatterND(self, column(index), source),
    }
    traced = ExportModel(model, mode, gates, dtype)
    inputs = ['x', 'gate_offset'] if traced.takes_offset else ['x']
    outputs = ['logits', 'gates'] if traced.has_gates else ['logits']
    program = trace(traced, images)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter, about its own code
        exported: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=OPSET, input_names=inputs, output_names=outputs,
            custom_translation_table=table)
    return exported.model_proto


def check_precision(precision: str, allowed: Sequence[str], calibration: Any) -> None:
    """Raise InputError for an unknown precision, and for int8 without images or images without int8."""
    if precision not in allowed:
        raise InputError(f'must be one of {", ".join(allowed)}, not {precision!r}.', 'precision')
    if (precision == 'int8') != (calibration is not None):
        raise InputError("is for precision 'int8', which needs it.", 'calibration')


def quantize(proto: Any, calibration: Iterable[Any], own: np.ndarray) -> Any:
    """The model with its convolutions in int8, their ranges taken with its own gates and with all gates open."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    names = {value.name for value in proto.graph.input}

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            batches = (split_batch(batch, 'calibration')[0] for batch in calibration)
            cases = itertools.product(batches, (own, np.full_like(own, FORCED)))
            self.feeds = ({'x': batch.float().cpu().numpy(), 'gate_offset': offset} for batch, offset in cases)

        def get_next(self) -> Any:
            feeds = next(self.feeds, None)
            return feeds and {name: value for name, value in feeds.items() if name in names}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, 'float32.onnx'), Path(folder, 'int8.onnx')
        onnx.save(proto, source)
        quantize_static(  # weights in 7 bits: sums of products of 8 bits saturate on a CPU with AVX2 but no VNNI
            source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=['Conv'],
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True,
            extra_options={'ActivationSymmetric': False})
        return onnx.load(target)


def describe(
        proto: Any, model: nn.Module, images: torch.Tensor, mode: str, gates: Optional[Sequence[bool]], precision: str,
) -> None:
    """Put into the file what its user needs to know."""
    config: Dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    data = resolve_input_data_config(model)
    proto.producer_name, proto.producer_version = 'timm_aig', __version__
    values = {
        'architecture': config.get('architecture'), 'mode': mode, 'precision': precision,
        'input_size': list(images.shape[1:]), 'mean': list(data['mean']), 'std': list(data['std']),
        'interpolation': data['interpolation'], 'crop_pct': data['crop_pct'], 'crop_mode': data['crop_mode'],
        'budgets': [[point.budget, point.gate_offset] for point in budget_table(model)] or None,
        'labels': label_names_of(model) or None, 'gated_blocks': list(gated_blocks(model)),
        'gates': gates, 'license': config.get('license'),
    }
    for key, value in values.items():
        if value is not None:
            proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
