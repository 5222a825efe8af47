"""Weights that ship with the package: they load offline, and compute what is published of them."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import timm_aig

ROOT = Path(__file__).parent.parent


def test_weights_beside_a_hub_config_are_loaded_and_listed(tmp_path, train_gates):
    package = tmp_path / 'timm_aig'
    shutil.copytree(ROOT / 'timm_aig', package, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'hub_configs', package / 'hub_configs', ignore=shutil.ignore_patterns('*.safetensors'))
    config = json.loads((ROOT / 'hub_configs' / 'resnet50_aig.t05_paper.json').read_text())
    config.update(architecture='cifar_resnet20_aig', tag='test')
    config['aig'] = {'target_rate': 0.3, 'version': 1}
    config['pretrained_cfg'].update(num_classes=4, input_size=[1, 28, 28], mean=[0.3], std=[0.4], pool_size=[7, 7])
    (package / 'hub_configs' / 'cifar_resnet20_aig.test.json').write_text(json.dumps(config))
    model = train_gates(timm.create_model('cifar_resnet20_aig', target_rate=0.3, num_classes=4, in_chans=1)).eval()
    save_file(model.state_dict(), package / 'hub_configs' / 'cifar_resnet20_aig.test.safetensors')
    x = torch.randn(8, 1, 28, 28)
    torch.save((x, *timm_aig.forward_gates(model, x)), tmp_path / 'expected.pt')

    program = '''
import timm, timm_aig, torch
x, logits, gates = torch.load('expected.pt')
model = timm.create_model('cifar_resnet20_aig.test', pretrained=True).eval()
with torch.no_grad():
    assert all(map(torch.equal, timm_aig.forward_gates(model, x), (logits, gates)))
assert next(iter(timm_aig.gated_blocks(model).values())).target_rate == 0.3
assert 'cifar_resnet20_aig.test' in timm.list_pretrained()
assert timm.create_model('cifar_resnet20_aig').conv1.in_channels == 3  # the weights' own only where they are asked for
'''
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={'PYTHONPATH': str(tmp_path), 'HF_HUB_OFFLINE': '1', 'PATH': '/usr/bin'})
    assert done.returncode == 0, done.stderr
