"""Rows of benchmark.py: the ways to run a network, each with the row that it is compared with."""
import argparse
import copy
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import timm.task
import torch

import timm_aig
from timm_aig.export.check import FORCED, own_offsets
from timm_aig.export.runtime import open_exported

__all__ = ['Row', 'draw_gates', 'forced', 'make_rows']


class Row(NamedTuple):
    """One way to run the network."""
    name: str
    run: Callable[[torch.Tensor], Any]
    reference: str  # row that the ratio is to
    rate: Optional[float] = None  # share of the gated blocks that run; None with the gates' own decisions
    adaptive: Any = None  # the model, if it has gates
    dtype: torch.dtype = torch.float32  # of the images


class RuntimeModel:
    """A file in another runtime. It runs with gate offsets [L], so all images of a batch share the drawn gates."""

    def __init__(self, run: Callable[[Any], Any], own: Any = None) -> None:
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
            rows += [row._replace(dtype=dtype) for row in torch_rows(args, *models, suffix)]
        if args.runtimes:
            rows += runtime_rows(args, adaptive, parent, images, batch, precision, suffix)
    return rows


def torch_rows(args: argparse.Namespace, adaptive: Any, parent: Any, suffix: str) -> List[Row]:
    """Parent and adaptive model in PyTorch."""
    optimize, reference = timm_aig.optimize_for_inference, f'parent, optimized{suffix}'
    rows = [
        Row(f'parent, timm default{suffix}', parent, reference),
        Row(reference, optimize(parent), reference),
        *adaptive_rows(args, optimize(adaptive), f'adaptive{suffix}', reference),
    ]
    if args.compile:
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
    threads = args.threads or torch.get_num_threads()
    import onnxruntime
    import openvino

    runtimes: Dict[str, Any] = {
        f"OpenVINO {openvino.__version__.split('-')[0]}": (timm_aig.export_openvino, '.xml')}
    if precision != 'bfloat16':
        runtimes = {f'ONNX Runtime {onnxruntime.__version__}': (timm_aig.export_onnx, '.onnx'), **runtimes}
    kwargs: Dict[str, Any] = {'calibration': images.split(8)} if precision == 'int8' else {}
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        for runtime, (export, file_type) in runtimes.items():
            reference = f'parent, {runtime}{suffix}'
            for model, mode in ((parent, 'masked'), (adaptive, 'sparse')):
                path = Path(folder, mode + file_type)
                export(model, path, mode=mode, images=images[:batch].clone(), precision=precision, **kwargs)
                # spinning threads would slow the other rows
                run = open_exported(path, threads, spinning=False, precision=precision)
                if mode == 'masked':
                    rows.append(Row(reference, RuntimeModel(run), reference))
                else:
                    file = RuntimeModel(run, own_offsets(adaptive))
                    rows += adaptive_rows(args, file, f'adaptive, {runtime}{suffix}', reference)
    return rows


def adaptive_rows(args: argparse.Namespace, model: Any, label: str, reference: str) -> List[Row]:
    if args.images:
        return [Row(f'{label}, own gates', model, reference, None, model)]
    return [Row(f'{label}, r = {rate:g}', model, reference, rate, model) for rate in args.rate]


def training_rows(args: argparse.Namespace, adaptive: Any, parent: Any) -> List[Row]:
    """A training step of parent and adaptive model."""
    rows = []
    for step in ['training step'] + ['compiled training step'] * args.compile:
        for name, model in (('parent', parent), ('adaptive', adaptive)):
            run = training_step(model, args.device, step.startswith('compiled'))
            rows.append(Row(f'{name}, {step}', run, f'parent, {step}'))
    return rows


def training_step(model: torch.nn.Module, device: str, compiled: bool) -> Callable[[torch.Tensor], Any]:
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


def forced(row: Row, gates: Dict[str, torch.Tensor], start: int, batch: int) -> Any:
    """Context in which the row's gates are forced to the drawn answers of a batch."""
    if isinstance(row.adaptive, RuntimeModel):
        forced = FORCED * (2 * gates[row.name][start].numpy() - 1)
        row.adaptive.offset = row.adaptive.own if row.rate is None else forced
        return nullcontext()
    if row.rate is None or row.adaptive is None:
        return nullcontext()
    return timm_aig.force_gates(row.adaptive, gates[row.name][start:start + batch])
