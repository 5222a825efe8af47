"""Load a network of the page by name: a shipped one, or an adaptive model or a cascade of the Hub or of a folder."""
import json
import os
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List

import timm
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from network import ModelError, Network
from rates import download

import timm_aig
from timm_aig.models.hub_configs import load_hub_configs

__all__ = ['CASCADE', 'load_network', 'shipped_models']

ON_A_SPACE = 'SPACE_ID' in os.environ
CASCADE = 'cascade of fmnist_t04 and fmnist_t06'  # as calibrated in hub_configs/results/fmnist_cascades.csv
MAX_PARAMETERS = 300_000_000  # 1.2 GB; any visitor may name a model
MAX_STAGES = 4
REASONS = (
    (HFValidationError, 'is not a name of a model on the Hub: hf-hub:user/name.'),
    ((RepositoryNotFoundError, RevisionNotFoundError), 'is not on the Hub, or not public.'),
    ((LocalEntryNotFoundError, TimeoutError), 'cannot be loaded: the Hub does not answer.'),
    ((FileNotFoundError, EntryNotFoundError), 'has no config.json or no model.safetensors.'))


def shipped_models() -> List[str]:
    """Names of the trained models in the package."""
    return [name for name, config in load_hub_configs().items() if 'file' in config['pretrained_cfg']]


def load_network(name: str) -> Network:
    """Load a network by name: a shipped one, [hf-hub:]user/name[@revision], or local-dir:folder.

    Raises:
        ModelError: It cannot be loaded, or it is a folder and this is a Space.
    """
    name = name.strip()
    if re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', name):
        name = f'hf-hub:{name}'
    return _load(name)


@lru_cache(maxsize=4)
def _load(name: str) -> Network:
    try:
        if name == CASCADE:
            models = [timm.create_model(f'cifar_resnet32_aig.fmnist_{tag}', pretrained=True) for tag in ('t04', 't06')]
            return Network(name, timm_aig.Cascade(list(zip(models, (.4, .7))), .7469))
        if name not in shipped_models() and 'cascade' in _read_checked_config(name):
            return Network(name, timm_aig.Cascade.from_pretrained(name))
        return Network(name, timm.create_model(name, pretrained=True))
    except ModelError:
        raise
    except Exception as e:  # a repository may contain anything
        for kinds, reason in REASONS:
            if isinstance(e, kinds):
                raise ModelError(f'{name[:80]} {reason}') from e
        print(f'app.py: {name}: {type(e).__name__}: {e}', file=sys.stderr)
        reason = str(e) if isinstance(e, (ValueError, RuntimeError)) else ''
        reason = re.sub(r'(?<![\w:])(/[^\s/:\'"]+){2,}', '...', ' '.join(reason.split()))  # paths of this machine
        raise ModelError(f'{name} cannot be loaded: {reason[:300] or type(e).__name__}') from e


def _read_checked_config(name: str) -> Dict[str, Any]:
    """The config.json of a folder or repository that the page may load. No weights are read."""
    path = _find_config(name, 'config.json')
    config = json.loads(path.read_text(encoding='utf-8'))
    folders = [path.parent]
    if 'cascade' in config:
        stages = [str(stage['model']) for stage in config['cascade']['stages']]
        if len(stages) > MAX_STAGES:
            raise ModelError(f'{name} has {len(stages)} stages; this page runs at most {MAX_STAGES}.')
        folders = [_find_config(name, f'{model}/config.json').parent for model in {*stages}
                   if re.fullmatch(r'model_\d+', model)]
    elif not str(config['architecture']).endswith('_aig'):
        raise ModelError(f'{name} has the architecture {str(config["architecture"])[:80]!r}; this page shows adaptive '
                         'models, <name>_aig, and cascades.')
    models = [timm.create_model(f'local-dir:{folder}', device='meta') for folder in folders]
    parameters = sum(p.numel() for model in models for p in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise ModelError(f'{name} has {parameters:,} parameters; this page loads models of at most {MAX_PARAMETERS:,}.')
    return config


def _find_config(name: str, filename: str) -> Path:
    source, _, place = name.partition(':')
    if source == 'hf-hub':
        return download(place, filename)
    if source == 'local-dir' and not ON_A_SPACE:
        return Path(place, filename)
    folder = '' if ON_A_SPACE else ' or local-dir:folder'
    raise ModelError(
        f'must be {", ".join([*shipped_models(), CASCADE])}, hf-hub:user/name{folder}, not {name[:80]!r}.')
