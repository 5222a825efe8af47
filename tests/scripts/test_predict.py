"""scripts/predict.py: its answers against a plain loop, a cascade and a file, and bad input."""
import csv
import json

import pytest
import timm
import torch

import timm_aig


@pytest.fixture
def predict(run_script, images, capsys):
    """Runs the script on the validation images; gives its rows."""
    def _predict(*args):
        assert run_script('predict.py', images / 'validation', '--batch-size', 8, '--json', *args) == 0
        return json.loads(capsys.readouterr().out)['rows']

    return _predict


def column(rows, key):
    return [row[key] for row in rows]


def test_the_answers_are_those_of_a_plain_loop(predict, adaptive_model, plain_loop, images):
    logits, gates, _, model = plain_loop(adaptive_model)
    rows = predict('--model', adaptive_model)
    probabilities, classes = logits.softmax(1).max(1)
    assert column(rows, 'file') == [str(file) for file in sorted((images / 'validation').rglob('*.png'))]
    assert column(rows, 'label') == [model.pretrained_cfg['label_names'][i] for i in classes]
    assert column(rows, 'probability') == pytest.approx(probabilities.tolist(), abs=1e-5)
    assert column(rows, 'blocks_run') == gates.sum(1).tolist()
    share = timm_aig.compute_cost(model, (3, 8, 8)).share(gates)
    assert column(rows, 'macs_share') == pytest.approx(share.tolist()) and len({*share.tolist()}) > 1


def test_class_names_may_be_given_by_number(predict, run_script, images, static_model, tmp_path, capsys):
    model = timm.create_model(static_model, pretrained=True)
    names = {str(i): name for i, name in reversed([*enumerate(model.pretrained_cfg['label_names'])])}
    name = f'local-dir:{timm_aig.save_pretrained(model, tmp_path, model_config=dict(label_names=names))}'
    expected = column(predict('--model', static_model), 'label')
    assert column(predict('--model', name), 'label') == column(predict('--cascade', name, name), 'label') == expected
    tops = []
    for model in (name, static_model):
        assert run_script('validate.py', '--model', model, '--data-dir', images, '--workers', 0, '--json') == 0
        tops.append(json.loads(capsys.readouterr().out)['rows'][0]['top1'])
    assert tops[0] == tops[1]


def test_a_static_model_has_no_blocks_that_can_be_left_out(predict, static_model):
    rows = predict('--model', static_model)
    assert {*column(rows, 'macs_share')} == {1} and 'blocks_run' not in rows[0]


def test_a_budget_sets_the_offset_of_the_models_table(predict, calibrated_model):
    own = column(predict('--model', calibrated_model), 'blocks_run')  # its offset is 0, that of budget 0.6
    low, middle, high = (
        column(predict('--model', calibrated_model, '--budget', b), 'blocks_run') for b in (.4, .6, .8))
    assert sum(low) < sum(own) < sum(high) and middle == own


def test_a_cascade_counts_stages_and_macs_over_its_largest_model(predict, adaptive_model, static_model, plain_loop):
    logits, gates, _, model = plain_loop(adaptive_model)
    rows = predict('--cascade', adaptive_model, static_model)
    sure = logits.softmax(1).amax(1) >= .9
    assert column(rows, 'stages') == (2 - sure.int()).tolist()
    share = timm_aig.compute_cost(model, (3, 8, 8)).share(gates) + (~sure).int()
    assert column(rows, 'macs_share') == pytest.approx(share.tolist())
    final = torch.where(sure[:, None], logits, plain_loop(static_model)[0]).argmax(1)
    assert column(rows, 'label') == [model.pretrained_cfg['label_names'][i] for i in final]


@pytest.mark.parametrize('mode', ['sparse', 'path'])
def test_a_file_answers_as_its_model(predict, calibrated_model, plain_loop, tmp_path, mode):
    model, path = plain_loop(calibrated_model)[3], tmp_path / 'm.onnx'
    pattern = [True, False, True] * 3
    timm_aig.export_onnx(model, path, mode, gates=pattern if mode == 'path' else None)
    rows = predict('--model', path)
    assert 'macs_share' not in rows[0]
    if mode == 'path':
        assert {*column(rows, 'blocks_run')} == {6}
        return
    for budget in ([], ['--budget', .5]):
        expected, rows = (predict('--model', name, *budget) for name in (calibrated_model, path))
        for key in ('file', 'label', 'blocks_run'):
            assert column(rows, key) == column(expected, key)
        assert column(rows, 'probability') == pytest.approx(column(expected, 'probability'), abs=1e-4)


def test_unreadable_images_are_named_and_left_out(run_script, images, adaptive_model, tmp_path, capsys):
    (tmp_path / 'broken.png').write_text('no image')
    good = images / 'validation' / 'ape' / '0.png'
    args = [tmp_path / 'broken.png', good, '--model', adaptive_model]
    assert run_script('predict.py', *args, '--csv', tmp_path / 'p.csv') == 0
    assert f'Left out {tmp_path / "broken.png"}, UnidentifiedImageError' in capsys.readouterr().err
    with open(tmp_path / 'p.csv', newline='') as file:
        assert [row['file'] for row in csv.DictReader(file)] == [str(good)]
    assert run_script('predict.py', *args) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ['file', 'label', 'probability', 'MACs', 'blocks', 'run'] and row.startswith(str(good))


def test_logits_that_are_no_numbers_are_an_error_and_no_class(run_script, images, static_model, capsys, monkeypatch):
    def create_broken(*args, create=timm.create_model, **kwargs):
        model = create(*args, **kwargs)
        torch.nn.init.constant_(model.fc.bias, torch.nan)
        return model

    monkeypatch.setattr(timm, 'create_model', create_broken)
    assert run_script('predict.py', images / 'validation', '--model', static_model) == 2
    assert 'the logits of the model are not numbers' in capsys.readouterr().err


@pytest.mark.parametrize('args, code, problem', [
    (['/nowhere', '--model', '{model}'], 2, 'IMAGES must be image files or folders of them; /nowhere does not exist'),
    (['{tmp}', '--model', '{model}'], 2, 'has no images'),
    (['{script}', '--model', '{model}'], 2, 'IMAGES has none that can be read'),
    (['{images}', '--model', '{model}', '--csv', '/nowhere/p.csv'], 3, '--csv must be a file in a folder to write to'),
    (['{images}', '--model', '{model}', '--budget', '0.5'], 2, 'has no calibrated budgets'),
    (['{images}', '--model', '{calibrated}', '--budget', '0.9'], 2, 'must be from 0.4 to 0.8'),
    (['{images}', '--model', '/nowhere.onnx'], 2, '--model must be a file of export_onnx, there is no file'),
    (['{images}', '--model', 'a.onnx', '--device', 'cuda'], 2, 'runs on the CPU'),
    (['{images}', '--cascade', '{model}', '{model}', '--budget', '0.5'], 2, '--budget is for --model'),
    (['{images}'], 2, 'one of the arguments --model --cascade is required'),
])
def test_bad_input_is_named(
        run_script, images, adaptive_model, calibrated_model, tmp_path, capsys, args, code, problem):
    names = dict(model=adaptive_model, calibrated=calibrated_model, images=images, tmp=tmp_path, script=__file__)
    assert run_script('predict.py', *(arg.format(**names) for arg in args)) == code
    assert problem in capsys.readouterr().err.splitlines()[-1]


def test_answers_of_random_weights_are_named_as_such(run_script, images, capsys):
    assert run_script('predict.py', images / 'validation' / 'ape', '--model', 'cifar_resnet20') == 0
    assert 'warning: cifar_resnet20 has random weights without --pretrained' in capsys.readouterr().err
