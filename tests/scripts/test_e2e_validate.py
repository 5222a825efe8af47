"""scripts/validate.py: its figures against a plain loop, its sweep, its paired test, its shards, and bad input."""
import csv
import json
import shutil

import pytest
import timm
import torch
import validate as script
from _inputs import create_evaluation_loader, data_config, open_evaluation_split
from PIL import Image
from scipy.stats import binomtest
from timm.data import create_transform

import timm_aig
from timm_aig.training.data import hold_out, open_dataset


@pytest.fixture
def validate(run_script, images, capsys):
    """Runs the script on the images; gives what it prints as JSON."""
    def _validate(*args):
        assert run_script('validate.py', '--data-dir', images, '--workers', 0, '--batch-size', 8, '--json', *args) == 0
        return json.loads(capsys.readouterr().out)

    return _validate


def test_the_figures_are_those_of_a_plain_loop(validate, adaptive_model, plain_loop, tmp_path):
    logits, gates, labels, model = plain_loop(adaptive_model)
    predictions = logits.argmax(1)
    row = validate('--model', adaptive_model, '--predictions', tmp_path / 'p.csv')['rows'][0]
    cost = timm_aig.compute_cost(model, (3, 8, 8))
    shares = cost.executed(gates) / (cost.total - cost.gates)
    assert row['images'] == len(labels) and row['unreadable'] == 0
    assert row['top1'] == pytest.approx(100 * (predictions == labels).double().mean().item())
    assert row['execution_rate'] == pytest.approx(gates.mean().item()) and 0 < row['execution_rate'] < 1
    assert row['macs_share'] == pytest.approx(shares.mean().item())
    assert row['macs_share_quantiles']['0.5'] == pytest.approx(shares.quantile(.5).item())
    assert row['paths'] == len(gates.unique(dim=0))
    with open(tmp_path / 'p.csv', newline='') as file:
        lines = list(csv.DictReader(file))
    assert [int(line['image']) for line in lines] == [*range(len(labels))]
    assert [int(line['prediction']) for line in lines] == predictions.tolist()
    assert [float(line['macs_share']) for line in lines] == pytest.approx(shares.tolist(), abs=1e-6)


def test_held_out_images_are_those_that_a_training_leaves_out(validate, adaptive_model, images, tmp_path):
    whole, part = tmp_path / 'whole.csv', tmp_path / 'part.csv'
    validate('--model', adaptive_model, '--split', 'train', '--predictions', whole)
    row = validate('--model', adaptive_model, '--holdout', 20, '--predictions', part)['rows'][0]
    held = hold_out(*(open_dataset('folder', str(images), 'train') for _ in range(2)), 20)[1]
    lines = whole.read_text().splitlines()
    assert part.read_text().splitlines() == [lines[0], *(lines[1 + index] for index in held.indices)] != lines[:21]
    assert row['images'] == 20


def test_budgets_are_rows_at_the_offsets_of_the_models_table(validate, calibrated_model):
    rows = validate('--model', calibrated_model, '--budgets', .4, .6, .8)['rows']
    closed, *offsets, opened = validate('--model', calibrated_model, '--gate-offset', -1000, -4, 0, 4, 1000)['rows']
    assert closed['execution_rate'] == 0 and opened['execution_rate'] == 1
    assert [row['budget'] for row in rows] == [.4, .6, .8] and offsets[0]['budget'] is None
    for row, offset in zip(rows, offsets):
        assert row['gate_offset'] == pytest.approx(offset['gate_offset'], abs=1e-9)
        assert all(row[key] == offset[key] for key in ('top1', 'macs_share', 'block_rates'))
    assert rows[0]['macs_share'] < rows[2]['macs_share']
    fast = validate('--model', calibrated_model, '--budgets', .8, '--optimize')['rows'][0]
    for key in ('top1', 'block_rates', 'execution_rate', 'macs_share', 'paths'):
        assert fast[key] == pytest.approx(rows[2][key])


def test_an_infinite_offset_is_reported_as_the_gates_take_it(validate, adaptive_model):
    row = validate('--model', adaptive_model, '--gate-offset', 'inf')['rows'][0]
    assert (row['gate_offset'], row['execution_rate']) == (1e4, 1)


@pytest.mark.parametrize('name', ['validate.py', 'analyze.py'])
def test_weights_that_are_no_numbers_are_not_blamed_on_the_images(
        run_script, images, adaptive_model, tmp_path, capsys, monkeypatch, name):
    def create_broken(*args, create=timm.create_model, **kwargs):
        model = create(*args, **kwargs)
        torch.nn.init.constant_(model.fc.bias, torch.nan)
        return model

    monkeypatch.setattr(timm, 'create_model', create_broken)
    more = ['--output', tmp_path] if name == 'analyze.py' else []
    assert run_script(name, '--data-dir', images, '--model', adaptive_model, '--workers', 0, *more) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith('error: the logits of the model are not numbers: ')


def test_alternatives_are_rows_too_and_all_of_it_is_drawn(validate, calibrated_model, static_model, tmp_path):
    result = validate(
        '--model', calibrated_model, '--budgets', .4, .8, '--alternatives', static_model, '--plot', tmp_path / 'a.png')
    assert [row['model'] for row in result['rows']] == [calibrated_model] * 2 + [static_model]
    assert [row['architecture'] for row in result['rows']] == ['cifar_resnet20_aig'] * 2 + ['cifar_resnet20']
    assert result['rows'][2]['macs'] == result['rows'][0]['all_macs'] == result['rows'][2]['all_macs']
    with Image.open(tmp_path / 'a.png') as image:
        assert min(image.size) > 500 and len(set(image.convert('RGB').get_flattened_data())) > 100
    assert [path.name for path in tmp_path.iterdir()] == ['a.png']
    rows = validate('--model', calibrated_model, '--budgets', .4, .8, '--alternatives', calibrated_model)['rows']
    assert [row['budget'] for row in rows] == [.4, .8, .4, .8]


def test_two_models_are_compared_image_by_image(validate, static_model, adaptive_model, plain_loop):
    comparison = validate('--model', adaptive_model, '--against', static_model)['comparison']
    (a, _, labels, _), (b, _, _, _) = (plain_loop(name) for name in (adaptive_model, static_model))
    a, b = a.argmax(1), b.argmax(1)
    only_a, only_b = int(((a == labels) & (b != labels)).sum()), int(((b == labels) & (a != labels)).sum())
    assert (comparison['only_first_right'], comparison['only_second_right']) == (only_a, only_b)
    assert comparison['difference'] == pytest.approx(100 * (only_a - only_b) / len(labels))
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.
    assert comparison['p_value'] == pytest.approx(expected)


def test_models_with_their_classes_in_another_order_are_compared(validate, static_model, tmp_path):
    model = timm.create_model(static_model, pretrained=True)
    for p in (model.fc.weight, model.fc.bias):
        p.data = p.data[[2, 0, 1]]
    other = timm_aig.save_pretrained(model, tmp_path, model_config={'label_names': ['cat', 'ape', 'bee']})
    comparison = validate('--model', static_model, '--against', f'local-dir:{other}')['comparison']
    assert comparison['only_first_right'] == comparison['only_second_right'] == 0


def test_images_are_cropped_as_the_model_says(images, static_model):
    args = script.parse_args(['--model', static_model, '--data-dir', str(images), '--workers', '0'])
    own = dict(crop_mode='squash', crop_pct=.9)
    model = timm.create_model(static_model, pretrained=True, pretrained_cfg_overlay={'input_size': (3, 8, 8), **own})
    config = data_config(args, model)
    dataset = open_evaluation_split(args, model)
    batch, _ = next(iter(create_evaluation_loader(args, dataset, config, use_prefetcher=False)))
    with Image.open(images / 'validation' / 'ape' / '0.png') as image:
        squashed = create_transform(**config)(image)
        cropped = create_transform(**{**config, 'crop_mode': 'center'})(image)
    torch.testing.assert_close(batch[0], squashed)
    assert not torch.allclose(batch[0], cropped, atol=.1)


def test_the_shards_of_two_processes_add_up_to_the_same_counts(validate, adaptive_model, images, fork_ranks, tmp_path):
    alone = validate('--model', adaptive_model)['rows'][0]
    fork_ranks(['--json', '--model', adaptive_model, '--data-dir', images, '--workers', 0, '--batch-size', 8,
                '--device', 'cpu'], script.main)
    lines = [(tmp_path / f'stdout {rank}').read_text().splitlines() for rank in (0, 1)]
    printed, nothing = ([line for line in some if not line.startswith('[Gloo]')] for some in lines)  # of torch 2.9
    shards = json.loads(''.join(printed))['rows'][0]
    assert not nothing
    assert alone['images'] % 2 == 1  # does not divide
    summed = ('loss', 'macs', 'macs_share')  # floats, added up in another order
    assert {k: v for k, v in shards.items() if k not in ('images_per_second', *summed)} == {
        k: v for k, v in alone.items() if k not in ('images_per_second', *summed)}
    assert [shards[k] for k in summed] == pytest.approx([alone[k] for k in summed])


@pytest.mark.parametrize('args, error', [
    (['--model', 'no_such_model'], 'model no_such_model'),
    (['--model', 'local-dir:/nowhere'], 'model local-dir:/nowhere'),
    (['--model', 'cifar_resnet20', '--data-dir', '/nowhere'], '--data-dir'),
    (['--model', 'cifar_resnet20', '--batch-size', '0'], '--batch-size'),
    (['--model', 'cifar_resnet20', '--dataset', 'other'], '--dataset'),
    (['--model', 'cifar_resnet20', '--holdout', '48'], '--holdout must leave'),
    (['--model', 'cifar_resnet20'], '--data-dir has 3 classes, ape, bee, cat, and the model does not say which of'),
    (['--model', 'cifar_resnet20_aig', '--budgets', '0.5', '--workers', '0'], 'calibrate'),
    (['--model', 'cifar_resnet20', '--budgets', '0.5'], '--model cifar_resnet20 has no gates'),
    (['--model', 'cifar_resnet20', '--gate-offset', '0'], '--model cifar_resnet20 has no gates'),
    (['--model', 'cifar_resnet20', '--device', 'abc'], '--device abc'),
    (['--model', 'cifar_resnet20', '--device', 'cuda:99'], '--device cuda:99'),
    (['--model', 'cifar_resnet20', '--input-size', '3', '0', '8'], '--input-size must be a whole number from 1'),
    (['--model', 'cifar_resnet20', '--crop-pct', '0'], '--crop-pct must be a number in (0, inf)'),
    (['--model', 'cifar_resnet20_aig', '--gate-offset', '0', 'nan'], '--gate-offset must be a number'),
])
def test_bad_input_is_one_line_that_names_the_argument(run_script, images, capsys, args, error):
    assert run_script('validate.py', '--data-dir', images, *args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith('error: ') and error in lines[-1] and 'Traceback' not in ''.join(lines)


@pytest.mark.parametrize('script', ['validate.py', 'analyze.py'])
def test_an_unreadable_image_in_a_loader_worker_is_one_short_line(
        run_script, make_images, adaptive_model, tmp_path, capsys, script):
    data = make_images(tmp_path / 'data')
    (data / 'validation' / 'bee' / '2.png').write_bytes(b'no image')
    more = ['--output', tmp_path] if script == 'analyze.py' else []
    assert run_script(script, '--data-dir', data, '--model', adaptive_model, '--workers', 1, '--unreadable', 'error',
                      *more) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'error: cannot read {data}/validation/bee/2.png')


def test_a_model_is_run_on_grey_images_with_the_mean_of_its_norms(validate, adaptive_model):
    assert validate('--model', adaptive_model, '--input-size', 1, 8, 8)['rows'][0]['images'] == 21


def test_a_label_that_the_model_does_not_know_is_bad_input(run_script, images, tmp_path, capsys):
    timm_aig.save_pretrained(timm.create_model('cifar_resnet20', num_classes=1), tmp_path)
    assert run_script('validate.py', '--data-dir', images, '--model', f'local-dir:{tmp_path}', '--workers', 0) == 2
    assert 'the model has 1 classes' in capsys.readouterr().err.splitlines()[-1]


def test_all_models_are_opened_before_the_first_is_run(run_script, images, static_model, capsys, monkeypatch):
    monkeypatch.setattr('timm_aig.training.evaluate.forward_gates', None)
    for argument in ('--against', '--alternatives'):
        arguments = ['--data-dir', images, '--model', static_model, '--workers', 0, argument, 'no_such_model']
        assert run_script('validate.py', *arguments) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f'error: {argument} no_such_model')


@pytest.mark.parametrize('args,error', [
    (['--gate-offset', -1, 0, '--against', 'resnet18'], '--against takes one'),
    (['--gate-offset', -1, 0, '--predictions', 'p.csv'], '--predictions takes one'),
    (['--optimize', '--alternatives', 'test_efficientnet'], '--optimize test_efficientnet: model (EfficientNet)'),
    (['--input-size', 3, 32, 32, '--alternatives', 'vit_tiny_patch16_224'], '--input-size cannot be used'),
    (['--alternatives', 'cifar_resnet20'], '--data-dir has 3 classes'),
])
def test_what_cannot_be_done_is_said_before_a_model_is_run(
        run_script, images, adaptive_model, capsys, monkeypatch, args, error):
    monkeypatch.setattr('timm_aig.training.evaluate.forward_gates', None)
    assert run_script('validate.py', '--data-dir', images, '--model', adaptive_model, '--workers', 0, *args) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f'error: {error}')


def test_the_figures_are_printed_before_a_file_that_cannot_be_written(
        run_script, images, static_model, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError('No space left on device')

    monkeypatch.setattr('timm_aig.training.checkpoint.write_atomically', full)
    arguments = ['--data-dir', images, '--model', static_model, '--workers', 0]
    assert run_script('validate.py', *arguments, '--predictions', tmp_path / 'p.csv') == 3
    out, err = capsys.readouterr()
    assert 'top1' in out and err.splitlines()[-1] == 'error: No space left on device'


def test_the_table_names_each_model(run_script, images, static_model, adaptive_model, capsys):
    assert run_script(
        'validate.py', '--data-dir', images, '--workers', 0, '--model', adaptive_model, '--against', static_model) == 0
    out = capsys.readouterr().out
    assert out.count(adaptive_model) >= 2 and out.count(static_model) >= 2 and 'McNemar' in out


def test_classes_are_matched_by_name_whatever_the_order_of_the_folders(validate, adaptive_model, images, tmp_path):
    expected = validate('--model', adaptive_model)['rows'][0]
    model, order = timm.create_model(adaptive_model, pretrained=True), [2, 0, 1]
    with torch.no_grad():
        for p in model.fc.parameters():
            p.copy_(p[order].clone())
    names = [['ape', 'bee', 'cat'][i] for i in order]
    timm_aig.save_pretrained(model, tmp_path / 'model', model_config={'label_names': names})
    found = validate('--model', f'local-dir:{tmp_path}/model')['rows'][0]
    assert (found['top1'], found['images']) == (expected['top1'], 21)
    assert found['loss'] == pytest.approx(expected['loss'])

    (tmp_path / 'data').mkdir()
    for name in ('bee', 'cat'):  # a split that lacks a class
        shutil.copytree(images / 'validation' / name, tmp_path / 'data' / 'validation' / name)
    both = [validate('--model', m, '--data-dir', tmp_path / 'data')['rows'][0]['loss']
            for m in (adaptive_model, f'local-dir:{tmp_path}/model')]
    assert both[0] == pytest.approx(both[1])


def test_other_classes_are_an_error_that_lists_both(run_script, adaptive_model, images, tmp_path, capsys):
    shutil.copytree(images / 'validation', tmp_path / 'validation')
    (tmp_path / 'validation' / 'cat').rename(tmp_path / 'validation' / 'dog')
    assert run_script('validate.py', '--data-dir', tmp_path, '--workers', 0, '--model', adaptive_model) == 2
    assert '--data-dir must have the classes of the model, ape, bee, cat, not ape, bee, dog' in capsys.readouterr().err
