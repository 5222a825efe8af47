"""scripts/segment_glyphs.py: labels of its pages, mean IoU by hand, and training, resuming and summing up."""
import csv
import json
from unittest.mock import Mock

import pytest
import segment_glyphs
import torch
from PIL import Image
from segment_glyphs import Answers, Glyphs, Pages, join, score

from timm_aig.training.trainer import Stopped, Trainer


@pytest.fixture
def data(tmp_path):
    """Three classes of flat 20 px images, a grey for each."""
    for split in ('train', 'test'):
        for label in range(3):
            folder = tmp_path / 'data' / split / f'class{label}'
            folder.mkdir(parents=True)
            for i in range(12):
                Image.new('L', (20, 20), 100 * label).save(folder / f'{i}.png')
    return tmp_path / 'data'


@pytest.fixture
def start(data, tmp_path, monkeypatch):
    """Runs the script for two batches of one epoch."""
    monkeypatch.setattr(segment_glyphs, 'OFFSETS', (-1e4, 0., 1e4))
    monkeypatch.setattr(segment_glyphs, 'CASCADES', (('static-r8', 'static-r32'),))
    monkeypatch.setattr(segment_glyphs, 'SHARES', (.5,))
    monkeypatch.setattr(segment_glyphs, 'TEST_BATCH', 4)

    def _start(*args):
        return segment_glyphs.main([
            '--data-dir', str(data), '--output', str(tmp_path / 'out'), '--epochs', '1', '--pages', '16',
            '--batch-size', '8', *map(str, args)])

    return _start


def test_a_label_is_the_class_of_the_image_at_its_position():
    labels = torch.arange(5)
    pages = Pages(Glyphs((40 * labels).byte().view(5, 1, 1).expand(5, 20, 20), labels), 4, 12)
    batches = list(pages)
    assert len(batches) == len(pages) == 3
    for x, y in batches:
        assert x.shape == (4, 1, 40, 40) and y.shape == (400,)
        assert torch.allclose((x[:, 0, 2::4, 2::4] * .3 + .5) * 255 / 40, y.view(4, 10, 10).float(), atol=1e-4)
    assert len({tuple(y.tolist()) for _, y in batches}) == 3  # new pages in each batch
    fixed = Pages(pages.glyphs, 4, 12, seed=0)
    assert all(torch.equal(a, b) for first, second in zip(fixed, fixed) for a, b in zip(first, second))


def test_the_mean_iou_is_that_counted_by_hand():
    labels = torch.tensor([[0, 1, 1], [1, 2, 2]])
    found = Answers(torch.tensor([[0, 0, 1], [1, 1, 2]]).short(), torch.zeros(2), torch.zeros(2))
    # IoU 1/2, 2/4 and 1/2; no position has the fourth class
    assert score(found, labels, 4) == pytest.approx((50., 100 * 4 / 6))


def test_the_least_sure_pages_of_a_cascade_go_on():
    small = Answers(torch.zeros(4, 3).short(), torch.tensor([.9, .2, .8, .4]), torch.tensor([1., 1., 1., 1.]))
    large = Answers(torch.ones(4, 3).short(), torch.rand(4), torch.tensor([10., 20., 30., 40.]))
    found = join(small, large, .5)
    assert found.classes.tolist() == [[0] * 3, [1] * 3, [0] * 3, [1] * 3] and found.macs.tolist() == [1, 21, 1, 41]


def test_it_trains_goes_on_and_sums_up(start, tmp_path, capsys, monkeypatch):
    table = tmp_path / 'table.csv'
    assert start('--networks', 'static-r32', 'any-r32', '--json') == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row['network'], row['setting']) for row in rows] == [
        ('static-r32', ''), ('any-r32', 'offset -10000'), ('any-r32', 'offset 0'), ('any-r32', 'offset 10000')]
    static, closed, _, opened = (row['macs_over_resnet32'] for row in rows)
    assert closed < .2 and static == 1 < opened < 1.01
    monkeypatch.setattr(segment_glyphs, 'train', None)  # nothing is trained again
    assert start('--networks', 'static-r32', 'any-r32') == 0
    assert start('--table', table) == 0  # of what is trained
    with open(table, newline='') as file:
        written = list(csv.DictReader(file))
    assert [row['network'] for row in written] == ['static-r32', *['any-r32'] * 3] and written[0]['pages'] == '16'
    assert start('--batch-size', 4, '--json', '--table', table) == 2  # they were trained otherwise
    assert "static-r32-s0 was trained with {'epochs': 1, 'pages': 16, 'batch_size': 8}" in capsys.readouterr().err
    assert start('--seed', 1, '--table', table) == 1  # no network of this seed


def test_cascades_of_what_is_trained_are_in_the_table(start, capsys):
    assert start('--networks', 'static-r8', 'static-r32', '--json') == 0
    *single, cascade = json.loads(capsys.readouterr().out)
    assert len(single) == 2 and cascade['setting'] == '50% go on'
    small, large = (row['macs'] for row in single)
    assert small < cascade['macs'] < small + large


def test_a_teacher_that_is_not_trained_and_a_wrong_folder_are_errors(start, tmp_path, capsys):
    assert start('--networks', 'any-r32') == 2
    assert 'any-r32 learns from static-r32, which is not trained' in capsys.readouterr().err
    assert segment_glyphs.main(['--data-dir', str(tmp_path)]) == 2
    assert '--data-dir must be a folder of prepare_glyphs.py' in capsys.readouterr().err
    assert start('--table', tmp_path / 'table.csv') == 1
    assert 'no network is trained' in capsys.readouterr().err and not (tmp_path / 'table.csv').exists()


def test_a_training_that_is_stopped_says_how_to_go_on(start, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, 'fit', Mock(side_effect=Stopped('stopped, saved.', 15)))
    assert start('--networks', 'static-r8') == 143
    assert 'stopped, saved. To go on, run the same command.\n' in capsys.readouterr().err
