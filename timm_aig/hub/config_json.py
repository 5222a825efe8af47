"""Checks config.json before timm builds a model from it, and fixes the commit of the weights to that of the config."""
import inspect
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Dict, List, Optional, Set

from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg

from ..config import AIG_ARGS, InputError

__all__ = ['allow_model_args', 'check_model_args', 'check_pretrained_cfg', 'checked_source', 'config_file']

LARGEST = 65536  # channels, classes, pixels, ...: a larger number would exhaust the memory
LARGEST_DEPTH = 1024  # blocks of a stage
LONGEST = 1024  # entries of a list
SIZES = ('input_size', 'test_input_size', 'min_input_size', 'pool_size', 'num_classes', 'label_offset')
_MODEL_CLASSES: List[type] = []
MODEL_ARGS = {*AIG_ARGS, 'gate_offset', 'gate_budgets', 'channels'}


def allow_model_args(model_cls: type) -> None:
    """Let model_args have the arguments of a class of models."""
    _MODEL_CLASSES.append(model_cls)


@cache
def _known_model_args() -> Set[str]:
    names = {name for cls in _MODEL_CLASSES for name in inspect.signature(cls).parameters}
    return (MODEL_ARGS | names) - {'block', 'block_args', 'device', 'dtype', 'kwargs'}  # not JSON


def checked_source(pretrained: bool, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Check the arguments that timm read from a config.json, and fix the weights to its commit and to safetensors.

    Returns:
        The arguments to go on with, `kwargs` itself if they are not from a config.json.

    Raises:
        InputError: config.json has an unknown field or a number that is too large.
    """
    where = config_file(kwargs)
    if where is None:
        return kwargs
    cfg = kwargs['pretrained_cfg']
    check_pretrained_cfg(cfg, where)
    check_model_args(kwargs.get('pretrained_model_args', {}), where)
    cfg = dict(cfg, custom_load=False)
    if cfg['source'] == 'hf-hub':
        cfg['hf_hub_filename'] = 'model.safetensors'
        if pretrained:
            cfg['hf_hub_id'] = _pinned(cfg['hf_hub_id'], kwargs.get('cache_dir'))
    return dict(kwargs, pretrained_cfg=cfg)


def config_file(kwargs: Dict[str, Any]) -> Optional[str]:
    """Path of the config.json that an entry point's arguments were read from, for errors. None if there is none."""
    cfg = kwargs.get('pretrained_cfg')
    if not isinstance(cfg, dict) or cfg.get('source') not in ('hf-hub', 'local-dir'):
        return None
    return f"{cfg['hf_hub_id'] if cfg['source'] == 'hf-hub' else cfg['file']}/config.json"


def _pinned(hub_id: str, cache_dir: Optional[str]) -> str:
    """'user/name@commit' with the commit of the config.json that timm just read into, or from, the cache."""
    repo_id, _, revision = hub_id.partition('@')
    config = try_to_load_from_cache(repo_id, 'config.json', cache_dir=cache_dir, revision=revision or None)
    commit = Path(config).parent.name if isinstance(config, str) else None
    return f'{repo_id}@{commit}' if commit else hub_id


def check_pretrained_cfg(cfg: Dict[str, Any], where: Any) -> None:
    """Check the names and sizes of a pretrained_cfg that was read from a file. timm checks the rest.

    Args:
        cfg: The pretrained_cfg.
        where: Name of the file, for errors.

    Raises:
        InputError: An unknown field or a size that is too large.
    """
    unknown = sorted(set(cfg) - {f.name for f in fields(PretrainedCfg)})
    if unknown:
        raise InputError(f'{where}: pretrained_cfg has no field {", ".join(map(repr, unknown))}.')
    for name in SIZES:
        _check_size(name, cfg.get(name), where)


def check_model_args(model_args: Any, where: Any) -> None:
    """Check the names and sizes of model_args that were read from a file. The model checks the rest.

    Args:
        model_args: Keyword arguments of the entry point: fields of AIGConfig and arguments of the parent.
        where: Name of the file, for errors.

    Raises:
        InputError: An unknown argument, a number that is too large, or a list that is too long.
    """
    if not isinstance(model_args, dict):
        raise InputError(f'{where}: model_args must be an object, not {_short(model_args)}.')
    for name, value in model_args.items():
        if name not in _known_model_args():
            known = ', '.join(sorted(_known_model_args()))
            raise InputError(f'{where}: model_args has {_short(name)}, known are {known}.')
        _check_size(name, value, where)


def _check_size(name: str, value: Any, where: Any) -> None:
    values = value if isinstance(value, (list, tuple)) else [value]
    largest = LARGEST_DEPTH if name == 'layers' else LARGEST
    if len(values) > LONGEST:
        raise InputError(f'{where}: {name} must have at most {LONGEST} entries, not {len(values)}.')
    if not all(abs(v) <= largest for v in values if isinstance(v, (int, float))):  # false for nan
        raise InputError(f'{where}: {name} must be at most {largest}, not {_short(value)}.')


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:80]}...'
