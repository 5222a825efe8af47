#!/usr/bin/env python3
"""Exports a model for ONNX Runtime, OpenVINO or torch.export, checks the file, and times it against the static parent.

    sparse  a block is computed for the images whose gate is open (default)
    masked  every block is computed and multiplied by its gate: for other tools and for checks
    path    the static network of one pattern of gates, the most frequent one on --images

All take any batch size. Before the file gets its name it is compared with PyTorch on the images, at batch 1 and more,
with the model's own gates, all gates open and all closed; int8 files are compared but not refused. Then the file is
timed against the static parent in the same runtime, in turns.
"""
import argparse
import copy
import itertools
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from _args import add_args, create_parser, integer
from _common import ResultError, check_file, run_script

EXAMPLES = """examples:
  scripts/export.py --model local-dir:output/demo                                    output/demo's model as ONNX
  scripts/export.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --images shirts
  scripts/export.py --model resnet50_aig --format openvino --output r50.xml
  scripts/export.py --model resnet50_aig --precision int8 --images photos --num-images 200      calibrated on 200
  scripts/export.py --model resnet50_aig --batch-size 8 --json"""

SUFFIXES = {'onnx': '.onnx', 'openvino': '.xml', 'program': '.pt2'}


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_args(parser, 'model', required=True)
    add_args(parser, 'pretrained')
    arg('--format', choices=SUFFIXES, default='onnx', help='program is torch.export (default: %(default)s)')
    arg('--mode', choices=('sparse', 'masked', 'path'), default='sparse', help='default: %(default)s')
    arg('--precision', choices=('float32', 'float16', 'bfloat16', 'int8'), default='float32',
        help='bfloat16 is for OpenVINO (default: %(default)s)')
    arg('--output', type=Path, metavar='FILE', help="default: the model's name with the suffix of the format, here")
    add_args(parser, 'images', help='folder of images to check and time on, and to calibrate int8 on (default: noise)')
    add_args(parser, 'num_images', default=8)
    add_args(parser, 'input_size', 'gate_offset')
    add_args(parser, 'batch_size', default=1, help='images in a batch of the timing (default: %(default)s)')
    add_args(parser, 'rounds', type=integer(0), default=20, help='timing rounds, 0: none (default: %(default)s)')
    add_args(parser, 'threads', 'json')
    args = parser.parse_args(argv)
    if args.precision == 'int8' and not args.images:
        parser.error('--precision int8 needs --images to calibrate on.')
    if args.format == 'program' and (args.mode, args.precision) != ('sparse', 'float32'):
        parser.error('--format program is for --mode sparse and --precision float32.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

import torch
from _inputs import open_model, read_image_folder, warn_of_random_weights

import timm_aig
from timm_aig import InputError
from timm_aig.export.check import FORCED, ExportError, own_offsets
from timm_aig.export.runtime import open_exported
from timm_aig.training.data import resolve_config


def load_images(args: argparse.Namespace, model: Any) -> torch.Tensor:
    """Normalised images [N, C, H, W]."""
    config = resolve_config(model, {'input_size': args.input_size})
    if not args.images:
        return torch.randn(args.num_images, *config['input_size'], generator=torch.Generator().manual_seed(0))
    return read_image_folder(args, config)


def write(args: argparse.Namespace, model: Any, images: torch.Tensor, path: Path, mode: str) -> Dict[str, Any]:
    """Export to a file and check it."""
    if args.format == 'program':
        return timm_aig.export_program(model, path, images)
    kwargs: Dict[str, Any] = dict(mode=mode, images=images, precision=args.precision)
    if mode == 'path':
        with torch.no_grad():
            patterns, counts = timm_aig.forward_gates(model, images)[1].unique(dim=0, return_counts=True)
        kwargs['gates'] = patterns[counts.argmax()].tolist()
    if args.precision == 'int8':
        kwargs['calibration'] = images.split(8)
    if args.format == 'openvino':
        return timm_aig.export_openvino(model, path, **kwargs)
    return timm_aig.export_onnx(model, path, **kwargs)


def load(args: argparse.Namespace, path: Path) -> Callable[[Dict[str, Any]], Any]:
    """A function that runs a file on its inputs by name."""
    # spinning threads of one session would slow the other
    return open_exported(path, args.threads or torch.get_num_threads(), spinning=False, precision=args.precision)


def time_file(args: argparse.Namespace, model: Any, images: torch.Tensor, path: Path) -> List[Dict[str, Any]]:
    """Milliseconds a batch of the file and of the static parent in the same runtime, in turns."""
    own = own_offsets(model)
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder, f'parent{SUFFIXES[args.format]}')
        write(args, timm_aig.ungate_(copy.deepcopy(model)), images, parent, 'masked')
        static, adaptive = load(args, parent), load(args, path)
        runs: Dict[str, Any] = {'static parent': (static, {}), 'path': (adaptive, {})}
        if args.mode != 'path':
            runs = {'static parent': (static, {}), 'own gates': (adaptive, {'gate_offset': own}),
                    'all open': (adaptive, {'gate_offset': own * 0 + FORCED})}
        seconds: Dict[str, List[float]] = {name: [] for name in runs}
        batches = itertools.cycle(images.repeat(args.batch_size, 1, 1, 1).split(args.batch_size))
        for i, x in zip(range(-2, args.rounds), batches):  # two to warm up
            for name, (call, feeds) in runs.items():
                begin = time.perf_counter()
                call({'x': x.numpy(), **feeds})
                if i >= 0:
                    seconds[name].append(time.perf_counter() - begin)
    rows = []
    for name, values in seconds.items():
        ratios = [s / r for s, r in zip(values, seconds['static parent'])]
        rows.append({'name': name, 'ms': 1e3 * statistics.median(values), 'ratio': statistics.median(ratios),
                     'ratio_min': min(ratios), 'ratio_max': max(ratios)})
    return rows


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    model = open_model(args, args.model)
    if args.gate_offset is not None:
        timm_aig.set_gate_offset(model, args.gate_offset)
    images = load_images(args, model)
    path = args.output or Path(re.split('[/:]', args.model.rstrip('/'))[-1] + SUFFIXES[args.format])
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f'must be a file in a folder that exists, not {path}.', 'output')
    check_file(path, 'output')
    warn_of_random_weights(args, args.model, f', and replaces {path}' if path.exists() else '')
    try:
        result: Dict[str, Any] = {'export': write(args, model, images, path, args.mode)}
    except ExportError as e:
        raise ResultError(str(e)) from e
    if args.rounds and args.format != 'program' and timm_aig.gated_blocks(model):
        result['times'] = time_file(args, model, images, path)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    e = result['export']
    print(f'Wrote {e["path"]}: {e["mode"]}, {e["precision"]}, {e["bytes"] / 1e6:.1f} MB, sha256 {e["sha256"]}.')
    print(f'Checked on {e["images"]} images: {e["patterns"]} patterns of gates, {e["gates_changed"]} gates changed, '
          f'logits differ by at most {e["max_difference"]:.1g}.')
    for row in result.get('times', ()):
        print(f'{row["name"]:14} {row["ms"]:8.2f} ms  {row["ratio"]:6.3f} of the parent '
              f'({row["ratio_min"]:.3f}-{row["ratio_max"]:.3f})')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
