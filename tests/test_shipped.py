"""Weights that ship with the package: they load offline, and compute what is published of them."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
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


SHIPPED = sorted(file.stem for file in (ROOT / 'hub_configs').glob('*.safetensors'))


@pytest.fixture(scope='session')
def fashion_mnist(request):
    """Folder with Fashion-MNIST, of Debian's package dataset-fashion-mnist or downloaded, kept in pytest's cache."""
    root = request.config.cache.mkdir('fashion_mnist')
    if not (root / 'FashionMNIST' / 'raw' / 't10k-labels-idx1-ubyte').exists():
        subprocess.run([sys.executable, ROOT / 'scripts' / 'prepare_fashion_mnist.py', root], check=True)
    return root


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_weights_reproduce_their_published_figures(name, fashion_mnist, run_script, capsys):
    """To the image on the machine that trained them; rounding of another may tip one or two."""
    published = json.loads((ROOT / 'hub_configs' / f'{name}.json').read_text())
    assert run_script(
        'validate.py', '--model', name, '--pretrained', '--dataset', published['dataset'], '--data-dir', fashion_mnist,
        '--split', published['split'], '--workers', 0, '--json') == 0
    row = json.loads(capsys.readouterr().out)['rows'][0]
    assert row['images'] == published['images'] == 10000
    tolerances = dict(top1=0.03, top5=0.03, execution_rate=1e-4, macs_share=1e-4, paths=3)
    for key, tolerance in tolerances.items():
        assert row[key] == pytest.approx(published['metrics'][key], abs=tolerance), key


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_weights_take_budgets_and_caps(name):
    published = json.loads((ROOT / 'hub_configs' / f'{name}.json').read_text())['gate_budgets']
    model = timm.create_model(name, pretrained=True).eval()
    assert [point.to_dict() for point in timm_aig.budget_table(model)] == published
    assert {.4, .5, .6, .7, .8, .9, 1.} <= {row['budget'] for row in published}
    assert all(abs(row['macs_share'] - row['budget']) <= .005 for row in published)
    assert timm_aig.budget_table(timm.create_model(name)) == ()  # nothing is known of other weights
    size = model.pretrained_cfg['input_size']
    cost, images = timm_aig.compute_cost(model, size), torch.rand(32, *size)
    shares = {}
    for budget, cap in ((.4, None), (1., None), (1., .55)):
        timm_aig.set_budget(model, budget, cap)
        with torch.inference_mode():
            gates = timm_aig.forward_gates(model, images)[1]
        shares[budget, cap] = cost.executed(gates) / (cost.total - cost.gates)
    assert shares[.4, None].mean() < .7 < shares[1., None].mean() and shares[1., .55].max() <= .55


def test_shipped_weights_are_small():
    assert SHIPPED and sum((ROOT / 'hub_configs' / f'{name}.safetensors').stat().st_size for name in SHIPPED) < 8e6
