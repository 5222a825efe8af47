#!/usr/bin/env python3
"""Time an adaptive network against its static parent, both optimized the same way, in turns in one process.

Each row of the table is one way to run the network. A share r of the gates, drawn for each image (seeded), is forced
open, or, with --images, they decide for themselves on real images. In every round each row runs the same images;
the rows take turns of 8 images (or one batch), so that other work on the machine slows all rows alike. A turn
starts with a call that is not timed.

    ms/img      milliseconds per image, median of the rounds
    ratio       time over that of the parent optimized the same way: median, and range of the rounds
    MACs        MACs share: executed MACs over the parent's
    efficiency  MACs / ratio: 1 if all of the skipped compute is saved time
    peak MiB    memory of a pass on top of model and input (Linux, CPU, with --memory)

--cascade and --requests print other tables, see scripts/README.md.
"""
import argparse
import copy
import json
import sys
from typing import Any, ContextManager, Dict, List, Optional

from _args import add_args, create_parser, integer, number
from _common import blame, keep_freed_memory, open_device, print_table, require, run_script

EXAMPLES = """examples:
  scripts/benchmark.py                                            # resnet50_aig at batch 1, 8 and 32
  scripts/benchmark.py --model cifar_resnet32_aig --train --batch-size 128 --num-images 256
  scripts/benchmark.py --cascade output/cascade --images my/images --num-images 256 --runtimes
  scripts/benchmark.py --device cuda --precision bfloat16 --torchcompile --batch-size 1 32 128 256 --num-images 256
  scripts/benchmark.py --requests --model local-dir:output/demo --images my/images --clients 16"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_args(parser, 'model', default='resnet50_aig')
    add_args(parser, 'pretrained', 'input_size')
    add_args(parser, 'batch_size', nargs='+', default=None,
             help='images in a batch, rows for each (default: 1 8 32, with --train 32)')
    arg('--rate', type=number('[0, 1]'), nargs='+', default=[1., .7, .5, .3], metavar='R',
        help='forced execution rates (default: 1 .7 .5 .3)')
    add_args(parser, 'images', help='folder of images, on which the gates decide (default: noise, forced gates)')
    add_args(parser, 'num_images', help='number of images (default: 32, with --requests 128)')
    add_args(parser, 'rounds', type=integer(1), default=7)
    arg('--precision', nargs='+', choices=('float32', 'float16', 'bfloat16', 'int8'), default=['float32'],
        help='rows for each: weights and arithmetic; int8 for --runtimes (default: float32)')
    arg('--torchcompile', '--compile', action='store_true',
        help='compiled rows too, over the compiled parent')
    arg('--runtimes', action='store_true', help='ONNX Runtime and OpenVINO too (CPU)')
    arg('--memory', action='store_true', help='peak memory of a pass too')
    other = parser.add_mutually_exclusive_group()
    add_args(other, 'cascade')
    other.add_argument('--train', action='store_true', help='time training steps instead, without a teacher')
    other.add_argument(
        '--requests', action='store_true', help='serve single images of clients instead, by ONNX Runtime (CPU)')
    arg('--clients', type=integer(1), nargs='+', metavar='N', help='clients of --requests (default: 1 4 16 64)')
    arg('--max-batch', type=integer(1), metavar='N', help='most images in a batch of --requests (default: 32)')
    add_args(parser, 'device', 'threads', 'seed', 'json')
    args = parser.parse_args(argv)
    for mode, refused in {'requests': ('batch_size', 'torchcompile', 'runtimes', 'memory'),
                          'cascade': ('torchcompile', 'memory'), 'train': ('runtimes',)}.items():
        for name in refused:
            if getattr(args, mode) and getattr(args, name):
                parser.error(f'--{name.replace("_", "-")} cannot be combined with --{mode}.')
    if not args.requests and (args.clients or args.max_batch):
        parser.error('--clients and --max-batch are for --requests.')
    args.clients, args.max_batch = args.clients or [1, 4, 16, 64], args.max_batch or 32
    args.num_images = args.num_images or (128 if args.requests else 32)
    args.batch_size = args.batch_size or ([32] if args.train else [1] if args.requests else [1, 8, 32])
    if args.train and min(args.batch_size) == 1:
        parser.error('--batch-size must be at least 2 for --train, for the batch norms of the gates.')
    if args.precision != ['float32'] and (args.cascade or args.requests or args.train):
        parser.error('--precision cannot be combined with --cascade, --requests or --train.')
    if 'int8' in args.precision and not args.runtimes:
        parser.error('--precision int8 is for --runtimes.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

import timm
import torch
from _cascade_times import load_cascade, measure_cascade, print_cascade_times
from _inputs import load_images, open_model
from _rows import draw_gates, forced, make_rows
from _serving import measure_requests, print_requests
from _timing import peak_mib, sum_up, time_runs

import timm_aig
from timm_aig import InputError
from timm_aig.run import environment


def load(args: argparse.Namespace) -> Any:
    """The adaptive model, its static parent with the same weights, and images [N, C, H, W]."""
    adaptive = open_model(args, args.model).to(args.device)
    with blame('model', args.model):
        parent = timm_aig.ungate_(copy.deepcopy(adaptive))
    images = load_images(args, timm.data.resolve_data_config({'input_size': args.input_size}, model=adaptive))
    if max(args.batch_size) > len(images):
        raise InputError(f'{max(args.batch_size)} needs as many images, there are {len(images)}.', 'batch_size')
    return adaptive, parent, images.to(args.device)


def measure(args: argparse.Namespace, adaptive: Any, parent: Any, images: torch.Tensor, batch: int) -> List[Dict]:
    """The table's rows for one batch size."""
    images = images[:len(images) // batch * batch]  # whole batches, for time and MACs alike
    cost = timm_aig.compute_cost(adaptive, tuple(images.shape[1:]))
    rows = {row.name: row for row in make_rows(args, adaptive, parent, images, batch)}
    own = timm_aig.forward_gates(adaptive, images)[1] if args.images and not args.train else None
    gates = {name: own if row.rate is None else draw_gates(args, row, images, batch, len(cost.blocks))
             for name, row in rows.items() if row.adaptive}

    def context(name: str, start: int) -> ContextManager:
        return forced(rows[name], gates.get(name), start, batch)

    seconds = time_runs({name: row.run for name, row in rows.items()}, images, batch, args.rounds, context)
    results = []
    for name, row in rows.items():
        figures = sum_up(seconds[name], seconds[row.reference], batch)
        macs = cost.share(gates[name]).mean().item() if row.adaptive else 1.
        results.append(dict(
            batch_size=batch, name=name, reference=row.reference, rate=row.rate, **figures, macs_share=macs,
            efficiency=macs / figures['ratio']))
        if args.memory:
            with context(name, 0):
                results[-1]['peak_mib'] = peak_mib(row.run, images[:batch])
    return results


def print_rows(results: List[Dict]) -> None:
    print_table([{
        'batch': r['batch_size'], '': r['name'], 'ms/img': f'{r["ms_per_image"]:.2f}', 'ratio': f'{r["ratio"]:.3f}',
        'range': f'{r["ratio_min"]:.3f}-{r["ratio_max"]:.3f}', 'MACs': f'{r["macs_share"]:.3f}',
        'efficiency': f'{r["efficiency"]:.3f}',
        **({'peak MiB': '-' if r['peak_mib'] is None else f'{r["peak_mib"]:.1f}'} if 'peak_mib' in r else {}),
    } for r in results], '')


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
        threads=torch.get_num_threads(), **environment(), rounds=args.rounds, seed=args.seed,
        command=' '.join(sys.argv))
    with torch.inference_mode():
        if args.cascade:
            cascade, images = load_cascade(args)
            results = measure_cascade(args, cascade, images)
        else:
            adaptive, parent, images = load(args)
            if args.requests:
                results = measure_requests(args, adaptive, parent, images)
            else:
                results = [row for batch in args.batch_size for row in measure(args, adaptive, parent, images, batch)]
        setting.update(images=len(images), input_size=list(images.shape[1:]))
    if args.json:
        print(json.dumps(dict(setting=setting, results=results), indent=2))
        return
    print(', '.join(f'{k} {v}' for k, v in setting.items()))
    show = print_requests if args.requests else print_cascade_times if args.cascade else print_rows
    show(results)


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
