"""hub_configs: schema, registry, defaults."""
import json
from pathlib import Path

import jsonschema
import pytest
import timm
from timm.models import PretrainedCfg

from timm_aig import AIGConfig, gated_blocks
from timm_aig.hub.card import checked_results
from timm_aig.models.hub_configs import load_hub_configs

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / 'hub_configs').glob('*.json'))
SCHEMA = json.loads((ROOT / 'tests' / 'hub_config.schema.json').read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_a_hub_config_fits_its_schema_its_name_and_its_readers(file):
    config = json.loads(file.read_text())
    VALIDATOR.validate(config)
    name = f"{config['architecture']}.{config['tag']}"
    assert file.stem == name
    PretrainedCfg(**config['pretrained_cfg'])
    if 'metrics' not in config:  # or training and registry would use different images
        for key in ('input_size', 'crop_pct', 'interpolation'):
            assert config['recipe'][key] == config['pretrained_cfg'][key]
    assert checked_results(config, config['architecture']) == config
    model = timm.create_model(name, device='meta')
    assert model.num_classes == config['pretrained_cfg']['num_classes']
    assert bool(gated_blocks(model)) == name.partition('.')[0].endswith('_aig') == ('aig' in config)
    if 'aig' not in config:
        return
    aig = AIGConfig(**config['aig'])
    assert aig.to_dict() == config['aig']  # written out in full
    if file.stem.endswith('_paper'):
        assert aig.schedule == 'paper' and config['tag'] == f't{round(aig.target_rate * 10):02d}_paper'
        assert not {'hf_hub_id', 'url', 'file'} & set(config['pretrained_cfg'])  # no weights to be listed
    assert {b.target_rate for b in gated_blocks(model).values()} <= {aig.target_rate, *(aig.target_rates or ()), .7, .8}


def test_every_file_is_in_the_registry_and_only_those_with_weights_are_listed_as_pretrained():
    configs = load_hub_configs()
    assert set(configs) == {file.stem for file in FILES} and len(configs) >= 6
    listed = set(timm.list_pretrained())
    for name, config in configs.items():
        cfg = timm.get_pretrained_cfg(name)
        own = config['pretrained_cfg']
        assert cfg.license == own['license'] and cfg.mean == tuple(own['mean'])
        has_weights = bool(own.get('hf_hub_id')) or (bool(cfg.file) and Path(cfg.file).exists())
        assert (name in listed) == has_weights


def test_a_default_has_weights_and_its_parent_has_none():
    configs = [config for config in load_hub_configs().values() if config.get('default')]
    assert {config['architecture'] for config in configs} >= {'cifar_resnet32_aig'}
    assert len({config['architecture'] for config in configs}) == len(configs)
    for config in configs:
        assert timm.is_model_pretrained(f"{config['architecture']}.{config['tag']}")
        assert not timm.is_model_pretrained(config['architecture'].removesuffix('_aig'))


@pytest.mark.parametrize('change', [
    dict(architecture='ResNet-50'), dict(tag='A b'), dict(description=''), dict(evil=1), dict(default=False),
    dict(metrics=dict(top1=94)), dict(reported=dict(top1=1)), dict(aig=dict(target_rate=2, version=1)),
    dict(pretrained_cfg={}),
])
def test_the_schema_refuses_what_is_wrong(change):
    config = {**json.loads((ROOT / 'hub_configs' / 'resnet50_aig.t05_paper.json').read_text()), **change}
    assert not VALIDATOR.is_valid(config)
