"""Checkpoints of the zoo: reads hub_configs, one JSON file for each checkpoint or recipe."""
import json
from functools import cache
from pathlib import Path
from typing import Any, Dict

from timm.models import PretrainedCfg

__all__ = ['load_hub_configs', 'pretrained_cfgs']


@cache
def load_hub_configs() -> Dict[str, Dict[str, Any]]:
    """Contents of the files in hub_configs by their names, '<architecture>.<tag>'.

    If there is a <name>.safetensors beside <name>.json, its path is the `file` of the pretrained_cfg.
    """
    package = Path(__file__).parent.parent
    installed, checkout = package / 'hub_configs', package.parent / 'hub_configs'  # a wheel has it inside the package
    folder = installed if installed.is_dir() else checkout
    configs = {}
    for file in sorted(folder.glob('*.json')):
        config = json.loads(file.read_text(encoding='utf-8'))
        weights = file.with_name(f'{file.stem}.safetensors')  # with_suffix would cut a tag with a dot
        if weights.is_file():
            config['pretrained_cfg']['file'] = str(weights)
        configs[file.stem] = config
    return configs


@cache
def pretrained_cfgs() -> Dict[str, Dict[str, PretrainedCfg]]:
    """timm's PretrainedCfg of each file, by architecture and tag."""
    cfgs: Dict[str, Dict[str, PretrainedCfg]] = {}
    for config in load_hub_configs().values():  # lists of JSON become tuples, as timm has them
        cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in config['pretrained_cfg'].items()}
        cfgs.setdefault(config['architecture'], {})[config['tag']] = PretrainedCfg(**cfg)
    return cfgs
