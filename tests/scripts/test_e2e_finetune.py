"""Tests that run scripts/finetune.py: killed, stopped, out of space, in two processes, and with bad input."""
import csv
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import _epochs
import pytest
import timm
import torch
from _models import create_models, create_trainable_model, parent_name
from _recipes import parse_training_args as parse_args, recipe_of
from PIL import Image

import timm_aig

SCRIPT = Path(__file__).parents[2] / 'scripts' / 'finetune.py'

# Both recipes; average, accumulation, mixup, loader workers, a static model with a teacher.
TRAININGS = {
    'distill, average': ['--model', 'STATIC', '--model-ema', '--workers', '0'],
    'distill, accumulation, workers': [
        '--model', 'STATIC', '--grad-accum-steps', '2', '--workers', '2', '--opt', 'adamw', '--lr', '0.01'],
    'paper, mixup': ['--model', 'STATIC', '--recipe', 'paper', '--mixup', '0.3', '--reprob', '0.5', '--drop', '0.2'],
    'static, teacher': ['--static', '--model', 'cifar_resnet20', '--teacher', 'STATIC', '--workers', '2'],
}
NAMES = sorted(TRAININGS)


@pytest.fixture
def training(finetune_args, static_model, tmp_path):
    """Arguments of one of TRAININGS that writes to tmp_path/name."""
    def _training(which, name):
        args = [static_model if arg == 'STATIC' else arg for arg in TRAININGS[which]]
        return [
            *finetune_args, '--checkpoint-interval', '1', *args, '--output', str(tmp_path), '--experiment', name,
            '--resume', 'auto']
    return _training


@pytest.fixture(scope='module')
def finished():
    """Folder of each training that ran uninterrupted, by its name in TRAININGS."""
    return {}


@pytest.fixture
def uninterrupted(training, fork_main, wait, tmp_path, finished):
    """Folder of a training that ran without interruption: once in this module, so tests must not change it."""
    def _uninterrupted(which):
        if which not in finished:
            assert wait(fork_main(training(which, 'whole'))) == 0, (tmp_path / 'stderr').read_text()
            finished[which] = tmp_path / 'whole'
        return finished[which]
    return _uninterrupted


def last_step(checkpoints):
    return max((int(path.stem[-8:]) for path in checkpoints.glob('*.pt')), default=-1)


def rows(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def assert_same_training(a, b):
    assert (a / 'model.safetensors').read_bytes() == (b / 'model.safetensors').read_bytes()
    assert [row['epoch'] for row in rows(a)] == ['0', '1']
    assert rows(a) == rows(b)
    one, two = (json.loads((folder / 'results.json').read_text()) for folder in (a, b))
    assert one['metrics'] == two['metrics'] and one['unreadable'] == two['unreadable']
    assert not [path for path in a.rglob('.*')]  # nothing half written is left


@pytest.mark.parametrize('which', NAMES)
def test_killed_at_random_moments_it_ends_with_the_same_weights(
        which, training, uninterrupted, fork_main, wait, tmp_path):
    whole = uninterrupted(which)
    chance, few = random.Random(NAMES.index(which)), 'accumulation' in which  # six steps, the others have twelve
    checkpoints = tmp_path / 'killed' / 'checkpoints'
    ended, kills = False, 0
    while not ended:
        step = last_step(checkpoints) + chance.randint(*(1, 2) if few else (2, 4))
        process = fork_main(training(which, 'killed'))
        while last_step(checkpoints) < step and not ended:
            time.sleep(0.002)
            ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        time.sleep(chance.uniform(0, 0.05))
        if not ended:
            os.killpg(process, signal.SIGKILL)
            kills += 1
        assert wait(process) == (0 if ended else -signal.SIGKILL), (tmp_path / 'stderr').read_text()
    assert kills >= 2
    assert_same_training(tmp_path / 'killed', whole)


class KilledAt:
    """Makes a process die by SIGKILL before, after or in the middle of its nth atomic write."""

    def __init__(self, count, when):
        self.count, self.when = count, when

    def __call__(self):
        replace, fsync = os.replace, os.fsync

        def die_in_time(call, when, *args):
            if when == 'after':
                call(*args)
            if self.count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count -= 1
            if when == 'before':
                call(*args)

        if self.when == 'writing':
            def cut(fd):
                if self.count == 0 and stat.S_ISREG(os.fstat(fd).st_mode):
                    os.ftruncate(fd, os.fstat(fd).st_size // 2)
                die_in_time(fsync, 'before', fd)
            os.fsync = cut
        else:
            os.replace = lambda *args: die_in_time(replace, self.when, *args)


def test_killed_before_after_and_in_the_middle_of_a_write_it_ends_with_the_same_weights(
        training, uninterrupted, fork_main, wait, tmp_path):
    which = 'distill, average'
    whole = uninterrupted(which)
    # an even fsync is that of a file, the odd one behind it that of its folder
    for when, counts in (('before', (0, 3)), ('writing', (4, 3)), ('after', (2,))):
        for count in counts:
            code = wait(fork_main(training(which, 'killed'), KilledAt(count, when)))
            assert code == -signal.SIGKILL, (when, count, (tmp_path / 'stderr').read_text())
    assert wait(fork_main(training(which, 'killed'))) == 0
    assert_same_training(tmp_path / 'killed', whole)


def test_killed_in_each_write_after_the_last_checkpoint_it_ends_with_the_same_weights(
        training, uninterrupted, fork_main, wait, tmp_path):
    which = 'distill, average'
    whole = uninterrupted(which)
    shutil.copytree(whole, tmp_path / 'killed')
    for name in ('model.safetensors', 'config.json', 'results.json', 'rates_over_epochs.png', 'accuracy_macs.png'):
        (tmp_path / 'killed' / name).unlink()
    for count in range(6):  # summary.csv, model, config, results, two pictures
        assert wait(fork_main(training(which, 'killed'), KilledAt(count, 'before'))) == -signal.SIGKILL
    assert wait(fork_main(training(which, 'killed'), KilledAt(6, 'before'))) == 0
    assert_same_training(tmp_path / 'killed', whole)


def wait_for(step, checkpoints, process):
    while last_step(checkpoints) < step:
        assert os.waitpid(process, os.WNOHANG) == (0, 0)
        time.sleep(0.005)


@pytest.mark.parametrize('which, signum', [
    ('distill, accumulation, workers', signal.SIGTERM), ('distill, accumulation, workers', signal.SIGINT),
    ('paper, mixup', signal.SIGTERM)])
def test_a_signal_to_all_its_processes_saves_exits_with_its_code_and_is_resumed(
        which, signum, training, uninterrupted, fork_main, wait, tmp_path):
    whole = uninterrupted(which)
    args = training(which, 'stopped')
    args[args.index('--checkpoint-interval') + 1] = '0'
    process = fork_main(args)
    wait_for(0, tmp_path / 'stopped' / 'checkpoints', process)
    os.killpg(process, signum)
    assert wait(process) == 128 + signum, (tmp_path / 'stderr').read_text()
    error = (tmp_path / 'stderr').read_text()
    assert f'stopped by {signum.name} in epoch 1 after step 1, saved. To go on, run the same command ' \
           'with --resume auto.' in error
    assert wait(fork_main(args)) == 0
    assert 'Resumed in epoch 1 after step 1.' in (tmp_path / 'stderr').read_text()
    assert (tmp_path / 'stopped' / 'model.safetensors').read_bytes() == \
        (whole / 'model.safetensors').read_bytes()


def test_a_torn_checkpoint_is_passed_over_with_a_message(training, uninterrupted, fork_main, wait, tmp_path):
    which = 'distill, average'
    whole = uninterrupted(which)
    process = fork_main(training(which, 'torn'))
    wait_for(3, tmp_path / 'torn' / 'checkpoints', process)
    os.killpg(process, signal.SIGKILL)
    wait(process)
    before, last = sorted((tmp_path / 'torn' / 'checkpoints').glob('*.pt'))[-2:]  # killed before it removed a third
    last.write_bytes(last.read_bytes()[:-100])
    assert wait(fork_main(training(which, 'torn'))) == 0
    error = (tmp_path / 'stderr').read_text()
    assert f'{last} is damaged' in error and 'using the one before' in error
    assert f'after step {int(before.stem[-8:])}' in error
    assert_same_training(tmp_path / 'torn', whole)


@pytest.mark.parametrize('kilobytes', [20, 1500])
def test_a_full_disk_is_exit_code_3_with_a_message_and_the_checkpoints_stay(
        kilobytes, training, fork_main, wait, tmp_path):
    which = 'distill, average'
    process = fork_main(training(which, 'full'))
    folder = tmp_path / 'full' / 'checkpoints'
    wait_for(3, folder, process)
    os.killpg(process, signal.SIGKILL)
    wait(process)
    before = {path.name: path.read_bytes() for path in folder.glob('*.pt')}

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    reader, writer = os.pipe()  # stderr is a file otherwise, that takes no more

    def prepare():
        for fd in (1, 2):
            os.dup2(writer, fd)
        fill()

    code = wait(fork_main(training(which, 'full'), prepare))
    os.close(writer)
    with os.fdopen(reader) as file:
        error = file.read()
    assert code == 3, error
    assert error.splitlines()[-1].startswith('error: ') and 'File too large' in error and 'Traceback' not in error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert wait(fork_main(training(which, 'full'))) == 0


@pytest.fixture
def run(finetune, finetune_args, static_model, tmp_path, capsys):
    """Runs finetune.main on a static model; returns its exit code and what it wrote to stderr."""
    def _run(*args, model=static_model, name='run'):
        argv = [*finetune_args, '--output', str(tmp_path), '--experiment', name, '--model', model]
        capsys.readouterr()
        try:
            code = finetune.main([*argv, *map(str, args)])
        except SystemExit as e:  # argparse's
            code = e.code
        return code, capsys.readouterr().err
    return _run


@pytest.fixture
def refused(run, tmp_path):
    """Runs with bad input, which must end with exit code 2 and one line of error, and must not write a model."""
    def _refused(*args, **kwargs):
        before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
        code, err = run(*args, **kwargs)
        lines = [line for line in err.splitlines() if line.startswith('error: ')]
        assert code == 2 and len(lines) == 1 and err.splitlines()[-1] == lines[0], err
        assert 'Traceback' not in err
        after = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
        assert {path: after.get(path) for path in before} == before
        assert not [path for path in after.keys() - before.keys() if path.suffix in ('.safetensors', '.json')]
        return lines[0]
    return _refused


@pytest.mark.parametrize('args,named', [
    (['--dataset', 'cifar10'], '--dataset must start with'),
    (['--dataset', 'torch/none'], '--dataset torch/none'),
    (['--data-dir', '/nowhere'], '--data-dir must be a folder'),
    (['--train-split', 'test'], "--data-dir must have a subfolder for split 'test'"),
    (['--num-classes', '5'], 'Pass --num-classes 3'),
    (['--holdout', '47'], '--holdout must leave'),
    (['--target-rate', '0.001'], '--target-rate must be in'),
    (['--teacher', 'no_such_model'], '--teacher no_such_model'),
    (['--teacher', 'cifar_resnet32'], '--teacher'),
    (['--initial-checkpoint', '/nowhere.pt'], '--initial-checkpoint /nowhere.pt'),
    (['--gate-channels', '0'], '--gate-channels must be a whole number from 1'),
    (['--opt', 'sgdd'], '--opt sgdd'), (['--sched', 'cosin'], '--sched cosin'), (['--sched', 'plateau'], '--sched'),
    (['--aa', 'nonsense'], '--aa nonsense'), (['--interpolation', 'cubist'], '--interpolation cubist'),
    (['--device', 'cuda:99'], '--device cuda:99'), (['--device', 'abc'], '--device abc'),
    (['--mean', '0.1', '0.2'], '--mean must be one number, or one for each of 3 channels'),
    (['--torchcompile', 'gcc'], '--torchcompile must be one of'),
    (['--config', '/nowhere.yaml'], '--config /nowhere.yaml'),
    (['--batch-size', '1'], '--batch-size must be at least 2'),
    (['--epochs', 'many'], '--epochs must be a whole number from 1'),
    (['--static', '--teacher', 'no_such_model'], '--teacher no_such_model'),
    (['--model-kwargs', 'no_such=3'], '--model local-dir:'),
])
def test_bad_input_is_refused_by_the_name_of_its_argument(refused, args, named):
    assert named in refused(*args)


@pytest.mark.parametrize('model,args,named', [
    ('no_such_model', [], '--model no_such_model'), ('local-dir:/nowhere', [], '--model local-dir:/nowhere'),
    ('test_efficientnet', ['--distill-weight', 0], '--model must be a model of a family that timm_aig can gate'),
    ('cifar_resnet20', [], '--distill-weight 0.5 needs a teacher'),
    ('cifar_resnet20_aig', [], '--distill-weight 0.5 needs a teacher'),
    ('cifar_resnet20_aig', ['--static'], '--model cifar_resnet20_aig has gates, --static'),
    ('vit_tiny_patch16_224', ['--static', '--input-size', 3, 32, 32], '--input-size cannot be used: Requested'),
])
def test_a_model_that_cannot_be_used_is_refused(refused, model, args, named):
    assert named in refused(*args, model=model)


def test_a_parent_whose_head_is_new_cannot_teach(refused, run, make_images, tmp_path):
    data = make_images(tmp_path / 'two', classes=('ape', 'bee'))
    error = refused('--data-dir', data, '--num-classes', 2)
    assert 'gets a new head of 2 classes, so it cannot be the teacher' in error and '--distill-weight 0' in error
    code, err = run('--data-dir', data, '--num-classes', 2, '--distill-weight', 0, '--epochs', 1)
    assert code == 0, err
    assert 'parent_metrics' not in json.loads((tmp_path / 'run' / 'results.json').read_text())


def test_a_teacher_with_another_head_or_normalization_is_refused(refused, run, make_images, tmp_path):
    data = make_images(tmp_path / 'two', classes=('ape', 'bee'))
    code, err = run('--static', '--data-dir', data, '--num-classes', 2, '--epochs', 1, '--mean', 0.2, '--std', 0.3,
                    model='cifar_resnet20', name='two classes')
    assert code == 0, err
    other = f'local-dir:{tmp_path}/two classes'
    assert '--teacher has 2 classes, the model 3' in refused('--teacher', other)
    error = refused('--data-dir', data, '--num-classes', 2, '--teacher', other)
    assert '--teacher' in error and 'needs --mean 0.2 0.2 0.2 --std 0.3 0.3 0.3' in error


@pytest.fixture
def reordered_model(static_model, tmp_path):
    """The static model with its classes in another order than the folders."""
    model, order = timm.create_model(static_model, pretrained=True), [2, 0, 1]
    with torch.no_grad():
        for p in model.fc.parameters():
            p.copy_(p[order].clone())
    names = [['ape', 'bee', 'cat'][i] for i in order]
    return f'local-dir:{timm_aig.save_pretrained(model, tmp_path / "other", model_config=dict(label_names=names))}'


def test_a_head_is_matched_to_the_folders_by_the_names_of_the_classes(
        run, refused, static_model, reordered_model, tmp_path):
    code, err = run('--epochs', 1, '--lr', 1e-9, model=reordered_model)
    assert code == 0, err
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    expected = json.loads(Path(static_model.removeprefix('local-dir:'), 'results.json').read_text())['metrics']['top1']
    assert results['metrics']['top1'] == results['parent_metrics']['top1'] == expected
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['label_names'] == ['cat', 'ape', 'bee']
    error = refused('--teacher', reordered_model, name='taught')
    assert '--teacher must have the classes ape, bee, cat, in this order; local-dir:' in error


def test_a_head_for_other_classes_is_not_taken_over(
        finetune, refused, finetune_args, static_model, make_images, tmp_path):
    data = make_images(tmp_path / 'data', classes=('ape', 'bee', 'dog'))
    assert 'gets a new head of 3 classes, so it cannot be the teacher' in refused('--data-dir', data)
    args = finetune.parse_args([*finetune_args, '--model', static_model])
    args.num_classes = None
    message = 'has the classes ape, bee, cat, but the data set ape, bee, dog'
    with pytest.raises(timm_aig.InputError, match=message):
        create_models(args, ['ape', 'bee', 'dog'])


def test_splits_with_other_classes_are_refused(refused, make_images, tmp_path):
    data = make_images(tmp_path / 'data', splits=[('train', 16)])
    make_images(data, splits=[('validation', 2)], classes=('ape', 'bee', 'dog'))
    error = refused('--data-dir', data)
    assert "--data-dir must have the same classes in both splits, only one has ['cat', 'dog']" in error


def test_unreadable_images_are_counted_or_an_error_that_names_the_file(run, refused, make_images, tmp_path):
    data = make_images(tmp_path / 'data')
    for bad in ('train/ape/3.png', 'train/cat/0.png', 'validation/bee/2.png'):
        (data / bad).write_bytes(b'no image')
    error = refused('--data-dir', data, '--unreadable', 'error', '--workers', 2, name='error')
    assert error.startswith('error: cannot read ') and '.png, UnidentifiedImageError' in error
    code, err = run('--data-dir', data, '--workers', 2, '--epochs', 1)
    assert code == 0, err
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert results['unreadable'] == {'train': 2, 'val': 1} and results['images'] == 20
    code, err = run('--data-dir', data, '--epochs', 1, '--resume', 'auto')  # none is read for training any more
    assert code == 0, err
    assert json.loads((tmp_path / 'run' / 'results.json').read_text())['unreadable'] == {'train': 2, 'val': 1}
    for file in (data / 'validation').rglob('*.png'):
        file.write_bytes(b'no image')
    assert '--val-split validation: the data set has no labelled images' in refused('--data-dir', data, name='blind')


def test_gates_have_a_learning_rate_and_a_weight_decay_of_their_own_and_vectors_none(finetune):
    args = parse_args(['--lr', '.2', '--weight-decay', '.3', '--gate-lr-scale', '.5', '--gate-weight-decay', '.4'])
    model = timm.create_model('cifar_resnet20_aig')
    groups = finetune.create_optimizer(args, model).param_groups
    found = {id(p): (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    for name, p in model.named_parameters():
        lr, decay = (.1, .4) if '.gate.' in name else (.2, .3)
        assert found.pop(id(p)) == (lr, decay if p.ndim > 1 else 0.), name
    assert not found
    model = timm.create_model('vit_tiny_patch16_224', img_size=32)
    decays = [group for group in finetune.create_optimizer(args, model).param_groups if group['weight_decay']]
    assert not any(p is model.pos_embed or p is model.cls_token for group in decays for p in group['params'])


def test_a_training_is_not_overwritten_nor_resumed_with_other_arguments_or_weights(
        run, refused, static_model, tmp_path):
    assert run('--epochs', 1)[0] == 0
    assert re.search('--output .* holds a training; pass --resume auto', refused('--epochs', 1))
    for args, differ in (
            (['--epochs', 2], 'epochs was 1 and is now 2'), (['--seed', 1], 'seed was 0 and is now 1'),
            (['--lr', 0.02], 'lr was 0.01 and is now 0.02'), (['--recipe', 'paper'], "recipe was 'distill'"),
            (['--static'], "architecture was 'cifar_resnet20_aig' and is now 'cifar_resnet20'")):
        error = refused('--epochs', 1, '--resume', 'auto', *args)
        assert error.startswith('error: --resume auto: ') and 'belongs to another training' in error and differ in error
    parent = Path(shutil.copytree(static_model.removeprefix('local-dir:'), tmp_path / 'moved'))
    assert run('--epochs', 1, '--resume', 'auto', '--nonfinite', 'skip', model=f'local-dir:{parent}')[0] == 0
    assert run('--epochs', 1, '--resume', 'auto', '--val-split', 'train', '--crop-pct', .9)[0] == 0
    other = timm.create_model(static_model, pretrained=True)
    other.fc.bias.data += 1
    timm_aig.save_pretrained(other, parent)
    for args in (dict(model=f'local-dir:{parent}'), {}):
        more = ['--teacher', f'local-dir:{parent}'] if not args else []
        assert 'teacher_weights' in refused('--epochs', 1, '--resume', 'auto', *more, **args)
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')
    assert 'holds a model but no checkpoints' in refused('--epochs', 1, '--resume', 'auto')


def test_a_training_is_not_resumed_with_other_classes(run, refused, make_images, tmp_path):
    data = make_images(tmp_path / 'data')
    args = ['--static', '--epochs', 1, '--data-dir', data]
    assert run(*args, model='cifar_resnet20')[0] == 0
    for split in ('train', 'validation'):
        (data / split / 'ape').rename(data / split / 'yak')  # now the last of the three
    error = refused(*args, '--resume', 'auto', model='cifar_resnet20')
    assert "classes was ['ape', 'bee', 'cat'] and is now ['bee', 'cat', 'yak']" in error


def test_a_loss_that_is_not_finite_is_exit_code_1(run, tmp_path):
    code, err = run('--lr', '1e30', '--warmup-epochs', 0)
    assert code == 1 and 'error: epoch 1, step ' in err.splitlines()[-1] and '--nonfinite skip' in err
    assert not (tmp_path / 'run' / 'model.safetensors').exists()
    code, err = run('--gate-loss-weight', '1e300', '--nonfinite', 'skip', name='skipped')
    assert code == 1 and 'not finite in any of the 12 steps' in err.splitlines()[-1]
    assert not (tmp_path / 'skipped' / 'model.safetensors').exists()


@pytest.mark.parametrize('name, public', [
    ('resnet18.a1_in1k', 'resnet18.a1_in1k'), ('hf-hub:user/name@v1', 'hf-hub:user/name'),
    ('local-dir:/home/me/x', 'cifar_resnet20')])
def test_the_parent_in_results_is_a_public_name(name, public):
    assert parent_name(name, timm.create_model('cifar_resnet20_aig')) == public


def test_an_epoch_without_an_update_has_an_empty_row(run, finetune, tmp_path, monkeypatch):
    train_epoch = finetune.Trainer._train_epoch
    monkeypatch.setattr(
        finetune.Trainer, '_train_epoch', lambda self: {} if train_epoch(self) and self.epoch == 0 else self.results())
    assert run('--epochs', 2)[0] == 0
    with open(tmp_path / 'run' / 'summary.csv', newline='') as file:
        first, second = csv.DictReader(file)
    assert first['train_loss'] == '' and float(first['eval_top1']) >= 0 and float(second['train_loss']) > 0
    assert float(first['lr']) > float(second['lr'])
    assert (tmp_path / 'run' / 'rates_over_epochs.png').is_file()


def test_the_recipe_of_a_result_given_back_is_the_same_training(run, finetune, images, tmp_path):
    args = ['--recipe', 'paper', '--smoothing', 0.1, '--target-rate', 0.4, '--amp', '--model-ema', '--clip-grad', 1]
    code, err = run(*args, name='first')
    assert code == 0, err
    assert finetune.main([
        '--config', str(tmp_path / 'first' / 'results.json'), '--data-dir', str(images), '--workers', '0',
        '--output', str(tmp_path), '--experiment', 'second', '--device', 'cpu']) == 0
    assert (tmp_path / 'first' / 'model.safetensors').read_bytes() == \
        (tmp_path / 'second' / 'model.safetensors').read_bytes()


def test_it_ends_in_a_folder_that_timm_loads_with_figures_and_pictures(run, images, tmp_path):
    code, err = run('--tensorboard', '--holdout', 8)
    assert code == 0, err
    folder = tmp_path / 'run'
    results = json.loads((folder / 'results.json').read_text())
    assert results['images'] == 8 and results['split'] == 'train, 8 held out'
    assert results['unreadable'] == {'train': 0, 'val': 0}
    assert results['metrics'].keys() == results['parent_metrics'].keys()
    for picture in ('rates_over_epochs.png', 'accuracy_macs.png'):
        with Image.open(folder / picture) as image:
            image.load()
    assert list((folder / 'tensorboard').iterdir())
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.pretrained_cfg['input_size'] == (3, 8, 8) and model.pretrained_cfg['label_names'] == [
        'ape', 'bee', 'cat']
    assert list(results['block_rates']) == list(timm_aig.gated_blocks(model))


def test_of_the_epochs_within_the_target_the_most_accurate_is_saved(run, monkeypatch, tmp_path):
    evaluate, states = _epochs.evaluate, []
    answers = iter([(30., .6), (90., .9), (60., .5), (50., .6), (60., .6), (60., .5)])

    def answer(model, *args):  # top1 and MACs share of each epoch, then of the kept one and of the parent
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        top1, share = next(answers)
        evaluation = replace(evaluate(model, *args), top1=top1)
        metrics = {**evaluation.metrics(timm_aig.compute_cost(model, (3, 8, 8))), 'macs_share': share}
        object.__setattr__(evaluation, 'metrics', lambda cost: metrics)
        return evaluation

    monkeypatch.setattr(_epochs, 'evaluate', answer)
    code, err = run('--epochs', 4, '--target-rate', .6)
    assert code == 0, err
    assert json.loads((tmp_path / 'run' / 'results.json').read_text())['epoch'] == 2
    saved = timm.create_model(f'local-dir:{tmp_path}/run', pretrained=True).state_dict()
    assert all(torch.equal(value, states[2][name]) for name, value in saved.items())
    assert not all(torch.equal(value, states[3][name]) for name, value in saved.items())
    assert sorted(path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()) == [
        'best-0002.safetensors', 'checkpoint-00000024.pt']


def test_an_epoch_before_the_low_budgets_is_not_the_best_for_any_budget(run, monkeypatch, tmp_path):
    evaluate, answers = _epochs.evaluate, iter([90., 30., 60., 50., 60., 60.])
    monkeypatch.setattr(_epochs, 'evaluate', lambda *args: replace(evaluate(*args), top1=next(answers)))
    code, err = run('--recipe', 'any', '--epochs', 4)  # the targets fall over 0.4 of the training
    assert code == 0, err
    assert json.loads((tmp_path / 'run' / 'results.json').read_text())['epoch'] == 2


def test_a_batch_has_an_image_for_each_budget(run, finetune):
    code, err = run('--recipe', 'any', '--batch-size', 2)
    assert code == 2 and 'error: --batch-size must be at least 4' in err
    for recipe, size in {'any': 4, 'distill': 2}.items():
        args = finetune.parse_args(['--data-dir', 'x', '--recipe', recipe])
        args.world_size = 1
        finetune.fit_batch_size(args, range(10))
        assert args.batch_size == size


def test_the_last_epoch_is_saved_where_it_is_asked_for(run, monkeypatch, tmp_path):
    evaluate, answers = _epochs.evaluate, iter([90., 60., 60.])
    monkeypatch.setattr(_epochs, 'evaluate', lambda *args: replace(evaluate(*args), top1=next(answers)))
    assert run('--keep', 'last')[0] == 0
    assert json.loads((tmp_path / 'run' / 'results.json').read_text())['epoch'] == 1
    assert [path.suffix for path in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['.pt']


def test_losses_are_logged_apart_with_speed_and_time_to_go(run, tmp_path):
    code, err = run()
    assert code == 0
    for row in rows(tmp_path / 'run'):
        task, kd, rate, loss = (float(row[f'train_{name}']) for name in ('task_loss', 'kd_loss', 'rate_loss', 'loss'))
        assert loss == pytest.approx(.5 * task + .5 * kd + rate, rel=1e-5)
    assert re.search(r'epoch 1/2: .*images/s, \d+ s so far, about \d+ s to go\n', err)


def test_calibrate_gives_the_target_on_training_images(run, tmp_path):
    code, _ = run('--epochs', 1, '--target-rate', .6, '--lr', 1e-9, '--calibrate', 40)
    model = timm.create_model(f'local-dir:{tmp_path}/run', pretrained=True)
    assert code == 0
    point, = timm_aig.budget_table(model)
    assert point.budget == .6 and abs(point.macs_share - .6) < .01 and point.images == 40
    for block in timm_aig.gated_blocks(model).values():
        assert float(block.gate.offset) == pytest.approx(point.gate_offset)
    results = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert abs(results['metrics']['macs_share'] - .6) < .2  # of other images


def test_a_batch_that_small_data_does_not_fill_is_made_smaller(run, tmp_path):
    code, err = run('--epochs', 1, '--batch-size', 128)
    assert code == 0 and '--batch-size 128 is more than the 48 training images of a process, 12 is used.' in err
    assert json.loads((tmp_path / 'run' / 'results.json').read_text())['recipe']['batch_size'] == 12


@pytest.mark.parametrize('loss, what', [('macs', 'MACs'), ('rate', 'gated blocks')])
def test_a_target_that_is_missed_is_reported_with_what_to_do(run, loss, what, tmp_path):
    code, err = run('--epochs', 1, '--target-rate', 0.3, '--gate-loss', loss, '--lr', 1e-9)
    assert code == 0
    last = err.splitlines()[-1]
    assert re.match(rf'--target-rate 0\.3 was asked for, but (9\d|100)\.\d% of the {what} came out\. More', last)
    advice = '--calibrate N finds on N training images, or for this model as it is "scripts/calibrate.py --model '
    assert (advice in last) == (loss == 'macs')  # budgets are shares of the MACs
    assert (f'local-dir:{tmp_path}/run --budgets 0.3' in last) == (loss == 'macs')
    assert 'was asked for' not in run('--epochs', 1, '--target-rate', 0.99, '--lr', 1e-9, name='met')[1]


def test_a_missed_target_is_not_calibrated_twice(finetune, finetune_args):
    args = finetune.parse_args([*finetune_args, '--model', 'resnet18', '--target-rate', '0.5', '--calibrate', '9'])
    text = _epochs.missed_target(args, {'metrics': {'macs_share': .7}}, Path('x'))
    assert '--calibrate' not in text and 'offset that "scripts/calibrate.py --model local-dir:x --budgets 0.5' in text


def test_a_block_that_never_ran_has_the_rate_0_in_the_picture(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(_epochs, 'plot_rates_over_epochs', lambda found, *args: rates.extend(found.tolist()))
    model = timm.create_model('cifar_resnet8_aig')
    names = [f'train_rate_{name}' for name in timm_aig.gated_blocks(model)]
    rows = [{**dict.fromkeys(names, rate), 'epoch': epoch, 'eval_top1': '', 'eval_macs_share': ''}
            for epoch, rate in enumerate((0., '0.0', ''))] + [{'epoch': 3, 'eval_top1': ''}]
    epochs = SimpleNamespace(
        folder=tmp_path, data=SimpleNamespace(names=[]), model=model, rows=rows,
        args=SimpleNamespace(static=False, dataset='x'))
    metrics = {'macs_share': .5, 'top1': 50.}
    _epochs.Epochs.save(epochs, {'metrics': metrics, 'architecture': 'x', 'epoch': 3})
    assert rates[:2] == [[0.] * len(names)] * 2 and all(rate != rate for row in rates[2:] for rate in row)


def test_a_calibration_that_would_fill_the_memory_is_refused_before_the_training(refused, monkeypatch):
    monkeypatch.setattr('_inputs.MAX_BYTES', 10_000)
    assert 'calibrate must be at most 13, since' in refused('--calibrate', 1000)  # of 4 * 3 * 8 * 8 bytes
    monkeypatch.setattr('_inputs.MAX_BYTES', 48 * 768)
    monkeypatch.setattr('finetune.open_output', None)
    with pytest.raises(TypeError):  # not refused: there are no more than 48
        refused('--calibrate', 1000)


def test_the_name_of_a_folder_does_not_say_whether_its_model_is_adaptive(
        finetune, finetune_args, static_model, tmp_path):
    shutil.copytree(static_model.partition(':')[2], tmp_path / 'photos_aig')
    name = f'local-dir:{tmp_path}/photos_aig'
    model = create_trainable_model(finetune.parse_args([*finetune_args, '--model', name, '--target-rate', '0.5']))
    assert not timm_aig.gated_blocks(model)


def test_the_saved_config_has_the_image_settings_of_the_training_only(finetune):
    model = timm.create_model('resnet50_aig.tv2_in1k', device='meta')
    assert model.pretrained_cfg['test_crop_pct'] != .9
    config = dict(
        input_size=(3, 224, 224), interpolation='bilinear', mean=(.5,) * 3, std=(.5,) * 3, crop_pct=.9,
        crop_mode='squash')
    finetune.describe_data(model, SimpleNamespace(config=config))
    for use_test_size in (False, True):
        assert config.items() <= timm.data.resolve_data_config(model=model, use_test_size=use_test_size).items()


def test_an_adaptive_model_goes_on_at_the_target_that_is_asked_for(run, tmp_path):
    assert run('--recipe', 'paper', '--target-rate', 0.7, '--epochs', 1, name='first')[0] == 0
    first = timm.create_model(f'local-dir:{tmp_path}/first', pretrained=True)
    timm_aig.set_gate_offset(first, -1)
    timm_aig.save_pretrained(first, tmp_path / 'first')
    code, err = run('--recipe', 'paper', '--target-rate', 0.4, '--epochs', 1, model=f'local-dir:{tmp_path}/first')
    assert code == 0, err
    config = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert config['model_args']['target_rate'] == 0.4
    assert 'gate_offset' not in config['model_args']  # was of the weights before


def test_an_adaptive_model_keeps_its_own_gates_and_the_recipe_says_so(run, refused, tmp_path):
    model = timm.create_model(
        'cifar_resnet20_aig', num_classes=3, target_rates=[.9] * 9, gate_channels=4, gate_norm='none')
    name = f'local-dir:{timm_aig.save_pretrained(model, tmp_path / "own")}'
    error = refused('--recipe', 'paper', model=name)
    assert '--gate-loss rate: ' in error and 'target_rates of its own' in error
    assert run('--distill-weight', 0, '--epochs', 1, model=name)[0] == 0
    recipe = json.loads((tmp_path / 'run' / 'results.json').read_text())['recipe']
    assert (recipe['gate_channels'], recipe['gate_norm'], recipe['schedule']) == (4, 'none', None)
    assert 'Pass the gate_channels' in refused('--distill-weight', 0, '--gate-channels', 32, model=name)


@pytest.mark.parametrize('model,argv,expected', [
    ('resnet50_aig.t05_paper', [], (.5, 'paper')),
    ('resnet50_aig.t05_paper', ['--target-rate', '0.4'], (.4, 'paper')),
    ('resnet50_aig', ['--schedule', 'paper'], (.6, 'paper')),
    ('resnet50', [], (.6, None)),
    ('resnet50', ['--target-rate', '0.3', '--schedule', 'paper'], (.3, 'paper')),
])
@pytest.mark.parametrize('recipe', ['paper', 'distill'])
def test_the_target_is_the_given_one_else_that_of_the_tag(recipe, model, argv, expected, monkeypatch):
    monkeypatch.setattr(timm, 'create_model', partial(timm.create_model, device='meta'))
    args = parse_args(['--model', model, '--recipe', recipe, '--distill-weight', '0', *argv])
    trained, _, _ = create_models(args, [])
    assert (args.target_rate, args.schedule) == expected
    assert {'target_rate': expected[0], 'schedule': expected[1]}.items() <= recipe_of(args).items()
    rates = [block.target_rate for block in timm_aig.gated_blocks(trained).values()]
    assert expected[0] in rates and (len(rates) == 16) == (expected[1] is None)


def test_readers_that_share_images_by_the_batch_know_its_size_and_the_seed(finetune, finetune_args, monkeypatch):
    seen = []
    create = timm_aig.training.data.create_dataset
    monkeypatch.setattr(timm_aig.training.data, 'create_dataset', lambda *args, **kwargs: (
        seen.append((kwargs['batch_size'], kwargs['seed'])), create(*args, **kwargs))[1])
    finetune.open_training_splits(finetune.parse_args([*finetune_args, '--seed', '3']))
    assert seen == [(8, 3)] * 2


def test_the_seed_is_that_of_the_order_of_the_images_in_several_processes(finetune, finetune_args):
    orders = []
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for seed in ('1', '2', '1'):
            args = finetune.parse_args([*finetune_args, '--seed', seed])
            args.distributed = True
            model = timm.create_model('cifar_resnet20', num_classes=3)
            data = finetune.create_training_loaders(args, *finetune.open_training_splits(args), model)
            orders.append(list(data.train.sampler))
    finally:
        torch.distributed.destroy_process_group()
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_crop_padding_keeps_the_whole_image_at_any_input_size(finetune, finetune_args, images):
    args = finetune.parse_args([*finetune_args, '--crop-padding', '1', '--hflip', '0'])
    args.distributed = False
    model = timm.create_model('cifar_resnet20', num_classes=3, pretrained_cfg_overlay=dict(crop_pct=.8))
    data = finetune.create_training_loaders(args, *finetune.open_training_splits(args), model)
    assert data.config['crop_pct'] == 1
    image = Image.open(images / 'train' / 'ape' / '0.png').resize((160, 160))
    image.paste((255, 255, 255), (0, 0, 80, 160))  # the left half; a crop of 8 px would be all of one half
    crops = [data.train.dataset.transform(image)[0] for _ in range(20)]
    white_columns = {((crop > 0.7 * crop.max()).sum(0) >= 6).sum().item() for crop in crops}
    assert white_columns <= {3, 4, 5} and len(white_columns) > 1


def torchrun(args):
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(SCRIPT), *args],
        stderr=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def family(process):
    children = Path(f'/proc/{process}/task/{process}/children').read_text().split()
    return [process, *(each for child in children for each in family(int(child)))]


def test_under_torchrun_it_trains_and_killed_as_a_group_it_ends_with_the_same_weights(training, fork_ranks, tmp_path):
    args = training('distill, average', 'two')
    args[args.index('--batch-size') + 1] = '4'
    fork_ranks(args)
    results = json.loads((tmp_path / 'two' / 'results.json').read_text())
    assert results['images'] == 21 and len(rows(tmp_path / 'two')) == 2
    assert results['environment']['processes'] == 2
    os.rename(tmp_path / 'two', tmp_path / 'whole')
    killed = torchrun(args)
    while last_step(tmp_path / 'two' / 'checkpoints') < 4:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.005)
    for process in family(killed.pid):  # torchrun gives its workers sessions of their own
        os.kill(process, signal.SIGKILL)
    killed.communicate()
    fork_ranks(args)
    assert 'Resumed in epoch' in (tmp_path / 'stderr').read_text()
    assert_same_training(tmp_path / 'two', tmp_path / 'whole')


def test_a_signal_to_one_of_two_processes_stops_both_and_the_training_goes_on(
        training, fork_main, fork_ranks, wait, tmp_path):
    args = training('distill, average', 'two')
    args[args.index('--batch-size') + 1] = '4'
    args[args.index('--checkpoint-interval') + 1] = '0'
    with socket.create_server(('127.0.0.1', 0)) as server:
        port = server.getsockname()[1]

    def prepare(rank):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))

    processes = [fork_main(args, partial(prepare, rank)) for rank in range(2)]
    while last_step(tmp_path / 'two' / 'checkpoints') < 0:
        time.sleep(0.005)
    os.kill(processes[1], signal.SIGTERM)
    assert [wait(process) for process in processes] == [143, 143]
    assert not (tmp_path / 'two' / 'results.json').exists()
    fork_ranks(args)
    assert (tmp_path / 'two' / 'results.json').exists()


def test_the_script_itself_is_stopped_by_sigterm(training, tmp_path):
    process = subprocess.Popen([sys.executable, SCRIPT, *training('paper, mixup', 'script'), '--epochs', '200'],
                               stderr=subprocess.PIPE, text=True)
    while last_step(tmp_path / 'script' / 'checkpoints') < 0:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 143
    assert process.stderr.read().splitlines()[-1].endswith('saved. To go on, run the same command with --resume auto.')
    assert torch.load(sorted((tmp_path / 'script' / 'checkpoints').iterdir())[-1], weights_only=True)['step'] >= 1


def test_one_training_for_all_budgets_is_saved_with_an_evaluation_of_every_epoch(
        finetune, finetune_args, static_model, run_script, images, tmp_path, capsys):
    output = ['--output', str(tmp_path), '--experiment', 'any']
    assert finetune.main([*finetune_args, '--recipe', 'any', '--model', static_model, '--least-budget', '.4', '--amp',
                          *output]) == 0
    results = json.loads((tmp_path / 'any' / 'results.json').read_text())
    assert results['recipe']['gate_loss'] == 'budgets' and results['recipe']['least_budget'] == .4
    assert 'was asked for' not in capsys.readouterr().err  # there is no single target
    last = rows(tmp_path / 'any')[-1]
    assert float(last['eval_top1']) == pytest.approx(results['metrics']['top1'])
    assert run_script('validate.py', '--model', f'local-dir:{tmp_path}/any', '--data-dir', images, '--workers', 0,
                      '--json') == 0
    row = json.loads(capsys.readouterr().out)['rows'][0]
    assert row['top1'] == pytest.approx(results['metrics']['top1'])  # float32 in spite of --amp
    assert row['macs_share'] == pytest.approx(results['metrics']['macs_share'])
