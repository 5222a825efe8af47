"""Adaptive ResNets in timm's registry: <arch>_aig for every arch of timm.models.resnet and cifar_resnet.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503

Each of them is the parent arch, converted with gate_. AIGConfig's fields are keyword arguments of the entry points,
and so are gate_offset, the offset that set_gate_offset sets, and gate_budgets, the table that set_budget reads. A tag
of the parent ('resnet50_aig.tv2_in1k') loads the parent's weights and leaves the gates open; the other tags come from
hub_configs.
"""
from functools import partial
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from safetensors import SafetensorError
from timm.models import (
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
from ..config import AIG_ARGS, AIGConfig
from ..convert import checkpoint_filter_fn, gate_
from ..hub.config_json import checked_source, config_file
from . import cifar_resnet  # noqa: F401, registers the CIFAR parents
from .hub_configs import load_hub_configs

__all__ = ['checkpoint_filter_fn']  # register_model adds each entry point

_PARENTS = list_models(module=('resnet', 'cifar_resnet'))
_HUB_CONFIGS = load_hub_configs()


def _default_cfgs() -> Dict[str, Any]:
    """Pretrained cfgs by 'arch_aig.tag': hub_configs', and the parents' (loading from the parents' repositories).

    The default tag is the parent's: a star marks it.
    """
    cfgs: Dict[str, Any] = {}
    for name, config in _HUB_CONFIGS.items():  # timm's sizes, means and the like are tuples, which JSON has not
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


def _hub_config(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    tag = kwargs.get('pretrained_cfg')
    return _HUB_CONFIGS.get(f'{variant}.{tag}', {}) if isinstance(tag, str) else {}


def _split_args(variant: str, kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """AIGConfig fields and other arguments; fields not given come from the tag's hub config, if it has one."""
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
    kwargs = checked_source(pretrained, kwargs)
    hub_config = _hub_config(variant, kwargs) if pretrained else {}
    aig_args, kwargs = _split_args(variant, kwargs)
    if gate_budgets is None and hub_config and AIGConfig(**aig_args) == AIGConfig.from_dict(hub_config['aig']):
        gate_budgets = hub_config.get('gate_budgets')  # other gates than the tag's have other budgets
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
        if gate_offset is not None:  # over what the weights say
            set_gate_offset(model, gate_offset)
        return model
    except SafetensorError as e:
        raise RuntimeError(f'The weights of {variant} are no whole safetensors file: {e}') from e
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as e:
        if config_file(kwargs) is None:
            raise
        raise ValueError(f'{config_file(kwargs)} describes no {variant}, or an argument does not fit it: '
                         f'{type(e).__name__} {e}') from e


@register_model
def resnet50_aig(pretrained: bool = False, **kwargs) -> ResNet:
    """Constructs a ResNet-50-AIG model, the paper's smaller ImageNet network.

    Args:
        pretrained: Load weights: the tag's, ResNet-50's default weights with open gates if none is given.
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
