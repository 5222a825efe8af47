#!/usr/bin/env python3
"""Make a static model adaptive and fine-tune it, or continue with an adaptive one, or train a static one.

The arguments are named as in timm's train.py. Three recipes set their defaults: `distill` (gates open at the start,
distillation from the frozen parent, one target for the MACs of the whole network, no gate noise at the end), `any` (the
same for all budgets at once) and `paper` (a target rate for each block and steps of the learning rate, as in the
paper's code).

    setup -> train -> save

The output folder holds summary.csv and checkpoints/ to resume from, and at the end model.safetensors and config.json
for timm.create_model('local-dir:...'), results.json, rates_over_epochs.png and accuracy_macs.png.
"""
import argparse
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from _common import (
    ResultError,
    blame,
    keep_freed_memory,
    open_device,
    open_folder,
    require,
    run_script,
    sleep_when_idle,
)
from _recipes import parse_training_args, recipe_of

EXAMPLES = """examples:
  scripts/finetune.py --data-dir photos --static --model resnet50.tv2_in1k --pretrained --num-classes 12 --opt sgd \\
      --lr 0.02 --experiment parent                        # photos/train/CLASS/*.jpg, photos/validation/CLASS/*.jpg
  scripts/finetune.py --data-dir photos --model local-dir:output/finetune/parent --target-rate 0.5 --opt sgd --lr 0.02
  torchrun --nproc-per-node 8 scripts/finetune.py --config hub_configs/resnet50_aig.t05_paper.json \\
      --batch-size 32 --data-dir imagenet                  # the recipes there are for 8 x 32 = 256 images
  scripts/finetune.py --static --dataset torch/fashion_mnist --data-dir data --model cifar_resnet32 --experiment r32 \\
      --resume auto                                        # start, or resume after a crash, SIGKILL or SIGTERM"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    return parse_training_args(argv, __doc__, EXAMPLES)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import hashlib

import safetensors.torch
import torch
import torch.nn as nn
from _epochs import Epochs, missed_target, print_results
from _inputs import (
    TrainingData,
    check_size,
    create_calibration_loader,
    create_training_loaders,
    fit_batch_size,
    open_training_splits,
)
from _models import check_normalization, create_models, parent_name
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import random_seed
from torch.utils.data import IterableDataset

import timm_aig
from timm_aig import InputError
from timm_aig.run import environment
from timm_aig.training.calibrate import BUDGETS
from timm_aig.training.checkpoint import CheckpointError, Checkpoints
from timm_aig.training.data import class_names, count_unreadable, label_names_of, match_classes
from timm_aig.training.schedule import GateSchedule
from timm_aig.training.trainer import NonFiniteError, Stopped, Trainer
from timm_aig.training.update import UpdateConfig

# What may differ when a training resumes: where things are, and what only matters in an emergency.
MAY_CHANGE = (
    'calibrate', 'crop_pct', 'initial_checkpoint', 'keep', 'model', 'nonfinite', 'pretrained', 'teacher', 'unreadable',
    'val_split')


# Setup

def describe_data(model: nn.Module, data: TrainingData) -> None:
    """Make the saved config.json say what images the model is trained on."""
    cfg: Any = model.pretrained_cfg
    if tuple(cfg['input_size']) != tuple(data.config['input_size']):
        cfg.pop('pool_size', None)  # holds for another input size
    cfg.update({k: data.config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')})
    cfg['num_classes'] = model.num_classes
    for key in ('tag', 'hf_hub_id', 'url', 'file', 'origin_url', 'label_names', 'paper_ids', 'test_input_size',
                'test_crop_pct', 'test_pool_size'):
        cfg.pop(key, None)  # describe the parent's weights


def create_task(args: argparse.Namespace, model: nn.Module, teacher: Optional[nn.Module], cost: timm_aig.Cost) -> Any:
    """The task and the schedule of its gates, None for a static model."""
    common: Dict[str, Any] = dict(
        criterion_kwargs=dict(smoothing=args.smoothing, soft_targets=bool(args.mixup or args.cutmix)),
        device=torch.device(args.device), verbose=False)
    if args.static and teacher is None:
        return ClassificationTask(model, **common), None
    if args.static:
        return LogitDistillationTask(
            model, teacher, task_loss_weight=1 - args.distill_weight, temperature=args.distill_temperature,
            **common), None
    compute_loss: Any = None
    if args.gate_loss == 'budgets':
        with blame('least_budget', args.least_budget):
            compute_loss = timm_aig.AnyBudgetLoss(cost, args.least_budget, args.gate_loss_weight)
    if args.gate_loss == 'macs':
        with blame('target_rate', args.target_rate):
            compute_loss = timm_aig.ComputeTargetLoss(cost, args.target_rate, args.gate_loss_weight)
    rates = [block.target_rate for block in timm_aig.gated_blocks(model).values()]
    gate_loss = compute_loss or timm_aig.TargetRateLoss(rates, args.gate_loss_weight, reduction='mean')
    task = timm_aig.AIGTask(
        model, gate_loss=gate_loss, teacher=teacher, distill_weight=args.distill_weight,
        distill_temperature=args.distill_temperature, **common)
    return task, GateSchedule(model, compute_loss, args.anneal, args.noise_off)


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay as timm's, not on biases and norms; gates have their own learning rate and weight decay."""
    groups: Dict[Tuple[float, float], List[nn.Parameter]] = {}
    without_decay = getattr(model, 'no_weight_decay', set)()  # position embeddings and the like
    for name, p in model.named_parameters():
        lr, decay = args.lr, args.weight_decay
        if '.gate.' in name:
            lr *= args.gate_lr_scale
            decay = decay if args.gate_weight_decay is None else args.gate_weight_decay
        groups.setdefault((lr, decay if p.ndim > 1 and name not in without_decay else 0.), []).append(p)
    with blame('opt', args.opt, Exception):  # each optimizer raises its own kinds
        return create_optimizer_v2(
            [{'params': params, 'lr': lr, 'weight_decay': decay} for (lr, decay), params in groups.items()],
            opt=args.opt, lr=args.lr, momentum=args.momentum)


def fingerprint(model: Optional[nn.Module]) -> Optional[str]:
    """Hash of a model's weights."""
    return model and hashlib.sha256(safetensors.torch.save(model.state_dict())).hexdigest()[:16]


def create_trainer(
        args: argparse.Namespace, model: nn.Module, parent: Any, teacher: Any, data: TrainingData, cost: timm_aig.Cost,
        folder: Path,
) -> Trainer:
    weights = {'parent_weights': fingerprint(parent), 'teacher_weights': fingerprint(teacher)}
    task, gate_schedule = create_task(args, model, teacher, cost)
    task.to(torch.device(args.device))
    model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer(args, model)
    updates = -(-len(data.train) // args.grad_accum_steps)
    with blame('sched', args.sched, (AssertionError, ValueError)):
        scheduler, epochs = create_scheduler_v2(
            optimizer, args.sched, num_epochs=args.epochs, decay_rate=args.decay_rate, min_lr=args.min_lr,
            decay_milestones=args.decay_milestones or [max(1, round(args.epochs * share)) for share in (3 / 7, 5 / 7)],
            warmup_epochs=min(args.warmup_epochs, args.epochs - 1), warmup_lr=args.lr / 100,
            step_on_epochs=False, updates_per_epoch=updates)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=True)
    if args.torchcompile:
        backends = torch.compiler.list_backends(None)
        if args.torchcompile not in backends:
            raise InputError(f'must be one of {", ".join(backends)}, not {args.torchcompile!r}.', 'torchcompile')
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed(device_ids=[args.local_rank] if args.device.startswith('cuda') else None)
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes)
    identity = {
        **{k: v for k, v in recipe_of(args).items() if k not in MAY_CHANGE}, **weights,
        'architecture': model.pretrained_cfg['architecture'], 'num_classes': model.num_classes, 'classes': data.names,
        'gates': list(timm_aig.gated_blocks(model)), 'input_size': list(data.config['input_size']),
        'updates': updates * epochs, 'world_size': args.world_size,
    }
    losses = [] if args.static and teacher is None else ['task_loss']
    losses += [] if teacher is None else ['kd_loss']
    losses += [] if args.static else ['rate_loss']
    return Trainer(
        task, data.train, optimizer, epochs, scheduler, gate_schedule, cost if not args.static else None, losses,
        amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None, mixup=mixup,
        update=UpdateConfig(args.grad_accum_steps, args.clip_grad, nonfinite=args.nonfinite),
        checkpoints=Checkpoints(folder / 'checkpoints', identity), checkpoint_interval=args.checkpoint_interval,
        seed=args.seed, title='train' if args.static else f'fine-tune, {args.recipe}')


def output_folder(args: argparse.Namespace) -> Path:
    model = re.sub(r'[^\w.]+', '-', args.model.rpartition(':')[2].rstrip('/').rpartition('/')[2])
    name = f'{model}-static' if args.static else f'{model}-{args.recipe}-{args.target_rate}'
    return Path(args.output, args.experiment or name)


def open_output(args: argparse.Namespace) -> Path:
    folder = open_folder(output_folder(args))
    open_folder(folder / 'checkpoints')
    checkpoints = any((folder / 'checkpoints').iterdir())
    if checkpoints and not args.resume:
        raise InputError(
            f'{folder} holds a training; pass --resume auto to resume it, or another --experiment.', 'output')
    if not checkpoints and any((folder / name).exists() for name in ('results.json', 'model.safetensors')):
        raise InputError(f'{folder} holds a model but no checkpoints; pass another --experiment.', 'output')
    return folder


# Save

def results_of(
        args: argparse.Namespace, trainer: Trainer, parent: Any, data: TrainingData, cost: timm_aig.Cost,
        epochs: Epochs, epoch: int,
) -> Dict[str, Any]:
    """Content of results.json."""
    device, model, evaluation = trainer.device, epochs.model, epochs.evaluation
    assert evaluation is not None
    results = {
        'architecture': model.pretrained_cfg['architecture'],
        'parent': parent_name(args.model, model),
        'dataset': args.dataset,
        'split': f'{args.train_split}, {args.holdout} held out' if args.holdout else args.val_split,
        'images': len(evaluation.labels),
        'metrics': evaluation.metrics(cost),
        'macs': cost.static,
        'block_rates': dict(zip(timm_aig.gated_blocks(model), evaluation.block_rates.tolist())),
        'epoch': epoch,
        'skipped_steps': trainer.skipped,
        'unreadable': {
            'train': count_unreadable(data.train.dataset, device), 'val': count_unreadable(data.val.dataset, device)},
        'seed': args.seed,
        'recipe': recipe_of(args),
        'command': args.command,
        'environment': {
            **environment(), 'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
            'processes': args.world_size, 'threads': torch.get_num_threads(),
        },
    }
    if parent is not None:
        parent_cost = timm_aig.compute_cost(parent, data.config['input_size'])
        results['parent_metrics'] = epochs.evaluate(model=parent.to(device)).metrics(parent_cost)
    return results


def set_up(args: argparse.Namespace, datasets: Any = None) -> Tuple[Any, Any, Any, Any, TrainingData, Path]:
    """Training split, model, its parent and teacher (None for none), loaders, and the output folder.

    Args:
        args: Arguments of parse_args.
        datasets: Training and validation split to use instead of args.dataset.
    """
    keep_freed_memory()
    open_device(args)
    require('train', *(['tensorboard'] if args.tensorboard else []), *([] if args.static else ['matplotlib']))
    random_seed(args.seed, 0)  # every process makes the same model
    train_set, val_set = datasets or open_training_splits(args)
    fit_batch_size(args, train_set)
    if args.distributed and args.rank == 0 and isinstance(val_set, IterableDataset):
        print(f'--dataset {args.dataset} cannot be sharded exactly: several processes may validate on some images '
              'twice and miss others. scripts/validate.py is exact, in one process.', file=sys.stderr)
    model, parent, teacher = create_models(args, class_names(train_set))
    for dataset in (train_set, val_set):
        match_classes(dataset, label_names_of(model), model.num_classes)
    data = create_training_loaders(args, train_set, val_set, model)
    if args.teacher and teacher is not None:
        check_normalization(args, teacher, data.config)
    if args.calibrate:
        check_size(train_set, data.config, 'calibrate', args.calibrate)
    describe_data(model, data)
    return train_set, model, parent, teacher, data, open_output(args)


def train(args: argparse.Namespace, datasets: Any = None) -> Dict[str, Any]:
    """Set up, train and save; returns the content of results.json. Arguments as in set_up."""
    train_set, model, parent, teacher, data, folder = set_up(args, datasets)
    cost = timm_aig.compute_cost(model, data.config['input_size'])
    trainer = create_trainer(args, model, parent, teacher, data, cost, folder)
    if args.resume:
        with blame('resume', args.resume, CheckpointError):
            trainer.resume()
    epochs = Epochs(args, trainer, data, cost, folder)
    try:
        trainer.fit(epochs)
        if trainer.skipped == trainer.step:
            raise NonFiniteError(f'loss or gradient was not finite in any of the {trainer.step} steps')
    except NonFiniteError as e:
        raise ResultError(f'{e}. A lower --lr may help; finetune.py --nonfinite skip skips such steps.') from e
    epoch = epochs.load_kept()
    if args.calibrate:
        calibrate(args, epochs.model, train_set, data, cost)
        epochs.evaluation = epochs.evaluate()
    results = results_of(args, trainer, parent, data, cost, epochs, epoch)
    if args.rank == 0:
        epochs.save(results)
        for old in trainer.checkpoints.files()[1:]:
            old.unlink()
    return results


def calibrate(
        args: argparse.Namespace, model: nn.Module, train_set: Any, data: TrainingData, cost: timm_aig.Cost,
) -> None:
    """Set the gate offset that gives --target-rate, or find those of several budgets."""
    least = cost.share(torch.zeros(1, len(cost.blocks))).item()
    budgets = [args.target_rate] if args.gate_loss == 'macs' else [budget for budget in BUDGETS if budget > least]
    try:
        timm_aig.calibrate_budget(
            model, create_calibration_loader(args, train_set, data), budgets, progress=args.rank == 0)
    except InputError as e:  # a few images give a few shares only; the model is saved as it is
        print(f'--calibrate {args.calibrate} found no gate offset: {e}', file=sys.stderr)
    else:
        if args.gate_loss == 'macs':
            timm_aig.set_budget(model, args.target_rate)


def run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        results = train(args)
    except Stopped as e:
        raise Stopped(f'{e} To go on, run the same command with --resume auto.', e.signum) from e
    if args.rank == 0 and args.json:
        print(json.dumps(results, indent=2))
    elif args.rank == 0:
        print_results(results)
        print(f'Wrote epoch {results["epoch"] + 1} of {args.epochs} to {output_folder(args)}. Only --resume needs its '
              'checkpoints folder.')
    missed = missed_target(args, results, output_folder(args))
    if args.rank == 0 and missed:
        print(missed, file=sys.stderr)


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
