"""scripts/benchmark.py: its rows, the gates' own decisions, and bad input; test_serving.py has --requests."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_aig

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'benchmark.py'


def test_it_reports_every_row_with_its_share_of_macs():
    done = subprocess.run([
        sys.executable, SCRIPT, '--model', 'cifar_resnet20_aig', '--batch-size', '1', '4', '--num-images', '4',
        '--rounds', '2', '--rate', '1', '0.5', '--memory', '--json'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result['setting']['threads'] >= 1
    assert result['setting']['cpu']
    rows = result['results']
    assert [(r['batch_size'], r['rate']) for r in rows] == [
        (b, rate) for b in (1, 4) for rate in (None, None, 1., .5)]
    for row in rows:
        assert row['ms_per_image'] > 0
        assert row['ratio_min'] <= row['ratio'] <= row['ratio_max']
        assert row['efficiency'] == pytest.approx(row['macs_share'] / row['ratio'])
    shares = {r['rate']: r['macs_share'] for r in rows if r['rate']}
    assert shares[1.] == pytest.approx(1, abs=0.01)
    assert 0.3 < shares[.5] < 0.8


def test_it_times_the_gates_own_decisions_on_real_images(run_script, tmp_path, capsys):
    for i in range(5):  # the last one fills no batch
        Image.new('RGB', (40, 40), (i * 60, 0, 0)).save(tmp_path / f'{i}.png')
    args = ['--model', 'cifar_resnet32_aig.fmnist_t06', '--pretrained', '--batch-size', 2, '--images', tmp_path,
            '--rounds', 1, '--json']
    assert run_script('benchmark.py', *args) == 0
    row = json.loads(capsys.readouterr().out)['results'][-1]
    assert row['name'] == 'adaptive, own gates'
    model = timm.create_model('cifar_resnet32_aig.fmnist_t06', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    grey = torch.stack([transform(Image.open(tmp_path / f'{i}.png').convert('L')) for i in range(4)])
    cost = timm_aig.compute_cost(model, (1, 28, 28))
    with torch.no_grad():
        gates = timm_aig.forward_gates(model, grey)[1]
    assert row['macs_share'] == pytest.approx(cost.executed(gates).mean().item() / (cost.total - cost.gates), abs=1e-3)


@pytest.mark.parametrize('args, message', [
    (['--model', 'nosuch_aig'], '--model nosuch_aig: Unknown model'),
    (['--model', 'resnet18'], '--model resnet18: model (ResNet) has no gated blocks'),
    (['--rate', '1.5'], '--rate must be a number in [0, 1]'),
    (['--batch-size', '0'], '--batch-size must be a whole number from 1'),
    (['--train', '--batch-size', '8', '1'], '--batch-size must be at least 2 for --train'),
    (['--model', 'cifar_resnet20_aig', '--images', 'nosuchfolder'], '--images nosuchfolder'),
    (['--model', 'cifar_resnet20_aig', '--batch-size', '1', '9', '--num-images', '2'], '--batch-size 9 needs'),
])
def test_the_argument_that_is_wrong_is_named(run_script, capsys, args, message):
    assert run_script('benchmark.py', *args) == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error
