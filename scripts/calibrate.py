#!/usr/bin/env python3
"""Find the gate offsets that give an adaptive model wanted budgets, on held-out training images.

    budget      mean MACs over those of the static parent that was asked for
    offset      of the gates, added to the open logit before the threshold
    MACs, top1  what they gave on the calibration images; measure on others with scripts/validate.py --budget

The model with its table goes to --output, where timm loads it; timm_aig.set_budget(model, 0.5) then interpolates.
"""
import argparse
import json
import logging
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Optional

# Before torch is imported: threads that spin while they wait make small models ten times slower on a busy machine.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import torch
from _common import error_text, open_device, open_folder
from torch.utils.data import IterableDataset
from validate import (
    add_evaluation_args,
    check_evaluation_args,
    create_model,
    create_test_loader,
    data_config,
    open_split,
)

import timm_aig
from timm_aig import InputError
from timm_aig.training.calibrate import BUDGETS, Calibration
from timm_aig.training.checkpoint import write_atomically

MOST_BYTES = 32 * 10 ** 9  # of calibration images

EXAMPLES = """examples:
  scripts/calibrate.py --model local-dir:output/finetune/r50_t05 --data-dir imagenet --holdout 10000 --output r50
  scripts/calibrate.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --dataset torch/fashion_mnist \\
      --data-dir data --holdout 5000 --budgets 0.5 0.6 0.7 --max-accuracy-drop 0.5 --output output/fmnist
  scripts/validate.py --model local-dir:output/fmnist --dataset torch/fashion_mnist --data-dir data --budget 0.5 0.6 0.7

exit code: 0 done, 2 bad input, a budget out of reach or a file that cannot be written"""


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = parser.add_argument
    add_evaluation_args(arg, split='train')
    arg('--budgets', type=float, nargs='*', metavar='X', default=BUDGETS, help='default: 0.4 to 1 in steps of 0.1')
    arg('--tolerance', type=float, default=0.005, metavar='X', help="of a budget's MACs, default: %(default)s")
    arg('--max-accuracy-drop', type=float, metavar='POINTS', help='find the smallest budget that loses no more, '
        'compared with all gates open')
    arg('--confidence', type=float, default=0.95, metavar='X', help="of that drop's interval, default: %(default)s")
    arg('--output', metavar='DIR', help='folder for model.safetensors and config.json, may be that of the model')
    arg('--hub-config', metavar='FILE', help='file of hub_configs to write the table into')
    arg('--json', action='store_true', help='print JSON rather than the table')
    args = parser.parse_args(argv)
    check_evaluation_args(args)
    return args


def create_images(args: argparse.Namespace, model: Any) -> Any:
    """Loader of the calibration images."""
    dataset, config = open_split(args), data_config(args, model)
    size = 0 if isinstance(dataset, IterableDataset) else 4 * len(dataset) * math.prod(config['input_size'])
    if size > MOST_BYTES:
        raise InputError(f'--holdout: {len(dataset)} images take {size / 1e9:.0f} GB, and they are kept in memory; '
                         f'{MOST_BYTES // (size // len(dataset))} are the most, 10000 are plenty.')
    return create_test_loader(args, dataset, config, use_prefetcher=False)


def read_hub_config(path: str) -> Dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise InputError(f'--hub-config {path}: {e}') from e
    if not isinstance(config, dict):
        raise InputError(f'--hub-config {path} must be a file of hub_configs.')
    return config


def write_hub_config(model: Any, path: str) -> None:
    config = read_hub_config(path)
    config['gate_budgets'] = [point.to_dict() for point in timm_aig.budget_table(model)]
    text = json.dumps(config, indent=2) + '\n'
    write_atomically(Path(path), lambda file: file.write(text.encode()))


def print_table(result: Calibration) -> None:
    print(f'{"budget":>6}  {"offset":>9}  {"MACs":>7}  {"top1":>6}')
    for p in result.table:
        top1 = '' if p.top1 is None else f'{p.top1:5.2f}%'
        print(f'{p.budget:6.4g}  {p.gate_offset:9.4f}  {p.macs_share:7.2%}  {top1:>6}')
    print(f'{result.table[0].images} images, {result.passes} passes; with all gates closed {result.lowest:.1%} of the '
          f'MACs run.')
    if result.smallest:
        s = result.smallest
        print(f'Budget {s.point.budget:g} is the smallest that keeps the accuracy of all gates open, '
              f'{s.reference:.2f}%: it loses {s.drop:.2f} points, {s.confidence:.0%} interval {s.interval[0]:.2f} to '
              f'{s.interval[1]:.2f}.')


def run(args: argparse.Namespace) -> None:
    device = open_device(args)
    if args.distributed:
        raise InputError('calibrate.py runs in one process, without torchrun.')
    model = create_model(args, args.model)
    architecture = model.pretrained_cfg['architecture']
    if args.hub_config and read_hub_config(args.hub_config).get('architecture') != architecture:
        raise InputError(f'--hub-config {args.hub_config} is not of {architecture}, the architecture of --model.')
    if args.output:
        open_folder(args.output)
    loader = create_images(args, model)
    model = model.to(device, memory_format=torch.channels_last)
    try:
        result = timm_aig.calibrate_budget(
            model, loader, args.budgets, tolerance=args.tolerance, max_accuracy_drop=args.max_accuracy_drop,
            confidence=args.confidence, progress=True)
    except InputError:
        raise
    except ValueError as e:
        raise InputError(str(e)) from e
    # printed first: nothing that cannot be written loses it
    if args.json:
        print(json.dumps(asdict(result), indent=2))
    else:
        print_table(result)
    for path, write in ((args.output, timm_aig.save_pretrained), (args.hub_config, write_hub_config)):
        if path:
            try:
                write(model, path)
            except (OSError, ValueError) as e:
                raise InputError(f'cannot write {path}: {e}') from e
            if not args.json:
                print(f'Wrote {path}.')


def main(argv: Optional[List[str]] = None) -> int:
    try:
        logging.basicConfig(level=logging.INFO, format='%(message)s')
        run(parse_args(argv))
    except InputError as e:
        print(f'error: {error_text(e)}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
