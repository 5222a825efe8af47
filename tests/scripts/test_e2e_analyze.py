"""scripts/analyze.py: its tables, figures and pictures against a plain loop, its groups, and bad input."""
import csv
import json
from collections import Counter

import pytest
from PIL import Image

import timm_aig


@pytest.fixture
def analyze(run_script, images, tmp_path, capsys):
    """Runs the script on the images; gives its output folder and what it prints."""
    def _analyze(*args, data=images):
        folder = tmp_path / 'analysis'
        assert run_script('analyze.py', '--data-dir', data, '--workers', 0, '--batch-size', 8, '--permutations', 19,
                          '--width', 800, '--output', folder, *args) == 0
        return folder, capsys.readouterr().out

    return _analyze


def rows(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def test_the_tables_and_figures_are_those_of_a_plain_loop(analyze, adaptive_model, plain_loop):
    logits, gates, labels, model = plain_loop(adaptive_model)
    folder, out = analyze('--model', adaptive_model, '--json')
    results = json.loads(out)
    assert json.loads((folder / 'analysis.json').read_text()) == results
    blocks, names = list(timm_aig.gated_blocks(model)), ['ape', 'bee', 'cat']
    assert 0 < gates.mean() < 1 and len(gates.unique(dim=0)) > 2
    for i, row in enumerate(rows(folder / 'rates.csv')):
        assert (row['class'], row['images']) == (names[i], '7')
        assert [float(row[b]) for b in blocks] == pytest.approx(gates[labels == i].mean(0).tolist(), abs=1e-6)
    for i, row in enumerate(rows(folder / 'blocks_run.csv')):
        assert [int(row[str(n)]) for n in range(10)] == gates[labels == i].sum(1).long().bincount(minlength=10).tolist()
    counted = Counter((names[y], ''.join(str(int(z)) for z in g)) for g, y in zip(gates, labels))
    assert {(row['class'], row['path']): int(row['images']) for row in rows(folder / 'paths.csv')} == counted
    for i, row in enumerate(rows(folder / 'likeness.csv')):
        likeness = logits.double().softmax(1)[labels == i].mean(0)
        assert [float(row[name]) for name in names] == pytest.approx(likeness.tolist(), rel=1e-3)
    cost = timm_aig.compute_cost(model, (3, 8, 8))
    assert results['images'] == 21 and results['unreadable'] == 0
    assert results['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert results['execution_rate'] == pytest.approx(gates.mean().item())
    assert results['macs_share'] == pytest.approx(cost.executed(gates).mean().item() / (cost.total - cost.gates))
    assert [block['rate'] for block in results['blocks'].values()] == pytest.approx(gates.mean(0).tolist())
    assert results['paths']['paths'] == len(gates.unique(dim=0))
    pictures = sorted(file.name for file in folder.glob('*.png'))
    assert pictures == ['blocks_run.png', 'contact_sheet_1.png', 'execution_rates.png']
    for picture in pictures:
        with Image.open(folder / picture) as image:
            image.load()
            assert image.width == 800


def test_the_claims_are_printed_with_their_verdicts_and_groups_come_from_a_file(analyze, adaptive_model, tmp_path):
    groups = tmp_path / 'groups.json'
    groups.write_text('{"beasts": ["ape", "cat"], "insects": ["bee"]}')
    folder, out = analyze('--model', adaptive_model, '--groups', groups)
    results = json.loads((folder / 'analysis.json').read_text())
    assert results['groups'] == {'beasts': ['ape', 'cat'], 'insects': ['bee']} and results['groups_from'] == 'file'
    assert [row['group'] for row in rows(folder / 'rates.csv')] == ['beasts', 'insects', 'beasts']
    assert len(results['claims']) == 6
    words = ' '.join(out.split())
    for claim in results['claims']:
        assert f'{claim["verdict"]}: {claim["claim"]}: {claim["finding"]}' in words


def test_a_smaller_offset_closes_gates_and_the_contact_sheets_of_before_are_gone(analyze, adaptive_model):
    folder, _ = analyze('--model', adaptive_model)
    (folder / 'contact_sheet_2.png').touch()
    with Image.open(folder / 'contact_sheet_1.png') as image:
        height = image.height
    _, out = analyze('--model', adaptive_model, '--gate-offset', -1000, '--split', 'train', '--holdout', 20, '--json')
    results = json.loads(out)
    assert (results['execution_rate'], results['split'], results['images']) == (0, 'train, 20 held out', 20)
    assert [file.name for file in folder.glob('contact_sheet_*')] == ['contact_sheet_1.png']
    analyze('--model', adaptive_model, '--show', 'bee')
    with Image.open(folder / 'contact_sheet_1.png') as image:
        assert image.height < height  # one class of three


def test_broken_images_and_a_class_without_images_are_left_out(analyze, adaptive_model, make_images, tmp_path):
    data = make_images(tmp_path / 'data', splits=(('validation', 3),))
    (data / 'validation' / 'ape' / '0.png').write_bytes(b'broken')
    for file in (data / 'validation' / 'bee').iterdir():
        file.write_bytes(b'broken')
    folder, out = analyze('--model', adaptive_model, '--json', data=data)
    results = json.loads(out)
    assert (results['images'], results['unreadable'], results['classes_without_images']) == (5, 4, ['bee'])
    assert [(row['class'], row['images']) for row in rows(folder / 'rates.csv')] == [('ape', '2'), ('cat', '3')]


@pytest.mark.parametrize('args, error', [
    (['--model', 'no_such_model'], 'model no_such_model'),
    (['--model', 'cifar_resnet20'], '--model must be adaptive, cifar_resnet20 has no gates'),
    (['--model', 'cifar_resnet20_aig', '--width', '3'], '--width must be a whole number from 400 to 8000'),
    (['--groups', '/nowhere'], '--groups /nowhere: '),
    (['--show', 'bee', 'cow'], '--show must be classes of the data set, not cow'),
    (['--model', 'resnet18_aig', '--input-size', '3', '8', '8', '--batch-size', '2', '--gate-offset', 'nan'],
     '--gate-offset'),
])
def test_bad_input_is_one_line_that_names_the_argument(
        run_script, images, adaptive_model, tmp_path, capsys, args, error):
    assert run_script('analyze.py', '--model', adaptive_model, '--data-dir', images, '--workers', 0,
                      '--output', tmp_path, *args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith('error: ') and error in lines[-1] and 'Traceback' not in ''.join(lines)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_exit_code_3(run_script, images, adaptive_model, capsys):
    assert run_script('analyze.py', '--model', adaptive_model, '--data-dir', images, '--output', '/dev/null') == 3
    assert "error: --output must be a folder to write to, '/dev/null' is not" in capsys.readouterr().err


@pytest.mark.parametrize('text, error', [
    ('[1', 'groups.json: '),
    ('["ape"]', 'groups.json: it must hold an object'),
    ('{"a": []}', 'must be an object of lists'),
    ('{"a": ["ape", "bee", "cat", "dog"]}', 'in one group; not so: dog'),
    ('{"a": ["ape", "bee"]}', 'in one group; not so: cat'),
    ('{"a": ["ape", "bee", "cat"], "b": ["bee"]}', 'in one group; not so: bee'),
])
def test_groups_that_do_not_fit_are_refused(run_script, images, adaptive_model, tmp_path, capsys, text, error):
    groups = tmp_path / 'groups.json'
    groups.write_text(text)
    assert run_script('analyze.py', '--model', adaptive_model, '--data-dir', images, '--groups', groups, '--output',
                      tmp_path / 'out') == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('error: --groups ') and error in last
    assert not (tmp_path / 'out').exists()


def test_the_figures_are_printed_before_a_file_that_cannot_be_written(
        run_script, images, adaptive_model, tmp_path, capsys):
    (tmp_path / 'analysis.json').mkdir()
    assert run_script('analyze.py', '--data-dir', images, '--workers', 0, '--permutations', 19,
                      '--model', adaptive_model, '--output', tmp_path) == 3
    out, err = capsys.readouterr()
    assert out.startswith('21 images of folder, validation: top-1') and 'Wrote' not in out
    assert err.splitlines()[-1].startswith('error: ') and 'analysis.json' in err


def test_a_data_set_with_more_classes_is_refused(run_script, make_images, adaptive_model, tmp_path, capsys):
    data = make_images(tmp_path / 'data', splits=(('validation', 2),), classes=('a', 'b', 'c', 'd'))
    assert run_script('analyze.py', '--model', adaptive_model, '--data-dir', data, '--workers', 0, '--output',
                      tmp_path / 'out') == 2
    assert 'the classes of the model, ape, bee, cat, not a, b, c, d.' in capsys.readouterr().err.splitlines()[-1]
