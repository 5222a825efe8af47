"""What finetune.py writes: the model, results.json, pictures and the table."""
import argparse
import json
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
from _common import write_text
from _inputs import TrainingData

import timm_aig
from timm_aig.analysis.figures import plot_accuracy_macs, plot_rates_over_epochs
from timm_aig.training.checkpoint import CheckpointError

TARGET_TOLERANCE = 0.02


def save(
        args: argparse.Namespace, model: nn.Module, data: TrainingData, results: Dict[str, Any],
        rows: List[Dict[str, Any]], folder: Path,
) -> None:
    """The model, results.json and the pictures."""
    for left in folder.glob('.saving-*'):
        shutil.rmtree(left)  # left by save_pretrained in a process that was killed
    try:
        timm_aig.save_pretrained(model, folder, model_config={'label_names': data.names} if data.names else None)
    except ValueError as e:
        raise CheckpointError(f'the trained model cannot be saved, its checkpoint is kept: {e}') from e
    write_text(folder / 'results.json', json.dumps(results, indent=2) + '\n')
    if args.static:
        return
    names = list(timm_aig.gated_blocks(model))
    rates = torch.tensor([[float(row[f'train_rate_{name}'] or 'nan') for name in names] for row in rows])
    title = f'{results["architecture"]} on {args.dataset}, {results["metrics"]["macs_share"]:.0%} of the MACs'
    plot_rates_over_epochs(rates, names, folder / 'rates_over_epochs.png', title)
    points = [('after each epoch', float(row['eval_macs_share']), float(row['eval_top1']))
              for row in rows if row['eval_top1'] != '' and int(row['epoch']) != results['epoch']]
    points.append(('adaptive', results['metrics']['macs_share'], results['metrics']['top1']))
    parent = results.get('parent_metrics')
    others = [('static parent', 1., parent['top1'])] if parent else []
    plot_accuracy_macs(points, others, folder / 'accuracy_macs.png', title)


def print_table(results: Dict[str, Any]) -> None:
    rows = [('static parent', results['parent_metrics'])] if 'parent_metrics' in results else []
    rows.append(('static' if results['metrics']['macs_share'] == 1 else 'adaptive', results['metrics']))
    print(f'\n{"":13}  {"top1":>6}  {"top5":>6}  {"blocks run":>10}  {"MACs":>6}  {"paths":>5}')
    for name, m in rows:
        print(f'{name:13}  {m["top1"]:5.2f}%  {m["top5"]:5.2f}%  {m["execution_rate"]:10.1%}  {m["macs_share"]:6.1%}  '
              f'{m["paths"]:5}')
    print(f'{results["images"]} images of {results["dataset"]}, {results["split"]}; seed {results["seed"]}')


def target_metric(args: argparse.Namespace) -> Optional[str]:
    """The metric that --target-rate is about, None for a static model or several targets."""
    if args.static or args.gate_loss == 'budgets' or (args.gate_loss == 'rate' and args.schedule):
        return None
    return 'macs_share' if args.gate_loss == 'macs' else 'execution_rate'


def is_within_target(args: argparse.Namespace, metrics: Dict[str, float]) -> bool:
    name = target_metric(args)
    return name is None or metrics[name] <= args.target_rate + TARGET_TOLERANCE


def missed_target(args: argparse.Namespace, results: Dict[str, Any], folder: Path) -> Optional[str]:
    """What to do about a target that was asked for and did not come out, None if it did."""
    name = target_metric(args)
    if name is None or abs(results['metrics'][name] - args.target_rate) <= TARGET_TOLERANCE:
        return None
    what = 'MACs' if name == 'macs_share' else 'gated blocks'
    return (f'--target-rate {args.target_rate:g} was asked for, but {results["metrics"][name]:.1%} of the {what} came '
            f'out. More --epochs or a larger --gate-loss-weight get closer. So does the gate offset that --calibrate N '
            f'finds on N training images, or for this model as it is "scripts/calibrate.py --model local-dir:{folder} '
            f'--budgets {args.target_rate:g} --output FOLDER" on held-out images.')
