#!/usr/bin/env python3
"""Publish a model on the Hugging Face Hub: weights, config.json, model card and pictures, in one commit.

SOURCE is a folder with model.safetensors and config.json, such as the output of finetune.py or import_convnet_aig.py.
Its results.json, rates_over_epochs.png and accuracy_macs.png (by finetune.py) and execution_rates.png (by
analyze.py --output SOURCE) are published too, other files are not. Or SOURCE is a checkpoint (.safetensors, .pth,
.pth.tar) of the model that --hub-config describes.

The token is the one of `hf auth login`, or HF_TOKEN. If a push fails, run it again: files that have arrived are not
uploaded twice.
"""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from _args import create_parser
from _common import read_json, run_script
from _push import add_push_args, publish

EXAMPLES = """examples:
  scripts/push_to_hub.py output/t06 user/resnet50_aig.t06 --dry-run
  scripts/push_to_hub.py output/t06 user/resnet50_aig.t06 --private
  scripts/push_to_hub.py output/t06 user/resnet50_aig.t06 --revision v2
  scripts/push_to_hub.py output/t06/model.safetensors user/resnet50_aig.t06 --hub-config resnet50_aig.t06_paper \\
      --create-pr"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    parser.add_argument('source', metavar='SOURCE', type=Path, help='folder or checkpoint')
    add_push_args(parser, 'Add model')
    parser.add_argument('--hub-config', metavar='NAME', help='name of a file in hub_configs, or a JSON file')
    parser.add_argument('--revision', metavar='BRANCH', help='branch, created if missing (default: main)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

import timm
import torch.nn as nn
from timm.models import load_checkpoint

import timm_aig
from timm_aig import InputError
from timm_aig.budget import read_budget_table, set_budget_table
from timm_aig.convert import checkpoint_filter_fn
from timm_aig.models.hub_configs import load_hub_configs

PICTURES = ('execution_rates.png', 'rates_over_epochs.png', 'accuracy_macs.png')
# Entries of config.json that save_pretrained writes itself.
WRITTEN = (
    'architecture', 'num_classes', 'num_features', 'global_pool', 'model_args', 'pretrained_cfg', 'label_names',
    'label_descriptions')


def read_hub_config(name: str) -> Dict[str, Any]:
    """A hub_config by its name or path."""
    known = load_hub_configs()
    if not name.endswith('.json') and name not in known:
        raise InputError(f'must be a JSON file or one of {", ".join(known)}, not {name}.', 'hub_config')
    return read_json(name, 'hub_config') if name.endswith('.json') else known[name]


def load_model(args: argparse.Namespace) -> Tuple[nn.Module, Dict[str, Any], Dict[str, Any]]:
    """The model, its results, and the user's own entries of its config.json."""
    results = read_hub_config(args.hub_config) if args.hub_config else {}
    folder = args.source.is_dir()
    if not folder and not args.source.is_file():
        raise InputError(f'SOURCE must be a folder or a checkpoint, there is no {args.source}.')
    if not folder and not results:
        raise InputError('SOURCE is a checkpoint, --hub-config must describe its model.')
    config = read_json(args.source / 'config.json') if folder else {}
    if 'cascade' in config:
        raise InputError('SOURCE is a cascade: publish it by Cascade.from_pretrained(SOURCE).push_to_hub(REPO).')
    try:
        if folder:
            model = timm.create_model(f'local-dir:{args.source}', pretrained=True)
        else:
            gates = {name: value for name, value in results.get('aig', {}).items() if name != 'version'}
            cfg = {**results['pretrained_cfg'], 'architecture': results['architecture'], 'file': None}
            model = timm.create_model(results['architecture'], pretrained_cfg=cfg, **gates)
            load_checkpoint(model, str(args.source), filter_fn=checkpoint_filter_fn)
            if results.get('gate_budgets'):
                set_budget_table(model, read_budget_table(results['gate_budgets']))
    except Exception as e:  # of timm, torch and the file formats
        raise InputError(f'SOURCE {args.source} cannot be loaded: {type(e).__name__}: {e}') from e
    if folder and (args.source / 'results.json').exists():
        results.update(read_json(args.source / 'results.json'))
    return model, results, {k: v for k, v in config.items() if k not in WRITTEN}


def run(args: argparse.Namespace) -> None:
    model, results, model_config = load_model(args)
    publish(
        args, timm_aig.push_to_hub, model, args.repo_id, results=results, model_config=model_config,
        pictures=[args.source / name for name in PICTURES if (args.source / name).exists()],
        commit_message=args.message, private=args.private or None, revision=args.revision, create_pr=args.create_pr,
        timeout=args.timeout, dry_run=args.dry_run)


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
