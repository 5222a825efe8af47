"""Export: an adaptive model as ONNX file, OpenVINO IR or torch.export program, in which a closed block is not computed.

Each file is run and compared with the model in PyTorch before it gets its name.
"""
import copy
import hashlib
import json
import os
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from timm.data import resolve_input_data_config
from timm.models.resnet import ResNet

from .. import __version__
from ..blocks import gated_blocks
from ..budget import budget_table
from ..inference import InferenceModel
from ..training.checkpoint import write_atomically
from .check import ExportError, Run, check_export, own_offsets, torch_run
from .model import MODES, ExportModel

__all__ = ['ExportError', 'export_aoti', 'export_onnx', 'export_openvino', 'export_program']

OPSET = 20
PRECISIONS = ('float32', 'float16', 'int8')
TOLERANCE = {'float32': 1e-4, 'float16': 2e-2}  # of logits, over the largest one where that is above 1


def export_onnx(
        model: nn.Module,
        path: Union[str, os.PathLike],
        mode: str = 'branch',
        open: Optional[Sequence[bool]] = None,
        images: Optional[torch.Tensor] = None,
        precision: str = 'float32',
        calibration: Optional[Iterable[torch.Tensor]] = None,
) -> Dict[str, Any]:
    """Write a model as an ONNX file (opset 20), checked in ONNX Runtime.

    Inputs are `x` [B, C, H, W], normalised as in training, and `gate_offset` [L], the logit offset of each of the L
    gates, which may be left out for the model's own. Outputs are `logits` and `gates` [B, L], 0. or 1. Batch norms are
    folded. The file's metadata hold labels, mean, std, input size, the names of the gated blocks and, of a calibrated
    model, `budgets`: pairs of a MACs share and the gate offset that gives it, the same for all gates.

    Args:
        model: timm ResNet, adaptive, or static for mode 'masked'. It is not changed.
        path: File to write.
        mode: 'branch', batch 1, an `If` for each gated block; 'masked', any batch, every block is computed and
            multiplied by its gate; 'path', any batch, a static network of the blocks in `open`, without gate_offset.
        open: Which of the L gated blocks run, for mode 'path'.
        images: Normalised images [N, C, H, W] of the size to export for, to check the file on. Four of noise if None.
        precision: 'float32'; 'float16', weights and arithmetic, with float32 inputs and outputs; 'int8', convolutions
            by onnxruntime's static quantization, of what `calibration` has.
        calibration: Batches of normalised images for 'int8'.

    Returns:
        path, mode, precision, opset, bytes, sha256, and what the check found: images, patterns (distinct ones of the
        gates), max_difference of the logits to the model's with the same gates, gates_changed (answers that differ).

    Raises:
        ValueError: An argument that is not allowed, or a model that cannot be exported.
        ExportError: The file disagrees with the model: in 'float32' by gates or 1e-4 of the largest logit, in 'float16'
            by 2e-2 of it. Of 'int8' the differences are only reported.
        ImportError: The `export` extra is not installed.
    """
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be one of {", ".join(PRECISIONS)}, not {precision!r}.')
    if (precision == 'int8') != (calibration is not None):
        raise ValueError("precision 'int8' and calibration, batches of images to find its ranges on, go together.")
    model, images = _prepare(model, images, mode, open)
    path = Path(path)
    proto = _onnx(model, images, mode, open)
    if precision == 'float16':
        proto = _to_float16(proto)
    elif calibration is not None:
        proto = _quantize(proto, calibration)
    _describe(proto, model, images, mode, open, precision)
    content = proto.SerializeToString()
    found = check_export(
        _onnx_run(content), model, images, mode, open, TOLERANCE.get(precision), exact_gates=precision == 'float32')
    write_atomically(path, lambda file: file.write(content))
    return _report(path, mode, precision, found, opset=OPSET)


def export_openvino(
        model: nn.Module,
        path: Union[str, os.PathLike],
        mode: str = 'branch',
        open: Optional[Sequence[bool]] = None,
        images: Optional[torch.Tensor] = None,
        precision: str = 'float32',
) -> Dict[str, Any]:
    """Write a model as an OpenVINO IR, <name>.xml and <name>.bin, checked in OpenVINO's CPU plugin.

    Inputs, outputs, modes and metadata (as rt_info `timm_aig`) are export_onnx's, but gate_offset must be given.

    Args:
        model, mode, open, images: As in export_onnx.
        path: File to write, ending in .xml.
        precision: 'float32', 'float16' to store weights as such, or 'bfloat16' for the arithmetic of the check too;
            to run in bfloat16 set INFERENCE_PRECISION_HINT.

    Returns:
        As export_onnx, bytes and sha256 of the weights.

    Raises:
        As export_onnx.
    """
    try:
        import openvino as ov
    except ImportError as e:
        raise ImportError(f"OpenVINO files need pip install 'timm_aig[export]' ({e}).") from e
    if precision not in (*TOLERANCE, 'bfloat16'):
        raise ValueError(f"precision must be one of {', '.join(TOLERANCE)}, bfloat16, not {precision!r}.")
    path = Path(path)
    if path.suffix != '.xml':
        raise ValueError(f'path must end in .xml, not {path.name!r}.')
    model, images = _prepare(model, images, mode, open)
    proto = _onnx(model, images, mode, open)
    _describe(proto, model, images, mode, open, precision)
    metadata = {p.key: p.value for p in proto.metadata_props}
    del proto.metadata_props[:]
    for initializer in proto.graph.initializer:  # to OpenVINO an input with a default would be a constant
        if initializer.name == 'gate_offset':
            proto.graph.initializer.remove(initializer)
            break
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export-') as folder:
        file = Path(folder, path.name)
        source = Path(folder, 'model.onnx')
        source.write_bytes(proto.SerializeToString())
        ir = ov.convert_model(source)
        ir.set_rt_info(metadata, ['timm_aig'])
        ov.save_model(ir, file, compress_to_fp16=precision == 'float16')
        hint = {'bfloat16': 'bf16'}.get(precision, 'f32')
        compiled = ov.Core().compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': hint})

        def run(x: np.ndarray, offset: Optional[np.ndarray]) -> Tuple[np.ndarray, Optional[np.ndarray]]:
            feeds = {'x': x}
            if len(compiled.inputs) > 1:
                feeds['gate_offset'] = own_offsets(model) if offset is None else offset
            outputs = list(compiled(feeds).values())
            return outputs[0], outputs[1] if len(outputs) > 1 else None

        tolerance = {'float32': 1e-3}.get(precision, 2e-2)
        found = check_export(run, model, images, mode, open, tolerance, exact_gates=precision == 'float32')
        for suffix in ('.bin', '.xml'):
            os.replace(file.with_suffix(suffix), path.with_suffix(suffix))
    return _report(path.with_suffix('.bin'), mode, precision, found) | {'path': str(path)}


def export_program(
        model: nn.Module,
        path: Union[str, os.PathLike],
        images: Optional[torch.Tensor] = None,
) -> Dict[str, Any]:
    """Write an adaptive model for batch 1 as a torch.export program (.pt2) whose branches are torch.cond.

    `torch.export.load(path).module()(x, gate_offset)` returns logits and gates, as in export_onnx; it needs torch, but
    neither timm nor timm_aig.

    Args and errors: As export_onnx.
    """
    model, images = _prepare(model, images, 'branch', None)
    path = Path(path)
    program = _program(ExportModel(model, 'branch'), images[:1])
    run = torch_run(program.module(), model)
    found = check_export(run, model, images, 'branch', None, TOLERANCE['float32'], exact_gates=True)
    write_atomically(path, lambda file: torch.export.save(program, file))
    return _report(path, 'branch', 'float32', found)


def export_aoti(
        model: nn.Module,
        path: Union[str, os.PathLike],
        images: Optional[torch.Tensor] = None,
) -> Dict[str, Any]:
    """Compile an adaptive model for batch 1 to an AOTInductor package (.pt2) for this machine. Needs a C++ compiler.

    `torch._inductor.aoti_load_package(path)(x, gate_offset)` returns logits and gates, as in export_onnx.

    Args and errors: As export_onnx.
    """
    model, images = _prepare(model, images, 'branch', None)
    path = Path(path)
    if path.suffix != '.pt2':
        raise ValueError(f'path must end in .pt2, not {path.name!r}.')
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export-') as folder:
        program = _program(ExportModel(model, 'branch'), images[:1])
        # with the layouts that inductor would choose the results are wrong (torch 2.14)
        with torch._inductor.config.patch(layout_optimization=False):
            file = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, path.name)))
        run = torch_run(torch._inductor.aoti_load_package(file), model)
        found = check_export(run, model, images, 'branch', None, TOLERANCE['float32'], exact_gates=True)
        os.replace(file, path)
    return _report(path, 'branch', 'float32', found)


def _prepare(
        model: nn.Module,
        images: Optional[torch.Tensor],
        mode: str,
        open: Optional[Sequence[bool]],
) -> Tuple[nn.Module, torch.Tensor]:
    """A copy of the model to export, and images to check it on."""
    if mode not in MODES:
        raise ValueError(f'mode must be one of {", ".join(MODES)}, not {mode!r}.')
    if isinstance(model, InferenceModel):
        raise ValueError('model is optimized for inference, export the one it was made from.')
    if not isinstance(model, ResNet):
        raise ValueError(f'model must be a timm ResNet, adaptive or static, not {type(model).__name__}.')
    blocks = gated_blocks(model)
    if not blocks and mode != 'masked':
        raise ValueError("model has no gated blocks; mode 'masked' exports a static model.")
    if (open is not None) != (mode == 'path') or (open is not None and len(open) != len(blocks)):
        raise ValueError(f"open, one value for each of the {len(blocks)} gated blocks, and mode 'path' go together.")
    model = copy.deepcopy(model).cpu().float().eval()
    if images is None:
        size = resolve_input_data_config(model)['input_size']
        images = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    if images.ndim != 4 or not len(images):
        raise ValueError(f'images must be [N, C, H, W] with N at least 1, not {list(images.shape)}.')
    return model, images.cpu().float().contiguous()


@contextmanager
def _quietly() -> Iterator[None]:
    """Export without the exporter's own progress and warnings, each shape for itself."""
    import torch._dynamo  # its config is there only then

    with warnings.catch_warnings(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        warnings.simplefilter('ignore')
        yield


def _program(model: ExportModel, x: torch.Tensor, batch: bool = False) -> Any:
    shapes = {'x': {0: torch.export.Dim('batch')} if batch else None, 'gate_offset': None}
    args = (x, torch.zeros_like(model.bias) if model.takes_offset else None)
    with _quietly(), torch.no_grad():
        return torch.export.export(model, args, dynamic_shapes=shapes, strict=False)


def _onnx(model: nn.Module, images: torch.Tensor, mode: str, open: Optional[Sequence[bool]]) -> Any:
    """onnx.ModelProto in float32."""
    from .branches import onnx  # names the extra where it is missing

    try:
        from onnxscript import opset20 as op
    except ImportError as e:
        raise ImportError(f"ONNX files need pip install 'timm_aig[export]' ({e}).") from e

    def mean(x, dim, keepdim: bool = False, dtype=None):
        if len(x.shape) == 4 and sorted(d % 4 for d in dim) == [2, 3]:  # what runtimes have a kernel for
            pooled = op.GlobalAveragePool(x)
            return pooled if keepdim else op.Flatten(pooled)
        axes: Any = op.Constant(value_ints=list(dim))
        return op.ReduceMean(x, axes, keepdims=int(keepdim))

    traced = ExportModel(model, mode, open or ())
    x = images[:1] if mode == 'branch' else images[:1].expand(2, -1, -1, -1)  # torch takes a batch of 1 for fixed
    inputs = ['x', 'gate_offset'] if traced.takes_offset else ['x']
    outputs = ['logits', 'gates'] if traced.takes_offset or mode == 'path' else ['logits']
    program = _program(traced, x, batch=mode != 'branch')
    with _quietly():
        exported: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, opset_version=OPSET, input_names=inputs, output_names=outputs,
            custom_translation_table={torch.ops.aten.mean.dim: mean})
    proto = exported.model_proto
    if traced.takes_offset:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(own_offsets(model), 'gate_offset'))
    return proto


def _to_float16(proto: Any) -> Any:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from .branches import sorted_nodes

    converted = convert_float_to_float16(proto, keep_io_types=True)
    nodes = sorted_nodes(list(converted.graph.node))  # it puts casts of inputs last
    del converted.graph.node[:]
    converted.graph.node.extend(nodes)
    return converted


def _quantize(proto: Any, calibration: Iterable[torch.Tensor]) -> Any:
    """The model with its convolutions in int8. The quantizer sees no branches, so they are laid out for it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from .branches import inline_branches, onnx, restore_branches

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = (image[None].float().numpy() for batch in calibration for image in batch.cpu())

        def get_next(self) -> Any:
            x = next(self.images, None)
            return None if x is None else {'x': x}

    static, branches = inline_branches(proto, select=True)
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (Path(folder, name) for name in ('a.onnx', 'b.onnx', 'c.onnx'))
        onnx.save(static, source)
        quant_pre_process(source, prepared, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            prepared, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, op_types_to_quantize=['Conv'],
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, extra_options={'ActivationSymmetric': False})
        return restore_branches(onnx.load(target), branches, proto)


def _describe(
        proto: Any, model: nn.Module, images: torch.Tensor, mode: str, open: Optional[Sequence[bool]], precision: str,
) -> None:
    """Put into the file what its user needs to know."""
    config: Dict[str, Any] = getattr(model, 'pretrained_cfg', None) or {}
    data = resolve_input_data_config(model)
    proto.producer_name, proto.producer_version = 'timm_aig', __version__
    values = {
        'architecture': config.get('architecture'), 'mode': mode, 'precision': precision,
        'input_size': list(images.shape[1:]), 'mean': list(data['mean']), 'std': list(data['std']),
        'interpolation': data['interpolation'], 'crop_pct': data['crop_pct'],
        'budgets': [[point.budget, point.gate_offset] for point in budget_table(model)] or None,
        'labels': config.get('label_names'), 'gated_blocks': list(gated_blocks(model)),
        'open': None if open is None else [bool(o) for o in open], 'license': config.get('license'),
    }
    for key, value in values.items():
        if value is not None:
            proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))


def _onnx_run(content: bytes) -> Run:
    from .passes import create_session

    session = create_session(content)

    def run(x: np.ndarray, offset: Optional[np.ndarray]) -> Tuple[np.ndarray, Optional[np.ndarray]]:
        outputs = session.run(None, {'x': x} if offset is None else {'x': x, 'gate_offset': offset})
        return outputs[0], outputs[1] if len(outputs) > 1 else None

    return run


def _report(path: Path, mode: str, precision: str, found: Dict[str, Any], **more: Any) -> Dict[str, Any]:
    content = path.read_bytes()
    return {
        'path': str(path), 'mode': mode, 'precision': precision, **more, 'bytes': len(content),
        'sha256': hashlib.sha256(content).hexdigest(), **found}
