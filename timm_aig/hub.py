"""save_pretrained: an adaptive model as a folder that timm loads, safetensors and config.json."""
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Union

import torch.nn as nn
from safetensors.torch import save_file
from timm.models import is_model
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model

from .blocks import gated_blocks

__all__ = ['save_pretrained']


def save_pretrained(
        model: nn.Module,
        folder: Union[str, os.PathLike],
        model_config: Optional[Dict[str, Any]] = None,
) -> Path:
    """Save a model so that `timm.create_model('local-dir:folder', pretrained=True)` rebuilds it.

    Writes `model.safetensors` and `config.json`, each whole or not at all.

    Args:
        model: Model made by timm.create_model, or converted from one; may be wrapped by DDP or torch.compile.
        folder: Where to, created if missing.
        model_config: More entries of config.json, such as label_names.

    Returns:
        The folder.

    Raises:
        ValueError: The registry has no architecture that would rebuild the model.
    """
    model = unwrap_model(model)
    arch = getattr(model, 'pretrained_cfg', {}).get('architecture')
    if not arch or not is_model(arch) or (gated_blocks(model) and not arch.endswith('_aig')):
        raise ValueError(
            f'model ({type(model).__name__}, architecture {arch!r}) cannot be rebuilt from timm\'s registry: '
            f'only models made by timm.create_model can be saved.')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix='.saving-') as saving:
        save_file(tensors, Path(saving, 'model.safetensors'), metadata={'format': 'pt'})
        save_config_for_hf(model, str(Path(saving, 'config.json')), model_config=model_config)
        # safetensors makes files that only their owner may read
        shutil.copymode(Path(saving, 'config.json'), Path(saving, 'model.safetensors'))
        for name in ('model.safetensors', 'config.json'):
            os.replace(Path(saving, name), folder / name)
    return folder
