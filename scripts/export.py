#!/usr/bin/env python3
"""Exports a model for ONNX Runtime, OpenVINO or torch.export, checks the file, and times it against the static parent.

    branch  batch 1; closed blocks are not computed (default)
    masked  any batch; every block is computed and multiplied by its gate: for other tools and for checks
    path    any batch; the static network of one pattern of gates, the one that most of --images take

The file is compared with PyTorch on the images (--images, or noise), with the gates' own answers, with all gates open
and with all closed; if they disagree, nothing is written. In float32 the gates must be the same; float16 and bfloat16
may be off by 2 % of the largest logit; of int8 the differences are only reported. A branch file in float32 is also
optimised for this machine, see timm_aig.optimize_onnx. Then the files are timed against the static parent in the same
runtime, in turns, with the gates' own answers and with all gates open.
"""
import argparse
import copy
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import timm
import torch
from timm.data import resolve_input_data_config

import timm_aig
from timm_aig import InputError
from timm_aig.export.check import FORCED, own_offsets
from timm_aig.training.data import read_images

EXAMPLES = """examples:
  scripts/export.py --model local-dir:output/demo                                    output/demo's model as ONNX
  scripts/export.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --images shirts
  scripts/export.py --model resnet50_aig --format openvino --output r50.xml
  scripts/export.py --model resnet50_aig --precision int8 --images photos --num-images 200      calibrated on 200
  scripts/export.py --model resnet50_aig --mode masked --no-optimize --json

exit code: 0 done, 1 the exported model disagrees, 2 bad input"""

SUFFIXES = {'onnx': '.onnx', 'openvino': '.xml', 'program': '.pt2', 'aoti': '.pt2'}


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = parser.add_argument
    arg('--model', required=True, metavar='NAME', help='of timm, or local-dir: or hf-hub:')
    arg('--pretrained', action='store_true', help='load weights, as local-dir: and hf-hub: always do')
    arg('--format', choices=SUFFIXES, default='onnx', help='default: %(default)s; program and aoti are torch.export')
    arg('--mode', choices=('branch', 'masked', 'path'), default='branch', help='default: %(default)s')
    arg('--precision', default='float32', metavar='TYPE',
        help='float32 (default), float16; ONNX: int8 too; OpenVINO: bfloat16 too, for the check and the timing')
    arg('--output', type=Path, metavar='FILE', help='default: <model> with the suffix of the format, here')
    arg('--images', metavar='DIR', help='folder of images to check on (default: noise), to calibrate int8 on')
    arg('--num-images', type=int, default=8, metavar='N', help='of them (default: %(default)s)')
    arg('--img-size', type=int, help="default: the model's")
    arg('--gate-offset', type=float, metavar='X', help="the file's default offset (default: the model's)")
    arg('--no-optimize', action='store_true', help='ONNX: write only the portable file, none for this machine')
    arg('--rounds', type=int, default=20, metavar='N', help='of timing, 0 for none (default: %(default)s)')
    arg('--threads', type=int, help="default: torch's")
    arg('--json', action='store_true', help='print the result as JSON')
    args = parser.parse_args(argv)
    if args.num_images < 1 or args.rounds < 0:
        raise InputError(f'--num-images must be at least 1 and --rounds at least 0, '
                         f'not {args.num_images} and {args.rounds}.')
    if args.precision == 'int8' and not args.images:
        raise InputError('--precision int8 needs --images to calibrate on.')
    if args.format in ('program', 'aoti') and (args.mode, args.precision) != ('branch', 'float32'):
        raise InputError(f'--format {args.format} is for --mode branch and --precision float32.')
    return args


def load_images(args: argparse.Namespace, model: Any) -> torch.Tensor:
    """Normalised images [N, C, H, W]."""
    config = resolve_input_data_config(model)
    if args.img_size:
        config['input_size'] = (config['input_size'][0], args.img_size, args.img_size)
    if not args.images:
        return torch.randn(args.num_images, *config['input_size'], generator=torch.Generator().manual_seed(0))
    try:
        return read_images(args.images, config, args.num_images)
    except Exception as e:  # timm's and PIL's own
        raise InputError(f'--images {args.images}: {e}') from e


def common_pattern(model: Any, images: torch.Tensor) -> List[bool]:
    """The pattern of gates that most of the images take."""
    with torch.no_grad():
        gates = timm_aig.forward_gates(model, images)[1]
    patterns, counts = gates.unique(dim=0, return_counts=True)
    return patterns[counts.argmax()].bool().tolist()


def write(
        args: argparse.Namespace, model: Any, images: torch.Tensor, path: Path, parent: bool = False,
) -> Dict[str, Any]:
    """Export to a file and check it; the parent as a static graph of the same format."""
    if args.format == 'program':
        return timm_aig.export_program(model, path, images)
    if args.format == 'aoti':
        return timm_aig.export_aoti(model, path, images)
    mode = 'masked' if parent else args.mode
    kwargs: Dict[str, Any] = dict(mode=mode, images=images, precision=args.precision)
    if mode == 'path':
        kwargs['open'] = common_pattern(model, images)
    if args.format == 'openvino':
        return timm_aig.export_openvino(model, path, **kwargs)
    if args.precision == 'int8':
        kwargs['calibration'] = [images]
    return timm_aig.export_onnx(model, path, **kwargs)


def runner(args: argparse.Namespace, path: Path) -> Callable[[np.ndarray, Optional[np.ndarray]], Any]:
    """Runs a file on x and gate offsets, None for the default or for none."""
    threads = args.threads or torch.get_num_threads()
    if args.format == 'onnx':
        from timm_aig.export.passes import create_session

        session = create_session(path.read_bytes(), threads, spinning=False)  # else the sessions fight for the cores
        return lambda x, offset: session.run(None, {'x': x} if offset is None else {'x': x, 'gate_offset': offset})
    import openvino

    hint = 'bf16' if args.precision == 'bfloat16' else 'f32'
    compiled = openvino.Core().compile_model(
        path, 'CPU', {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': hint})
    request = compiled.create_infer_request()
    return lambda x, offset: request.infer({'x': x} if offset is None else {'x': x, 'gate_offset': offset})


def time_files(
        args: argparse.Namespace, model: Any, images: torch.Tensor, files: Dict[str, Path],
) -> List[Dict[str, Any]]:
    """Milliseconds of each file at batch 1, in turns, and over the static parent in the same runtime."""
    own = own_offsets(model)
    everything = np.full_like(own, FORCED)
    with tempfile.TemporaryDirectory() as folder:
        static = timm_aig.ungate_(copy.deepcopy(model))
        parent = Path(folder, f'parent{SUFFIXES[args.format]}')
        write(args, static, images, parent, parent=True)
        reference = runner(args, parent)
        runs = {'static parent': lambda x: reference(x, None)}
        for name, path in files.items():
            run = runner(args, path)
            if args.mode == 'path':
                runs[name] = lambda x, run=run: run(x, None)
                continue
            runs[f'{name}, own gates'] = lambda x, run=run: run(x, own)
            runs[f'{name}, all open'] = lambda x, run=run: run(x, everything)
        seconds: Dict[str, List[float]] = {name: [] for name in runs}
        xs = [image[None].numpy() for image in images]
        for i in range(-2, args.rounds):  # two to warm up
            x = xs[i % len(xs)]
            for name, call in runs.items():
                begin = time.perf_counter()
                call(x)
                if i >= 0:
                    seconds[name].append(time.perf_counter() - begin)
    rows = []
    for name, values in seconds.items():
        ratios = sorted(s / r for s, r in zip(values, seconds['static parent']))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        rows.append({'name': name, 'ms': 1e3 * statistics.median(values), 'ratio': statistics.median(ratios),
                     'ratio_quartiles': [low, high]})
    return rows


def run(args: argparse.Namespace) -> Dict[str, Any]:
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained or ':' in args.model).eval()
    except Exception as e:  # timm's, the Hub's and the files' own
        raise InputError(f'--model {args.model}: {e}') from e
    if args.gate_offset is not None:
        timm_aig.set_gate_offset(model, args.gate_offset)
    images = load_images(args, model)
    path = args.output or Path(re.split('[/:]', args.model.rstrip('/'))[-1] + SUFFIXES[args.format])
    if not path.parent.is_dir():
        raise InputError(f'--output: there is no folder {path.parent}.')
    if path.is_dir():
        raise InputError(f'--output: {path} is a folder.')
    result = {'export': write(args, model, images, path)}
    files = {'portable' if args.format == 'onnx' else args.format: path}
    branches = args.format == 'onnx' and args.mode == 'branch' and args.precision == 'float32'
    if branches and not args.no_optimize:
        files['optimized'] = timm_aig.optimize_onnx(path)
        result['optimized'] = {'path': str(files['optimized']), 'bytes': files['optimized'].stat().st_size}
    if args.rounds and args.format in ('onnx', 'openvino') and timm_aig.gated_blocks(model):
        result['times'] = time_files(args, model, images, files)
    return result


def print_result(result: Dict[str, Any]) -> None:
    e = result['export']
    print(f'Wrote {e["path"]}: {e["mode"]}, {e["precision"]}, {e["bytes"] / 1e6:.1f} MB, sha256 {e["sha256"]}.')
    print(f'Checked on {e["images"]} images, all gates open and all closed: {e["patterns"]} patterns of the gates, '
          f'{e["gates_changed"]} gates changed, logits differ by at most {e["max_difference"]:.1g}.')
    if 'optimized' in result:
        print(f'Wrote {result["optimized"]["path"]}, for this machine, {result["optimized"]["bytes"] / 1e6:.1f} MB.')
    for row in result.get('times', ()):
        low, high = row['ratio_quartiles']
        print(f'{row["name"]:24} {row["ms"]:8.2f} ms  {row["ratio"]:6.3f} of the parent ({low:.3f}-{high:.3f})')


def main(argv: Optional[List[str]] = None) -> int:
    try:
        args = parse_args(argv)
        result = run(args)
    except RuntimeError as e:  # ExportError, and the optimizer's
        print(f'error: {e}', file=sys.stderr)
        return 1
    except (InputError, ImportError, OSError, ValueError) as e:
        print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print_result(result)
    return 0


if __name__ == '__main__':
    sys.exit(main())
