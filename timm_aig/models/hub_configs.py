"""The known checkpoints: the files of hub_configs, which say how each was made and where its weights are."""
import json
from pathlib import Path
from typing import Any, Dict

__all__ = ['load_hub_configs']


def load_hub_configs() -> Dict[str, Dict[str, Any]]:
    """The checkpoints this package knows, one file of hub_configs each, by its name, '<architecture>.<tag>'.

    Weights that lie beside a file, <its name>.safetensors, are in its pretrained_cfg as `file`.
    """
    package = Path(__file__).parent.parent
    installed, checkout = package / 'hub_configs', package.parent / 'hub_configs'  # a wheel has them inside the package
    folder = installed if installed.is_dir() else checkout
    configs = {}
    for file in sorted(folder.glob('*.json')):
        config = json.loads(file.read_text(encoding='utf-8'))
        weights = file.with_name(f'{file.stem}.safetensors')  # a tag may hold a dot
        if weights.is_file():
            config['pretrained_cfg']['file'] = str(weights)
        configs[file.stem] = config
    return configs
