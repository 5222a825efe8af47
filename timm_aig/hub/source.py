"""Models from the Hub or a folder: what their config.json may say, and weights of the same revision as it."""
import inspect
import logging
from dataclasses import fields
from math import isfinite
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from timm.models import PretrainedCfg
from timm.models._hub import hf_split
from timm.models.resnet import ResNet

from ..budget import read_budget_table
from ..config import AIG_ARGS

__all__ = ['check_model_args', 'check_pretrained_cfg', 'checked_source', 'config_file']

_logger = logging.getLogger(__name__)

LARGEST = 65536  # of any number of channels, classes, blocks: beyond it a config asks for memory, not for a model
MODEL_ARGS = {*AIG_ARGS, 'gate_offset', 'gate_budgets', 'channels'}
MODEL_ARGS |= {*list(inspect.signature(ResNet.__init__).parameters)[1:]}
MODEL_ARGS -= {'block', 'device', 'dtype'}  # what JSON cannot hold, and where the model is


def checked_source(pretrained: bool, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments that timm gives an entry point, checked and pinned if they come from a config.json.

    Weights from the Hub are those of the commit that config.json is of, whatever is pushed meanwhile, and are read from
    model.safetensors only.

    Raises:
        ValueError: config.json has a wrong value.
        RuntimeError: The repository changed while its config.json was read.
    """
    where = config_file(kwargs)
    if where is None:
        return kwargs
    cfg = kwargs['pretrained_cfg']
    check_pretrained_cfg(cfg, where)
    check_model_args(kwargs.get('pretrained_model_args', {}), where)
    cfg = dict(cfg, custom_load=False)
    if cfg['source'] == 'hf-hub':
        cfg['hf_hub_filename'] = 'model.safetensors'
        if pretrained:
            cfg['hf_hub_id'] = _pinned(cfg['hf_hub_id'], kwargs.get('cache_dir'))
    return dict(kwargs, pretrained_cfg=cfg)


def config_file(kwargs: Dict[str, Any]) -> Optional[str]:
    """Where the arguments that timm gives an entry point come from, for errors; None if not from a config.json."""
    cfg = kwargs.get('pretrained_cfg')
    if not isinstance(cfg, dict) or cfg.get('source') not in ('hf-hub', 'local-dir'):
        return None
    return f"{cfg['hf_hub_id'] if cfg['source'] == 'hf-hub' else cfg['file']}/config.json"


def _pinned(hub_id: str, cache_dir: Optional[str]) -> str:
    """'user/name@commit' for the commit whose config.json was read last, from the Hub or from the cache."""
    repo_id, revision = hf_split(hub_id)
    config = try_to_load_from_cache(repo_id, 'config.json', cache_dir=cache_dir, revision=revision)
    commit = Path(config).parent.name if isinstance(config, str) else None
    if commit is None or commit == revision:
        return hub_id
    if not constants.HF_HUB_OFFLINE:
        # huggingface_hub takes an older copy from its cache without a word where the Hub fails to answer.
        try:
            newest = get_hf_file_metadata(hf_hub_url(repo_id, 'config.json', revision=revision)).commit_hash
        except Exception as e:
            _logger.warning(f'{hub_id} cannot be asked for its newest version, loading {commit} from the cache: {e}')
        else:
            if newest != commit:
                raise RuntimeError(
                    f'{hub_id} changed from {commit} to {newest} while it was loaded, or the Hub did not answer at '
                    f'first. Load it again.')
    return f'{repo_id}@{commit}'


def check_pretrained_cfg(cfg: Dict[str, Any], where: Any) -> None:
    """Check a pretrained_cfg that was read from a file.

    Args:
        cfg: The pretrained_cfg.
        where: What to name in errors.

    Raises:
        ValueError: An unknown field or a value that is not allowed.
    """
    unknown = sorted(set(cfg) - {f.name for f in fields(PretrainedCfg)})
    if unknown:
        raise ValueError(f'{where}: pretrained_cfg has no field {", ".join(map(repr, unknown))}.')
    for name, (allowed, is_allowed) in _CFG_FIELDS.items():
        value = cfg.get(name)
        if value is not None and not is_allowed(value):
            raise ValueError(f'{where}: {name} must be {allowed}, not {_short(value)}.')


def check_model_args(model_args: Any, where: Any) -> None:
    """Check the model arguments of a config.json: names of AIGConfig's fields and of timm's ResNet, values of JSON.

    Raises:
        ValueError: An unknown name, or a number that is too large. What the values mean, the model checks.
    """
    if not isinstance(model_args, dict):
        raise ValueError(f'{where}: model_args must be an object, not {_short(model_args)}.')
    for name, value in model_args.items():
        if name not in MODEL_ARGS:
            raise ValueError(f'{where}: model_args has {_short(name)}, known are {", ".join(sorted(MODEL_ARGS))}.')
        if name == 'gate_budgets':
            try:
                read_budget_table(value)
            except ValueError as e:
                raise ValueError(f'{where}: {e}') from e
            continue
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
        if not all(isfinite(v) and abs(v) <= LARGEST for v in numbers):
            raise ValueError(f'{where}: {name} must be at most {LARGEST}, not {_short(value)}.')
        if isinstance(value, list) and len(value) > 1024:
            raise ValueError(f'{where}: {name} must be a list of at most 1024 entries, not {len(value)}.')
        if name == 'layers' and (not isinstance(value, list) or not all(_whole(v, 1, 1024) for v in value)):
            raise ValueError(f'{where}: layers must be a list of whole numbers from 1 to 1024, not {_short(value)}.')


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:80]}...'


def _whole(value: Any, low: int, high: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _size(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 3 and all(_whole(v, 1) for v in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and 1 <= len(value) <= LARGEST and all(_number(v) for v in value)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return _text(value) or (isinstance(value, (list, tuple)) and all(_text(v) for v in value))


_SIZE = ('three whole numbers above 0', _size)
_FLAG = ('true or false', lambda value: isinstance(value, bool))
_CROP = ('a number above 0', lambda value: _number(value) and value > 0)
_TEXT = ('a text', _text)
_TEXTS = ('a text or a list of texts', _texts)

# Fields of PretrainedCfg: what is allowed, in words and as a test.
_CFG_FIELDS: Dict[str, Tuple[str, Callable[[Any], bool]]] = {
    'input_size': _SIZE, 'test_input_size': _SIZE, 'min_input_size': _SIZE,
    'num_classes': (f'a whole number from 0 to {LARGEST}', lambda value: _whole(value, 0)),
    'label_offset': (f'a whole number from 0 to {LARGEST}', lambda value: _whole(value, 0)),
    'mean': ('a list of numbers', _numbers), 'std': ('a list of numbers', _numbers),
    'crop_pct': _CROP, 'test_crop_pct': _CROP,
    'fixed_input_size': _FLAG,
    'architecture': _TEXT, 'tag': _TEXT, 'interpolation': _TEXT, 'crop_mode': _TEXT, 'license': _TEXT,
    'description': _TEXT, 'origin_url': _TEXT, 'paper_name': _TEXT, 'hf_hub_id': _TEXT, 'file': _TEXT,
    'first_conv': _TEXTS, 'classifier': _TEXTS, 'paper_ids': _TEXTS, 'notes': _TEXTS,
    'label_names': ('a list of names', lambda value: isinstance(value, (dict, list, tuple))),
    'label_descriptions': ('an object', lambda value: isinstance(value, dict)),
    'pool_size': ('a list of whole numbers above 0',
                  lambda value: isinstance(value, (list, tuple)) and all(_whole(v, 1) for v in value)),
}
