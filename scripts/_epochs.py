"""What finetune.py does after each epoch and at the end: evaluate, keep the best weights, write files, print."""
import argparse
import csv
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import safetensors.torch
import torch
import torch.nn as nn
from _common import blame, print_table, write_csv, write_text
from _inputs import TrainingData
from timm.utils import unwrap_model

import timm_aig
from timm_aig.analysis.figures import plot_accuracy_macs, plot_rates_over_epochs
from timm_aig.training.checkpoint import CheckpointError, write_atomically
from timm_aig.training.evaluate import METRICS, Evaluation, evaluate
from timm_aig.training.trainer import Trainer

TARGET_TOLERANCE = 0.02


class Epochs:
    """The epochs of a training so far, as rows of summary.csv. Call it after each one, in all processes.

    The weights of the best epoch are in checkpoints/best-<epoch>.safetensors.
    """

    def __init__(
            self, args: argparse.Namespace, trainer: Trainer, data: TrainingData, cost: timm_aig.Cost, folder: Path,
    ) -> None:
        self.args, self.trainer, self.data, self.cost, self.folder = args, trainer, data, cost, folder
        self.rows: List[Dict[str, Any]] = []
        if (folder / 'summary.csv').exists():
            with open(folder / 'summary.csv', newline='') as file:  # later epochs are repeated
                self.rows = [row for row in csv.DictReader(file) if int(row['epoch']) < trainer.epoch]
        self.evaluation: Optional[Evaluation] = None  # of the last epoch
        self.start, self.first_step = time.monotonic(), trainer.step
        self.writer: Any = None
        if args.tensorboard and args.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=trainer.epoch)

    @property
    def model(self) -> Any:
        """The model to save, the average if there is one."""
        return unwrap_model(self.trainer.task.get_eval_model(ema=self.trainer.task.has_ema()))

    def __call__(self, epoch: int, results: Dict[str, float]) -> None:
        evaluated: Dict[str, float] = {}
        is_last = epoch + 1 == self.trainer.epochs
        if is_last or (epoch + 1) % self.args.val_interval == 0:
            # what is published is in float32
            self.evaluation = self.evaluate(None if is_last else self.trainer.amp_dtype)
            evaluated = self.evaluation.metrics(self.cost)
        lr = self.trainer.optimizer.param_groups[0]['lr']
        self.rows.append({
            'epoch': epoch, **{f'train_{name}': value for name, value in results.items()},
            **{f'eval_{name}': evaluated.get(name, '') for name in METRICS}, 'lr': lr})
        if self.args.rank != 0:
            return
        best = self.best()
        if self.args.keep == 'best' and best == epoch and not is_last:
            weights = safetensors.torch.save({k: v.contiguous() for k, v in self.model.state_dict().items()})
            write_atomically(self.best_file(epoch), lambda file: file.write(weights))
        for old in self.folder.glob('checkpoints/best-*.safetensors'):
            if old != self.best_file(best):
                old.unlink()
        head = max(self.rows, key=len)  # an epoch without an update has no results
        write_csv(self.folder / 'summary.csv', head, [[row.get(name, '') for name in head] for row in self.rows])
        rates = self.trainer.rate_names
        values = {**results, **{f'eval {name}': value for name, value in evaluated.items()}, 'lr': lr}
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name.replace('rate_', 'gates/') if name in rates else name, value, epoch)
            self.writer.flush()
        shown = (f'{name} {value:.4g}' for name, value in values.items() if name not in rates)
        print(f'epoch {epoch + 1}/{self.trainer.epochs}: {", ".join(shown)}; {self.progress()}', file=sys.stderr)

    def progress(self) -> str:
        """Speed of all processes, and the time that is left."""
        def minutes(seconds: float) -> str:
            return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'

        trainer, seconds = self.trainer, time.monotonic() - self.start
        steps = trainer.step - self.first_step
        if not steps:
            return 'already trained'
        left = (trainer.epochs * trainer.updates_per_epoch - trainer.step) * seconds / steps
        images = steps * trainer.accum_steps * self.args.batch_size * self.args.world_size / seconds
        return f'{images:.0f} images/s, {minutes(seconds)} so far, about {minutes(left)} to go'

    def evaluate(self, amp_dtype: Any = None, model: Optional[nn.Module] = None) -> Evaluation:
        """Evaluate a model, or the trained one, on the validation images."""
        if model is None:
            model = self.trainer.task.get_eval_model(ema=self.trainer.task.has_ema())  # may be compiled
        with blame('val_split', self.args.val_split):
            return evaluate(model, self.data.val, self.trainer.device, amp_dtype)

    def best(self) -> int:
        """The most accurate epoch that keeps to the target, the last one if none does."""
        within = [row for row in self.rows if row['eval_top1'] != '' and self.is_within_target(row)]
        if not within:
            return int(self.rows[-1]['epoch'])
        return int(max(within, key=lambda row: (float(row['eval_top1']), int(row['epoch'])))['epoch'])

    def is_within_target(self, row: Dict[str, Any]) -> bool:
        if not self.args.static and self.args.gate_loss == 'budgets':  # before, low budgets are not trained
            return int(row['epoch']) + 1 > self.args.anneal * self.trainer.epochs
        name = target_metric(self.args)
        return name is None or float(row[f'eval_{name}']) <= self.args.target_rate + TARGET_TOLERANCE

    def best_file(self, epoch: int) -> Path:
        return self.folder / 'checkpoints' / f'best-{epoch:04d}.safetensors'

    def load_kept(self) -> int:
        """Load the weights of the epoch to keep into the model. Returns the epoch."""
        best = self.best()
        path = self.best_file(best)
        if self.args.keep == 'last' or not path.exists():
            return self.trainer.epochs - 1
        self.model.load_state_dict(safetensors.torch.load_file(path))
        self.evaluation = self.evaluate()
        return best

    def save(self, results: Dict[str, Any]) -> None:
        """The model, results.json and the pictures."""
        for left in self.folder.glob('.saving-*'):
            shutil.rmtree(left)  # left by save_pretrained in a process that was killed
        names = self.data.names
        try:
            timm_aig.save_pretrained(self.model, self.folder, model_config={'label_names': names} if names else None)
        except ValueError as e:
            raise CheckpointError(f'the trained model cannot be saved, its checkpoint is kept: {e}') from e
        write_text(self.folder / 'results.json', json.dumps(results, indent=2) + '\n')
        if self.args.static:
            return
        blocks = list(timm_aig.gated_blocks(self.model))
        rates = torch.tensor([  # of a resumed training they are text, and empty for an epoch without an update
            [float(str(row.get(f'train_rate_{name}', '')) or 'nan') for name in blocks] for row in self.rows])
        share = results['metrics']['macs_share']
        title = f'{results["architecture"]} on {self.args.dataset}, {share:.0%} of the MACs'
        plot_rates_over_epochs(rates, blocks, self.folder / 'rates_over_epochs.png', title)
        points = [('after each epoch', float(row['eval_macs_share']), float(row['eval_top1']))
                  for row in self.rows if row['eval_top1'] != '' and int(row['epoch']) != results['epoch']]
        parent = [('static parent', 1., results['parent_metrics']['top1'])] if 'parent_metrics' in results else []
        points.append(('adaptive', share, results['metrics']['top1']))
        plot_accuracy_macs(points, parent, self.folder / 'accuracy_macs.png', title)


def print_results(results: Dict[str, Any]) -> None:
    trained = 'static' if results['metrics']['macs_share'] == 1 else 'adaptive'
    rows = {'static parent': results.get('parent_metrics'), trained: results['metrics']}
    print_table([{
        '': name, 'top1': f'{m["top1"]:.2f}%', 'top5': f'{m["top5"]:.2f}%', 'blocks run': f'{m["execution_rate"]:.1%}',
        'MACs': f'{m["macs_share"]:.1%}', 'paths': m['paths']} for name, m in rows.items() if m], '')
    print(f'{results["images"]} images of {results["dataset"]}, {results["split"]}; seed {results["seed"]}')


def target_metric(args: argparse.Namespace) -> Optional[str]:
    """The metric that --target-rate is about, None for a static model or several targets."""
    if args.static or args.gate_loss == 'budgets' or (args.gate_loss == 'rate' and args.schedule):
        return None
    return 'macs_share' if args.gate_loss == 'macs' else 'execution_rate'


def missed_target(args: argparse.Namespace, results: Dict[str, Any], folder: Path) -> Optional[str]:
    """What to do about a target that was asked for and did not come out, None if it did."""
    name = target_metric(args)
    if name is None or abs(results['metrics'][name] - args.target_rate) <= TARGET_TOLERANCE:
        return None
    what = 'MACs' if name == 'macs_share' else 'gated blocks'
    text = (f'--target-rate {args.target_rate:g} was asked for, but {results["metrics"][name]:.1%} of the {what} came '
            'out. More --epochs or a larger --gate-loss-weight get closer.')
    if args.gate_loss == 'macs':  # budgets are MACs shares
        training = '' if args.calibrate else ' --calibrate N finds on N training images, or for this model as it is'
        text += (f' So does the gate offset that{training} "scripts/calibrate.py --model local-dir:{folder} --budgets '
                 f'{args.target_rate:g} --output FOLDER" finds on held-out images.')
    return text
