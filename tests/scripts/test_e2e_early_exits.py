"""scripts/early_exits.py: what it trains, and the row that compare.py makes of it."""
import csv
from unittest.mock import Mock

import _answers
import _comparison
import compare
import early_exits
import pytest
import timm
import torch

import timm_aig
from timm_aig.training.trainer import Stopped, Trainer


@pytest.fixture(scope='module')
def folder(finetune_args, static_model, tmp_path_factory):
    """A trained ResNet-20 with exits, as compare.py would train it."""
    output = tmp_path_factory.mktemp('exits')
    args = [
        *finetune_args, '--model', 'cifar_resnet20', '--teacher', static_model, '--distill-weight', '0.5',
        '--output', str(output), '--experiment', 'exits-r32-s0']
    assert early_exits.main(args) == 0
    return output / 'exits-r32-s0'


def test_the_last_exit_is_the_network_and_the_macs_of_all_are_its_macs_and_those_of_the_heads(folder):
    model, exits = early_exits.open_exits(folder)
    static = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        logits, macs = zip(*(run(x) for _, run in exits))
        assert torch.equal(logits[2], static(x))
        features = static.layer1(static.act1(static.bn1(static.conv1(x)))).mean((2, 3))
        hidden, _, _, last = model.exits.exit_heads['e0'].classifier
        torch.testing.assert_close(logits[0], last(hidden(features).relu()))
    heads = [(16 + 3) * 128, (32 + 3) * 128]
    assert torch.stack(macs).sum(0).tolist() == [timm_aig.compute_cost(static).static + sum(heads)] * 5
    convolutions = 8 * 8 * 9 * (3 * 16 + 6 * 16 * 16)  # stem and layer1
    assert macs[0].tolist() == [convolutions + heads[0]] * 5


def test_each_exit_has_the_labels_and_the_teacher(static_model):
    torch.manual_seed(0)
    model = early_exits.EarlyExits(timm.create_model('cifar_resnet8', num_classes=3))
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([2, 1])
    assert model(x).shape == (6, 3)
    images, labels = early_exits.repeat_labels(lambda samples: samples, (x, y))
    assert images is x and labels.tolist() == [2, 1, 2, 1, 2, 1]
    teacher = timm.create_model(static_model, pretrained=True).eval()
    torch.testing.assert_close(early_exits.ForEachExit(teacher)(x).view(3, 2, 3), teacher(x).expand(3, 2, 3))


def test_images_leave_at_the_first_exit_that_is_sure(folder, images, static_model, tmp_path, monkeypatch):
    small = _comparison.Task('--num-classes 3 --input-size 3 8 8', '--split train', '--split validation', 2, 6)
    monkeypatch.setitem(_comparison.TASKS, 'glyphs', small)
    static = folder.with_name('static-r32-s0')
    timm_aig.save_pretrained(timm.create_model(f'local-dir:{folder}', pretrained=True), static)
    (static / 'results.json').write_text('{"recipe": {"amp": false}}')
    args = ['glyphs', '--data-dir', str(images), '--output', str(folder.parent), '--seeds', '0']
    assert compare.main([*args, '--table', str(tmp_path / 'table.csv')]) == 0
    with open(tmp_path / 'table.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['model'] == 'exits-r32']
    assert rows and {row['used'] for row in rows} == {'exits-r32 at 1 + exits-r32 at 2 + exits-r32 at 3'}

    namespace = compare.parse_args(args)
    row = next(row for row in _answers.rows_of_seed(namespace, 0) if row.name == 'exits-r32')
    model, exits = early_exits.open_exits(folder)
    loader = _answers.open_images(namespace, 'exits-r32-s0', model, small.test)
    right, used = [], 0.
    with torch.no_grad():
        for x, label in ((x[None], label) for batch, labels in loader for x, label in zip(batch, labels)):
            for (_, run), threshold in zip(exits, (*row.thresholds, 0.)):
                logits, macs = run(x)
                used += macs.item()
                if logits.softmax(1).max() >= threshold:
                    break
            right.append(logits.argmax().item() == label.item())
    assert row.right.tolist() == right and row.macs == pytest.approx(used / len(right))


def test_what_exits_have_no_use_for_is_an_error(finetune_args, tmp_path, capsys):
    for flag in ('--model-ema', '--tensorboard', '--json'):
        with pytest.raises(SystemExit) as e:
            early_exits.main([*finetune_args, '--model', 'cifar_resnet20', '--output', str(tmp_path / 'x'), flag])
        assert e.value.code == 2 and f'error: {flag} is not for' in capsys.readouterr().err
    assert not (tmp_path / 'x').exists()


def test_a_training_that_is_stopped_says_how_to_go_on(finetune_args, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, 'fit', Mock(side_effect=Stopped('stopped, saved.', 15)))
    assert early_exits.main([*finetune_args, '--model', 'cifar_resnet20', '--output', str(tmp_path)]) == 143
    assert 'stopped, saved. To go on, run the same command with --resume auto.' in capsys.readouterr().err
