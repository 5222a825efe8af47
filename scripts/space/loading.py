"""Load a network of the page by name: a shipped one, or an adaptive model or a cascade of the Hub or of a folder."""
import csv
import json
import os
import re
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

import timm
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from images import read_image
from network import ModelError, Network
from PIL import Image

import timm_aig

__all__ = ['CASCADE', 'ON_A_SPACE', 'load_network', 'shipped_models']

ON_A_SPACE = 'SPACE_ID' in os.environ
HERE = Path(__file__).resolve().parent
STAGES, THRESHOLD = ('cifar_resnet8.fmnist', 'cifar_resnet32.fmnist'), .8856  # hub_configs/results/fmnist_cascades.csv
CASCADE = f'cascade of {" and ".join(STAGES)}'
MAX_PARAMETERS = 300_000_000  # 1.2 GB; any visitor may name a model
MAX_BYTES = 5 * MAX_PARAMETERS  # of all files of a repository that may be loaded, those that end so:
LOADED = ('.safetensors', 'config.json', 'rates.csv', 'execution_rates.png')
MAX_ARGUMENTS = 10_000  # sum of the whole numbers in model_args; 1,000 layers take seconds to build
MAX_STAGES = 4
MAX_CSV = 10_000_000  # characters
REASONS = (
    (HFValidationError, 'is not a name of a model on the Hub: hf-hub:user/name.'),
    ((RepositoryNotFoundError, RevisionNotFoundError), 'is not on the Hub, or not public.'),
    ((LocalEntryNotFoundError, TimeoutError), 'cannot be loaded: the Hub does not answer.'),
    ((FileNotFoundError, EntryNotFoundError), 'has no config.json or no model.safetensors.'))


def shipped_models() -> List[str]:
    """Names of the adaptive models with weights in the package."""
    return [name for name in timm_aig.list_trained() if timm.get_pretrained_cfg(name).file]


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
        network = Network(name, _create(name))
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
    network.rates = _find_rates(name, network.stages[0].gated, network.model.num_classes)
    return network


def _create(name: str) -> Any:
    """The model or cascade of a name. A foreign one is looked at before it is loaded."""
    if name == CASCADE:
        return timm_aig.Cascade([timm.create_model(stage, pretrained=True) for stage in STAGES], THRESHOLD)
    if name in shipped_models():
        return timm.create_model(name, pretrained=True)
    if name.startswith('hf-hub:'):
        repo_id, revision = _split(name)
        files = HfApi().model_info(repo_id, revision=revision, files_metadata=True).siblings or []
        size = sum(file.size or 0 for file in files if file.rfilename.endswith(LOADED))
        if size > MAX_BYTES:
            raise ModelError(f'{name} has {size:,} bytes to load; this page loads at most {MAX_BYTES:,}.')
    path = _find_file(name, 'config.json')
    config = json.loads(path.read_text(encoding='utf-8'))
    folders = [path.parent]
    if 'cascade' in config:
        stages = [str(stage['model']) for stage in config['cascade']['stages']]
        if len(stages) > MAX_STAGES:
            raise ModelError(f'{name} has {len(stages)} stages; this page runs at most {MAX_STAGES}.')
        folders = [_find_file(name, f'{model}/config.json').parent for model in {*stages}
                   if re.fullmatch(r'model_\d+', model)]
    elif not str(config['architecture']).endswith('_aig'):
        raise ModelError(f'{name} has the architecture {str(config["architecture"])[:80]!r}; this page shows adaptive '
                         'models, <name>_aig, and cascades.')
    for folder in folders:
        model_args = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('model_args') or {}
        if _sum({k: v for k, v in model_args.items() if k != 'gate_budgets'}) > MAX_ARGUMENTS:
            raise ModelError(f'{name} has model_args in its config.json that are too large for this page.')
    models = [timm.create_model(f'local-dir:{folder}', device='meta') for folder in folders]
    parameters = sum(p.numel() for model in models for p in model.parameters())
    if parameters > MAX_PARAMETERS:
        raise ModelError(f'{name} has {parameters:,} parameters; this page loads models of at most {MAX_PARAMETERS:,}.')
    return timm_aig.Cascade.from_pretrained(name) if 'cascade' in config else timm.create_model(name, pretrained=True)


def _split(name: str) -> Tuple[str, Optional[str]]:
    """The repository of hf-hub:user/name[@revision], and its revision."""
    repo_id, _, revision = name.removeprefix('hf-hub:').partition('@')
    return repo_id, revision or None


def _sum(value: Any) -> int:
    """Sum of the whole numbers in a JSON value."""
    if isinstance(value, (list, dict)):
        return sum(map(_sum, value.values() if isinstance(value, dict) else value))
    return value if isinstance(value, int) else 0


def _find_file(name: str, filename: str) -> Path:
    """A file of a folder or repository that the page may load, or one beside a shipped model."""
    source, _, place = name.partition(':')
    if source == 'hf-hub':
        repo_id, revision = _split(name)
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    if source == 'local-dir' and not ON_A_SPACE:
        return Path(place, filename)
    if name in shipped_models():
        folders = [root / 'hub_configs' / name for root in (HERE, HERE.parent.parent)]  # in a Space and in a checkout
        return next((folder / filename for folder in folders if folder.is_dir()), Path(filename))
    folder = '' if ON_A_SPACE else ' or local-dir:folder'
    raise ModelError(
        f'must be {", ".join([*shipped_models(), CASCADE])}, hf-hub:user/name{folder}, not {name[:80]!r}.')


def _find_rates(name: str, blocks: List[str], classes: int) -> Union[List[List[float]], Image.Image, None]:
    """Execution rates beside a model, as analyze.py writes them: by class and block, else as a picture, else None."""
    with suppress(Exception):  # none, or of another form: the page works without it
        with open(_find_file(name, 'rates.csv'), newline='', encoding='utf-8') as file:
            rows = list(csv.DictReader(file.read(MAX_CSV).splitlines()))
        rates = [[float(row[block] or 'nan') for block in blocks] for row in rows]
        if len(rates) == classes and not any(rate < 0 or rate > 1 for row in rates for rate in row):
            return rates
    with suppress(Exception):
        return read_image(_find_file(name, 'execution_rates.png'))
    return None
