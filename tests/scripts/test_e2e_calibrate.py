"""scripts/calibrate.py: a folder with a table that meets its budgets, a hub_config with it, and bad input."""
import json
import shutil
from pathlib import Path

import pytest
import timm

import timm_aig


@pytest.fixture
def calibrate(run_script, images, capsys):
    """Runs the script on the training images; gives its exit code, output and errors."""
    def _calibrate(*args):
        code = run_script('calibrate.py', '--data-dir', images, '--workers', 0, '--batch-size', 8, *args)
        return (code, *capsys.readouterr())

    return _calibrate


def shares(run_script, images, capsys, model, split, *budgets):
    assert run_script('validate.py', '--model', model, '--data-dir', images, '--workers', 0, '--json', '--split', split,
                      '--budgets', *budgets) == 0
    return [row['macs_share'] for row in json.loads(capsys.readouterr().out)['rows']]


def test_the_folder_it_writes_meets_its_budgets_on_the_calibration_images(
        calibrate, run_script, images, capsys, adaptive_model, tmp_path):
    code, out, err = calibrate(
        '--model', adaptive_model, '--budgets', .4, .7, '--tolerance', .02, '--max-accuracy-drop', 5, '--json',
        '--output', tmp_path / 'new')
    assert code == 0 and 'calibrating' in err
    result = json.loads(out)
    table = {row['budget']: row for row in result['table']}
    assert {.4, .7, result['smallest']['point']['budget']} <= set(table) and result['passes'] > 2
    assert result['smallest']['drop'] <= 5 and all(row['images'] == 48 for row in table.values())
    measured = shares(run_script, images, capsys, f'local-dir:{tmp_path / "new"}', 'train', .4, .7)
    assert measured == pytest.approx([.4, .7], abs=.021)
    assert measured == pytest.approx([table[.4]['macs_share'], table[.7]['macs_share']], abs=1e-5)


def test_held_out_images_are_those_that_finetune_leaves_out_and_a_hub_config_gets_the_table(
        calibrate, adaptive_model, images, tmp_path, finetune, monkeypatch):
    config = tmp_path / 'x.json'
    config.write_text(json.dumps({'architecture': 'cifar_resnet20_aig', 'tag': 'x', 'recipe': {'lr': 1}}))
    seen = []
    monkeypatch.setattr('timm_aig.calibrate_budget', lambda model, loader, *args, **kwargs: (
        seen.append(loader.dataset), timm_aig.training.calibrate.calibrate_budget(model, loader, *args, **kwargs))[1])
    code, out, _ = calibrate(
        '--model', adaptive_model, '--budgets', .5, '--tolerance', .05, '--holdout', 20, '--hub-config', config)
    assert code == 0 and '20 images' in out and f'Wrote {config}.' in out and ' 0.5  ' in out
    written = json.loads(config.read_text())
    assert written['recipe'] == {'lr': 1} and written['gate_budgets'][0]['budget'] == .5
    args = finetune.parse_args(['--data-dir', str(images), '--holdout', '20', '--model', 'resnet18'])
    assert seen[0].indices == finetune.open_training_splits(args)[1].indices and len(seen[0]) == 20


@pytest.mark.parametrize('args, error', [
    (['--budgets', '.001'], '--budgets must be in reach, not 0.001'),
    (['--budgets', '2'], '--budgets must be'), (['--budgets'], '--budgets'),
    (['--holdout', '48'], '--holdout'), (['--input-size', '3', '60000', '60000'], '48 take 2074 GB'),
    (['--hub-config', '/nowhere.json'], '--hub-config'),
    (['--tolerance', '0'], 'tolerance'), (['--hub-config', __file__], '--hub-config'),
    (['--hub-config', str(Path(__file__).parents[2] / 'hub_configs' / 'resnet50_aig.t05_distill.json')],
     'must be a file of hub_configs for cifar_resnet20_aig, the --model'),
])
def test_bad_input_is_one_line_and_nothing_is_written(calibrate, adaptive_model, tmp_path, args, error):
    folder = tmp_path / 'model'
    shutil.copytree(adaptive_model.removeprefix('local-dir:'), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, _, err = calibrate('--model', f'local-dir:{folder}', '--output', folder, *args)
    lines = err.splitlines()
    assert code == 2 and lines[-1].startswith('error: ') and error in lines[-1] and 'Traceback' not in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_static_model_is_bad_input(calibrate, static_model):
    code, _, err = calibrate('--model', static_model)
    assert code == 2 and 'no gated blocks' in err.splitlines()[-1]


def test_the_table_is_printed_before_a_folder_that_cannot_be_written(calibrate, adaptive_model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError('No space left on device')

    monkeypatch.setattr('timm_aig.save_pretrained', full)
    code, out, err = calibrate('--model', adaptive_model, '--budgets', .5, '--tolerance', .05, '--output', tmp_path)
    assert code == 3 and ' 0.5  ' in out
    assert err.splitlines()[-1] == 'error: No space left on device'


def test_a_folder_or_file_that_can_never_be_written_is_met_before_the_passes(calibrate, adaptive_model, monkeypatch):
    monkeypatch.setattr('timm_aig.calibrate_budget', None)
    code, _, err = calibrate('--model', adaptive_model, '--output', '/proc/none')
    assert code == 3 and err.splitlines()[-1].startswith("error: --output must be a folder to write to, '/proc/none'")
    monkeypatch.setattr('pathlib.Path.read_text', lambda *args, **kwargs: '{"architecture": "cifar_resnet20_aig"}')
    code, _, err = calibrate('--model', adaptive_model, '--hub-config', '/proc/none')
    assert code == 3 and '--hub-config must be a file in a folder to write to' in err.splitlines()[-1]


def test_a_run_that_writes_nothing_says_so_at_its_start(calibrate, adaptive_model, tmp_path):
    args = ('--model', adaptive_model, '--budgets', .5, '--tolerance', .05)
    code, out, err = calibrate(*args, '--json')
    assert code == 0 and err.startswith('Nothing will be written') and json.loads(out)['table']
    assert 'Nothing will be written' not in calibrate(*args, '--output', tmp_path)[2]


def test_training_drops_the_table_of_the_weights_it_started_from(finetune, finetune_args, adaptive_model, tmp_path):
    rows = [dict(budget=.5, gate_offset=-1., macs_share=.5, images=9)]
    model = timm.create_model(adaptive_model, pretrained=True, gate_budgets=rows)
    start = timm_aig.save_pretrained(model, tmp_path / 'start')
    assert timm_aig.budget_table(timm.create_model(f'local-dir:{start}', pretrained=True))
    assert finetune.main([
        *finetune_args, '--epochs', '1', '--model', f'local-dir:{start}', '--distill-weight', '0', '--output',
        str(tmp_path), '--experiment', 'x']) == 0
    trained = timm.create_model(f'local-dir:{tmp_path}/x', pretrained=True)
    assert timm_aig.gated_blocks(trained) and timm_aig.budget_table(trained) == ()
