"""scripts/export.py."""
import json
import sys

import pytest
import timm

import timm_aig


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """local-dir: name of an adaptive model of 3 classes at 8 x 8 pixels."""
    path = tmp_path_factory.mktemp('model')
    model = timm.create_model(
        'cifar_resnet20_aig', num_classes=3, target_rates=[1.] * 7 + [.5, .5],
        pretrained_cfg_overlay=dict(input_size=(3, 8, 8)))
    timm_aig.save_pretrained(model, path)
    return f'local-dir:{path}'


def test_it_writes_checks_and_times(run_script, folder, images, tmp_path, capsys):
    path = tmp_path / 'm.onnx'
    args = ['--model', folder, '--images', images / 'validation', '--output', path]
    assert run_script('export.py', *args, '--rounds', 2, '--batch-size', 3, '--json') == 0
    result = json.loads(capsys.readouterr().out)
    assert result['export']['gates_changed'] == 0 and result['export']['images'] == 8
    assert [row['name'] for row in result['times']] == ['static parent', 'own gates', 'all open']
    assert [file.name for file in tmp_path.iterdir()] == ['m.onnx']


@pytest.mark.parametrize('args', [
    ['--format', 'openvino'], ['--mode', 'path'], ['--mode', 'masked'], ['--precision', 'int8', '--images', 'IMAGES'],
    ['--format', 'program'], ['--mode', 'masked', '--model', 'cifar_resnet20']])
def test_other_forms(run_script, folder, images, tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    args = [images if arg == 'IMAGES' else arg for arg in args]
    assert run_script('export.py', '--model', folder, '--rounds', 1, '--num-images', 2, *args) == 0
    out = capsys.readouterr().out
    assert 'Checked on 2 images' in out and 'sha256' in out


def test_the_file_is_named_after_the_model(run_script, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = folder.rpartition('/')[2]
    assert run_script('export.py', '--model', f'{folder}/', '--mode', 'masked', '--rounds', 0, '--num-images', 1) == 0
    assert [file.name for file in tmp_path.iterdir()] == [f'{name}.onnx']


@pytest.mark.parametrize('args, match', [
    (['--model', 'resnet9000_aig'], '--model resnet9000_aig'),
    (['--model', 'cifar_resnet20'], '--model has no gated blocks'),
    (['--model', 'cifar_resnet20', '--mode', 'path'], '--model has no gated blocks'),
    (['--model', 'cifar_resnet20_aig', '--output', 'm.xml'], '--output must end in .onnx, not m.xml'),
    (['--model', 'cifar_resnet20_aig', '--images', '/nowhere'], '--images /nowhere: there is no such folder.'),
    (['--model', 'cifar_resnet20_aig', '--output', '/nowhere/m.onnx'], 'not /nowhere/m.onnx'),
    (['--model', 'cifar_resnet20_aig', '--output', '/tmp'], '--output must be a file'),
    (['--model', 'cifar_resnet20_aig', '--precision', 'bfloat16'], '--precision must be one of'),
    (['--model', 'cifar_resnet20_aig', '--format', 'program', '--mode', 'path'], '--format program'),
    (['--model', 'cifar_resnet20_aig', '--precision', 'int8'], '--precision int8 needs --images'),
    (['--model', 'cifar_resnet20_aig', '--num-images', '0'], '--num-images must be a whole number from 1'),
])
def test_bad_input_is_named(run_script, tmp_path, monkeypatch, capsys, args, match):
    monkeypatch.chdir(tmp_path)
    assert run_script('export.py', *args) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith('error: ') and match in err and 'Traceback' not in err
    assert not list(tmp_path.iterdir())


def test_random_weights_are_named_and_what_they_replace(run_script, folder, tmp_path, capsys):
    path = tmp_path / 'm.onnx'
    args = ['--output', path, '--mode', 'masked', '--rounds', 0, '--num-images', 1]
    assert run_script('export.py', '--model', folder, *args) == 0
    assert 'random weights' not in capsys.readouterr().err
    assert run_script('export.py', '--model', 'cifar_resnet20', '--input-size', 3, 8, 8, *args) == 0
    warning = f'warning: cifar_resnet20 has random weights without --pretrained, and replaces {path}.'
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize('package, kind', [('onnxscript', 'onnx'), ('openvino', 'openvino')])
def test_a_missing_extra_is_named_before_the_model_is_loaded(run_script, monkeypatch, tmp_path, capsys, package, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(timm, 'create_model', None)
    assert run_script('export.py', '--model', 'resnet18_aig', '--format', kind) == 2
    err = capsys.readouterr().err
    assert package in err and "pip install 'timm_aig[export]'" in err
