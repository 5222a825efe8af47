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
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

from _args import add_args, create_parser, integer
from _common import check_file, print_table, require, run_script

EXAMPLES = """examples:
  scripts/export.py --model local-dir:output/demo                                  # output/demo's model as ONNX
  scripts/export.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --images shirts
  scripts/export.py --model resnet50_aig --precision int8 --images photos --num-images 200    # calibrated on 200"""

SUFFIXES = {'onnx': '.onnx', 'openvino': '.xml', 'program': '.pt2'}
ONNX_PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
PACKAGES = {'onnx': ONNX_PACKAGES, 'openvino': (*ONNX_PACKAGES, 'openvino'), 'program': ()}


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
    add_args(parser, 'rounds', type=integer(0), default=5,
             help='how often all images are timed, 0: not at all (default: %(default)s)')
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
from _inputs import load_images, open_model, warn_of_random_weights
from _timing import sum_up, time_runs

import timm_aig
from timm_aig import InputError
from timm_aig.export.check import FORCED, own_offsets
from timm_aig.export.runtime import open_exported
from timm_aig.training.data import resolve_config


def write(args: argparse.Namespace, model: Any, images: torch.Tensor, path: Path, mode: str) -> Dict[str, Any]:
    """Export to a file and check it."""
    if args.format == 'program':
        return timm_aig.export_program(model, path, images)
    kwargs: Dict[str, Any] = dict(mode=mode, images=images, precision=args.precision)
    if mode == 'path' and timm_aig.gated_blocks(model):
        with torch.no_grad():
            patterns, counts = timm_aig.forward_gates(model, images)[1].unique(dim=0, return_counts=True)
        kwargs['gates'] = patterns[counts.argmax()].tolist()
    if args.precision == 'int8':
        kwargs['calibration'] = images.split(8)
    if args.format == 'openvino':
        return timm_aig.export_openvino(model, path, **kwargs)
    return timm_aig.export_onnx(model, path, **kwargs)


def time_file(args: argparse.Namespace, model: Any, images: torch.Tensor, path: Path) -> List[Dict[str, Any]]:
    """Milliseconds a batch of the file and of the static parent in the same runtime, in turns."""
    def load(path: Path) -> Any:
        # spinning threads of one session would slow the other
        return open_exported(path, args.threads or torch.get_num_threads(), spinning=False, precision=args.precision)

    own = own_offsets(model)
    with tempfile.TemporaryDirectory() as folder:
        parent = Path(folder, f'parent{SUFFIXES[args.format]}')
        write(args, timm_aig.ungate_(copy.deepcopy(model)), images, parent, 'masked')
        static, adaptive = load(parent), load(path)
    runs = {'static parent': lambda x: static({'x': x.numpy()}), 'path': lambda x: adaptive({'x': x.numpy()})}
    if args.mode != 'path':
        del runs['path']
        for name, offset in {'own gates': own, 'all open': own * 0 + FORCED}.items():
            runs[name] = partial(lambda offset, x: adaptive({'x': x.numpy(), 'gate_offset': offset}), offset)
    images = images.repeat(-(-args.batch_size // len(images)), 1, 1, 1)
    seconds = time_runs(runs, images, args.batch_size, args.rounds)
    rows = []
    for name, rounds in seconds.items():
        figures = sum_up(rounds, seconds['static parent'], args.batch_size)
        rows.append({'name': name, 'ms': figures['ms_per_image'] * args.batch_size,
                     **{key: figures[key] for key in ('ratio', 'ratio_min', 'ratio_max')}})
    return rows


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.output or Path(re.split('[/:]', args.model.rstrip('/'))[-1] + SUFFIXES[args.format])
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f'must be a file in a folder that exists, not {path}.', 'output')
    if path.suffix != SUFFIXES[args.format]:
        raise InputError(f'must end in {SUFFIXES[args.format]}, not {path}.', 'output')
    check_file(path, 'output')
    require('export', *PACKAGES[args.format])
    model = open_model(args, args.model)
    if args.gate_offset is not None:
        timm_aig.set_gate_offset(model, args.gate_offset)
    images = load_images(args, resolve_config(model, {'input_size': args.input_size}))
    warn_of_random_weights(args, args.model, f', and replaces {path}' if path.exists() else '')
    result: Dict[str, Any] = {'export': write(args, model, images, path, args.mode)}
    if args.rounds and args.format != 'program' and timm_aig.gated_blocks(model):
        result['times'] = time_file(args, model, images, path)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    e = result['export']
    print(f'Wrote {e["path"]}: {e["mode"]}, {e["precision"]}, {e["bytes"] / 1e6:.1f} MB, sha256 {e["sha256"]}.')
    print(f'Checked on {e["images"]} images: {e["patterns"]} patterns of gates, {e["gates_changed"]} gates changed, '
          f'logits differ by at most {e["max_difference"]:.1g}.')
    if 'times' in result:
        print_table([{
            '': row['name'], 'ms': f'{row["ms"]:.2f}', 'over the parent': f'{row["ratio"]:.3f}',
            'range': f'{row["ratio_min"]:.3f}-{row["ratio_max"]:.3f}'} for row in result['times']], '')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
