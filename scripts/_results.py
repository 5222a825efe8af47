"""What finetune.py writes: the model, results.json, pictures and the table."""
import argparse
import csv
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


def read_summary(folder: Path) -> List[Dict[str, Any]]:
    path = folder / 'summary.csv'
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def save(args: argparse.Namespace, model: nn.Module, data: TrainingData, results: Dict[str, Any], folder: Path) -> None:
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
    rows = read_summary(folder)
    names = list(timm_aig.gated_blocks(model))
    rates = torch.tensor([[float(row[f'train_rate_{name}'] or 'nan') for name in names] for row in rows])
    title = f'{results["architecture"]} on {args.dataset}, {results["metrics"]["macs_share"]:.0%} of the MACs'
    plot_rates_over_epochs(rates, names, folder / 'rates_over_epochs.png', title)
    points = [('after each epoch', float(row['eval_macs_share']), float(row['eval_top1']))
              for row in rows[:-1] if row['eval_top1']]
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


def missed_target(args: argparse.Namespace, results: Dict[str, Any], folder: Path) -> Optional[str]:
    """What to do about a target that was asked for and did not come out, None if it did."""
    if args.static or args.gate_loss == 'budgets' or (args.gate_loss == 'rate' and args.schedule):
        return None  # several targets
    name, what = ('macs_share', 'MACs') if args.gate_loss == 'macs' else ('execution_rate', 'gated blocks')
    got = results['metrics'][name]
    if abs(got - args.target_rate) <= TARGET_TOLERANCE:
        return None
    return (f'--target-rate {args.target_rate:g} was asked for, but {got:.1%} of the {what} came out. More --epochs or '
            f'a larger --gate-loss-weight get closer. For this model as it is, "scripts/calibrate.py --model '
            f'local-dir:{folder} --budgets {args.target_rate:g} --output FOLDER" on held-out images finds the gate '
            f'offset that gives it.')
