"""Adaptive models in timm's registry: <arch>_aig for every arch of a family's modules.

Each is the parent arch converted with gate_. AIGConfig's fields are keyword arguments of the entry points. So are
gate_offset, for set_gate_offset, and gate_budgets, the table of set_budget.

Tags of the parent ('resnet50_aig.tv2_in1k') load the parent's weights and leave the gates open. The other tags are the
files of hub_configs. Without a tag, pretrained=True loads the parent's default tag. If the parent has no weights, it
loads the hub_config that is marked "default".
"""
import sys
from collections import deque
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    list_models,
    model_entrypoint,
    register_model,
)

from ..blocks import set_gate_offset
from ..budget import read_budget_table, set_budget_table
from ..config import AIG_ARGS, AIGConfig, InputError
from ..convert import checkpoint_filter_fn, gate_
from ..hub.config_json import config_file, pin_weights
from ..hub.timeout import stalled_request
from .hub_configs import load_hub_configs, pretrained_cfgs

__all__ = ['Family', 'list_trained', 'register_family']

_HUB_CONFIGS = load_hub_configs()
_DEFAULT_TAGS = {c['architecture']: c['tag'] for c in _HUB_CONFIGS.values() if c.get('default')}

DOCSTRING = """Constructs {} with gates.

Args:
    pretrained: Load the weights of the tag, or the parent's default weights with open gates if there is no tag.
    **kwargs: AIGConfig's fields (target_rate, schedule, target_rates, gate_channels, gate_norm), gate_offset (of
        pretrained weights; a checkpoint_path has its own), gate_budgets, and the arguments of the parent.
"""


class Family(NamedTuple):
    """Parents that are built the same way.

    modules: Names of timm's modules that define the parents.
    filter_fn: Converts checkpoints of other formats, as timm's filter_fn.
    feature_cfg: How features_only takes features, as the parents' own, by parent.
    without: Patterns of parents that have no block to gate.
    """
    modules: Tuple[str, ...]
    filter_fn: Optional[Callable[..., Any]] = None
    feature_cfg: Callable[[str], Dict[str, Any]] = lambda parent: {}
    without: Tuple[str, ...] = ()


def default_cfgs_of(parents: Sequence[str]) -> Dict[str, DefaultCfg]:
    """Pretrained cfgs by '<arch>_aig': those of the parent, and of hub_configs. The parent's default is the default."""
    configs, cfgs = pretrained_cfgs(), {}
    for parent in parents:
        # timm copies what it registers; its functions, which copy too, would take three times as long as all the rest
        cfg = sys.modules[model_entrypoint(parent).__module__].default_cfgs[parent]
        theirs = dict(cfg.cfgs)
        for tag, tag_cfg in theirs.items():
            if tag_cfg.hf_hub_id == 'timm/':  # stands for the repository of that name
                theirs[tag] = _with_hub_id(tag_cfg, f'timm/{parent}.{tag}' if tag else f'timm/{parent}')
        own = configs.get(f'{parent}_aig', {})
        tags = deque(dict.fromkeys([*cfg.tags, *own]))
        cfgs[f'{parent}_aig'] = DefaultCfg(tags, {**theirs, **own}, cfg.is_pretrained)
    return cfgs


def _with_hub_id(cfg: PretrainedCfg, hub_id: str) -> PretrainedCfg:
    """A copy. copy.copy would take ten times as long, for hundreds of them at each import."""
    copied = PretrainedCfg.__new__(PretrainedCfg)
    vars(copied).update(vars(cfg), hf_hub_id=hub_id)
    return copied


def list_trained() -> List[str]:
    """Names of the pretrained models with trained gates, for timm.create_model(name, pretrained=True).

    The other names of timm.list_models('*_aig', pretrained=True) load the static parent's weights. Their gates are
    open for every image.
    """
    return [name for name in list_models('*_aig*', pretrained=True) if name in _HUB_CONFIGS]


def _create_model_aig(
        family: Family,
        variant: str,
        pretrained: bool = False,
        gate_offset: Optional[float] = None,
        gate_budgets: Optional[Sequence[Dict[str, Any]]] = None,
        **kwargs,
) -> nn.Module:
    parent, kwargs = variant.removesuffix('_aig'), pin_weights(kwargs)
    overlay = PretrainedCfg(**(kwargs.get('pretrained_cfg_overlay') or {}))
    if pretrained and variant in _DEFAULT_TAGS and not kwargs.get('pretrained_cfg') and not overlay.has_weights:
        kwargs['pretrained_cfg'] = _DEFAULT_TAGS[variant]
    tag = kwargs.get('pretrained_cfg')
    hub_config = _HUB_CONFIGS.get(f'{variant}.{tag}', {}) if isinstance(tag, str) else {}
    tag_args = {k: v for k, v in hub_config.get('aig', {}).items() if k in AIG_ARGS}
    config = AIGConfig(**{**tag_args, **{k: kwargs.pop(k) for k in AIG_ARGS if k in kwargs}})
    if gate_budgets is None and pretrained and config == AIGConfig(**tag_args):
        gate_budgets = hub_config.get('gate_budgets')  # the budgets are those of the tag's gates
    budgets = () if gate_budgets is None else read_budget_table(gate_budgets)

    def adaptive_parent(**parent_args) -> nn.Module:
        return gate_(model_entrypoint(parent)(**parent_args), config)

    def filter_checkpoint(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        if family.filter_fn is not None:
            state_dict = family.filter_fn(state_dict, model)
        return checkpoint_filter_fn(state_dict, model)

    try:
        model = build_model_with_cfg(
            adaptive_parent,
            variant,
            pretrained,
            pretrained_filter_fn=filter_checkpoint,
            feature_cfg=family.feature_cfg(parent),
            **kwargs,
        )
        if gate_offset is not None:  # replaces that of the weights
            set_gate_offset(model, gate_offset)
        if budgets:
            set_budget_table(model, budgets)
        return model
    except SafetensorError as e:
        raise RuntimeError(f'The weights of {variant} are not a valid safetensors file: {e}') from e
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as e:
        if config_file(kwargs) is None:
            raise
        raise InputError(
            f'{config_file(kwargs)} describes no {variant}, or an argument does not fit it: '
            f'{type(e).__name__} {e}') from e
    except Exception as e:
        request = stalled_request(e)
        if request is None:
            raise
        raise TimeoutError(
            f'the Hub stalled at {request}. HF_HUB_DOWNLOAD_TIMEOUT sets how many seconds to wait for it.') from e


def entry_point(family: Family, parent: str) -> Callable[..., nn.Module]:
    """The entry point of a parent's adaptive model."""
    variant = f'{parent}_aig'

    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        return _create_model_aig(family, variant, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = DOCSTRING.format(parent)
    return create


def register_family(name: str, family: Family) -> None:
    """Register <arch>_aig for every arch of a family.

    Args:
        name: Name of the module that gets the entry points and, as timm expects it there, `default_cfgs`.
        family: The family.
    """
    module: Any = sys.modules[name]
    parents = list_models(module=family.modules, exclude_filters=family.without)
    module.default_cfgs = {**getattr(module, 'default_cfgs', {}), **default_cfgs_of(parents)}
    for parent in parents:
        function = entry_point(family, parent)
        function.__module__ = name
        setattr(module, function.__name__, register_model(function))
