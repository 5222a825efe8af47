"""Adaptive ResNets in timm's registry: <arch>_aig for every arch of timm.models.resnet and cifar_resnet.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503

Each is the parent arch converted with gate_. AIGConfig's fields are keyword arguments of the entry points. So are
gate_offset, for set_gate_offset, and gate_budgets, the table of set_budget.

Tags of the parent ('resnet50_aig.tv2_in1k') load the parent's weights and leave the gates open. The other tags are the
files of hub_configs. Without a tag, pretrained=True loads the parent's default tag. If the parent has no weights, it
loads the hub_config that is marked "default".
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    list_models,
    model_entrypoint,
    register_model,
)
from timm.models.resnet import ResNet

from ..blocks import set_gate_offset
from ..budget import BudgetPoint, read_budget_table, set_budget_table
from ..config import AIG_ARGS, AIGConfig, InputError
from ..convert import checkpoint_filter_fn, gate_
from ..hub.config_json import checked_source, config_file
from . import cifar_resnet  # noqa: F401, registers the CIFAR parents
from .hub_configs import load_hub_configs

__all__ = ['list_trained']  # register_model adds each entry point

_PARENTS = list_models(module=('resnet', 'cifar_resnet'))
_HUB_CONFIGS = load_hub_configs()
_DEFAULT_TAGS = {c['architecture']: c['tag'] for c in _HUB_CONFIGS.values() if c.get('default')}


def _default_cfgs() -> Dict[str, Any]:
    """Pretrained cfgs of hub_configs and of the parents, by 'arch_aig.tag'. The parent's default tag is the default."""
    cfgs: Dict[str, Any] = {}
    for name, config in _HUB_CONFIGS.items():  # lists of JSON become tuples, as timm has them
        cfgs[name] = {k: tuple(v) if isinstance(v, list) else v for k, v in config['pretrained_cfg'].items()}
    for parent in _PARENTS:
        parent_cfgs = get_arch_pretrained_cfgs(parent)
        default = get_pretrained_cfg(parent)
        for name, cfg in parent_cfgs.items():
            arch, dot, tag = name.partition('.')
            star = '*' if default and tag == default.tag else ''
            cfgs[f'{arch}_aig.{tag}{star}' if dot else f'{arch}_aig'] = cfg
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def list_trained() -> List[str]:
    """Names of the pretrained models with trained gates, for timm.create_model(name, pretrained=True).

    The other names of timm.list_models('*_aig', pretrained=True) load the static parent's weights. Their gates are
    open for every image.
    """
    return [name for name in list_models('*_aig*', pretrained=True) if name in _HUB_CONFIGS]


def _adaptive_resnet(
        parent: str,
        aig_args: Dict[str, Any],
        gate_budgets: Sequence[BudgetPoint],
        **kwargs,
) -> ResNet:
    model = gate_(model_entrypoint(parent)(**kwargs), AIGConfig(**aig_args))
    if gate_budgets:
        set_budget_table(model, gate_budgets)
    return model


def _with_default_tag(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments with the default tag of hub_configs, if they say neither a tag nor where other weights are."""
    overlay = PretrainedCfg(**(kwargs.get('pretrained_cfg_overlay') or {}))
    if variant not in _DEFAULT_TAGS or kwargs.get('pretrained_cfg') or overlay.has_weights:
        return kwargs
    return dict(kwargs, pretrained_cfg=_DEFAULT_TAGS[variant])


def _hub_config(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    tag = kwargs.get('pretrained_cfg')
    return _HUB_CONFIGS.get(f'{variant}.{tag}', {}) if isinstance(tag, str) else {}


def _split_args(variant: str, kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """AIGConfig fields and other arguments. Fields that are not given come from the tag's hub config, if any."""
    aig_args = {k: v for k, v in _hub_config(variant, kwargs).get('aig', {}).items() if k in AIG_ARGS}
    aig_args.update((k, kwargs[k]) for k in AIG_ARGS if k in kwargs)
    return aig_args, {k: v for k, v in kwargs.items() if k not in AIG_ARGS}


def _create_resnet_aig(
        variant: str,
        pretrained: bool = False,
        gate_offset: Optional[float] = None,
        gate_budgets: Optional[Sequence[Dict[str, Any]]] = None,
        **kwargs,
) -> ResNet:
    parent = variant.removesuffix('_aig')
    kwargs = checked_source(pretrained, _with_default_tag(variant, kwargs) if pretrained else kwargs)
    hub_config = _hub_config(variant, kwargs) if pretrained else {}
    aig_args, kwargs = _split_args(variant, kwargs)
    if gate_budgets is None and hub_config and AIGConfig(**aig_args) == AIGConfig.from_dict(hub_config['aig']):
        gate_budgets = hub_config.get('gate_budgets')  # the budgets are those of the tag's gates
    table = read_budget_table(() if gate_budgets is None else gate_budgets)
    try:
        model = build_model_with_cfg(
            partial(_adaptive_resnet, parent, aig_args, table),
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3) if parent.startswith('cifar') else (0, 1, 2, 3, 4)),
            **kwargs,
        )
        if gate_offset is not None:  # replaces that of the weights
            set_gate_offset(model, gate_offset)
        return model
    except SafetensorError as e:
        raise RuntimeError(f'The weights of {variant} are not a valid safetensors file: {e}') from e
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as e:
        if config_file(kwargs) is None:
            raise
        raise InputError(
            f'{config_file(kwargs)} describes no {variant}, or an argument does not fit it: '
            f'{type(e).__name__} {e}') from e


@register_model
def resnet50_aig(pretrained: bool = False, **kwargs) -> ResNet:
    """Constructs a ResNet-50-AIG model, the paper's smaller ImageNet network.

    Args:
        pretrained: Load the weights of the tag, or ResNet-50's default weights with open gates if there is no tag.
        **kwargs: AIGConfig's fields (target_rate, schedule, target_rates, gate_channels, gate_norm), gate_offset,
            gate_budgets, and timm's ResNet arguments.
    """
    return _create_resnet_aig('resnet50_aig', pretrained, **kwargs)


@register_model
def resnet101_aig(pretrained: bool = False, **kwargs) -> ResNet:
    """Constructs a ResNet-101-AIG model, the paper's larger ImageNet network. Arguments as in resnet50_aig."""
    return _create_resnet_aig('resnet101_aig', pretrained, **kwargs)


def _entry_point(variant: str) -> Callable[..., ResNet]:
    def entry_point(pretrained: bool = False, **kwargs) -> ResNet:
        return _create_resnet_aig(variant, pretrained, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = variant
    entry_point.__doc__ = f"Constructs {variant.removesuffix('_aig')} with gates. Arguments as in resnet50_aig."
    return register_model(entry_point)


for _parent in _PARENTS:
    if f'{_parent}_aig' not in globals():
        globals()[f'{_parent}_aig'] = _entry_point(f'{_parent}_aig')
