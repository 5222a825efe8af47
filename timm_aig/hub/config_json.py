"""What a model takes from the folder or repository of its config.json: safetensors only, all of one commit."""
from pathlib import Path
from typing import Any, Dict, Optional

from huggingface_hub import try_to_load_from_cache

__all__ = ['config_file', 'pin_weights']


def pin_weights(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Let an entry point load the weights that belong to the config.json that timm has read.

    Weights on the Hub are model.safetensors of the commit that the config.json in the cache is from.

    Args:
        kwargs: Arguments of an entry point.

    Returns:
        The arguments to go on with, `kwargs` itself if they are not from a config.json.
    """
    if config_file(kwargs) is None:
        return kwargs
    cfg = dict(kwargs['pretrained_cfg'], custom_load=False)
    if cfg['source'] == 'hf-hub':
        cfg['hf_hub_filename'] = 'model.safetensors'
        repo_id, _, revision = cfg['hf_hub_id'].partition('@')
        config = try_to_load_from_cache(
            repo_id, 'config.json', cache_dir=kwargs.get('cache_dir'), revision=revision or None)
        if isinstance(config, str):  # in a folder with the name of its commit
            cfg['hf_hub_id'] = f'{repo_id}@{Path(config).parent.name}'
    return dict(kwargs, pretrained_cfg=cfg)


def config_file(kwargs: Dict[str, Any]) -> Optional[str]:
    """Path of the config.json that an entry point's arguments were read from, None if there is none."""
    cfg = kwargs.get('pretrained_cfg')
    if not isinstance(cfg, dict) or cfg.get('source') not in ('hf-hub', 'local-dir'):
        return None
    return f"{cfg['hf_hub_id'] if cfg['source'] == 'hf-hub' else cfg['file']}/config.json"
