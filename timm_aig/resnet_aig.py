"""Adaptive ResNets in timm's registry: <arch>_aig for every arch of timm.models.resnet and cifar_resnet.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503

Each of them is the parent arch, converted with gate_. AIGConfig's fields are keyword arguments of the entry points. A
tag of the parent ('resnet50_aig.tv2_in1k') loads the parent's weights and leaves the gates open; the other tags come
from hub_configs.
"""
import logging
from functools import partial
from typing import Any, Callable, Dict, Tuple

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    list_models,
    model_entrypoint,
    register_model,
)
from timm.models.resnet import ResNet

from . import cifar_resnet  # noqa: F401, registers the CIFAR parents
from .blocks import gated_blocks
from .config import AIG_ARGS, AIGConfig, load_hub_configs
from .convert import gate_

__all__ = ['checkpoint_filter_fn']  # register_model adds each entry point

_logger = logging.getLogger(__name__)

_PARENTS = list_models(module=('resnet', 'cifar_resnet'))
_HUB_CONFIGS = {f"{c['architecture']}.{c['tag']}": c for c in load_hub_configs()}


def _default_cfgs() -> Dict[str, Any]:
    """Pretrained cfgs by 'arch_aig.tag': the parents' (loading from the parents' repositories), then hub_configs'."""
    cfgs: Dict[str, Any] = {}
    for parent in _PARENTS:
        for name, cfg in get_arch_pretrained_cfgs(parent).items():
            arch, dot, tag = name.partition('.')
            cfgs[f'{arch}_aig{dot}{tag}'] = cfg
    for name, config in _HUB_CONFIGS.items():  # timm's sizes, means and the like are tuples, which JSON has not
        cfgs[name] = {k: tuple(v) if isinstance(v, list) else v for k, v in config['pretrained_cfg'].items()}
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: ResNet) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint to an adaptive model: a parent's gets the model's own open gates, an adaptive one must match.

    Raises:
        RuntimeError: The checkpoint's gates are not the model's: other blocks, or another width or norm.
    """
    prefixes = tuple(f'{name}.gate.' for name in gated_blocks(model))
    own = {k: v for k, v in model.state_dict().items() if prefixes and k.startswith(prefixes)}
    theirs = {k: v for k, v in state_dict.items() if '.gate.' in k and k.startswith('layer')}
    if not theirs:
        if own:
            _logger.warning(
                f'Weights of the static parent: the {len(prefixes)} gates of this model are new and open for every '
                f'image, so it computes what its parent does until it is fine-tuned.')
        return {**state_dict, **own}
    blocks_own, blocks_theirs = ({k.partition('.gate.')[0] for k in keys} for keys in (own, theirs))
    if blocks_own != blocks_theirs:
        raise RuntimeError(
            f'The checkpoint does not fit: it has gates on {_names(blocks_theirs)}, the model on {_names(blocks_own)}. '
            f'Pass the target_rate, schedule or target_rates it was trained with.')
    for key in sorted(own.keys() | theirs.keys()):
        shapes = [list(d[key].shape) if key in d else 'missing' for d in (theirs, own)]
        if shapes[0] != shapes[1]:
            raise RuntimeError(
                f'The checkpoint does not fit: {key} is {shapes[0]} there and {shapes[1]} in the model. '
                f'Pass the gate_channels and gate_norm it was trained with.')
    return state_dict


def _names(blocks) -> str:
    return f'{len(blocks)} blocks ({", ".join(sorted(blocks))})' if blocks else 'no block'


def _adaptive_resnet(parent: str, aig_args: Dict[str, Any], **kwargs) -> ResNet:
    return gate_(model_entrypoint(parent)(**kwargs), AIGConfig(**aig_args))


def _split_args(variant: str, kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """AIGConfig fields and other arguments; fields not given come from the tag's hub config, if it has one."""
    tag = kwargs.get('pretrained_cfg')
    known = _HUB_CONFIGS.get(f'{variant}.{tag}', {}) if isinstance(tag, str) else {}
    aig_args = {k: v for k, v in known.get('aig', {}).items() if k in AIG_ARGS}
    aig_args.update((k, kwargs[k]) for k in AIG_ARGS if k in kwargs)
    return aig_args, {k: v for k, v in kwargs.items() if k not in AIG_ARGS}


def _create_resnet_aig(variant: str, pretrained: bool = False, **kwargs) -> ResNet:
    parent = variant.removesuffix('_aig')
    aig_args, kwargs = _split_args(variant, kwargs)
    return build_model_with_cfg(
        partial(_adaptive_resnet, parent, aig_args),
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3) if parent.startswith('cifar') else (0, 1, 2, 3, 4)),
        **kwargs,
    )


@register_model
def resnet50_aig(pretrained: bool = False, **kwargs) -> ResNet:
    """Constructs a ResNet-50-AIG model, the paper's smaller ImageNet network.

    Args:
        pretrained: Load weights: the tag's, ResNet-50's default weights with open gates if none is given.
        **kwargs: AIGConfig's fields (target_rate, schedule, target_rates, gate_channels, gate_norm) and timm's ResNet
            arguments.
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
