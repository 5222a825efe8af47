#!/usr/bin/env python3
"""Publish an adaptive model on the Hugging Face Hub: weights, config.json, model card and pictures, in one commit.

SOURCE is a folder with model.safetensors and config.json, such as an output folder of scripts/finetune.py or of
scripts/import_convnet_aig.py; results.json, rates_over_epochs.png and accuracy_macs.png (of finetune.py) and
execution_rates.png (of analyze.py --output SOURCE) in it are published too, other files are not. Or it is a checkpoint
(.safetensors, .pth, .pth.tar), and --hub-config says what model it is of.

The token is that of `hf auth login`, or HF_TOKEN. If a push fails, run it again: what has arrived is not sent again.
"""
import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Tuple

import timm
import torch.nn as nn
from huggingface_hub.constants import ENDPOINT
from timm.models import load_checkpoint

import timm_aig
from timm_aig import AIGConfig, InputError
from timm_aig.convert import checkpoint_filter_fn
from timm_aig.hub.card import checked_results
from timm_aig.hub.config_json import check_pretrained_cfg
from timm_aig.models.hub_configs import load_hub_configs

EXAMPLES = """examples:
  scripts/push_to_hub.py output/t06 user/resnet50_aig.t06 --dry-run
  scripts/push_to_hub.py output/t06 user/resnet50_aig.t06 --private
  scripts/push_to_hub.py output/t06 user/resnet50_aig.t06 --revision v2
  scripts/push_to_hub.py model_best.pth.tar user/resnet50_aig.t06 --hub-config resnet50_aig.t06_paper --create-pr

exit code: 0 done, 1 the model or the Hub refuses, 2 bad input"""

PICTURES = ('execution_rates.png', 'rates_over_epochs.png', 'accuracy_macs.png')
# What save_pretrained writes into config.json by itself.
WRITTEN = (
    'architecture', 'num_classes', 'num_features', 'global_pool', 'model_args', 'pretrained_cfg', 'label_names',
    'label_descriptions')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', metavar='SOURCE', type=Path, help='folder or checkpoint')
    parser.add_argument('repo_id', metavar='REPO', help='user/name, created if missing')
    parser.add_argument('--hub-config', metavar='NAME', help='name in hub_configs or JSON file')
    parser.add_argument('--revision', metavar='BRANCH', help='branch to commit to, created if missing (default: main)')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request')
    parser.add_argument('--message', default='Add model', help='of the commit (default: Add model)')
    parser.add_argument('--dry-run', action='store_true', help='check and show everything, card included; send nothing')
    parser.add_argument('--json', action='store_true', help='print the result as JSON')
    return parser.parse_args()


def read_json(path: Path) -> Dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise InputError(f'{path} cannot be read: {e}') from e
    if not isinstance(content, dict):
        raise InputError(f'{path} must hold a JSON object.')
    return content


def read_hub_config(name: str) -> Dict[str, Any]:
    """A hub_config by its name or path, checked."""
    if name.endswith('.json'):
        config = read_json(Path(name))
    else:
        known = load_hub_configs()
        if name not in known:
            raise InputError(f'--hub-config must be a JSON file or one of {", ".join(known)}, not {name}.')
        config = known[name]
    try:
        AIGConfig.from_dict(config['aig'])
        check_pretrained_cfg(config['pretrained_cfg'], name)
        config['pretrained_cfg'].pop('file', None)  # where it ships on this machine
        return checked_results(config)
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f'--hub-config {name}: {e!r}') from e


def load(args: argparse.Namespace) -> Tuple[nn.Module, Dict[str, Any], Dict[str, Any]]:
    """The model, what is known of it, and entries of its config.json that are not timm's."""
    known = read_hub_config(args.hub_config) if args.hub_config else {}
    try:
        if args.source.is_dir():
            config = read_json(args.source / 'config.json')
            results = args.source / 'results.json'
            results = read_json(results) if results.exists() else {}
            model = timm.create_model(f'local-dir:{args.source}', pretrained=True)
            return model, {**known, **results}, {k: v for k, v in config.items() if k not in WRITTEN}
        if not args.source.is_file():
            raise InputError(f'SOURCE must be a folder or a checkpoint, there is no {args.source}.')
        if not known:
            raise InputError('a checkpoint needs --hub-config, which says what model it is of.')
        aig = {k: v for k, v in known['aig'].items() if k != 'version'}
        cfg = dict(known['pretrained_cfg'], architecture=known['architecture'])
        budgets = known.get('gate_budgets', ())
        model = timm.create_model(known['architecture'], pretrained_cfg=cfg, gate_budgets=budgets, **aig)
        load_checkpoint(model, str(args.source), filter_fn=checkpoint_filter_fn)
        return model, known, {}
    except InputError:
        raise
    except Exception as e:
        raise InputError(f'{args.source} cannot be loaded: {type(e).__name__}: {e}') from e


def show(upload: Any) -> None:
    """What will be sent, and where to."""
    visibility = {True: 'private', False: 'public', None: "the namespace's default visibility"}[upload.private]
    state = {True: 'there already', False: 'new', None: 'the Hub cannot be asked whether it exists'}[upload.exists]
    branch = upload.revision or 'main'
    print(f'{ENDPOINT}/{upload.repo_id} ({state}, {visibility}), '
          f"{'pull request to' if upload.create_pr else 'branch'} {branch}{' (new)' if upload.new_revision else ''}")
    for name, size in upload.files.items():
        print(f'  + {name:24} {size / 1e6:10.3f} MB')
    for name in upload.deleted:
        print(f'  - {name}')


def main() -> None:
    args = parse_args()
    try:
        model, results, model_config = load(args)
        options = dict(
            results=results, model_config=model_config, commit_message=args.message, private=args.private or None,
            pictures=[args.source / name for name in PICTURES if (args.source / name).exists()],
            revision=args.revision, create_pr=args.create_pr)
        upload = timm_aig.push_to_hub(model, args.repo_id, dry_run=True, **options)
        if not args.json:
            show(upload)
        if args.dry_run and not args.json:
            print(f'\nREADME.md:\n{upload.card}')
        if not args.dry_run:
            upload = timm_aig.push_to_hub(model, args.repo_id, **options)
        if args.json:
            print(json.dumps(asdict(upload), indent=2))
        elif upload.url:
            print(upload.url)
    except Exception as e:
        if isinstance(e, InputError):
            print(f'push_to_hub: {e}', file=sys.stderr)
            sys.exit(2)
        cause = f' ({e.__cause__})' if e.__cause__ else ''  # huggingface_hub's reason for a failed upload
        print(f'push_to_hub: {type(e).__name__}: {e}{cause}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main()
