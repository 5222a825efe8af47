#!/usr/bin/env python3
"""Make a static ResNet adaptive and fine-tune it, or go on with an adaptive one, or train a static one.

The arguments are named as in timm's train.py. Two recipes set their defaults: `distill` (gates open at the start,
distillation from the frozen parent, one target for the MACs of the whole network, the end without noise) and `paper`
(a target rate for each block, steps of the learning rate, as in the paper's code).

    setup -> train -> save

The output folder holds summary.csv, checkpoints/ to resume from, and at the end model.safetensors and config.json for
timm.create_model('local-dir:...'), results.json, rates_over_epochs.png and accuracy_macs.png.
"""
import argparse
import copy
import csv
import hashlib
import importlib.util
import io
import json
import logging
import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

# Before torch is imported: threads that spin while they wait make small models ten times slower on a busy machine.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import safetensors.torch
import timm
import torch
import torch.nn as nn
from _common import error_text, keep_freed_memory, open_device, open_folder
from _recipes import parse_args, recipe_of
from timm.data import Mixup, create_loader, resolve_input_data_config
from timm.data.transforms import str_to_interp_mode
from timm.models import is_model, load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import random_seed
from torch.utils.data import DistributedSampler, IterableDataset
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip, Resize

import timm_aig
from timm_aig import InputError
from timm_aig.analysis.figures import plot_accuracy_macs, plot_rates_over_epochs
from timm_aig.budget import set_budget_table
from timm_aig.config import AIG_ARGS
from timm_aig.training.checkpoint import CheckpointError, Checkpoints, write_atomically
from timm_aig.training.data import (
    check_same_classes,
    class_names,
    convert_images,
    count_unreadable,
    hold_out,
    open_dataset,
    resolve_config,
    start_worker,
)
from timm_aig.training.evaluate import METRICS, Evaluation, evaluate
from timm_aig.training.schedule import GateSchedule
from timm_aig.training.trainer import NonFiniteError, Stopped, Trainer

EXAMPLES = """examples:
  scripts/finetune.py --data-dir photos --static --model resnet50.tv2_in1k --pretrained --num-classes 12 --opt sgd \\
      --lr 0.02 --experiment parent                          photos/train/CLASS/*.jpg, photos/validation/CLASS/*.jpg
  scripts/finetune.py --data-dir photos --model local-dir:output/finetune/parent --target-rate 0.5 --opt sgd --lr 0.02
  torchrun --nproc-per-node 8 scripts/finetune.py --config hub_configs/resnet50_aig.t05_paper.json \\
      --batch-size 32 --data-dir imagenet                    of each process: the recipes there are for 256 in all
  scripts/finetune.py --static --dataset torch/fashion_mnist --data-dir data --model cifar_resnet32 --experiment r32
  scripts/finetune.py ... --experiment r50 --resume auto     start, or go on after a crash, SIGKILL or SIGTERM

exit code: 0 done, 1 the loss is no longer finite, 2 bad input, 3 output cannot be written, 143 stopped by SIGTERM"""

# What a resumed training may say otherwise: where things are, and what to do in case of need.
MAY_CHANGE = (
    'crop_pct', 'initial_checkpoint', 'model', 'nonfinite', 'pretrained', 'teacher', 'unreadable', 'val_split',
    'validation_batch_size')


class Data(NamedTuple):
    """Loaders, and what the saved model says of its data."""
    train: Any
    val: Any
    names: List[str]  # of the classes, empty if the data set has none
    config: Dict[str, Any]  # input_size, mean, std, interpolation, crop_pct


def open_data(args: argparse.Namespace) -> Any:
    """Training and validation split."""
    common = dict(
        name=args.dataset, root=args.data_dir, download=args.dataset_download, unreadable=args.unreadable,
        input_key=args.input_key, target_key=args.target_key,
        batch_size=args.batch_size, seed=args.seed)  # wds/, tfds/ and hfids/ share and shuffle images by these
    train = open_dataset(split=args.train_split, is_training=True, **common)
    if args.holdout:
        return hold_out(train, open_dataset(split=args.train_split, **common), args.holdout)
    val = open_dataset(split=args.val_split, **common)
    check_same_classes(train, val)
    return train, val


def create_loaders(args: argparse.Namespace, train: Any, val: Any, model: nn.Module) -> Data:
    given = {k: getattr(args, k) for k in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
    channels = (args.input_size or model.pretrained_cfg['input_size'])[0]
    for name in ('mean', 'std'):
        if given[name] and len(given[name]) not in (1, channels):
            raise InputError(f'--{name} must be one number or one for each of {channels} channels.')
    config = resolve_config(model, given)
    common = dict(
        input_size=config['input_size'], interpolation=config['interpolation'], mean=config['mean'], std=config['std'],
        num_workers=args.workers, distributed=args.distributed, persistent_workers=False, worker_seeding=start_worker,
        use_prefetcher=args.device.startswith('cuda'), device=torch.device(args.device),
        pin_memory=args.device.startswith('cuda'))
    try:
        train_loader = create_loader(
            train, batch_size=args.batch_size, is_training=True, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
            color_jitter=args.color_jitter or None, auto_augment=args.aa, re_prob=args.reprob, **common)
        val_loader = create_loader(
            val, batch_size=args.validation_batch_size or args.batch_size, crop_pct=config['crop_pct'], **common)
    except (AssertionError, KeyError, ValueError) as e:  # what check_args cannot know of timm's transforms
        raise InputError(f'--aa {args.aa} or --interpolation {config["interpolation"]}: {type(e).__name__}: {e}') from e
    if len(train_loader) == 0:
        raise InputError(f'--batch-size {args.batch_size}: the {len(train)} training images do not fill one batch.')
    if isinstance(train_loader.sampler, DistributedSampler):
        train_loader.sampler.seed = args.seed  # of the order of the images
    if args.crop_padding is not None:
        steps = train.transform.transforms  # from timm's tensor on, random crop and colours come before
        first = next(i for i, step in enumerate(steps) if 'Tensor' in type(step).__name__)
        size = config['input_size'][1:]
        train.transform = Compose([
            Resize(size, str_to_interp_mode(config['interpolation'])), RandomCrop(size, padding=args.crop_padding),
            RandomHorizontalFlip(args.hflip), *steps[first:]])
    for dataset in (train, val):
        convert_images(dataset, config['input_size'][0])
    return Data(train_loader, val_loader, class_names(train), config)


def create_model(args: argparse.Namespace, name: str, num_classes: Optional[int], pretrained: bool, what: str) -> Any:
    kwargs: Dict[str, Any] = {'drop_rate': args.drop, 'drop_path_rate': args.drop_path} if what == '--model' else {}
    if num_classes:
        kwargs['num_classes'] = num_classes
    if args.input_size:
        kwargs['in_chans'] = args.input_size[0]
    if what == '--model' and '_aig' in name and not args.static and ':' not in name:
        kwargs.update(aig_config(args).to_dict())
        kwargs.pop('version')
    try:
        model = timm.create_model(name, pretrained=pretrained or ':' in name, **kwargs)
        if what == '--model' and ':' in name and timm_aig.gated_blocks(model):  # its config has a target of its own
            model = timm.create_model(name, pretrained=True, target_rate=args.target_rate, **kwargs)
        return model
    except Exception as e:  # timm's, the Hub's and the files' own
        raise InputError(f'{what} {name}: {e}') from e


def aig_config(args: argparse.Namespace) -> timm_aig.AIGConfig:
    return timm_aig.AIGConfig(
        target_rate=args.target_rate, schedule=args.schedule, gate_channels=args.gate_channels,
        gate_norm=args.gate_norm)


def has_new_head(args: argparse.Namespace, model: nn.Module) -> bool:
    """Whether the model's weights are another task's, so that its head is not trained."""
    return not args.initial_checkpoint and model.pretrained_cfg['num_classes'] != model.num_classes


def create_models(args: argparse.Namespace, names: List[str]) -> Any:
    """The model to train, its static parent and its teacher, None if there is none."""
    model = create_model(args, args.model, args.num_classes, args.pretrained, '--model')
    if args.initial_checkpoint:
        try:
            load_checkpoint(model, args.initial_checkpoint, weights_only=True)
        except Exception as e:
            raise InputError(f'--initial-checkpoint {args.initial_checkpoint}: {e}') from e
    if names and model.num_classes != len(names):
        raise InputError(
            f'--num-classes: the data set has {len(names)} classes, the head of --model {args.model} '
            f'{model.num_classes}. Pass --num-classes {len(names)} for a new head.')
    adaptive = bool(timm_aig.gated_blocks(model))
    if args.static and adaptive:
        raise InputError(f'--static: --model {args.model} has gates.')
    if adaptive:
        continue_gates(args, model)
    trained = args.pretrained or args.initial_checkpoint or ':' in args.model
    parent = copy.deepcopy(model) if trained and not adaptive and not args.static else None
    teacher = create_teacher(args, model, parent)
    if parent is not None and has_new_head(args, model):
        parent = None
    if not args.static and not adaptive:
        if not is_model(f'{model.pretrained_cfg["architecture"]}_aig'):
            raise InputError(f'--model must be a ResNet of timm or timm_aig, not {args.model!r}.')
        timm_aig.gate_(model, aig_config(args))
    return model, parent, teacher


def continue_gates(args: argparse.Namespace, model: Any) -> None:
    """Take the gates of an adaptive --model as they are, and let the recipe say so."""
    set_budget_table(model, ())  # of the weights as they were, and so is the offset
    timm_aig.set_gate_offset(model, 0.)
    if ':' in args.model:
        own = timm_aig.AIGConfig(**{k: v for k, v in model._model_args.items() if k in AIG_ARGS})
        if own.target_rates and args.gate_loss == 'rate':
            raise InputError(f'--gate-loss rate: --model {args.model} has target_rates of its own, one for each block.')
        args.schedule, args.gate_channels, args.gate_norm = own.schedule, own.gate_channels, own.gate_norm


def create_teacher(args: argparse.Namespace, model: Any, parent: Any) -> Any:
    """The --teacher, else the parent; None without distillation."""
    if not args.distill_weight:
        return None
    if args.teacher:
        teacher = create_model(args, args.teacher, None, True, '--teacher')
        if teacher.num_classes != model.num_classes:
            raise InputError(f'--teacher has {teacher.num_classes} classes, the model {model.num_classes}.')
        return teacher
    if args.static:
        return None
    if parent is None:
        raise InputError(
            f'--distill-weight {args.distill_weight} needs a teacher: a --model that is a trained static ResNet '
            f'(--pretrained, --initial-checkpoint, local-dir:, hf-hub:), or --teacher. 0 goes without.')
    if has_new_head(args, model):
        raise InputError(
            f'--model {args.model} gets a new head of {model.num_classes} classes and so cannot be the teacher. '
            f'Train it with --static first, or pass --teacher, or --distill-weight 0.')
    return parent


def check_teacher(args: argparse.Namespace, teacher: Any, data: Data) -> None:
    """A --teacher must see the images that it was trained on."""
    own = resolve_input_data_config(teacher)
    if any(tuple(own[k]) != tuple(data.config[k]) for k in ('mean', 'std')):
        mean, std = (' '.join(map(str, own[k])) for k in ('mean', 'std'))
        raise InputError(f'--teacher {args.teacher} needs --mean {mean} --std {std}.')


def describe_data(model: nn.Module, data: Data) -> None:
    """Make the saved config.json say what images the model is trained on."""
    cfg: Any = model.pretrained_cfg
    if tuple(cfg['input_size']) != tuple(data.config['input_size']):
        cfg.pop('pool_size', None)  # of the features at another size
    cfg.update({k: data.config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')})
    cfg['num_classes'] = model.num_classes
    for key in ('tag', 'hf_hub_id', 'url', 'file', 'origin_url', 'label_names', 'paper_ids', 'test_input_size',
                'test_crop_pct', 'test_pool_size'):
        cfg.pop(key, None)  # of the parent's weights


def create_task(args: argparse.Namespace, model: nn.Module, teacher: Optional[nn.Module], cost: timm_aig.Cost) -> Any:
    """The task, and the schedule of its gates (None for a static model)."""
    common: Dict[str, Any] = dict(
        criterion_kwargs=dict(smoothing=args.smoothing, soft_targets=bool(args.mixup or args.cutmix)),
        device=torch.device(args.device), verbose=False)
    if args.static:
        if teacher is None:
            return ClassificationTask(model, **common), None
        return LogitDistillationTask(
            model, teacher, task_loss_weight=1 - args.distill_weight, temperature=args.distill_temperature,
            **common), None
    gate_loss: Any
    compute_loss = None
    if args.gate_loss == 'macs':
        try:
            gate_loss = compute_loss = timm_aig.ComputeTargetLoss(cost, args.target_rate, args.gate_loss_weight)
        except ValueError as e:
            raise InputError(f'--target-rate: {e}') from e
    else:
        rates = [block.target_rate for block in timm_aig.gated_blocks(model).values()]
        gate_loss = timm_aig.TargetRateLoss(rates, args.gate_loss_weight, reduction='mean')
    task = timm_aig.AIGTask(
        model, gate_loss=gate_loss, teacher=teacher, distill_weight=args.distill_weight,
        distill_temperature=args.distill_temperature, **common)
    return task, GateSchedule(model, compute_loss, args.anneal, args.noise_off)


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay on weights but not on biases and norms, and what the arguments say of the gates."""
    groups: Dict[Tuple[float, float], List[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        lr, decay = args.lr, args.weight_decay
        if '.gate.' in name:
            lr *= args.gate_lr_scale
            decay = decay if args.gate_weight_decay is None else args.gate_weight_decay
        groups.setdefault((lr, decay if p.ndim > 1 else 0.), []).append(p)
    return create_optimizer_v2(
        [{'params': params, 'lr': lr, 'weight_decay': decay} for (lr, decay), params in groups.items()],
        opt=args.opt, lr=args.lr, momentum=args.momentum)


def fingerprint(model: Optional[nn.Module]) -> Optional[str]:
    """Of a model's weights, wherever they came from."""
    return model and hashlib.sha256(safetensors.torch.save(model.state_dict())).hexdigest()[:16]


def create_trainer(
        args: argparse.Namespace, model: nn.Module, parent: Any, teacher: Any, data: Data, cost: timm_aig.Cost,
        folder: Path,
) -> Trainer:
    weights = {'parent_weights': fingerprint(parent), 'teacher_weights': fingerprint(teacher)}
    task, gate_schedule = create_task(args, model, teacher, cost)
    task.to(torch.device(args.device))
    model.to(memory_format=torch.channels_last)
    try:
        optimizer = create_optimizer(args, model)
    except Exception as e:  # each optimizer has its own
        raise InputError(f'--opt {args.opt}: {e}') from e
    milestones = args.decay_milestones or [max(1, round(args.epochs * share)) for share in (3 / 7, 5 / 7)]
    updates = -(-len(data.train) // args.grad_accum_steps)
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer, args.sched, num_epochs=args.epochs, decay_milestones=milestones, decay_rate=args.decay_rate,
            warmup_epochs=min(args.warmup_epochs, args.epochs - 1), warmup_lr=args.lr / 100, min_lr=args.min_lr,
            step_on_epochs=False, updates_per_epoch=updates)
    except (AssertionError, ValueError) as e:
        raise InputError(f'--sched {args.sched}: {e}') from e
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=True)
    if args.torchcompile:
        if args.torchcompile not in torch.compiler.list_backends(None):
            raise InputError(f'--torchcompile must be one of {", ".join(torch.compiler.list_backends(None))}.')
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed(device_ids=[args.local_rank] if args.device.startswith('cuda') else None)
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes)
    same = {k: v for k, v in recipe_of(args).items() if k not in MAY_CHANGE}
    identity = {
        **same, **weights, 'architecture': model.pretrained_cfg['architecture'], 'num_classes': model.num_classes,
        'classes': data.names, 'gates': list(timm_aig.gated_blocks(model)),
        'input_size': list(data.config['input_size']), 'updates': updates * epochs, 'world_size': args.world_size,
    }
    return Trainer(
        task, data.train, optimizer, epochs, scheduler, gate_schedule, cost if not args.static else None,
        amp_dtype=getattr(torch, args.amp_dtype) if args.amp else None, mixup=mixup,
        mixup_off_epoch=args.mixup_off_epoch, clip_grad=args.clip_grad, clip_mode=args.clip_mode,
        grad_accum_steps=args.grad_accum_steps, nonfinite=args.nonfinite,
        checkpoints=Checkpoints(folder / 'checkpoints', identity), checkpoint_interval=args.checkpoint_interval,
        seed=args.seed, title='train' if args.static else f'fine-tune, {args.recipe}')


def output_folder(args: argparse.Namespace) -> Path:
    model = re.sub(r'[^\w.]+', '-', args.model)
    name = f'{model}-static' if args.static else f'{model}-{args.recipe}-{args.target_rate}'
    return Path(args.output, args.experiment or name)


def open_output(args: argparse.Namespace) -> Path:
    if not args.static and importlib.util.find_spec('matplotlib') is None:  # better known before the training
        raise InputError("the pictures need matplotlib: pip install 'timm_aig[train]'")
    folder = open_folder(output_folder(args))
    open_folder(folder / 'checkpoints')
    checkpoints = any((folder / 'checkpoints').iterdir())
    if checkpoints and not args.resume:
        raise InputError(
            f'--output: {folder} holds a training, pass --resume auto to go on with it, or another --experiment.')
    if not checkpoints and any((folder / name).exists() for name in ('results.json', 'model.safetensors')):
        raise InputError(f'--output: {folder} holds a model but no checkpoints, pass another --experiment.')
    return folder


def write_summary(path: Path, epoch: int, row: Optional[Dict[str, Any]] = None) -> None:
    """Keep the rows before an epoch and add one, whole or not at all, wherever the process is killed."""
    rows: List[Dict[str, Any]] = []
    if path.exists():
        with open(path, newline='') as file:
            rows = [old for old in csv.DictReader(file) if int(old['epoch']) < epoch]
    if row:
        rows.append({'epoch': epoch, **row})
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def log_epoch(args: argparse.Namespace, trainer: Trainer, data: Data, cost: Any, folder: Path):
    """What to do behind each epoch: validate, add a row to summary.csv and to TensorBoard."""
    writer = None
    if args.tensorboard and args.rank == 0:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise InputError("--tensorboard needs pip install 'timm_aig[train]'.") from e
        writer = SummaryWriter(str(folder / 'tensorboard'), purge_step=trainer.epoch)
    if args.rank == 0:
        write_summary(folder / 'summary.csv', trainer.epoch)

    def after_epoch(epoch: int, results: Dict[str, float]) -> None:
        evaluated: Dict[str, float] = {}
        if (epoch + 1) % args.val_interval == 0 and epoch + 1 < trainer.epochs:  # the last one is in results.json
            model = trainer.task.get_eval_model(ema=trainer.task.has_ema())
            evaluated = validate(args, model, data, trainer).metrics(cost)
        if args.rank != 0:
            return
        lr = trainer.optimizer.param_groups[0]['lr']
        columns = {f'train_{name}': value for name, value in results.items()}
        columns.update((f'eval_{name}', evaluated.get(name, '')) for name in METRICS)
        write_summary(folder / 'summary.csv', epoch, {**columns, 'lr': lr})
        values = {**results, **{f'eval {name}': value for name, value in evaluated.items()}, 'lr': lr}
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(name.replace('rate_', 'gates/') if name.startswith('rate_') else name, value, epoch)
            writer.flush()
        shown = (f'{name} {value:.4g}' for name, value in values.items() if not name.startswith('rate_'))
        print(f'epoch {epoch + 1}/{trainer.epochs}: {", ".join(shown)}', file=sys.stderr)

    return after_epoch


def validate(args: argparse.Namespace, model: nn.Module, data: Data, trainer: Trainer) -> Evaluation:
    try:
        return evaluate(model, data.val, trainer.device, trainer.amp_dtype)
    except ValueError as e:
        raise InputError(f'{args.val_split}: {e}', 'val_split') from e


def environment(args: argparse.Namespace, device: torch.device) -> Dict[str, Any]:
    return {
        'torch': torch.__version__, 'timm': timm.__version__, 'timm_aig': timm_aig.__version__,
        'machine': platform.machine(), 'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu',
        'processes': args.world_size, 'threads': torch.get_num_threads(),
    }


def save(args: argparse.Namespace, model: nn.Module, data: Data, results: Dict[str, Any], folder: Path) -> None:
    """The model, results.json and the pictures."""
    for left in folder.glob('.saving-*'):
        shutil.rmtree(left)  # by save_pretrained in a process that was killed
    try:
        timm_aig.save_pretrained(model, folder, model_config={'label_names': data.names} if data.names else None)
    except ValueError as e:
        raise CheckpointError(f'the trained model cannot be saved, its checkpoint is kept: {e}') from e
    text = json.dumps(results, indent=2) + '\n'
    write_atomically(folder / 'results.json', lambda file: file.write(text.encode()))
    if args.static:
        return
    with open(folder / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    names = list(timm_aig.gated_blocks(model))
    rates = torch.tensor([[float(row[f'train_rate_{name}'] or 'nan') for name in names] for row in rows])
    title = f'{results["architecture"]} on {args.dataset}, {results["metrics"]["macs_share"]:.0%} of the MACs'
    plot_rates_over_epochs(rates, names, folder / 'rates_over_epochs.png', title)
    points = [('after each epoch', float(row['eval_macs_share']), float(row['eval_top1']))
              for row in rows if row['eval_top1']]
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


def parent_name(name: str, model: nn.Module) -> str:
    """What others know the starting point as: a model of timm, a repository of the Hub, or an architecture."""
    source, colon, rest = name.partition(':')
    if not colon:
        return name
    return rest.partition('@')[0] if source == 'hf-hub' else model.pretrained_cfg['architecture'].removesuffix('_aig')


def results_of(args: argparse.Namespace, trainer: Trainer, model: nn.Module, data: Data, cost: timm_aig.Cost) -> Any:
    """What results.json holds but for the parent."""
    evaluation = validate(args, model, data, trainer)
    sets = {'train': data.train.dataset, 'val': data.val.dataset}
    return {
        'architecture': model.pretrained_cfg['architecture'],
        'parent': parent_name(args.model, model),
        'dataset': args.dataset,
        'split': f'{args.train_split}, {args.holdout} held out' if args.holdout else args.val_split,
        'images': len(evaluation.labels),
        'metrics': evaluation.metrics(cost),
        'macs': cost.static,
        'block_rates': dict(zip(timm_aig.gated_blocks(model), evaluation.block_rates.tolist())),
        'skipped_steps': trainer.skipped,
        'unreadable': {name: count_unreadable(dataset, trainer.device) for name, dataset in sets.items()},
        'seed': args.seed,
        'recipe': recipe_of(args),
        'command': args.command,
        'environment': environment(args, trainer.device),
    }


def run(args: argparse.Namespace, datasets: Any = None) -> Dict[str, Any]:
    """All of it; returns what results.json holds. datasets: training and validation split instead of args.dataset."""
    # setup
    device = open_device(args)
    random_seed(args.seed, 0)  # every process makes the same model
    train, val = datasets or open_data(args)
    if args.distributed and args.rank == 0 and isinstance(val, IterableDataset):
        print(f'--dataset {args.dataset} has no exact shards: several processes may validate on some images twice and '
              'miss others. scripts/validate.py is exact, in one process.', file=sys.stderr)
    model, parent, teacher = create_models(args, class_names(train))
    data = create_loaders(args, train, val, model)
    if args.teacher and teacher is not None:
        check_teacher(args, teacher, data)
    describe_data(model, data)
    cost = timm_aig.compute_cost(model, data.config['input_size'])
    folder = open_output(args)
    trainer = create_trainer(args, model, parent, teacher, data, cost, folder)
    if args.resume:
        try:
            trainer.resume()
        except CheckpointError as e:
            raise InputError(f'--resume: {e}') from e
    # train
    trainer.fit(log_epoch(args, trainer, data, cost, folder))
    if trainer.skipped == trainer.step:
        raise NonFiniteError(f'loss or gradient was not finite in any of the {trainer.step} steps')
    model = timm.utils.unwrap_model(trainer.task.get_eval_model(ema=trainer.task.has_ema()))
    # save
    results = results_of(args, trainer, model, data, cost)
    if parent is not None:
        parent_cost = timm_aig.compute_cost(parent, data.config['input_size'])
        results['parent_metrics'] = validate(args, parent.to(device), data, trainer).metrics(parent_cost)
    if args.rank == 0:
        save(args, model, data, results, folder)
    return results


def main(argv: Optional[List[str]] = None) -> int:
    try:
        args = parse_args(argv, __doc__, EXAMPLES)
        args.command = shlex.join(['scripts/finetune.py', *(sys.argv[1:] if argv is None else argv)])
        logging.basicConfig(level=logging.INFO, format='%(message)s')
        keep_freed_memory()
        results = run(args)
    except InputError as e:
        print(f'error: {error_text(e)}', file=sys.stderr)
        return 2
    except NonFiniteError as e:
        print(f'error: {e}. --nonfinite skip leaves such steps out, a lower --lr may avoid them.', file=sys.stderr)
        return 1
    except (CheckpointError, OSError) as e:
        print(f'error: {error_text(e)}', file=sys.stderr)
        return 3
    except Stopped as e:
        print(f'{e} Go on with --resume auto.', file=sys.stderr)
        return 143
    else:
        if args.rank == 0:
            if args.json:
                print(json.dumps(results, indent=2))
            else:
                print_table(results)
                print(f'Wrote {output_folder(args)}.')
        return 0
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == '__main__':
    sys.exit(main())
