#!/usr/bin/env python3
"""Find the gate offsets that realise budgets of an adaptive model, or thresholds of a cascade, on held-out images.

    budget      MACs share that was asked for: mean executed MACs over the static parent's
    offset      logit offset of the gates that realises it
    MACs, top1  MACs share and accuracy on the calibration images; measure on others with scripts/validate.py --budgets

--output gets the model with its table of budgets, for timm to load; timm_aig.set_budget(model, 0.5) then interpolates.
"""
import argparse
import json
import logging
import sys
from dataclasses import asdict
from typing import Any, Dict, List, Optional

from _args import add_args, add_evaluation_args, create_parser, number
from _common import (
    blame,
    check_file,
    open_device,
    open_folder,
    print_table,
    read_json,
    run_script,
    sleep_when_idle,
    write_text,
)

EXAMPLES = """examples:
  scripts/calibrate.py --model local-dir:output/finetune/r50_t05 --data-dir imagenet --holdout 10000 --output r50
  scripts/calibrate.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --dataset torch/fashion_mnist \\
      --data-dir data --holdout 5000 --budgets 0.5 0.6 0.7 --max-accuracy-drop 0.5 --output output/fmnist
  scripts/calibrate.py --cascade resnet18 resnet50 --pretrained --data-dir imagenet --holdout 10000 --macs 0.6 \\
      --output cascade"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_evaluation_args(parser, split='train', cascade=True)
    add_args(parser, 'budgets', default=[.4, .5, .6, .7, .8, .9, 1.],
             help='MACs shares to calibrate, or to try in each adaptive stage of --cascade '
                  '(default: 0.4 to 1 in steps of 0.1)')
    arg('--tolerance', type=number('(0, 1)'), default=0.005, metavar='X',
        help='largest difference of a MACs share from its budget (default: %(default)s)')
    arg('--max-accuracy-drop', type=number('[0, inf)'), metavar='POINTS',
        help='also find the smallest budget that loses at most so many points to all gates open')
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument('--macs', type=number('(0, inf)'), metavar='X',
                      help='most mean MACs of --cascade, over those of the largest model')
    goal.add_argument('--accuracy', type=number('[0, 100]'), metavar='PERCENT', help='least accuracy of --cascade')
    arg('--output', metavar='DIR', help="folder for model.safetensors and config.json, may be the model's own")
    arg('--hub-config', metavar='FILE', help='file of hub_configs to write the table into')
    add_args(parser, 'json')
    args = parser.parse_args(argv)
    if bool(args.cascade) == (args.macs is None and args.accuracy is None):
        parser.error('--cascade needs --macs or --accuracy, which are for --cascade only.')
    if args.cascade and (args.hub_config or args.max_accuracy_drop is not None):
        parser.error('--hub-config and --max-accuracy-drop are for one adaptive model.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import torch
from _cascade import common_data_config, create_cascade_loader, open_cascade
from _inputs import check_size, create_evaluation_loader, data_config, open_evaluation_split, open_model

import timm_aig
from timm_aig import InputError
from timm_aig.training.calibrate import Calibration


def create_loader(args: argparse.Namespace, model: Any) -> Any:
    """Loader of the calibration images."""
    dataset, config = open_evaluation_split(args, model), data_config(args, model)
    check_size(dataset, config, 'holdout')
    return create_evaluation_loader(args, dataset, config, use_prefetcher=False)


def read_hub_config(path: str, architecture: str) -> Dict[str, Any]:
    config = read_json(path, 'hub_config')
    if config.get('architecture') != architecture:
        raise InputError(f'{path} must be a file of hub_configs for {architecture}, the --model.', 'hub_config')
    return config


def print_result(result: Calibration) -> None:
    print_table([{
        'budget': f'{p.budget:.4g}', 'offset': f'{p.gate_offset:.4f}', 'MACs': f'{p.macs_share:.2%}',
        'top1': '' if p.top1 is None else f'{p.top1:.2f}%'} for p in result.table])
    print(f'{result.table[0].images} images, {result.passes} passes; '
          f'the MACs share is {result.lowest:.1%} with all gates closed.')
    if result.smallest:
        s = result.smallest
        print(f'Budget {s.point.budget:g} is the smallest that keeps the accuracy of all gates open, '
              f'{s.reference:.2f}%: it loses {s.drop:.2f} points, {s.confidence:.0%} interval {s.interval[0]:.2f} to '
              f'{s.interval[1]:.2f}.')


def usable_budgets(args: argparse.Namespace, cascade: Any, stage: int) -> List[float]:
    """Those of --budgets in the range of a stage's table. Says on stderr if an adaptive stage has none."""
    model = cascade.models[cascade.order[stage]]
    table = timm_aig.budget_table(model)
    found = [budget for budget in args.budgets if table and table[0].budget <= budget <= table[-1].budget]
    if timm_aig.gated_blocks(model) and not found:
        why = f'calibrated for {table[0].budget:g} to {table[-1].budget:g}' if table else 'not calibrated'
        print(f'Stage {stage + 1} keeps its gate offset: it is {why}.', file=sys.stderr)
    return found


def run_cascade(args: argparse.Namespace, device: torch.device) -> None:
    cascade = open_cascade(args)
    if args.output:
        open_folder(args.output)
    loader = create_cascade_loader(args, cascade, device)
    check_size(loader.dataset, common_data_config(args, cascade), 'holdout')
    cascade = cascade.to(device, memory_format=torch.channels_last)
    budgets: Any = [usable_budgets(args, cascade, stage) or [None] for stage in range(len(cascade.order))]
    points = cascade.calibrate(loader, macs=args.macs, accuracy=args.accuracy, budgets=budgets, progress=True)
    chosen = next(p for p in points if (p.thresholds, p.budgets) == (cascade.thresholds, cascade.budgets))
    if args.json:
        print(json.dumps({'chosen': asdict(chosen), 'points': [asdict(point) for point in points]}, indent=2))
    else:
        if any(chosen.budgets):
            print(f'budgets {", ".join(map(str, chosen.budgets))}')
        print(f'thresholds {", ".join(f"{value:.4f}" for value in chosen.thresholds)}: MACs {chosen.macs_share:.1%} of '
              f'the largest model, top1 {chosen.top1:.2f}% on {chosen.images} images.')
    if args.output:
        with blame('cascade', ' '.join(args.cascade)):
            cascade.cpu().save_pretrained(args.output)
        if not args.json:
            print(f'Wrote {args.output}.')


def run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    device = open_device(args)
    if args.distributed:
        raise InputError('calibrate.py runs in one process, without torchrun.')
    if not args.output and not args.hub_config:
        print('Nothing will be written, only printed: --output is not given.', file=sys.stderr)
    if args.cascade:
        run_cascade(args, device)
        return
    model = open_model(args, args.model)
    hub_config = args.hub_config and read_hub_config(args.hub_config, model.pretrained_cfg['architecture'])
    if args.hub_config:
        check_file(args.hub_config, 'hub-config')
    if args.output:
        open_folder(args.output)

    loader = create_loader(args, model)
    model = model.to(device, memory_format=torch.channels_last)
    with blame('model', args.model):
        result = timm_aig.calibrate_budget(
            model, loader, args.budgets, tolerance=args.tolerance, max_accuracy_drop=args.max_accuracy_drop,
            progress=True)

    # print first: a file that cannot be written does not lose the figures
    if args.json:
        print(json.dumps(asdict(result), indent=2))
    else:
        print_result(result)
    if args.output:
        with blame('model', args.model):
            timm_aig.save_pretrained(model, args.output)
    if args.hub_config:
        hub_config['gate_budgets'] = [point.to_dict() for point in result.table]
        write_text(args.hub_config, json.dumps(hub_config, indent=2) + '\n')
    written = [path for path in (args.output, args.hub_config) if path]
    if written and not args.json:
        print(f'Wrote {" and ".join(written)}.')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
