"""Convert timm models and their checkpoints to adaptive ones and back: gate_, ungate_, checkpoint_filter_fn."""
import copy
import logging
import re
from itertools import groupby
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.models import is_model

from .blocks import GATED, GatedBlock, gate_class, gated_blocks, require_gated_blocks
from .compat import model_args, set_model_args
from .config import AIG_ARGS, AIGConfig, InputError
from .gate import Gate

__all__ = ['gate_', 'ungate_', 'checkpoint_filter_fn', 'copy_module', 'plain_copy', 'residual_blocks']

_logger = logging.getLogger(__name__)

# Tensors of a gate in a state dict.
GATE_KEY = re.compile(r'(.+)\.gate\.(?:fc1|bn|fc2|offset)(?:\.|$)')


class _Site(NamedTuple):
    """Place of a block: child `child` of `parent`, whose name is `stage`."""
    stage: str
    parent: nn.Module
    child: str
    block: Any
    cls: Any  # what is_wanted answered, its gated class in gate_


def _find_blocks(model: nn.Module, is_wanted: Callable[[nn.Module, str], Any]) -> List[_Site]:
    sites = [
        _Site(stage, parent, child, block, cls)
        for stage, parent in model.named_modules()
        for child, block in parent._modules.items()  # named_children() would leave out the second name of a block
        if (cls := is_wanted(parent, child))
    ]
    compiled = [site.stage for site in sites if site.child == '_orig_mod']
    if compiled:  # would go on to run the block that it was made from
        raise InputError(f'has a compiled block, {compiled[0]}: convert the model first, then compile.', 'model')
    return sites


def _is_gated(parent: nn.Module, child: str) -> bool:
    return type(parent._modules[child]) in GATED.values()


def residual_blocks(model: nn.Module) -> Dict[str, Any]:
    """Blocks of a model in order, gated or not, by module name."""
    sites = _find_blocks(model, lambda parent, child: _is_gated(parent, child) or gate_class(parent, child))
    return {f'{site.stage}.{site.child}'.lstrip('.'): site.block for site in sites}


def _rates(sites: List[_Site], config: AIGConfig) -> Tuple[float, ...]:
    """Target rate of each block. Stages whose names have the same prefix are one network."""
    if config.target_rates is not None:
        return config.block_rates([len(sites)])
    rates: Tuple[float, ...] = ()
    for _, network in groupby(sites, key=lambda site: site.stage.removesuffix('.blocks').rpartition('.')[0]):
        stages = [list(stage) for _, stage in groupby(network, key=lambda site: site.stage)]
        rates += config.block_rates([len(stage) for stage in stages], stages[0][0].cls.bottleneck)
    return rates


def _relu_input(site: _Site) -> bool:
    """Whether the activation after the sum leaves the block's input as it is: there is none, or this block and the one
    before it in the same stage end in a ReLU."""
    if site.cls.act_name is None:
        return True
    if not isinstance(site.parent, site.cls.stage_cls):
        return False
    names = list(site.parent._modules)
    before = names[:names.index(site.child) + 1][-2:]
    return len(before) == 2 and all(
        (cls := gate_class(site.parent, name)) and cls.act_name
        and type(getattr(site.parent._modules[name], cls.act_name)) is nn.ReLU for name in before)


def gate_(model: nn.Module, config: Optional[AIGConfig] = None, **fields: Any) -> nn.Module:
    """Make every residual block of a model adaptive, in place.

    The gates start open: until they are trained, the model in eval computes the same as before, bit for bit.

    Args:
        model: Any module that contains blocks of a supported family, such as a timm model, a features_only backbone or
            a detector with one. Families: timm's resnet, res2net, resnest, sknet, resnetv2, regnet, convnext,
            efficientnet, mobilenetv3 and vision_transformer, of whose blocks attention and MLP have a gate each, and
            torchvision's ResNets.
        config: Which blocks to gate and their target rates. Default: AIGConfig().
        **fields: AIGConfig's fields, instead of config: `gate_(model, target_rate=0.5)`.

    Returns:
        The same model.

    Raises:
        InputError: The model has no supported blocks, has gates already or batch norms without running statistics, or
            the config does not fit it. The model is unchanged then.
    """
    if config is not None and fields:
        raise InputError(f'must not be given together with its fields ({", ".join(fields)}).', 'config')
    config = AIGConfig(**fields) if config is None else config
    if not isinstance(config, AIGConfig):
        raise InputError(f'must be an AIGConfig, not {type(config).__name__}.', 'config')
    if not isinstance(model, nn.Module):
        raise InputError(f'must be a module, not {model!r:.80}.', 'model')
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise InputError('is wrapped in DistributedDataParallel: convert the model first, then wrap it.', 'model')
    if _find_blocks(model, _is_gated) or isinstance(model, GatedBlock):
        raise InputError('is gated already, ungate_ it first to change its gates.', 'model')
    if type(model) in GATED:
        raise InputError(f'({type(model).__name__}) is a block itself, gate_ the module that holds it.', 'model')
    sites = _find_blocks(model, gate_class)
    if not sites:
        modules = sorted({(key if isinstance(key, type) else key[0]).__module__ for key in GATED})
        raise InputError(
            f'({type(model).__name__}) has no supported blocks. Supported are the residual blocks with a '
            f'shortcut of {", ".join(modules)}, in their models and in modules built from them.', 'model')

    for site in sites:
        norms = [m for m in site.block.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]
        if any(norm.running_mean is None for norm in norms):
            raise InputError(f'has a batch norm without running statistics in {site.stage}: what a sample gives would '
                             'depend on which others of its batch run.', 'model')

    rates = _rates(sites, config)
    if config.schedule and min(rates) == 1:
        raise InputError(f'{config.schedule!r} leaves none of the {len(sites)} blocks a gate.', 'schedule')
    if min(rates) == 1:
        _logger.warning('A target rate of 1 leaves none of the %d blocks a gate.', len(sites))
    replacements: Dict[nn.Module, GatedBlock] = {}  # by block: one that is used in two places stays one
    for site, rate in zip(sites, rates):
        if rate < 1 and site.block not in replacements:
            gated, weight = site.cls, next(site.block.parameters())
            gate = Gate(
                gated.in_channels(site.block),
                config.gate_channels,
                config.gate_norm or gated.gate_norm,
                device=weight.device,
                dtype=weight.dtype,
            )
            gate.train(site.block.training)
            relu_input = all(_relu_input(s) for s in sites if s.block is site.block)
            replacements[site.block] = gated(site.block, gate, rate, relu_input)
    for site in sites:
        if site.block in replacements:
            setattr(site.parent, site.child, replacements[site.block])
    _record_args(model, config)
    return model


def ungate_(model: nn.Module) -> nn.Module:
    """Turn an adaptive model back into the static timm model, in place. All blocks run and the keys are timm's.

    Returns:
        The same model.

    Raises:
        InputError: The model has no gated blocks or is optimized for inference.
    """
    require_gated_blocks(model)
    sites = _find_blocks(model, _is_gated)
    if not sites:
        raise InputError('is optimized for inference, ungate_ the original and optimize that.', 'model')
    blocks = {site.block: site.block.ungated() for site in sites}  # by block, as in gate_
    for site in sites:
        setattr(site.parent, site.child, blocks[site.block])
    _record_args(model, None)
    return model


def _record_args(model: nn.Module, config: Optional[AIGConfig]) -> None:
    """Update the architecture and arguments from which timm would rebuild the model."""
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


def copy_module(model: nn.Module, memo: Optional[Dict[int, Any]] = None) -> nn.Module:
    """copy.deepcopy of a module, also of one whose weights a hook computes, as pruning does."""
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor) and not t.is_leaf]
    return copy.deepcopy(model, {**{id(t): t.detach().clone() for t in computed}, **(memo or {})})


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy of a model in eval that computes the same with plain modules, which can be read and replaced.

    Parametrized weights, as of weight_norm and spectral_norm, get their values. Compiled modules are not compiled.
    """
    from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

    model = copy_module(model).eval()
    model = model._modules.get('_orig_mod') or model
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and '_orig_mod' in child._modules:
                setattr(module, name, child._modules['_orig_mod'])
        if is_parametrized(module):
            # not remove_parametrizations, which changes the class that the original shares
            values = {name: getattr(module, name).detach() for name in module.parametrizations}  # type: ignore
            module.__class__ = type_before_parametrizations(module)
            del module.parametrizations
            for name, value in values.items():
                setattr(module, name, nn.Parameter(value))
    return model


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Fit a checkpoint to a model. Both may be adaptive or static. This is a filter_fn as timm calls it.

    A static checkpoint for an adaptive model gets the model's new, open gates. An adaptive checkpoint must have the
    same gates as the model, or loses them if the model is static.

    Args:
        state_dict: Checkpoint.
        model: Model made by timm.create_model.

    Returns:
        The checkpoint with the gates of the model.

    Raises:
        RuntimeError: The checkpoint's gates are not the model's (other blocks, another width or norm), or weights
            other than the classifier's are missing.
    """
    classifiers = getattr(model, 'pretrained_cfg', {}).get('classifier') or ()
    heads = tuple(f'{name}.' for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    # gates, the classifier, and a counter that checkpoints of old torch versions do not have
    missing = [k for k in model.state_dict() if k not in state_dict and not (
        _gated_block(k) or k.startswith(heads) or k.endswith('.num_batches_tracked'))]
    if missing:  # timm does not check this if the number of classes differs, and would leave random weights
        raise RuntimeError(f'The checkpoint does not fit: it lacks {len(missing)} tensors, {", ".join(missing[:3])}...')
    own = {k: v for k, v in model.state_dict().items() if _gated_block(k)}
    theirs = {k: v for k, v in state_dict.items() if _gated_block(k)}
    if not theirs:
        if own:
            _logger.warning(
                f'Loaded the weights of the static parent. The {len(gated_blocks(model))} gates are untrained and '
                f'open for every image, so the model computes the same as its parent until it is fine-tuned. '
                f'timm_aig.list_trained() lists the models with trained gates.')
        return {**state_dict, **own}
    blocks_own, blocks_theirs = ({_gated_block(k) for k in keys} for keys in (own, theirs))
    if not own and not getattr(model, 'pretrained_cfg', {}).get('architecture', '').endswith('_aig'):
        _logger.warning(
            f'Loaded the weights of an adaptive model. Since this model is static, its {len(blocks_theirs)} gates are '
            f'dropped and every block runs for every image.')
        return {k: v for k, v in state_dict.items() if k not in theirs}
    if blocks_own != blocks_theirs:
        raise RuntimeError(
            f'The checkpoint does not fit: it has gates on {_names(blocks_theirs)}, the model on {_names(blocks_own)}. '
            f'Pass the target_rate, schedule or target_rates it was trained with.')
    for key in sorted(own.keys() | theirs.keys()):
        if key.endswith('.gate.offset'):  # missing in files of timm_aig before 0.2
            continue
        shapes = [list(d[key].shape) if key in d else 'missing' for d in (theirs, own)]
        if shapes[0] != shapes[1]:
            raise RuntimeError(
                f'The checkpoint does not fit: {key} is {shapes[0]} in the checkpoint and {shapes[1]} in the model. '
                f'Pass the gate_channels and gate_norm it was trained with.')
    return state_dict


def _gated_block(key: str) -> str:
    """Block of a state dict key of a gate, '' for other keys: 'layer1.0.gate.fc1.bias' -> 'layer1.0'."""
    match = GATE_KEY.match(key)
    return match[1] if match else ''


def _names(blocks: Set[str]) -> str:
    return f'{len(blocks)} blocks ({", ".join(sorted(blocks))})' if blocks else 'no block'
