#!/usr/bin/env python3
"""Time an adaptive ResNet against its static parent, both optimized the same way, in turns in one process.

Each row of the table is one way to run the network. The gates are forced open at random with rate r for each image and
block (seeded), or, with --images, decide for themselves on real images. In every round each row runs the same images;
the rows take turns of 8 images (or one batch), so that other work on the machine slows all rows alike.

    ms/img      milliseconds per image, median of the rounds
    ratio       time over that of the parent optimized the same way: median, and range of the rounds
    MACs        MACs share: executed MACs over the parent's
    efficiency  MACs / ratio: 1 if all of the skipped compute is saved time
    peak MiB    memory of a pass on top of model and input (Linux, CPU, with --memory)

--cascade and --requests print other tables, see scripts/README.md.
"""
import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from _common import (
    add_args,
    blame,
    create_model,
    create_parser,
    integer,
    keep_freed_memory,
    number,
    open_device,
    require,
    run_script,
)

EXAMPLES = """examples:
  scripts/benchmark.py                                            resnet50_aig at batch 1, 8 and 32
  scripts/benchmark.py --model resnet101_aig --batch-size 1 --compile
  scripts/benchmark.py --model cifar_resnet32_aig --train --batch-size 128 --num-images 256
  scripts/benchmark.py --model local-dir:output/demo --images my/images --json > result.json
  scripts/benchmark.py --cascade output/cascade --images my/images --num-images 256 --runtimes
  scripts/benchmark.py --requests --rate .5                       clients that send single images, served in batches
  scripts/benchmark.py --requests --model local-dir:output/demo --images my/images --clients 16"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_args(parser, 'model', default='resnet50_aig')
    add_args(parser, 'cascade', 'pretrained', 'input_size')
    add_args(parser, 'batch_size', nargs='+', default=None,
             help='images in a batch, one table for each (default: 1 8 32, with --train 32)')
    arg('--rate', type=number('[0, 1]'), nargs='+', default=[1., .7, .5, .3], metavar='R',
        help='forced execution rates (default: 1 .7 .5 .3)')
    add_args(parser, 'images', help='folder of images, on which the gates decide (default: noise, forced gates)')
    add_args(parser, 'num_images', help='number of images (default: 32, with --requests 128)')
    add_args(parser, 'rounds', type=integer(1), default=7)
    arg('--compile', action='store_true', help='compiled rows too, over the compiled parent')
    arg('--runtimes', action='store_true', help='ONNX Runtime and OpenVINO too (CPU)')
    arg('--train', action='store_true', help='time training steps instead, without a teacher')
    arg('--memory', action='store_true', help='peak memory of a pass too')
    arg('--requests', action='store_true', help='serve single images of clients instead, by ONNX Runtime (CPU)')
    arg('--clients', type=integer(1), nargs='+', metavar='N', help='clients of --requests (default: 1 4 16 64)')
    arg('--max-batch', type=integer(1), metavar='N', help='most images in a batch of --requests (default: 32)')
    add_args(parser, 'device', 'threads', 'seed', 'json')
    args = parser.parse_args(argv)
    if args.requests and any((args.cascade, args.batch_size, args.compile, args.runtimes, args.train, args.memory)):
        parser.error('--requests goes without --cascade, --batch-size, --compile, --runtimes, --train and --memory.')
    if not args.requests and (args.clients or args.max_batch):
        parser.error('--clients and --max-batch are for --requests.')
    args.clients, args.max_batch = args.clients or [1, 4, 16, 64], args.max_batch or 32
    args.num_images = args.num_images or (128 if args.requests else 32)
    args.batch_size = args.batch_size or ([32] if args.train else [1] if args.requests else [1, 8, 32])
    if args.cascade and (args.train or args.compile or args.memory):
        parser.error('--cascade is timed without --train, --compile and --memory.')
    if args.train and min(args.batch_size) == 1:
        parser.error('--batch-size must be at least 2 for --train, for the batch norms of the gates.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

import timm
import timm.task
import torch
from _cascade_times import measure_cascade, print_cascade_times
from _inputs import read_image_folder
from _memory import peak_mib
from _serving import measure_requests, print_requests

import timm_aig
from timm_aig import InputError
from timm_aig.export.check import FORCED, own_offsets
from timm_aig.export.runtime import open_exported
from timm_aig.run import environment


class Row(NamedTuple):
    """One way to run the network."""
    name: str
    run: Callable[[torch.Tensor], Any]
    rate: Optional[float] = None  # forced rate; None with the gates' own decisions
    reference: str = 'parent, optimized'  # row that the ratio is to
    adaptive: Any = None  # the model, if it has gates


def load_models(args: argparse.Namespace) -> Any:
    """The adaptive model and its static parent, with the same weights."""
    kwargs = {'in_chans': args.input_size[0]} if args.input_size else {}
    adaptive = create_model(args.model, args.pretrained, **kwargs).eval().to(args.device)
    with blame('model', args.model):
        parent = timm_aig.ungate_(copy.deepcopy(adaptive))
    return adaptive, parent


def load_images(args: argparse.Namespace, model: torch.nn.Module) -> torch.Tensor:
    """Images [num_images, C, H, W]: those of --images, else noise (time does not depend on values)."""
    config = timm.data.resolve_data_config({'input_size': args.input_size}, model=model)
    if args.images:
        images = read_image_folder(args, config)
    else:
        generator = torch.Generator().manual_seed(args.seed)
        images = torch.randn(args.num_images, *config['input_size'], generator=generator)
    if max(args.batch_size) > len(images):
        raise InputError(f'{max(args.batch_size)} needs as many images, there are {len(images)}.', 'batch_size')
    return images.to(args.device)


class RuntimeModel:
    """A file in another runtime. It runs with gate offsets [L], so all images of a batch share the drawn gates."""

    def __init__(self, run: Callable[[Any], Any], own: Any = None) -> None:
        self.run = run
        self.own = self.offset = own

    def __call__(self, x: torch.Tensor) -> Any:
        return self.run({'x': x.numpy()} if self.offset is None else {'x': x.numpy(), 'gate_offset': self.offset})


def runtime_rows(args: argparse.Namespace, adaptive: Any, parent: Any, images: torch.Tensor, batch: int) -> List[Row]:
    """Parent and adaptive model in ONNX Runtime and OpenVINO."""
    threads = args.threads or torch.get_num_threads()
    import onnxruntime
    import openvino

    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        x = images[:batch].clone()
        for model, mode in ((parent, 'masked'), (adaptive, 'sparse')):
            onnx, ir = Path(folder, f'{mode}.onnx'), Path(folder, f'{mode}.xml')
            timm_aig.export_onnx(model, onnx, mode=mode, images=x)
            timm_aig.export_openvino(model, ir, mode=mode, images=x)
            for runtime, path in (
                (f'ONNX Runtime {onnxruntime.__version__}', onnx),
                (f"OpenVINO {openvino.__version__.split('-')[0]}", ir),
            ):
                run = open_exported(path, threads, spinning=False)  # spinning threads would slow the other rows
                reference = f'parent, {runtime}'
                if mode == 'masked':
                    rows.append(Row(reference, RuntimeModel(run), reference=reference))
                else:
                    file = RuntimeModel(run, own_offsets(adaptive))
                    rows.extend(adaptive_rows(args, file, f'adaptive, {runtime}', reference))
    return rows


def adaptive_rows(args: argparse.Namespace, model: Any, label: str, reference: str) -> List[Row]:
    if args.images:
        return [Row(f'{label}, own gates', model, None, reference, model)]
    return [Row(f'{label}, r = {rate:g}', model, rate, reference, model) for rate in args.rate]


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


def make_rows(args: argparse.Namespace, adaptive: Any, parent: Any, images: torch.Tensor, batch: int) -> List[Row]:
    if args.train:
        rows = []
        for step in ['training step'] + ['compiled training step'] * args.compile:
            for name, model in (('parent', parent), ('adaptive', adaptive)):
                run = training_step(model, args.device, step.startswith('compiled'))
                rows.append(Row(f'{name}, {step}', run, reference=f'parent, {step}'))
        return rows
    rows = [
        Row('parent, timm default', parent),
        Row('parent, optimized', timm_aig.optimize_for_inference(parent)),
        *adaptive_rows(args, timm_aig.optimize_for_inference(adaptive), 'adaptive', 'parent, optimized'),
    ]
    if args.compile:
        compiled = timm_aig.optimize_for_inference(parent, compile=True)
        rows.append(Row('parent, compiled', compiled, reference='parent, compiled'))
        compiled = timm_aig.optimize_for_inference(adaptive, compile=True)
        rows.extend(adaptive_rows(args, compiled, 'adaptive, compiled', 'parent, compiled'))
    if args.runtimes:
        rows.extend(runtime_rows(args, adaptive, parent, images, batch))
    return rows


def forced(row: Row, gates: Dict[str, torch.Tensor], start: int, batch: int) -> Any:
    """Context in which the row's gates are forced to the drawn answers of a batch."""
    if isinstance(row.adaptive, RuntimeModel):
        forced = FORCED * (2 * gates[row.name][start].numpy() - 1)
        row.adaptive.offset = row.adaptive.own if row.rate is None else forced
        return nullcontext()
    if row.rate is None or row.adaptive is None:
        return nullcontext()
    return timm_aig.force_gates(row.adaptive, gates[row.name][start:start + batch])


def time_rows(
        args: argparse.Namespace, rows: List[Row], images: torch.Tensor, batch: int, gates: Dict[str, torch.Tensor],
) -> Dict[str, List[float]]:
    """Seconds of each round for each row."""
    synchronize = torch.cuda.synchronize if args.device.startswith('cuda') else lambda: None
    starts = list(range(0, len(images) - batch + 1, batch))
    batches = max(1, 8 // batch)
    turns = [starts[i:i + batches] for i in range(0, len(starts), batches)]
    seconds: Dict[str, List[float]] = {row.name: [] for row in rows}
    for round in range(-1, args.rounds):  # round -1 warms up
        totals = dict.fromkeys(seconds, 0.)
        for turn, row in itertools.product(turns, rows):
            for start in turn:
                x = images[start:start + batch]
                with forced(row, gates, start, batch):
                    synchronize()
                    begin = time.perf_counter()
                    row.run(x)
                    synchronize()
                    totals[row.name] += time.perf_counter() - begin
        if round >= 0:
            for name, total in totals.items():
                seconds[name].append(total / (len(starts) * batch))
        print(f'\rbatch {batch}: round {round + 1} of {args.rounds}', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def measure(args: argparse.Namespace, adaptive: Any, parent: Any, images: torch.Tensor, batch: int) -> List[Dict]:
    """The table's rows for one batch size."""
    images = images[:len(images) // batch * batch]  # whole batches, for time and MACs alike
    cost = timm_aig.compute_cost(adaptive, tuple(images.shape[1:]))
    rows = make_rows(args, adaptive, parent, images, batch)
    generator = torch.Generator().manual_seed(args.seed)
    gates = {}
    for row in rows:
        if row.adaptive is None:
            continue
        if row.rate is None:
            gates[row.name] = timm_aig.forward_gates(adaptive, images)[1]
        else:
            generator.manual_seed(args.seed)  # the lower rate's gates are a subset of the higher's
            gates[row.name] = (torch.rand(len(images), len(cost.blocks), generator=generator) < row.rate).float()
            if isinstance(row.adaptive, RuntimeModel):  # a file has one offset for each gate: the same for all images
                gates[row.name] = gates[row.name][::batch].repeat_interleave(batch, 0)
    seconds = time_rows(args, rows, images, batch, gates)
    results = []
    for row in rows:
        ratios = [s / r for s, r in zip(seconds[row.name], seconds[row.reference])]
        macs = cost.share(gates[row.name]).mean().item() if row.adaptive else 1.
        result = dict(
            batch_size=batch, name=row.name, reference=row.reference, rate=row.rate,
            ms_per_image=statistics.median(seconds[row.name]) * 1e3,
            ratio=statistics.median(ratios), ratio_min=min(ratios), ratio_max=max(ratios),
            macs_share=macs, efficiency=macs / statistics.median(ratios),
        )
        if args.memory:
            with forced(row, gates, 0, batch):
                result['peak_mib'] = peak_mib(row.run, images[:batch])
        results.append(result)
    return results


def print_table(results: List[Dict]) -> None:
    memory = 'peak_mib' in results[0]
    print(f"{'batch':>5}  {'':40} {'ms/img':>8}  {'ratio':>6} {'range':>13} {'MACs':>6} {'efficiency':>10}"
          + (f" {'peak MiB':>9}" if memory else ''))
    for r in results:
        line = f"{r['batch_size']:>5}  {r['name']:40} {r['ms_per_image']:8.2f}  {r['ratio']:6.3f} " \
               f"{r['ratio_min']:6.3f}-{r['ratio_max']:<6.3f} {r['macs_share']:6.3f} {r['efficiency']:10.3f}"
        if memory:
            line += f" {r['peak_mib']:9.1f}" if r['peak_mib'] is not None else f" {'-':>9}"
        print(line)


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.train:
        keep_freed_memory()  # as finetune.py does
    if args.threads:
        torch.set_num_threads(args.threads)
    if open_device(args).type != 'cpu' and (args.runtimes or args.memory or args.requests):
        raise InputError(f'must be cpu for --runtimes, --memory and --requests, not {args.device}.', 'device')
    if args.runtimes or args.requests:
        require('export', 'onnxruntime', 'openvino')
    setting = dict(
        model=args.cascade or args.model, device=args.device, precision='float32', threads=torch.get_num_threads(),
        **environment(), images=args.num_images, rounds=args.rounds, seed=args.seed, command=' '.join(sys.argv))
    with torch.inference_mode():
        if args.cascade:
            results = measure_cascade(args)
        else:
            adaptive, parent = load_models(args)
            images = load_images(args, adaptive)
            if args.requests:
                results = measure_requests(args, adaptive, parent, images)
            else:
                results = [row for batch in args.batch_size for row in measure(args, adaptive, parent, images, batch)]
            setting.update(images=len(images), input_size=list(images.shape[1:]))
    if args.json:
        print(json.dumps(dict(setting=setting, results=results), indent=2))
        return
    print(', '.join(f'{k} {v}' for k, v in setting.items()))
    show = print_requests if args.requests else print_cascade_times if args.cascade else print_table
    show(results)


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
