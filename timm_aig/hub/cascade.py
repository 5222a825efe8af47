"""Save, load and publish a Cascade: a folder for each model, and one config.json for the stages."""
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Union

import timm
from huggingface_hub import ModelCardData, snapshot_download

from ..config import InputError
from .card import INSTALL, merge_card, name_on_hub
from .push import TIMEOUT, Upload, check_repo_id, look_up, open_api, send
from .save import move_files, save_pretrained
from .timeout import hub_timeout

if TYPE_CHECKING:
    from ..cascade import Cascade

__all__ = ['load_cascade', 'push_cascade', 'save_cascade']

TAGS = ['timm', 'timm_aig', 'image-classification', 'cascade']
ABOUT = 'A cascade: an image goes on to the next stage while its largest class probability is below the threshold.'
STAGES = """| stage | model | budget | threshold |
|---|---|---|---|
"""
USAGE = """```python
import timm_aig

cascade = timm_aig.Cascade.from_pretrained('hf-hub:{name}')
logits = cascade(x)
```"""


def save_cascade(cascade: 'Cascade', folder: Union[str, os.PathLike]) -> Path:
    """Write `model_1/`, `model_2/`, ... as save_pretrained does, each model once, and config.json.

    Args:
        cascade: Cascade of models made by timm.create_model.
        folder: Output folder, created if missing.

    Raises:
        InputError: A model cannot be saved, see save_pretrained. The files in the folder are unchanged.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stages = [
        {'model': f'model_{index + 1}', 'budget': budget, 'threshold': threshold}
        for index, budget, threshold in zip(cascade.order, cascade.budgets, (*cascade.thresholds, None))]
    text = json.dumps({'library_name': 'timm_aig', 'cascade': {'stages': stages}}, indent=2)
    with tempfile.TemporaryDirectory(prefix='.saving-', dir=folder) as new:
        for number, model in enumerate(cascade.models, start=1):
            save_pretrained(model, Path(new, f'model_{number}'))
        Path(new, 'config.json').write_text(text + '\n', encoding='utf-8')
        move_files(new, folder)
    return folder


def load_cascade(name: Union[str, os.PathLike], **kwargs: Any) -> 'Cascade':
    """Load a cascade, in eval, from a folder, 'local-dir:folder' or 'hf-hub:user/name[@revision]', of one commit.

    Args:
        name: Where it is.
        **kwargs: For timm.create_model, such as in_chans.

    Raises:
        InputError: There is no cascade, or its config.json is not one.
        TimeoutError: The Hub stalled.
    """
    from ..cascade import Cascade

    source, _, rest = str(name).partition(':')
    if source == 'hf-hub':
        repo_id, _, revision = rest.partition('@')
        check_repo_id(repo_id)
        files = ['config.json', 'model_*/config.json', 'model_*/model.safetensors']
        with hub_timeout(TIMEOUT):
            folder = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=files))
    else:
        folder = Path(rest if source == 'local-dir' else name)
    stages = _read_stages(folder / 'config.json')
    names = sorted({stage['model'] for stage in stages})
    models = {name: timm.create_model(f'local-dir:{folder / name}', pretrained=True, **kwargs) for name in names}
    return Cascade(
        [(models[stage['model']], stage['budget']) for stage in stages],
        [stage['threshold'] for stage in stages[:-1]]).eval()


def _read_stages(path: Path) -> List[Dict[str, Any]]:
    try:
        stages = json.loads(path.read_text(encoding='utf-8'))['cascade']['stages']
        if not all(re.fullmatch(r'model_\d+', stage['model']) for stage in stages):  # no path to elsewhere
            raise ValueError('a stage names no model_<number>')
        if not all(isinstance(stage['threshold'], (int, float)) for stage in stages[:-1]):
            raise ValueError('a stage before the last has no threshold')
        return [{name: stage[name] for name in ('model', 'budget', 'threshold')} for stage in stages]
    except (OSError, LookupError, TypeError, ValueError) as e:
        raise InputError(f'{path.parent} is not a saved cascade: {type(e).__name__} {e}') from e


def push_cascade(
        cascade: 'Cascade',
        repo_id: str,
        *,
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        token: Optional[str] = None,
        timeout: float = TIMEOUT,
) -> str:
    """Publish a cascade in one commit, with a model card. Your own text in a card that is there is kept.

    Args:
        cascade: As for save_cascade.
        repo_id: 'user/name', created if missing.
        private: Visibility of a new repository, None for the namespace's default.
        revision: Branch to commit to, created from main if missing. None for main.
        token: Access token, None for HF_TOKEN or the one saved by `hf auth login`.
        timeout: Seconds to wait for a Hub that stalls, see hub_timeout.

    Returns:
        URL of the commit.

    Raises:
        InputError: The id is not 'user/name', a model cannot be saved, or private is True and the repository is public.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused a request.
        TimeoutError: The Hub stalled.
    """
    check_repo_id(repo_id)
    api = open_api(token)
    with tempfile.TemporaryDirectory() as temporary, hub_timeout(timeout):
        folder = save_cascade(cascade, temporary)
        upload, head, old_card = look_up(api, Upload(repo_id, private=private, revision=revision))
        (folder / 'README.md').write_text(_card(cascade, upload, old_card), encoding='utf-8', newline='')
        return send(api, upload, head, folder, 'Add cascade')


def _card(cascade: 'Cascade', upload: Upload, existing: Optional[str]) -> str:
    rows = []
    for stage, index in enumerate(cascade.order):
        model: Any = cascade.models[index]
        budget, threshold = cascade.budgets[stage], (*cascade.thresholds, None)[stage]
        cells = ('' if value is None else f'{value:.4g}' for value in (budget, threshold))
        rows.append(f'| {stage + 1} | {model.pretrained_cfg["architecture"]} | {" | ".join(cells)} |')
    models: Any = cascade.models
    licenses = {model.pretrained_cfg.get('license') for model in models}
    data = ModelCardData(
        license=licenses.pop() if len(licenses) == 1 else None, library_name='timm', tags=TAGS,
        pipeline_tag='image-classification')
    name = name_on_hub(upload.repo_id, upload.revision)
    title, table = f'# {upload.repo_id.partition("/")[2]}', STAGES + '\n'.join(rows)
    sections = [title, ABOUT, INSTALL, table, USAGE.format(name=name)]
    return merge_card(upload.repo_id, sections, data, existing)
