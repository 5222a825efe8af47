"""The model that finetune.py trains, its static parent and its teacher."""
import argparse
import copy
from typing import Any, Dict, List

import torch.nn as nn
from _common import blame, create_model
from _recipes import model_kwargs_of
from timm.data import resolve_input_data_config
from timm.models import is_model, load_checkpoint

import timm_aig
from timm_aig import InputError
from timm_aig.compat import model_args
from timm_aig.config import AIG_ARGS
from timm_aig.training.data import label_names_of


def create_models(args: argparse.Namespace, names: List[str]) -> Any:
    """The model to train, its static parent and its teacher; None for no parent or teacher.

    Sets args.target_rate, schedule, gate_channels and gate_norm to those of the model.
    """
    model = create_trainable_model(args)
    if names and model.num_classes != len(names):
        raise InputError(
            f'{model.num_classes} is the head of --model {args.model}, but the data set has {len(names)} classes. '
            f'Pass --num-classes {len(names)} for a new head.', 'num_classes')
    check_class_names(args, model, names)
    adaptive = bool(timm_aig.gated_blocks(model))
    if args.static and adaptive:
        raise InputError(f'{args.model} has gates, --static trains a model without.', 'model')
    has_weights = args.pretrained or args.initial_checkpoint or ':' in args.model
    parent = copy.deepcopy(model) if has_weights and not adaptive and not args.static else None
    teacher = create_teacher(args, model, parent, names)
    if parent is not None and has_new_head(args, model):
        parent = None
    if not adaptive and not args.static:
        if not is_model(f'{model.pretrained_cfg["architecture"]}_aig'):
            raise InputError(f'must be a model of a family that timm_aig can gate, not {args.model!r}.', 'model')
        timm_aig.gate_(model, timm_aig.AIGConfig(**given_gate_args(args)))
    if not args.static:
        if args.gate_loss == 'budgets' and args.batch_size < 4:
            raise InputError(f'must be at least 4 to train budgets side by side, not {args.batch_size}.', 'batch_size')
        config = timm_aig.AIGConfig(**{k: v for k, v in model_args(model).items() if k in AIG_ARGS})
        if config.target_rates and args.gate_loss == 'rate':
            raise InputError(f'rate: {args.model} has target_rates of its own, one for each block.', 'gate_loss')
        norms = {type(block.gate.bn) for block in timm_aig.gated_blocks(model).values()}
        if nn.BatchNorm1d in norms and args.batch_size == 1:
            raise InputError('must be at least 2 for gates with a batch norm; --gate-norm none has none.', 'batch_size')
        for name in AIG_ARGS:
            setattr(args, name, getattr(config, name))
    return model, parent, teacher


def check_class_names(args: argparse.Namespace, model: Any, names: List[str]) -> None:
    """A head for other classes is no start: --num-classes makes a new one, also for the same number of classes."""
    if args.initial_checkpoint or has_new_head(args, model):
        model.pretrained_cfg.pop('label_names', None)
    labels = label_names_of(model) or names
    if not names or {*labels} == {*names}:
        return
    if not args.num_classes:
        raise InputError(
            f'{args.model} has the classes {_shown(labels)}, but the data set {_shown(names)}. '
            f'Pass --num-classes {len(names)} for a new head.', 'model')
    model.reset_classifier(model.num_classes)
    del model.pretrained_cfg['label_names']
    model.pretrained_cfg['num_classes'] = None  # see has_new_head


def _shown(names: List[str]) -> str:
    return ', '.join(names[:10]) + ('...' if len(names) > 10 else '')


def given_gate_args(args: argparse.Namespace) -> Dict[str, Any]:
    """AIGConfig's fields that were given as arguments; the others are the model's own."""
    return {k: getattr(args, k) for k in AIG_ARGS if getattr(args, k, None) is not None}


def create_trainable_model(args: argparse.Namespace) -> Any:
    kwargs: Dict[str, Any] = {'drop_rate': args.drop, 'drop_path_rate': args.drop_path}
    if args.num_classes:
        kwargs['num_classes'] = args.num_classes
    if args.input_size:
        kwargs['in_chans'] = args.input_size[0]
    kwargs.update(model_kwargs_of(args))
    gate_args = given_gate_args(args)
    adaptive = ':' not in args.model and args.model.partition('.')[0].endswith('_aig')
    model = create_model(args.model, args.pretrained, **kwargs, **(gate_args if adaptive else {}))
    if gate_args and not adaptive and timm_aig.gated_blocks(model):  # local-dir: or hf-hub: of an adaptive model
        model = create_model(args.model, **kwargs, **gate_args)
    if args.initial_checkpoint:
        with blame('initial_checkpoint', args.initial_checkpoint, Exception):
            load_checkpoint(model, args.initial_checkpoint, weights_only=True)
    return model


def has_new_head(args: argparse.Namespace, model: nn.Module) -> bool:
    """True if the head is freshly initialised."""
    return not args.initial_checkpoint and model.pretrained_cfg['num_classes'] != model.num_classes


def create_teacher(args: argparse.Namespace, model: Any, parent: Any, names: List[str]) -> Any:
    """--teacher, else the parent; None without distillation."""
    if not args.distill_weight:
        return None
    if args.teacher:
        kwargs = {'in_chans': args.input_size[0]} if args.input_size else {}
        teacher = create_model(args.teacher, True, 'teacher', **kwargs)
        if teacher.num_classes != model.num_classes:
            raise InputError(f'has {teacher.num_classes} classes, the model {model.num_classes}.', 'teacher')
        labels, expected = label_names_of(teacher), label_names_of(model) or names
        if labels and names and labels != expected:
            raise InputError(
                f'must have the classes {_shown(expected)}, in this order; {args.teacher} has {_shown(labels)}.',
                'teacher')
        return teacher
    if args.static:
        return None
    if parent is None:
        raise InputError(
            f'{args.distill_weight} needs a teacher: a --model that is trained and static (--pretrained, '
            f'--initial-checkpoint, local-dir:, hf-hub:), or --teacher. 0 trains without a teacher.', 'distill_weight')
    if has_new_head(args, model):
        raise InputError(
            f'{args.model} gets a new head of {model.num_classes} classes, so it cannot be the teacher. '
            f'Train it with --static first, or pass --teacher, or --distill-weight 0.', 'model')
    return parent


def check_normalization(args: argparse.Namespace, teacher: Any, data_config: Dict[str, Any]) -> None:
    """A --teacher must see images as in its own training."""
    own = resolve_input_data_config(teacher)
    if any(tuple(own[k]) != tuple(data_config[k]) for k in ('mean', 'std')):
        mean, std = (' '.join(map(str, own[k])) for k in ('mean', 'std'))
        raise InputError(f'{args.teacher} needs --mean {mean} --std {std}.', 'teacher')


def parent_name(name: str, model: nn.Module) -> str:
    """A public name of the starting point: a model of timm, a repository of the Hub, or an architecture."""
    if name.startswith('local-dir:'):
        return model.pretrained_cfg['architecture'].removesuffix('_aig')
    return name.partition('@')[0]
