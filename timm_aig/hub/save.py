"""save_pretrained: a folder from which timm and transformers load the same model."""
import copy
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Union

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import is_model, save_for_hf
from timm.utils import unwrap_model

from ..blocks import gated_blocks
from ..budget import budget_table
from ..config import InputError
from ..convert import plain_copy
from ..passes import forward_gates

__all__ = ['move_files', 'save_pretrained']

FILES = ('model.safetensors', 'config.json')


def move_files(source: Union[str, os.PathLike], folder: Path) -> None:
    """Move all files of a folder tree into another one, over what is there: those that describe others last."""
    for file in sorted(Path(source).rglob('*'), reverse=True):  # model_1/... before config.json
        if file.is_file():
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


def save_pretrained(
        model: nn.Module,
        folder: Union[str, os.PathLike],
        model_config: Optional[Dict[str, Any]] = None,
) -> Path:
    """Save a model so that `timm.create_model('local-dir:folder', pretrained=True)` rebuilds it.

    Writes `model.safetensors` and `config.json`, after timm has rebuilt the model from them with the same weights,
    logits and gates. The gate offset and the table of calibrate_budget are saved too.

    Args:
        model: Model made by timm.create_model, or converted from one. May be wrapped by DDP, torch.compile or an EMA.
            Parametrized weights, as of weight_norm, are saved by their values.
        folder: Output folder, created if missing.
        model_config: More entries for config.json, such as label_names.

    Returns:
        The folder.

    Raises:
        InputError: timm would not rebuild this model, a weight is not finite, or label_names does not have one name
            for each class.
        OSError: The folder cannot be written to. Its files are unchanged.
    """
    model = plain_copy(unwrap_model(model))
    _require_rebuildable(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.saving-') as saving:
        try:
            save_file(_tensors(model), Path(saving, 'model.safetensors'), metadata={'format': 'pt'})
        except SafetensorError as e:  # also raised for a full disk
            raise OSError(f'cannot write to {folder}: {e}') from e
        _write_config(model, Path(saving), model_config)
        _require_reload(model, saving)
        # safetensors makes files that only their owner may read
        shutil.copymode(Path(saving, 'config.json'), Path(saving, 'model.safetensors'))
        for name in FILES:
            os.replace(Path(saving, name), folder / name)
    return folder


def _require_rebuildable(model: nn.Module) -> None:
    arch = getattr(model, 'pretrained_cfg', {}).get('architecture')
    if not arch or not is_model(arch) or (gated_blocks(model) and not arch.endswith('_aig')):
        raise InputError(
            f'this model ({type(model).__name__}, architecture {arch!r}) cannot be rebuilt from timm\'s registry: '
            f'only models made by timm.create_model can be saved.')
    if not hasattr(model, 'num_classes'):
        raise InputError(f'this model ({type(model).__name__}) is a backbone without a head, save the whole model.')
    replaced = [name or 'the model' for name, m in model.named_modules() if 'forward' in vars(m)]
    if replaced:
        raise InputError(f'the forward of {replaced[0]} was replaced: unwrap the model first, for accelerate by '
                         f'unwrap_model(model, keep_fp32_wrapper=False).')


def _tensors(model: nn.Module) -> Dict[str, torch.Tensor]:
    """The state dict as contiguous copies on the CPU."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if type(tensor) is not torch.Tensor or tensor.is_quantized:
            raise InputError(f'{name} is no plain tensor ({type(tensor).__name__}): save the model before it is '
                             f'quantized or sharded.')
        if tensor.is_meta or (tensor.is_floating_point() and not tensor.isfinite().all()):
            raise InputError(f'{name} has no values or values that are not finite, nothing was saved.')
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors


def _write_config(model: nn.Module, folder: Path, model_config: Optional[Dict[str, Any]]) -> None:
    """Write timm's config.json, in a form that transformers' TimmWrapper takes too."""
    # timm exports config.json only with weights, of any layout only as a pickle: give it a model without values.
    save_for_hf(copy.deepcopy(model).to('meta'), str(folder), model_config=model_config)
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    names = config['pretrained_cfg'].get('label_names')
    fit = names is None or len(names) == config['num_classes']  # no longer after reset_classifier
    for name in ('label_names', 'label_descriptions'):  # timm reads them here or there, transformers only at the top
        labels = config['pretrained_cfg'].pop(name, None)
        if labels is not None and fit:
            config.setdefault(name, labels)
    labels = config.get('label_names')
    if labels is not None and len(labels) != config['num_classes']:
        raise InputError(f'label_names has {len(labels)} names, the model {config["num_classes"]} classes.')
    args = config.setdefault('model_args', {})
    args.pop('num_classes', None)  # transformers passes it too, which would be twice
    args.pop('gate_offset', None)  # in the weights
    args.pop('gate_budgets', None)
    if budget_table(model):
        args['gate_budgets'] = [point.to_dict() for point in budget_table(model)]
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _require_reload(model: nn.Module, folder: Union[str, os.PathLike]) -> None:
    """Check that timm rebuilds the same model from the folder."""
    dtype = {} if torch.get_default_dtype() == torch.float32 else {'dtype': torch.float32}
    logger = logging.getLogger('timm')
    level = logger.level
    logger.setLevel(logging.WARNING)  # it would name the temporary folder
    try:
        with torch.random.fork_rng(devices=[]), torch.device('cpu'):  # leaves the caller's random numbers alone
            reloaded = timm.create_model(f'local-dir:{folder}', pretrained=True, **dtype).eval()
    except Exception as e:
        unfit = any(text in str(e) for text in ('Unexpected key', 'it lacks', 'missing in the'))
        merge = ' If they are of adapters or pruning, merge these first.' if unfit else ''
        raise InputError(f'timm cannot rebuild this model ({type(model).__name__}): {e}{merge}') from e
    finally:
        logger.setLevel(level)
    saved: Any = copy.deepcopy(model).cpu().float().to(memory_format=torch.contiguous_format).eval()
    for block in gated_blocks(saved).values():
        block.execution = 'auto'  # not saved
    channels, *size = reloaded.pretrained_cfg['input_size']
    if not reloaded.pretrained_cfg.get('fixed_input_size'):
        size = [min(s, 64) for s in size]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *size, generator=generator, dtype=torch.float32, device='cpu')
    with torch.no_grad():
        expected, found = forward_gates(saved, x), forward_gates(reloaded, x)
    if not expected[0].isfinite().all():
        raise InputError('the logits of this model are not finite.')
    if not all(map(torch.equal, expected, found)):
        raise InputError(
            'timm rebuilds a model with other logits or gates: this one was changed after timm.create_model in a way '
            'that config.json cannot express.')
