"""gate_ and ungate_: static timm ResNets <-> adaptive ResNets, in place; and the same for their checkpoints."""
import logging
from itertools import groupby
from typing import Any, Dict, List, NamedTuple, Optional, Set, Tuple, Type

import torch
import torch.nn as nn
from timm.models import is_model
from timm.models.resnet import BasicBlock, Bottleneck

from .blocks import GatedBasicBlock, GatedBlock, GatedBottleneck, gated_blocks, require_gated_blocks
from .compat import model_args, set_model_args
from .config import AIG_ARGS, AIGConfig
from .gate import Gate

__all__ = ['gate_', 'ungate_', 'checkpoint_filter_fn']

_logger = logging.getLogger(__name__)

GATED: Dict[type, Type[GatedBlock]] = {cls.block_cls: cls for cls in (GatedBasicBlock, GatedBottleneck)}


class _Site(NamedTuple):
    """Where a block sits: `parent` (named `stage`) holds it as its child `child`."""
    stage: str
    parent: nn.Module
    child: str
    block: Any


def _find_blocks(model: nn.Module, types: Tuple[type, ...]) -> List[_Site]:
    return [
        _Site(stage, parent, child, block)
        for stage, parent in model.named_modules()
        for child, block in parent._modules.items()  # named_children() leaves out a block's second name
        if type(block) in types
    ]


def _rates(sites: List[_Site], config: AIGConfig) -> Tuple[float, ...]:
    """Target rate of each block; a network is what shares the name in front of its stages."""
    if config.target_rates is not None:
        return config.block_rates([len(sites)])
    rates: Tuple[float, ...] = ()
    for _, network in groupby(sites, key=lambda site: site.stage.rpartition('.')[0]):
        stages = [list(stage) for _, stage in groupby(network, key=lambda site: site.stage)]
        rates += config.block_rates([len(stage) for stage in stages], type(stages[0][0].block) is Bottleneck)
    return rates


def _relu_input(site: _Site) -> bool:
    """Whether both the block before this one, in the same nn.Sequential, and this one end in a ReLU."""
    if not isinstance(site.parent, nn.Sequential):
        return False
    index = list(site.parent._modules).index(site.child)
    blocks = list(site.parent._modules.values())[max(index - 1, 0):index + 1]
    return len(blocks) == 2 and all(type(_last_act(b)) is nn.ReLU for b in blocks)


def _last_act(block: nn.Module) -> Optional[nn.Module]:
    if isinstance(block, Bottleneck):
        return block.act3
    return block.act2 if isinstance(block, BasicBlock) else None


def gate_(model: nn.Module, config: Optional[AIGConfig] = None) -> nn.Module:
    """Make every timm ResNet block of a model adaptive, in place.

    In eval the model computes what it did before, bit for bit, until its gates are trained: they start open.

    Args:
        model: Any module that contains timm's BasicBlock or Bottleneck: a timm ResNet, a features_only backbone, a
            detector with such a backbone.
        config: Which blocks to gate and at what rate, AIGConfig() by default.

    Returns:
        The same model.

    Raises:
        ValueError: No ResNet blocks, gates already there, or a config that does not fit; the model is unchanged then.
    """
    config = AIGConfig() if config is None else config
    if not isinstance(config, AIGConfig):
        raise ValueError(f'config must be an AIGConfig, not {type(config).__name__}.')
    if _find_blocks(model, tuple(GATED.values())) or isinstance(model, GatedBlock):
        raise ValueError('model is gated already, ungate_ it first to change its gates.')
    sites = _find_blocks(model, tuple(GATED))
    if not sites:
        what = 'is a block itself, gate_ the module that holds it' if type(model) in GATED else \
            'has no timm ResNet blocks (BasicBlock, Bottleneck)'
        raise ValueError(f'model ({type(model).__name__}) {what}.')

    replacements: Dict[nn.Module, GatedBlock] = {}  # by block, so that one used in two places stays one
    for site, rate in zip(sites, _rates(sites, config)):
        if rate < 1 and site.block not in replacements:
            conv = site.block.conv1
            gate = Gate(
                conv.in_channels,
                config.gate_channels,
                config.gate_norm,
                device=conv.weight.device,
                dtype=conv.weight.dtype,
            )
            gate.train(site.block.training)
            relu_input = all(_relu_input(s) for s in sites if s.block is site.block)
            replacements[site.block] = GATED[type(site.block)](site.block, gate, rate, relu_input)
    for site in sites:
        if site.block in replacements:
            setattr(site.parent, site.child, replacements[site.block])
    _record_args(model, config)
    return model


def ungate_(model: nn.Module) -> nn.Module:
    """Turn an adaptive model back into the plain ResNet, in place: all blocks always run, keys are timm's again.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no gated blocks, or is optimized for inference.
    """
    require_gated_blocks(model)
    sites = _find_blocks(model, tuple(GATED.values()))
    if not sites:
        raise ValueError('model is optimized for inference, ungate_ the original and optimize that.')
    blocks = {site.block: site.block.ungated() for site in sites}  # by block, as in gate_
    for site in sites:
        setattr(site.parent, site.child, blocks[site.block])
    _record_args(model, None)
    return model


def _record_args(model: nn.Module, config: Optional[AIGConfig]) -> None:
    """Keep what timm would rebuild the model from (its architecture and arguments) true to what it is now."""
    cfg: Any = getattr(model, 'pretrained_cfg', None)
    if not isinstance(cfg, dict) or not cfg.get('architecture'):
        return
    arch = cfg['architecture'].removesuffix('_aig') + ('_aig' if config else '')
    if not is_model(arch):
        return
    cfg['architecture'] = arch
    args = {k: v for k, v in model_args(model).items() if k not in (*AIG_ARGS, 'gate_offset', 'gate_budgets')}
    if config:
        args.update((k, v) for k, v in config.to_dict().items() if k in AIG_ARGS)
    set_model_args(model, args)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint to a model, in the form of timm's filter_fn: adaptive or static, whichever they are.

    A static checkpoint gets the new, open gates of an adaptive model; an adaptive one must have the model's gates, and
    loses them for a static model.

    Args:
        state_dict: The checkpoint.
        model: ResNet made by timm.create_model.

    Raises:
        RuntimeError: The checkpoint's gates are not the model's (other blocks, or another width or norm), or weights
            other than the classifier's are missing.
    """
    missing = [k for k in model.state_dict() if k not in state_dict and not _may_be_missing(k)]
    if missing:  # timm would leave them at random where another number of classes is asked for
        raise RuntimeError(f'The checkpoint does not fit: it lacks {len(missing)} tensors, {", ".join(missing[:3])}...')
    own = {k: v for k, v in model.state_dict().items() if _gated_block(k)}
    theirs = {k: v for k, v in state_dict.items() if _gated_block(k)}
    if not theirs:
        if own:
            _logger.warning(
                f'Weights of the static parent: the {len(gated_blocks(model))} gates of this model are new and open '
                f'for every image, so it computes what its parent does until it is fine-tuned.')
        return {**state_dict, **own}
    blocks_own, blocks_theirs = ({_gated_block(k) for k in keys} for keys in (own, theirs))
    if not own and not getattr(model, 'pretrained_cfg', {}).get('architecture', '').endswith('_aig'):
        _logger.warning(
            f'Weights of an adaptive model: its {len(blocks_theirs)} gates are dropped, this static model runs every '
            f'block for every image.')
        return {k: v for k, v in state_dict.items() if k not in theirs}
    if blocks_own != blocks_theirs:
        raise RuntimeError(
            f'The checkpoint does not fit: it has gates on {_names(blocks_theirs)}, the model on {_names(blocks_own)}. '
            f'Pass the target_rate, schedule or target_rates it was trained with.')
    for key in sorted(own.keys() | theirs.keys()):
        if key.endswith('.gate.offset'):  # files of timm_aig before 0.2 have none
            continue
        shapes = [list(d[key].shape) if key in d else 'missing' for d in (theirs, own)]
        if shapes[0] != shapes[1]:
            raise RuntimeError(
                f'The checkpoint does not fit: {key} is {shapes[0]} there and {shapes[1]} in the model. '
                f'Pass the gate_channels and gate_norm it was trained with.')
    return state_dict


def _gated_block(key: str) -> str:
    """Name of the block whose gate a key of a ResNet's state dict belongs to, '' for another key."""
    block, gate, _ = key.partition('.gate.')
    return block if gate and block.startswith('layer') else ''


def _may_be_missing(key: str) -> bool:
    """Gates, the classifier, and what checkpoints of old versions of torch do not have."""
    return bool(_gated_block(key)) or key.startswith('fc.') or key.endswith('.num_batches_tracked')


def _names(blocks: Set[str]) -> str:
    return f'{len(blocks)} blocks ({", ".join(sorted(blocks))})' if blocks else 'no block'
