"""scripts/prepare_*.py, on stand-ins for the files of Fashion-MNIST and for the fonts."""
import csv
import gzip
import shutil
import struct
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image
from prepare_fashion_mnist import main
from torchvision.datasets import FashionMNIST


@pytest.fixture
def source(tmp_path):
    """Four files of two training images and one test image."""
    folder = tmp_path / 'source'
    folder.mkdir()
    for name, _ in FashionMNIST.resources:
        count = 2 if name.startswith('train') else 1
        if 'images' in name:
            content = struct.pack('>iiii', 2051, count, 28, 28) + bytes(count * 28 * 28)
        else:
            content = struct.pack('>ii', 2049, count) + bytes(count)
        (folder / name).write_bytes(gzip.compress(content))
    return folder


@pytest.fixture
def glyphs(tmp_path_factory, monkeypatch):
    """prepare_glyphs with two Latin fonts and letters."""
    import prepare_glyphs

    folder = tmp_path_factory.mktemp('fonts')
    source = Path(matplotlib.get_data_path(), 'fonts/ttf')
    for name, file in {'first': 'DejaVuSans.ttf', 'second': 'DejaVuSerif.ttf'}.items():
        shutil.copyfile(source / file, folder / f'{name}.ttf')
    monkeypatch.setattr(prepare_glyphs, 'FOLDER', folder)
    monkeypatch.setattr(prepare_glyphs, 'FONTS', (prepare_glyphs.Font('fonts-first', 'free', 'first.ttf'),))
    monkeypatch.setattr(prepare_glyphs, 'TEST_FONTS', (prepare_glyphs.Font('fonts-second', 'free', 'second.ttf'),))
    choose = prepare_glyphs.characters
    monkeypatch.setattr(
        prepare_glyphs, 'characters', lambda count, seed: choose(count, seed) and list('ABCDEFGH'[:count]))
    return prepare_glyphs


def test_torchvision_reads_what_it_lays_out(source, tmp_path, capsys):
    root = tmp_path / 'data'
    assert main([str(root), '--source', str(source)]) == 0
    assert capsys.readouterr().out.startswith('2 training and 1 test images')
    assert len(FashionMNIST(str(root), train=True)) == 2


def test_a_mistyped_source_is_an_error_and_no_download(source, tmp_path, capsys):
    assert main([str(tmp_path / 'data'), '--source', str(tmp_path / 'typo')]) == 2
    assert f"--source must be a folder, '{tmp_path / 'typo'}' is not" in capsys.readouterr().err
    (tmp_path / 'file').touch()
    assert main([str(tmp_path / 'file'), '--source', str(source)]) == 3
    assert 'ROOT must be a folder to write to' in capsys.readouterr().err


@pytest.mark.parametrize('fault', ['missing', 'other', 'torn'])
def test_a_missing_other_or_torn_file_is_named_and_nothing_is_written(source, tmp_path, capsys, fault):
    file = source / 'train-labels-idx1-ubyte.gz'
    whole = file.read_bytes()
    file.unlink()
    if fault != 'missing':
        file.write_bytes(gzip.compress(b'other') if fault == 'other' else whole[:-9])
    assert main([str(tmp_path / 'data'), '--source', str(source)]) == 2
    assert f"error: --source {file} " in capsys.readouterr().err
    assert not list((tmp_path / 'data').iterdir())


def test_glyphs_are_an_image_folder_with_a_severity_for_each_image(glyphs, tmp_path, capsys):
    root = tmp_path / 'glyphs'
    args = ['--classes', '3', '--size', '12', '--train', '9', '--validation', '3', '--test', '3', '--test-fonts', '4']
    assert glyphs.main([str(root), *args]) == 0
    assert '9 train, 3 validation, 3 test, 4 test_fonts images of 3 characters' in capsys.readouterr().out
    classes = sorted(folder.name for folder in (root / 'train').iterdir())
    assert len(classes) == 3 and all(name.startswith('U+') for name in classes)
    with open(root / 'glyphs.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 19 and len({row['severity'] for row in rows}) > 10
    for row in rows:
        assert row['font'] == ('second.ttf' if row['image'].startswith('test_fonts') else 'first.ttf')
        image = Image.open(root / row['image'])
        assert image.size == (12, 12) and image.mode == 'L' and len(set(image.get_flattened_data())) > 2
    assert (root / 'fonts.csv').read_text().splitlines()[1].startswith('first.ttf,fonts-first,')


def test_glyphs_of_one_seed_are_the_same(glyphs, tmp_path):
    args = ['--classes', '2', '--train', '4', '--validation', '2', '--test', '2', '--test-fonts', '2']
    for folder, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert glyphs.main([str(tmp_path / folder), *args, '--seed', str(seed)]) == 0
    a, b, c = ({file.relative_to(tmp_path / folder): file.read_bytes() for file in (tmp_path / folder).rglob('*.png')}
               for folder in 'abc')
    assert a == b and list(a.values()) != list(c.values())


def test_more_severe_images_differ_more_from_the_character(glyphs):
    shapes = torch.zeros(1, 2, 32, 32)
    shapes[0, 0, 8:24, 14:18] = 1
    shapes[0, 1, 14:18, 8:24] = 1
    labels = torch.arange(400) % 2
    plain = torch.nn.functional.avg_pool2d(shapes[0], 2)[labels]
    errors = []
    for severity in (0., .3, 1.):
        images = glyphs.draw(
            shapes, 0 * labels, labels, torch.full((400,), severity), torch.Generator().manual_seed(0))[:, 0]
        errors.append(torch.minimum((images - plain).abs(), (1 - images - plain).abs()).mean().item())
    assert errors[0] == pytest.approx(0, abs=1e-6) and .01 < errors[0] + .02 < errors[1] < errors[2]


def test_what_is_missing_for_the_glyphs_is_named(glyphs, tmp_path, capsys, monkeypatch):
    (tmp_path / 'file').touch()
    for args, problem in (
            ([str(tmp_path)], 'ROOT must be a new or empty folder'),
            ([str(tmp_path / 'file')], 'ROOT must be a new or empty folder'),
            ([], 'ROOT is required'),
            ([str(tmp_path / 'new'), '--classes', '9999'], '--classes must be at most 2370, not 9999'),
            ([str(tmp_path / 'new'), '--classes', '2'], 'has no'),
            ([str(tmp_path / 'new')], 'fonts are missing: apt-get install fonts-second')):
        if 'has no' in problem:
            monkeypatch.setattr(glyphs, 'characters', lambda count, seed: ['a', '\U0010fffd'])
        if 'missing' in problem:
            monkeypatch.setattr(glyphs, 'TEST_FONTS', (glyphs.Font('fonts-second', '', 'no/such.ttf'),))
        try:
            code = glyphs.main(args)
        except SystemExit as e:
            code = e.code
        assert code == 2 and problem in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()


def test_the_packages_of_the_fonts_are_printed(capsys):
    import prepare_glyphs

    assert prepare_glyphs.main(['--packages']) == 0
    assert 'fonts-noto-cjk' in capsys.readouterr().out.split()
