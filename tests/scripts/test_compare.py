"""scripts/compare.py: the order of its trainings, what it resumes, and its table."""
import csv
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import _answers
import _comparison
import compare
import pytest
import timm
import torch
from PIL import Image

import timm_aig
from timm_aig.training.trainer import Stopped


@pytest.fixture
def start(images, tmp_path):
    """Runs the script on small images, three classes and one seed."""
    def _start(*args):
        return compare.main([
            'glyphs', '--data-dir', str(images), '--output', str(tmp_path / 'out'), '--seeds', '0', *map(str, args)])

    return _start


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Puts models into the output folder as if finetune.py had trained them."""
    small = '--num-classes 3 --input-size 3 8 8'
    task = _comparison.Task(small, '--split train', '--split validation', 2, 6)
    monkeypatch.setitem(_comparison.TASKS, 'glyphs', task)
    monkeypatch.setattr(_answers, 'OFFSETS', (-1., 0., 1e4))
    monkeypatch.setattr(_answers, 'TIMED', 9)
    monkeypatch.setattr(_answers, 'ROUNDS', 2)
    monkeypatch.setattr(_answers, 'BATCHES', (1, 4))

    def _trained(*names):
        for name in names:
            torch.manual_seed(len(name))
            kind, net = name.split('-')
            model = timm.create_model(_comparison.NETS[net] + ('_aig' if kind == 'any' else ''), num_classes=3)
            model.pretrained_cfg['input_size'] = (3, 8, 8)
            for block in timm_aig.gated_blocks(model).values():
                torch.nn.init.normal_(block.gate.fc2.weight, std=3.)
            torch.nn.init.normal_(model.fc.weight)
            folder = tmp_path / 'out' / f'{name}-s0'
            timm_aig.save_pretrained(model.eval(), folder)
            (folder / 'results.json').write_text('{"recipe": {"amp": false}}')

    return _trained


@pytest.fixture
def commands(monkeypatch):
    """Replaces each training by a process that notes its name, and fails for those named."""
    done, plan = [], compare.planned

    def planned(args):
        program = ("import pathlib, sys; sys.exit(1) if sys.argv[2] in sys.argv[3:] else None; "
                   "folder = pathlib.Path(sys.argv[1], sys.argv[2]); folder.mkdir(); "
                   "(folder / 'results.json').write_text('{}')")
        trainings = plan(args)
        done.extend(trainings)
        return [t._replace(command=[sys.executable, '-c', program, args.output, t.name, *failing]) for t in trainings]

    failing = []
    monkeypatch.setattr(compare, 'planned', planned)
    monkeypatch.setattr(compare, 'summarize', lambda args: [])
    return failing


def test_a_training_starts_once_what_it_needs_is_done(start, commands, tmp_path, capsys):
    assert start('--only', 'r32', '--jobs', 3) == 0
    times = {file.parent.name: file.stat().st_mtime_ns for file in (tmp_path / 'out').glob('*/results.json')}
    assert set(times) == {f'{name}-s0' for name in compare.trainings(compare.TASKS['glyphs']) if 'r32' in name}
    assert times['static-r32-s0'] < times['any-r32-s0'] and times['half-r32-s0'] < times['distill-r32-s0']
    assert start('--only', 'r32') == 0  # nothing is trained again
    assert times == {file.parent.name: file.stat().st_mtime_ns for file in (tmp_path / 'out').glob('*/results.json')}


def test_a_training_that_fails_is_named_and_what_needs_it_does_not_start(start, commands, capsys):
    commands.append('static-r32-s0')
    assert start('--only', 'static-r32', 'distilled-r8') == 1
    assert 'distilled-r8-s0 needs static-r32-s0, which is not trained' in capsys.readouterr().err
    commands[:] = ['static-r8-s0']
    assert start('--only', 'static-r8') == 1
    assert 'static-r8-s0 failed, see' in capsys.readouterr().err


@pytest.mark.parametrize('args, code, problem', [
    (['--data-dir', '/nowhere'], 2, "--data-dir must be a folder, '/nowhere' is not"),
    (['--table', 'table.csv'], 1, 'has no trainings of glyphs to sum up'),
])
def test_nothing_to_train_on_or_to_sum_up_is_an_error(start, capsys, args, code, problem):
    assert start(*args) == code and problem in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.parse_args(['glyphs'])
    assert '--data-dir' in capsys.readouterr().err


def test_trainings_are_valid_command_lines(finetune, images, tmp_path):
    for task in compare.TASKS:
        plans = compare.planned(compare.parse_args([
            task, '--data-dir', str(images), '--seeds', '0', '--output', str(tmp_path / 'two words'), '--amp']))
        for training in plans:
            args = finetune.parse_args(training.command[2:])
            assert args.experiment == training.name and args.resume == 'auto' and args.amp
            assert args.output == str(tmp_path / 'two words') and training.needs in {None, *(t.name for t in plans)}
            if training.needs == 'half-r32-s0':
                parent = next(t for t in plans if t.name == training.needs)
                args.epochs += finetune.parse_args(parent.command[2:]).epochs
            assert args.epochs == compare.TASKS[task].epochs or training.name == 'half-r32-s0'


def test_the_table_has_what_validate_measures(start, trained, run_script, images, tmp_path, capsys):
    trained('static-r8', 'static-r32', 'any-r20')
    assert start('--table', tmp_path / 'table.csv') == 0
    with open(tmp_path / 'table.csv', newline='') as file:
        rows = {(row['model'], row['setting']): row for row in csv.DictReader(file)}
    capsys.readouterr()
    for name, args in {'static-r8': [], 'any-r20': ['--gate-offset', '-1']}.items():
        assert run_script('validate.py', '--model', f'local-dir:{tmp_path}/out/{name}-s0', '--data-dir', images,
                          '--workers', 0, '--json', *args) == 0
        expected = json.loads(capsys.readouterr().out)['rows'][0]
        row = rows[name, 'offset -1' if args else '']
        assert float(row['top1']) == round(expected['top1'], 2)
        assert float(row['macs']) == pytest.approx(expected['macs'] / 1e6, abs=1e-3)
    cascade = [row for (name, _), row in rows.items() if name == 'cascade, static-r8 + static-r32']
    shares = [float(row['setting'].split()[0]) for row in cascade if row['setting'].endswith('of the MACs')]
    assert shares == sorted(shares) and shares and {row['used'] for row in cascade} == {'static-r8 + static-r32'}
    assert 'any-r20 at' in rows['cascade, static or adaptive nets', '1 of the MACs']['used']  # it has the best answers
    assert rows['static-r32', '']['macs_over_resnet32'] == '1.0'


def test_one_seed_has_no_spread_and_a_second_run_reads_the_answers(start, trained, tmp_path, monkeypatch, capsys):
    trained('static-r32')
    assert start('--table', tmp_path / 'a.csv') == 0
    monkeypatch.setattr(timm, 'create_model', None)
    assert start('--table', tmp_path / 'b.csv') == 0
    assert (tmp_path / 'a.csv').read_text() == (tmp_path / 'b.csv').read_text()
    assert ',,' in (tmp_path / 'a.csv').read_text()


def test_seeds_trained_elsewhere_are_added_to_the_table(start, trained, tmp_path, capsys):
    trained('static-r32', 'any-r20')
    first, second, both = (tmp_path / f'{name}.csv' for name in ('first', 'second', 'both'))
    assert start('--table', first) == 0
    for name in ('static-r32', 'any-r20'):
        (tmp_path / 'out' / f'{name}-s0').rename(tmp_path / 'out' / f'{name}-s3')
    answers = torch.load(tmp_path / 'out' / 'any-r20-s3' / 'answers.pt', weights_only=True)
    answers[0][2][1][:2] = 1 - answers[0][2][1][:2]  # of the test images at offset -1, two are now right or wrong
    torch.save(answers, tmp_path / 'out' / 'any-r20-s3' / 'answers.pt')
    assert start('--seeds', 3, '--table', second) == 0 and start('--seeds', 3, '--add', first, '--table', both) == 0
    tables = []
    for path in (first, second, both):
        with open(path, newline='') as file:
            tables.append({(row['model'], row['setting']): row for row in csv.DictReader(file)})
    for key in (('static-r32', ''), ('any-r20', 'offset -1')):
        a, b, mean = (table[key] for table in tables)
        top1 = [float(a['top1_seeds']), float(b['top1_seeds'])]
        assert mean['seeds'] == '0, 3' and mean['top1_seeds'] == f'{a["top1_seeds"]}, {b["top1_seeds"]}'
        assert float(mean['top1']) == pytest.approx(sum(top1) / 2, abs=.01)
        assert float(mean['top1_std']) == pytest.approx(abs(top1[0] - top1[1]) / 2 ** .5, abs=.01)
        assert float(mean['macs']) == pytest.approx((float(a['macs']) + float(b['macs'])) / 2, abs=1e-3)

    assert start('--seeds', 3, '--add', both, '--table', second) == 2
    assert "--add has seeds [0, 3]" in capsys.readouterr().err
    other = first.read_text().replace('glyphs,', 'fmnist,'), second.read_text().replace('static-r32,,', 'static-r32,,n')
    bad = {'bad.csv': 'model,setting\nx,y\n', 'task.csv': other[0], 'nan.csv': other[1]}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
    for args in (('--add', first), *(('--add', tmp_path / name, '--table', both) for name in (*bad, 'missing.csv'))):
        assert start('--seeds', 3, *args) == 2 and 'error: --add ' in capsys.readouterr().err
    for args in (('--amp',), ('--only', 'static')):
        assert start(*args, '--table', both) == 2 and f'error: {args[0]} is for trainings' in capsys.readouterr().err


def test_a_cascade_that_other_seeds_used_too_is_named_once(start, monkeypatch, tmp_path):
    added = [compare.Result(seed, 1e6, 90., 'a + b; a + c', [], 'float32') for seed in (1, 2)]
    row = _answers.Row('cascade', 'x', 1e6, 90., torch.ones(1), (('a', None), ('b', None)))
    monkeypatch.setattr(compare, 'read_results', lambda args: [(('cascade', 'x'), result) for result in added])
    monkeypatch.setattr(compare, 'rows_of_seed', lambda args, seed: [row])
    monkeypatch.setattr(compare, 'precision', lambda *args: 'float32')
    assert start('--add', 'x', '--table', tmp_path / 'table.csv') == 0
    with open(tmp_path / 'table.csv', newline='') as file:
        assert [row['used'] for row in csv.DictReader(file)] == ['a + b; a + c']


def test_a_missing_extra_is_named_before_the_times_are_taken(start, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert start('--times', tmp_path / 'times.csv') == 2
    assert "pip install 'timm_aig[export]'" in capsys.readouterr().err


def test_cascades_are_of_nets_that_all_seeds_have(start, trained, tmp_path):
    trained('static-r8', 'static-r32', 'any-r32')
    for name in ('static-r8', 'static-r32'):
        shutil.copytree(tmp_path / 'out' / f'{name}-s0', tmp_path / 'out' / f'{name}-s1')
    recipe = tmp_path / 'out' / 'static-r8-s1' / 'results.json'
    recipe.write_text('{"recipe": {"amp": true, "amp_dtype": "bfloat16"}}')
    assert start('--seeds', 0, 1, '--table', tmp_path / 'table.csv') == 0
    with open(tmp_path / 'table.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['used'] for row in rows if row['model'].startswith('cascade')} == {'static-r8 + static-r32'}
    assert {row['seeds'] for row in rows if row['model'].startswith('any')} == {'0'}
    assert {row['precision'] for row in rows if row['model'].startswith('cascade')} == {
        'float32, bfloat16 and float32'}


def test_sigterm_stops_the_trainings_too(images, tmp_path, monkeypatch):
    program = ('import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit('
               'pathlib.Path(sys.argv[1], "saved").write_text("x") and 0)); pathlib.Path(sys.argv[1], "up").touch(); '
               'time.sleep(60)')
    args = compare.parse_args(['glyphs', '--data-dir', str(images), '--output', str(tmp_path), '--only', 'static-r8'])
    plan = [t._replace(command=[sys.executable, '-c', program, str(tmp_path)]) for t in compare.planned(args)]
    monkeypatch.setattr(compare, 'planned', lambda args: plan)

    def stop():
        while not (tmp_path / 'up').exists():
            time.sleep(.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Stopped, match='stopped by SIGTERM'):
        compare.train(args)
    assert (tmp_path / 'saved').exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_pairs_are_counted_on_the_images(start, trained, tmp_path):
    trained('static-r32', 'any-r32')
    for name, right in {'static-r32': [1, 1, 1, 1, 0, 0], 'any-r32': [1, 0, 0, 0, 1, 0]}.items():
        answers = [torch.full((6,), .5, dtype=torch.float64), torch.tensor(right, dtype=torch.float64),
                   torch.full((6,), 2e6, dtype=torch.float64)]
        offset = None if name == 'static-r32' else 0.
        torch.save([(offset, answers, answers)], tmp_path / 'out' / f'{name}-s0' / 'answers.pt')
    assert start('--pairs', tmp_path / 'pairs.csv') == 0
    with open(tmp_path / 'pairs.csv', newline='') as file:
        row, = csv.DictReader(file)
    assert (row['model'], row['setting'], row['against'], row['seed']) == ('any-r32', 'offset 0', 'static-r32', '0')
    assert (row['only_model'], row['only_against'], row['points']) == ('1', '3', '-33.33')
    assert row['images'] == '6' and row['p'] == '0.62'  # 2 * (1 + 4) / 2 ** 4 = 0.625


def test_macs_are_split_by_the_severity_of_the_image(start, trained, images, tmp_path, capsys):
    trained('static-r32', 'any-r20')
    files = sorted((images / 'validation').rglob('*.*'))
    rows = [f'test/{file.relative_to(images / "validation")},x,{i / len(files)}' for i, file in enumerate(files)]
    (images / 'glyphs.csv').write_text('image,font,severity\n' + '\n'.join(rows[::-1]) + '\n')
    try:
        assert start('--table', tmp_path / 'table.csv') == 0
    finally:
        (images / 'glyphs.csv').unlink()
    with open(tmp_path / 'table.csv', newline='') as file:
        table = {(row['model'], row['setting']): row for row in csv.DictReader(file)}
    assert table['static-r32', '']['macs_by_severity'] == '1.000 1.000 1.000 1.000'
    answers = torch.load(tmp_path / 'out' / 'any-r20-s0' / 'answers.pt', weights_only=True)
    macs = answers[0][2][2]  # of the test images at offset -1, in the order of the files
    static = answers and torch.load(tmp_path / 'out' / 'static-r32-s0' / 'answers.pt', weights_only=True)[0][2][2][0]
    expected = ' '.join(f'{part.mean() / static:.3f}' for part in macs.chunk(4))
    assert table['any-r20', 'offset -1']['macs_by_severity'] == expected


def test_severities_come_in_the_order_in_which_timm_reads_the_images(start, tmp_path):
    folders = ['U+4E9', 'U+4E10', 'U+4E1A']
    for i, folder in enumerate(folders):
        (tmp_path / 'test' / folder).mkdir(parents=True)
        Image.new('L', (8, 8)).save(tmp_path / 'test' / folder / f'{i}.png')
    rows = [f'test/{folder}/{i}.png,{i}' for i, folder in enumerate(folders)]
    (tmp_path / 'glyphs.csv').write_text('\n'.join(['image,severity', *rows]))
    dataset = timm.data.create_dataset('', root=str(tmp_path), split='test')
    expected = [float(Path(dataset.filename(i)).stem) for i in range(3)]
    args = compare.parse_args(['glyphs', '--data-dir', str(tmp_path)])
    assert _answers.severities(args).tolist() == expected != sorted(expected)


def test_times_are_of_the_models_and_cascades_of_the_table(start, trained, tmp_path, capsys):
    trained('static-r8', 'static-r32', 'any-r20')
    assert start('--times', tmp_path / 'times.csv') == 0
    with open(tmp_path / 'times.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    names = [row['model'] for row in rows if row['batch_size'] == '1']
    assert names[:2] == ['static-r32', 'static-r8'] and names.count('any-r20') == 2
    assert 'cascade, static or adaptive nets' in names and len(rows) == 2 * len(names)
    for row in rows:
        assert float(row['ratio_min']) <= float(row['ratio']) <= float(row['ratio_max'])
        assert float(row['p50_ms']) <= float(row['p99_ms']) and float(row['ms_per_image']) > 0
    assert {row['ratio'] for row in rows if row['model'] == 'static-r32'} == {'1.0'}
