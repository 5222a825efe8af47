"""What finetune.py does after each epoch: evaluate, keep the best weights, write summary.csv, print a line."""
import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

import safetensors.torch
import torch.nn as nn
from _common import blame, write_csv
from _inputs import TrainingData
from _results import is_within_target
from timm.utils import unwrap_model

import timm_aig
from timm_aig.training.checkpoint import write_atomically
from timm_aig.training.evaluate import METRICS, Evaluation, evaluate
from timm_aig.training.trainer import Trainer


class Epochs:
    """The epochs of a training so far, as rows of summary.csv. Call it after each one, in all processes.

    The weights of the best epoch are in checkpoints/best-<epoch>.safetensors.
    """

    def __init__(
            self, args: argparse.Namespace, trainer: Trainer, data: TrainingData, cost: timm_aig.Cost, folder: Path,
    ) -> None:
        self.args, self.trainer, self.data, self.cost, self.folder = args, trainer, data, cost, folder
        self.rows = [row for row in read_summary(folder) if int(row['epoch']) < trainer.epoch]  # others are repeated
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
        write_csv(self.folder / 'summary.csv', self.rows[0], [row.values() for row in self.rows])
        rates = self.trainer.rate_names
        values = {**results, **{f'eval {name}': value for name, value in evaluated.items()}, 'lr': lr}
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name.replace('rate_', 'gates/') if name in rates else name, value, epoch)
            self.writer.flush()
        shown = (f'{name} {value:.4g}' for name, value in values.items() if name not in rates)
        print(f'epoch {epoch + 1}/{self.trainer.epochs}: {", ".join(shown)}; {self.progress()}', file=sys.stderr)

    def progress(self) -> str:
        """Speed of this process's part of the training, and the time that is left."""
        trainer, seconds = self.trainer, time.monotonic() - self.start
        steps = trainer.step - self.first_step
        if not steps:
            return 'already trained'
        left = (trainer.epochs * trainer.updates_per_epoch - trainer.step) * seconds / steps
        images = steps * trainer.accum_steps * self.args.batch_size * self.args.world_size / seconds
        return f'{images:.0f} images/s, {_minutes(seconds)} so far, about {_minutes(left)} to go'

    def evaluate(self, amp_dtype: Any = None, model: Optional[nn.Module] = None) -> Evaluation:
        """Evaluate a model, or the trained one, on the validation images."""
        if model is None:
            model = self.trainer.task.get_eval_model(ema=self.trainer.task.has_ema())  # may be compiled
        with blame('val_split', self.args.val_split):
            return evaluate(model, self.data.val, self.trainer.device, amp_dtype)

    def best(self) -> int:
        """The most accurate epoch that keeps to the target, the last one if none does."""
        within = [row for row in self.rows if row['eval_top1'] != '' and is_within_target(
            self.args, {name: float(row[f'eval_{name}']) for name in METRICS})]
        if not within:
            return int(self.rows[-1]['epoch'])
        return int(max(within, key=lambda row: (float(row['eval_top1']), int(row['epoch'])))['epoch'])

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


def read_summary(folder: Path) -> List[Dict[str, Any]]:
    path = folder / 'summary.csv'
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def _minutes(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'
