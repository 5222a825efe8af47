"""What holds for every script: how it starts, its help, and the form of its errors."""
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from _args import number
from _common import ResultError, blame, check_file, create_model, error_text, open_folder, run_script

from timm_aig import InputError
from timm_aig.export.check import ExportError
from timm_aig.training.checkpoint import CheckpointError
from timm_aig.training.trainer import Stopped

SCRIPTS = Path(__file__).parents[2] / 'scripts'
NAMES = sorted(path.name for path in SCRIPTS.glob('[!_]*.py'))


def test_every_script_can_be_executed():
    assert len(NAMES) > 10
    for script in (SCRIPTS / name for name in NAMES):
        assert script.read_text(encoding='utf-8').startswith('#!') and os.access(script, os.X_OK), script


RUN_ALL = '''
import contextlib, io, json, runpy, sys
sys.modules.update(dict.fromkeys(['torch', 'timm', 'torchvision']))  # importing one is an error
results = {}
for script in sys.argv[1:]:
    for flag in ('--help', '--no-such-flag'):
        out, err, sys.argv = io.StringIO(), io.StringIO(), [script, flag]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(script, run_name='__main__')
            except SystemExit as e:
                results[f'{script} {flag}'] = [e.code or 0, out.getvalue(), err.getvalue()]
print(json.dumps(results))
'''


@pytest.fixture(scope='module')
def without_torch():
    """Exit code, output and errors of each script with --help and with a wrong flag, in one process without torch."""
    paths = [str(SCRIPTS / name) for name in NAMES]
    done = subprocess.run([sys.executable, '-c', RUN_ALL, *paths], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PYTHONPATH': str(SCRIPTS)})
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    return lambda name, flag: results[f'{SCRIPTS / name} {flag}']


def test_a_process_that_may_use_one_cpu_gets_one_loader_process(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {3}, raising=False)
    assert runpy.run_path(str(SCRIPTS / '_args.py'))['ARGUMENTS']['workers']['default'] == 1


@pytest.mark.parametrize('name', NAMES)
def test_the_examples_of_its_help_can_be_pasted_into_a_shell(name):
    examples = import_module(name.removesuffix('.py')).EXAMPLES.split('\n\n')[0].replace('\\\n', '')
    for line in examples.splitlines()[1:]:
        words = shlex.split(line, comments=True)
        script = next((i for i, word in enumerate(words) if re.fullmatch(r'scripts/\w+\.py', word)), None)
        if script is not None:  # else a line of comment
            import_module(Path(words[script]).stem).parse_args(words[script + 1:])


@pytest.mark.parametrize('name', NAMES)
def test_help_and_wrong_flags_need_no_slow_import(without_torch, name):
    code, out, _ = without_torch(name, '--help')
    assert code == 0 and 'examples:' in out and 'exit code: 0 done' in out
    code, _, err = without_torch(name, '--no-such-flag')
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1


def test_a_script_starts_in_a_process_of_its_own():
    done = subprocess.run([SCRIPTS / NAMES[0], '--no-such-flag'], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith('error: ')


@pytest.mark.parametrize('error,code', [
    (None, 0), (ResultError('no good.'), 1), (ExportError('another answer.'), 1),
    (InputError('must be in (0, 1], not 2.', 'target_rate'), 2),
    (OSError('no space left.'), 3), (CheckpointError('no space left.'), 3), (KeyboardInterrupt(), 130),
    (Stopped('stopped by SIGTERM.', 15), 143),
])
def test_each_way_to_end_has_its_exit_code(capsys, error, code):
    def run(args):
        if error is not None:
            raise error

    assert run_script(run, Namespace()) == code
    assert capsys.readouterr().err.count('\n') == (code != 0)


def test_an_error_in_the_program_itself_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda args: 1 / 0, Namespace())


def test_an_error_names_the_flag_on_one_line():
    assert error_text(InputError('must be in\n(0, 1].', 'target_rate')) == '--target-rate must be in (0, 1].'
    assert error_text(InputError('must be a folder.', 'path')) == '--output must be a folder.'
    assert error_text(InputError('must be at least two.', 'stages')) == '--cascade must be at least two.'
    assert error_text(InputError('must be in [0.1, 1].', 'least')) == '--least-budget must be in [0.1, 1].'
    assert error_text(InputError('Traceback ...\ntimm_aig.config.InputError: cannot read a.png')) == 'cannot read a.png'


@pytest.mark.parametrize('text', ['{"a":', '[1]', 'null', '{}', '{"cascade": {"stages": []}}'])
def test_a_folder_that_holds_no_model_is_named(text, tmp_path):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(InputError) as caught:
        create_model(f'local-dir:{tmp_path}')
    assert str(caught.value) == f'model local-dir:{tmp_path}: {tmp_path}/config.json does not describe a model.'


def test_the_folder_of_a_training_that_was_stopped_is_named(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(InputError, match=r'its training has not ended; finetune\.py --resume auto goes on with it'):
        create_model(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('error,text', [
    (ValueError('a. b'), 'a. b'), (AssertionError(), 'AssertionError'), (KeyError(17), 'KeyError: 17'),
    (ValueError('weights_only=True blocked it. If trusted, retry with weights_only=False.'),
     'weights_only=True blocked it.'),
    (ValueError('Re-running `torch.load` with `weights_only` set to `False` will succeed.'), 'ValueError'),
])
def test_what_an_error_says_is_never_empty_and_never_advises_unsafe_unpickling(error, text):
    with pytest.raises(InputError) as caught, blame('model', 'x', Exception):
        raise error
    assert str(caught.value) == f'model x: {text}'


@pytest.mark.parametrize('interval,inside,outside', [
    ('(0, 1]', ['1', '1e-9'], ['0', '1.1', 'nan', 'x', '-1']), ('[0, inf)', ['0', '1e9'], ['-1e-9', 'inf', 'nan']),
    ('(-inf, inf)', ['-5', '0'], ['inf', '-inf', 'nan']), ('[-inf, inf]', ['inf', '-inf'], ['nan']),
])
def test_a_number_lies_in_its_interval(interval, inside, outside):
    assert [number(interval)(text) for text in inside] == [float(text) for text in inside]
    for text in outside:
        with pytest.raises(Exception, match=f'must be a number.*, not {text!r}'):
            number(interval)(text)


def test_an_output_folder_is_made_and_an_unwritable_one_is_an_os_error(tmp_path):
    assert open_folder(tmp_path / 'a' / 'b').is_dir()
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file', tmp_path / 'file' / 'folder', '/proc/folder'):
        with pytest.raises(OSError, match='--output must be a folder to write to'):
            open_folder(path)


def test_a_file_that_can_be_written_is_left_as_it_is_and_another_is_an_os_error(tmp_path):
    (tmp_path / 'file').write_text('old')
    check_file(tmp_path / 'file', 'csv')
    check_file(tmp_path / 'new', 'csv')
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']
    for path in (tmp_path, tmp_path / 'file' / 'x', tmp_path / 'none' / 'x', '/proc/file'):
        with pytest.raises(OSError, match='--csv must be a file in a folder to write to'):
            check_file(path, 'csv')


@pytest.mark.parametrize('name, args', [
    ('validate.py', ['--model', 'cifar_resnet20', '--plot', '/nowhere/x']),
    ('validate.py', ['--model', 'cifar_resnet20', '--predictions', '/nowhere/x']),
    ('compare.py', ['glyphs', '--data-dir', '.', '--table', '/nowhere/x']),
])
def test_a_file_that_can_never_be_written_is_met_before_the_work(run_script, monkeypatch, capsys, name, args):
    monkeypatch.setattr('timm.create_model', None)
    assert run_script(name, *args) == 3
    assert f'{args[-2]} must be a file in a folder to write to' in capsys.readouterr().err


def test_the_slurm_job_starts_finetune_on_every_gpu_of_every_node_with_its_arguments(tmp_path):
    for name, line in (('scontrol', 'echo node7'), ('srun', 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f'#!/bin/bash\n{line}\n')
        (tmp_path / name).chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_NODELIST': 'node[7-8]', 'SLURM_JOB_NUM_NODES': '2',
           'SLURM_GPUS_ON_NODE': '8', 'SLURM_JOB_ID': '42'}
    done = subprocess.run(
        ['bash', SCRIPTS / 'finetune.sbatch', '--model', 'resnet50', '--data-dir', 'a b'], env=env, text=True,
        capture_output=True, check=True)
    line = ' '.join(done.stdout.splitlines())
    assert line.startswith('torchrun --nnodes 2 --nproc-per-node 8 ') and '--rdzv-endpoint node7:29500' in line
    assert line.endswith('scripts/finetune.py --workers 7 --checkpoint-interval 1000 --resume auto '
                         '--model resnet50 --data-dir a b')
