"""--cascade of calibrate.py and validate.py: thresholds, the folder they are saved in, and bad input."""
import json
import shutil

import calibrate
import pytest
import timm
import torch
from _cascade_times import torch_runs

import timm_aig


@pytest.fixture
def call(run_script, images, capsys):
    """Runs a script on the images; gives its exit code, output and errors."""
    def _call(name, *args):
        code = run_script(name, '--data-dir', images, '--workers', 0, '--batch-size', 8, *args)
        return (code, *capsys.readouterr())

    return _call


@pytest.fixture
def rows(call):
    """Rows of validate.py."""
    def _rows(*args):
        code, out, _ = call('validate.py', '--json', *args)
        assert code == 0
        return json.loads(out)['rows']

    return _rows


def test_thresholds_0_and_1_are_the_first_and_the_last_model(rows, static_model, adaptive_model):
    first, last = (rows('--model', name)[0] for name in (adaptive_model, static_model))
    none, all_of_them = rows('--cascade', adaptive_model, static_model, '--thresholds', 0, 1)
    assert (none['top1'], all_of_them['top1']) == pytest.approx((first['top1'], last['top1']))
    assert none['macs'] == pytest.approx(first['macs'])
    assert all_of_them['macs'] == pytest.approx(first['macs'] + last['macs'])
    assert none['stage_shares'] == [1, 0] and all_of_them['stage_shares'] == [1, 1]
    assert none['macs_share'] == pytest.approx(first['macs'] / last['all_macs'])


def test_only_unsure_images_reach_the_second_model(rows, plain_loop, static_model, adaptive_model):
    logits, _, labels, _ = plain_loop(adaptive_model)
    sure = logits.softmax(1).amax(1)
    threshold = sure.sort().values[7].item()
    row = rows('--cascade', adaptive_model, static_model, '--thresholds', threshold)[0]
    final = torch.where((sure < threshold)[:, None], plain_loop(static_model)[0], logits)
    assert row['stage_shares'] == [1, pytest.approx(7 / len(labels))]
    assert row['top1'] == pytest.approx(100 * (final.argmax(1) == labels).double().mean().item())


def test_images_that_cannot_be_read_are_left_out(rows, images, static_model, adaptive_model, tmp_path):
    data = shutil.copytree(images, tmp_path / 'data')
    (data / 'validation' / 'bee' / '0.png').write_bytes(b'no image')
    alone = rows('--model', static_model, '--data-dir', data)[0]
    row = rows('--cascade', static_model, adaptive_model, '--thresholds', 0, '--data-dir', data)[0]
    assert row['images'] == alone['images'] == 20 and row['top1'] == pytest.approx(alone['top1'])


def test_labels_are_those_of_any_model_that_names_its_classes(rows, static_model, tmp_path):
    """A folder sorts its classes; the model that names them has another order."""
    model = timm.create_model(static_model, pretrained=True)
    with torch.no_grad():
        for tensor in model.fc.parameters():
            tensor.copy_(tensor.flip(0))
    names = {'named': dict(label_names=['cat', 'bee', 'ape']), 'unnamed': dict(label_names=None)}
    for name, config in names.items():
        model.pretrained_cfg['label_names'] = config['label_names']
        timm_aig.save_pretrained(model, tmp_path / name)
    row = rows('--cascade', *(f'local-dir:{tmp_path / name}' for name in ('unnamed', 'named')), '--thresholds', 0)[0]
    assert row['top1'] == pytest.approx(rows('--model', static_model)[0]['top1'])


def test_a_calibrated_cascade_is_saved_and_does_what_was_measured(call, rows, static_model, adaptive_model, tmp_path):
    code, out, err = call(
        'calibrate.py', '--cascade', adaptive_model, static_model, '--split', 'validation', '--macs', 1.2, '--json',
        '--output', tmp_path / 'cascade')
    assert code == 0 and 'stage 2' in err
    chosen = json.loads(out)['chosen']
    assert chosen['macs_share'] <= 1.2
    row = rows('--cascade', tmp_path / 'cascade')[0]
    assert row['thresholds'] == chosen['thresholds'] and row['images'] == chosen['images']
    assert row['top1'] == pytest.approx(chosen['top1']) and row['macs_share'] == pytest.approx(chosen['macs_share'])
    assert timm_aig.Cascade.from_pretrained(tmp_path / 'cascade').thresholds == tuple(chosen['thresholds'])


def test_tables_are_printed_for_people(call, static_model, adaptive_model):
    names = ('--cascade', adaptive_model, static_model)
    assert 'of the largest model, top1' in call('calibrate.py', *names, '--macs', 2)[1]
    assert 'images of each stage' in call('validate.py', *names)[1]


@pytest.mark.parametrize('script, args, problem', [
    ('validate.py', ['--cascade', '{static}', '{static}', '--optimize'], '--cascade takes --thresholds'),
    ('validate.py', ['--model', '{static}', '--thresholds', '.5'], '--thresholds is for --cascade'),
    ('validate.py', ['--cascade', 'no/such'], '--cascade no/such: no/such is not a saved cascade'),
    ('validate.py', ['--cascade', '{static}', '{other}'], 'same classes, not 3, 2'),
    ('validate.py', ['--cascade', '{static}', '{large}'], '--cascade must take the same images, but input_size is'),
    ('validate.py', [], 'one of the arguments --model --cascade is required'),
    ('calibrate.py', ['--cascade', '{static}', '{static}'], '--cascade needs --macs or --accuracy'),
    ('calibrate.py', ['--cascade', '{static}', '{static}', '--macs', '0.1'], '--macs is out of reach'),
    ('calibrate.py', ['--model', '{static}', '--macs', '.5'], 'which are for --cascade only'),
    ('calibrate.py', ['--model', '{static}', '--macs', '.5', '--accuracy', '90'], 'not allowed with argument --macs'),
])
def test_bad_input_is_named(call, static_model, tmp_path, script, args, problem):
    names = {'static': static_model, 'other': '', 'large': ''}
    for name, kwargs in {'other': dict(num_classes=2), 'large': dict(num_classes=3)}.items():
        if f'{{{name}}}' in args:
            model = timm.create_model('cifar_resnet20', **kwargs)
            names[name] = f'local-dir:{timm_aig.save_pretrained(model, tmp_path / name)}'
    code, _, err = call(script, *(arg.format(**names) for arg in args))
    assert code == 2 and problem in err


def test_images_that_would_fill_the_memory_are_not_read(images, static_model, monkeypatch, capsys):
    monkeypatch.setattr('_inputs.MAX_BYTES', 1e4)
    args = ['--cascade', static_model, static_model, '--data-dir', str(images), '--macs', '0.9', '--workers', '0']
    assert calibrate.main(args) == 2
    assert '--holdout must be at most' in capsys.readouterr().err


def test_calibrated_stages_run_at_the_budgets_that_are_best(call, rows, adaptive_model, tmp_path):
    table = [dict(budget=b, gate_offset=o, macs_share=b, images=9) for b, o in ((.4, -1.), (.8, 1.), (1., 100.))]
    model = timm.create_model(adaptive_model, pretrained=True, gate_budgets=table)
    name = f'local-dir:{timm_aig.save_pretrained(model, tmp_path / "model")}'
    code, out, _ = call('calibrate.py', '--cascade', name, name, '--split', 'validation', '--macs', 2, '--budgets',
                        .4, 1, '--output', tmp_path / 'cascade')
    assert code == 0 and 'budgets ' in out
    cascade = timm_aig.Cascade.from_pretrained(tmp_path / 'cascade')
    assert len(cascade.models) == 1 and set(cascade.budgets) <= {.4, 1.}
    _, _, err = call('calibrate.py', '--cascade', name, adaptive_model, '--macs', 2, '--budgets', .6, '--output',
                     tmp_path / 'between')
    assert timm_aig.Cascade.from_pretrained(tmp_path / 'between').budgets == (.6, None)
    assert 'Stage 2 keeps its gate offset: it is not calibrated.' in err and 'Stage 1' not in err
    _, _, err = call('calibrate.py', '--cascade', name, name, '--macs', 2, '--budgets', .3)
    assert 'Stage 1 keeps its gate offset: it is calibrated for 0.4 to 1.' in err
    best = max(rows('--model', name, '--budgets', .4, 1), key=lambda row: row['top1'])
    assert rows('--cascade', tmp_path / 'cascade')[0]['top1'] >= best['top1'] - 1e-9


def test_times_are_of_each_stage_and_the_cascade_in_turns(call, run_script, images, static_model, tmp_path, capsys):
    model = timm.create_model('resnet10t', num_classes=3)  # of another family, for ONNX Runtime too
    model.pretrained_cfg.update(input_size=(3, 32, 32), test_input_size=None, crop_pct=1.)
    large = f'local-dir:{timm_aig.save_pretrained(model, tmp_path / "large")}'
    args = ['--cascade', large, large, '--images', images / 'validation', '--num-images', 5, '--rounds', 2,
            '--batch-size', 1, 2, '--runtimes', '--threads', 1, '--json']
    assert run_script('benchmark.py', *args) == 0
    results = json.loads(capsys.readouterr().out)['results']
    assert {(r['batch_size'], r['runtime'], r['name']) for r in results} == {
        (batch, runtime, name) for batch in (1, 2) for runtime in ('PyTorch, optimized', 'ONNX Runtime', 'OpenVINO')
        for name in ('stage 1', 'stage 2', 'cascade')}
    for r in results:
        assert 0 < r['p50_ms'] <= r['p99_ms'] and r['ratio_min'] <= r['ratio'] <= r['ratio_max']
        assert (r['ratio'] == 1) == (r['name'] == 'stage 2') or r['name'] == 'stage 1'
        assert (r['macs_share'] is None) == (r['name'] != 'cascade')


@pytest.mark.parametrize('args, problem', [
    ([], '--images must be given'), (['--train'], '--train not allowed with argument --cascade'),
    (['--images', '/nowhere'], '--images /nowhere: there is no such folder.'),
    (['--batch-size', '99', '--images', '{images}'], '--batch-size 99'),
])
def test_what_a_cascade_cannot_be_timed_on_is_named(run_script, images, static_model, capsys, args, problem):
    args = [arg.format(images=images / 'validation') for arg in args]
    assert run_script('benchmark.py', '--cascade', static_model, static_model, *args) == 2
    assert problem in capsys.readouterr().err


def test_times_of_an_adaptive_last_stage_are_over_its_static_parent(
        run_script, images, static_model, adaptive_model, capsys):
    args = ['--cascade', static_model, adaptive_model, '--images', images / 'validation', '--num-images', 99,
            '--rounds', 1, '--batch-size', 2, '--threads', 1, '--json']
    assert run_script('benchmark.py', *args) == 0
    found = json.loads(capsys.readouterr().out)
    ratios = {row['name']: row['ratio'] for row in found['results']}
    assert found['setting']['images'] == 21 and found['setting']['input_size'] == [3, 8, 8]  # there are no more
    assert set(ratios) == {'parent', 'stage 1', 'stage 2', 'cascade'} and ratios['parent'] == 1


def test_what_is_timed_of_a_stage_is_its_model_at_its_budget(static_model, calibrated_model, monkeypatch):
    static, adaptive = (timm.create_model(name, pretrained=True).eval() for name in (static_model, calibrated_model))
    runs = torch_runs(timm_aig.Cascade([static, (adaptive, .4)]), None)
    monkeypatch.setattr(timm_aig.Cascade, 'forward', None)  # it takes time of its own
    timm_aig.set_budget(adaptive, .4)
    x = torch.randn(5, 3, 8, 8)
    with torch.inference_mode():
        for name, model in {'stage 1': static, 'stage 2': adaptive}.items():
            torch.testing.assert_close(runs[name](x), model(x))
