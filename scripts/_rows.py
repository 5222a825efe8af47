"""Rows of benchmark.py: the ways to run a network, each with the row that it is compared with."""
import argparse
import copy
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ContextManager, Dict, List, NamedTuple, Optional

import timm.task
import torch
from _timing import Run

import timm_aig
from timm_aig.export.check import FORCED, own_offsets
from timm_aig.export.runtime import open_exported


class Row(NamedTuple):
    """One way to run the network."""
    name: str
    run: Run
    reference: str  # row that the ratio is to
    rate: Optional[float] = None  # share of the gated blocks that run; None with the gates' own decisions
    adaptive: Any = None  # the model, if it has gates


class RuntimeModel:
    """A file in another runtime. It runs with gate offsets [L], so all images of a batch share the drawn gates."""

    def __init__(self, run: Any, own: Any = None) -> None:
        self.run = run
        self.own = self.offset = own

    def __call__(self, x: torch.Tensor) -> Any:
        return self.run({'x': x.numpy()} if self.offset is None else {'x': x.numpy(), 'gate_offset': self.offset})


def make_rows(args: argparse.Namespace, adaptive: Any, parent: Any, images: torch.Tensor, batch: int) -> List[Row]:
    """All rows of the table for a batch size, in every precision."""
    if args.train:
        return training_rows(args, adaptive, parent)
    rows: List[Row] = []
    for precision in args.precision:
        suffix = '' if precision == 'float32' else f', {precision}'
        if precision != 'int8':
            dtype = getattr(torch, precision)
            models = [copy.deepcopy(model).to(dtype) for model in (adaptive, parent)]
            rows += [row._replace(run=in_dtype(row.run, dtype)) for row in torch_rows(args, *models, suffix)]
        if args.runtimes:
            rows += runtime_rows(args, adaptive, parent, images, batch, precision, suffix)
    return rows


def in_dtype(run: Run, dtype: torch.dtype) -> Run:
    return run if dtype == torch.float32 else lambda x: run(x.to(dtype))


def torch_rows(args: argparse.Namespace, adaptive: Any, parent: Any, suffix: str) -> List[Row]:
    """Parent and adaptive model in PyTorch."""
    optimize, reference = timm_aig.optimize_for_inference, f'parent, optimized{suffix}'
    rows = [
        Row(f'parent, timm default{suffix}', parent, reference),
        Row(reference, optimize(parent), reference),
        *adaptive_rows(args, optimize(adaptive), f'adaptive{suffix}', reference),
    ]
    if args.torchcompile:
        reference = f'parent, compiled{suffix}'
        rows.append(Row(reference, optimize(parent, compile=True), reference))
        rows += adaptive_rows(args, optimize(adaptive, compile=True), f'adaptive, compiled{suffix}', reference)
        if args.device.startswith('cuda'):
            graph = torch.compile(optimize(parent), mode='reduce-overhead')
            rows.append(Row(f'parent, CUDA graph{suffix}', graph, reference))
    return rows


def runtime_rows(
        args: argparse.Namespace, adaptive: Any, parent: Any, images: torch.Tensor, batch: int, precision: str,
        suffix: str,
) -> List[Row]:
    """Parent and adaptive model in ONNX Runtime and OpenVINO. int8 is calibrated on the images."""
    import onnxruntime
    import openvino

    runtimes: Dict[str, Any] = {
        f'ONNX Runtime {onnxruntime.__version__}': (timm_aig.export_onnx, '.onnx'),
        f'OpenVINO {openvino.__version__.split("-")[0]}': (timm_aig.export_openvino, '.xml')}
    kwargs: Dict[str, Any] = {'calibration': images.split(8)} if precision == 'int8' else {}
    rows = []
    for runtime, (export, file_type) in runtimes.items():
        if precision == 'bfloat16' and file_type == '.onnx':
            continue  # export_onnx does not write it

        reference, runs = f'parent, {runtime}{suffix}', []
        for model, mode in ((parent, 'masked'), (adaptive, 'sparse')):
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
                path = Path(folder, f'model{file_type}')
                export(model, path, mode=mode, images=images[:batch].clone(), precision=precision, **kwargs)
                # spinning threads would slow the other rows
                runs.append(open_exported(path, args.threads or torch.get_num_threads(), False, precision))
        rows.append(Row(reference, RuntimeModel(runs[0]), reference))
        file = RuntimeModel(runs[1], own_offsets(adaptive))
        rows += adaptive_rows(args, file, f'adaptive, {runtime}{suffix}', reference)
    return rows


def adaptive_rows(args: argparse.Namespace, model: Any, label: str, reference: str) -> List[Row]:
    if args.images:
        return [Row(f'{label}, own gates', model, reference, None, model)]
    return [Row(f'{label}, r = {rate:g}', model, reference, rate, model) for rate in args.rate]


def training_rows(args: argparse.Namespace, adaptive: Any, parent: Any) -> List[Row]:
    """A training step of parent and adaptive model."""
    return [
        Row(f'{name}, {step}', training_step(model, args.device, step.startswith('compiled')), f'parent, {step}')
        for step in ['training step'] + ['compiled training step'] * args.torchcompile
        for name, model in (('parent', parent), ('adaptive', adaptive))]


def training_step(model: torch.nn.Module, device: str, compiled: bool) -> Run:
    """One step of SGD on random labels, for batches of images."""
    with torch.inference_mode(False):
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        task_cls = timm_aig.AIGTask if timm_aig.gated_blocks(model) else timm.task.ClassificationTask
        task = task_cls(model, torch.nn.CrossEntropyLoss(), device=torch.device(device), verbose=False).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if compiled:
            task.compile()

    def step(x: torch.Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone(memory_format=torch.channels_last)
            task(x, torch.arange(len(x), device=device) % model.num_classes)['loss'].backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def draw_gates(args: argparse.Namespace, row: Row, images: torch.Tensor, batch: int, blocks: int) -> torch.Tensor:
    """Gates [N, L] of a row for all images: an exact share of the L blocks, drawn for each image."""
    generator = torch.Generator().manual_seed(args.seed)  # the lower rate's gates are a subset of the higher's
    order = torch.rand(len(images), blocks, generator=generator).argsort(1).argsort(1)
    gates = (order < round(row.rate * blocks)).float().to(images.device)
    if isinstance(row.adaptive, RuntimeModel):  # a file has one offset for each gate: the same for all images
        gates = gates[::batch].repeat_interleave(batch, 0)
    return gates


def forced(row: Row, gates: Optional[torch.Tensor], start: int, batch: int) -> ContextManager:
    """Context in which the row's gates are forced to the drawn answers [N, L] of the batch that begins at an image."""
    if isinstance(row.adaptive, RuntimeModel) and gates is not None:
        row.adaptive.offset = row.adaptive.own if row.rate is None else FORCED * (2 * gates[start].numpy() - 1)
        return nullcontext()
    if row.rate is None or gates is None:
        return nullcontext()
    return timm_aig.force_gates(row.adaptive, gates[start:start + batch])
