"""Tests that run scripts/demo.py: its main job on small settings, and every kind of bad input."""
import importlib
import json
import re
import sys

import pytest
import timm
import torch
from PIL import Image

import timm_aig
from timm_aig.training.trainer import Stopped

QUICK = ['--epochs', '1', '--finetune-epochs', '1', '--input-size', '3', '8', '8']


@pytest.fixture(scope='module')
def demo():
    """The script as a module, which times few images: starting Python and timing take long."""
    module = importlib.import_module('demo')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'TIMED_BATCHES', (1, 4))
        yield module


def image_folder(root, splits=('train', 'validation'), classes=('dark', 'light'), count=3):
    for split in splits:
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new(('L', 'RGB', 'RGBA')[i % 3], (12 + i, 10), 60 * label + i).save(folder / f'{i}.png')
    return root


@pytest.fixture
def refused(demo, capsys, tmp_path):
    """Runs the demo, which must stop with exit code 2 and one line of error before it trains or writes anything."""
    def run(*args):
        output = tmp_path / 'refused'
        try:
            code = demo.main([*QUICK, '--output', str(output), *map(str, args)])
        except SystemExit as e:  # argparse's
            code = e.code
        out, err = capsys.readouterr()
        assert code == 2 and out == '' and 'epoch 1' not in err
        assert not output.exists() or not list(output.iterdir())
        error = err[err.index('error: '):].rstrip('\n')
        assert '\n' not in error
        return error
    return run


def test_the_digits_end_in_a_table_and_a_folder_that_timm_reloads(demo, capsys, tmp_path):
    folder = tmp_path / 'a folder' / 'demo'
    assert demo.main([*QUICK, '--batch-size', '256', '--output', str(folder)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table if '%' in line] == ['static', 'static', 'adaptive', 'adaptive', 'cascade']
    assert '9.0 of 9' in table[1] and '100%' in table[1] and '3.0 of 3' in table[2]
    assert 'logits are equal' in table[-1]
    assert sorted(file.name for file in folder.iterdir()) == ['config.json', 'execution_rates.png', 'model.safetensors']
    with Image.open(folder / 'execution_rates.png') as image:
        image.load()
        assert image.format == 'PNG'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.pretrained_cfg['label_names'] == list('0123456789')
    assert [point.budget for point in timm_aig.budget_table(model)][::len(timm_aig.budget_table(model)) - 1] == [.4, .6]
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_an_image_folder_ends_in_json_figures_that_agree_and_one_seed_gives_one_model(demo, capsys, tmp_path):
    data = image_folder(tmp_path / 'data', count=12)
    for name in ('again', 'out'):
        assert demo.main([
            *QUICK, '--data-dir', str(data), '--batch-size', '4', '--budgets', '0.6', '0.9', '--model',
            'cifar_resnet14', '--input-size', '3', '16', '16', '--output', str(tmp_path / name), '--json']) == 0
        figures = json.loads(capsys.readouterr().out)
    assert len({(tmp_path / name / 'model.safetensors').read_bytes() for name in ('again', 'out')}) == 1
    assert figures['test_images'] == 24 and figures['budgets'] == [.6, .9]
    assert figures['held_out'] == 4  # of 24 training images
    parent, small, low, high, cascade = figures['rows']
    assert parent['blocks_run'] == parent['blocks'] == 6 and parent['macs_share'] == 1
    assert small['macs_share'] < 1 and small['macs_share'] <= cascade['macs_share']
    assert 0 <= low['blocks_run'] <= high['blocks_run'] <= 6 and 0 < low['macs_share'] <= high['macs_share'] < 1.01
    for row in figures['rows']:
        assert 0 <= row['accuracy'] <= 1
        assert row['ms_per_image'].keys() == {'1', '4'} and min(row['ms_per_image'].values()) > 0
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == 'cifar_resnet14_aig' and config['label_names'] == ['dark', 'light']
    assert config['pretrained_cfg']['input_size'] == [3, 16, 16]


def test_what_is_calibrated_on_is_neither_trained_nor_tested_on(demo):
    train, held_out, test = demo.open_datasets(demo.parse_args([]))
    images = [{image.tobytes() for image, _ in dataset} for dataset in (train, held_out, test)]
    assert [len(dataset) for dataset in (train, held_out, test)] == [1150, 287, 360]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]


def test_a_training_that_diverges_is_exit_code_1_and_nothing_is_written(demo, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(  # Muon's steps are bounded
        demo.finetune, 'create_optimizer', lambda args, model: torch.optim.SGD(model.parameters(), 1e30))
    data = image_folder(tmp_path / 'data', count=20)
    args = [*QUICK, '--data-dir', str(data), '--batch-size', '4', '--output', str(tmp_path / 'out')]
    assert demo.main(args) == 1
    assert 'A lower --lr may help' in capsys.readouterr().err
    assert not list((tmp_path / 'out').iterdir())


def test_a_dataset_that_is_unknown_or_not_there_is_refused(refused, tmp_path):
    for name in ('cifar10', 'torch/no_such_data', 'folders', ' '):
        assert refused('--dataset', name, '--data-dir', tmp_path).startswith('error: --dataset')
    assert '--data-dir' in refused('--dataset', 'torch/fashion_mnist')
    assert '--data-dir' in refused('--data-dir', tmp_path / 'missing')
    assert '--dataset torch/fashion_mnist' in refused('--dataset', 'torch/fashion_mnist', '--data-dir', tmp_path)


def test_an_image_folder_without_images_splits_or_classes_is_refused(refused, tmp_path):
    (tmp_path / 'empty').mkdir()
    assert 'Found 0 images' in refused('--data-dir', tmp_path / 'empty')
    one_split = image_folder(tmp_path / 'one split', splits=['train'])
    assert "subfolder for split 'validation'" in refused('--data-dir', one_split)
    assert '2 classes' in refused('--data-dir', image_folder(tmp_path / 'one class', classes=['dark']))
    assert '--data-dir has 6 training images' in refused('--data-dir', image_folder(tmp_path / 'few images'))
    other = image_folder(tmp_path / 'other classes', splits=['train'])
    image_folder(other, splits=['val'], classes=('dark', 'odd'))
    assert "['light', 'odd']" in refused('--data-dir', other)


@pytest.mark.parametrize('content', [b'', b'no image', 'truncated'])
def test_an_image_that_cannot_be_read_is_named(refused, tmp_path, content):
    data = image_folder(tmp_path / 'data', count=12)
    bad = data / 'train' / 'light' / '1.png'
    if content == 'truncated':
        Image.effect_noise((64, 64), 50).save(bad)
        content = bad.read_bytes()[:1000]
    bad.write_bytes(content)
    error = refused('--data-dir', data, '--batch-size', 4)
    assert 'cannot read' in error and str(bad) in error


@pytest.mark.parametrize('args,message', [
    *((['--model', name], '--model must be a static ResNet') for name in (
        'no_such_model', 'vit_tiny_patch16_224', 'hrnet_w18_small', 'resnet18_aig', 'a/b')),
    (['--small', 'resnet50'], "--small must have less than 0.6 of the parent's MACs"),
    (['--small', 'no_such_model'], '--small must be a static ResNet'),
    (['--budgets', '0.6', '0.4'], '--budgets must ascend, not 0.6 0.4'),
    (['--budgets', '0.01', '0.4'], '--budgets'),
    (['--budgets', '0.5', '1.5'], '--budgets must be a number in (0, 1)'),
    (['--budgets', 'half', '0.6'], '--budgets must be a number in (0, 1)'),
    (['--epochs', '0'], '--epochs must be a whole number from 1'),
    (['--batch-size', '3'], '--batch-size must be a whole number from 4'),
    (['--lr', 'inf'], '--lr must be a number in (0, inf)'),
])
def test_an_argument_that_makes_no_sense_is_refused(refused, args, message):
    assert f'error: {message}' in refused(*args)


def test_an_output_that_cannot_be_written_is_met_before_the_training(demo, capsys, tmp_path):
    (tmp_path / 'file').write_text('')
    for output in (tmp_path / 'file', '/proc/demo'):
        assert demo.main([*QUICK, '--output', str(output)]) == 3
        assert 'error: --output must be a folder to write to' in capsys.readouterr().err


def test_a_missing_extra_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    assert re.search(r"sklearn.*pip install 'timm_aig\[demo\]'", refused())


def test_a_demo_that_is_stopped_does_not_say_that_it_saved(demo, capsys, monkeypatch, tmp_path):
    def stop(*args):
        raise Stopped('stopped by SIGINT in epoch 1 after step 9, saved.', 2)

    monkeypatch.setattr(demo.finetune, 'train', stop)
    assert demo.main([*QUICK, '--output', str(tmp_path)]) == 130
    assert capsys.readouterr().err == 'stopped by SIGINT. The demo keeps nothing of it.\n'
    assert not list(tmp_path.iterdir())
