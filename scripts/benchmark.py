#!/usr/bin/env python3
"""Time an adaptive network against its static parent, both optimized the same way, in turns in one process.

Each row of the table is one way to run the network. A share r of the gates, drawn for each image (seeded), is forced
open, or, with --images, they decide for themselves on real images. In every round each row runs the same images;
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
import time
from typing import Any, Dict, List, Optional

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
  scripts/benchmark.py --device cuda --precision bfloat16 --compile --batch-size 1 32 128 256 --num-images 256
  scripts/benchmark.py --requests --rate .5                       clients that send single images, served in batches
  scripts/benchmark.py --requests --model local-dir:output/demo --images my/images --clients 16"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_args(parser, 'model', default='resnet50_aig')
    add_args(parser, 'cascade', 'pretrained', 'input_size')
    add_args(parser, 'batch_size', nargs='+', default=None,
             help='images in a batch, rows for each (default: 1 8 32, with --train 32)')
    arg('--rate', type=number('[0, 1]'), nargs='+', default=[1., .7, .5, .3], metavar='R',
        help='forced execution rates (default: 1 .7 .5 .3)')
    add_args(parser, 'images', help='folder of images, on which the gates decide (default: noise, forced gates)')
    add_args(parser, 'num_images', help='number of images (default: 32, with --requests 128)')
    add_args(parser, 'rounds', type=integer(1), default=7)
    arg('--precision', nargs='+', choices=('float32', 'float16', 'bfloat16', 'int8'), default=['float32'],
        help='rows for each: weights and arithmetic; int8 for --runtimes (default: float32)')
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
    if args.precision != ['float32'] and (args.cascade or args.requests or args.train):
        parser.error('--precision goes without --cascade, --requests and --train.')
    if 'int8' in args.precision and not args.runtimes:
        parser.error('--precision int8 is for --runtimes.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

import timm
import torch
from _cascade_times import measure_cascade, print_cascade_times
from _inputs import read_image_folder
from _memory import peak_mib
from _rows import Row, draw_gates, forced, make_rows
from _serving import measure_requests, print_requests

import timm_aig
from timm_aig import InputError
from timm_aig.run import environment


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
                x = images[start:start + batch].to(row.dtype)
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
    own = timm_aig.forward_gates(adaptive, images)[1] if args.images and not args.train else None
    gates = {row.name: own if row.rate is None else draw_gates(args, row, images, batch, len(cost.blocks))
             for row in rows if row.adaptive}
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
                result['peak_mib'] = peak_mib(row.run, images[:batch].to(row.dtype))
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
        model=args.cascade or args.model, device=args.device, precision=' '.join(args.precision),
        threads=torch.get_num_threads(), **environment(), images=args.num_images, rounds=args.rounds, seed=args.seed,
        command=' '.join(sys.argv))
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
