"""python -m timm_aig.run: scripts that do not import timm_aig run with its models."""
import os
import platform
import subprocess
import sys

import pytest
import timm
import torch

import timm_aig
from timm_aig.run import main

# What timm's scripts do: argparse, imports from beside them, create_model by name, a process group under torchrun.
SCRIPT = '''
import argparse, os, sys
import beside
import timm
import torch.distributed as dist
from timm.utils import init_distributed_device

parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--device', default='cpu')
args = parser.parse_args()

def main():
    model = timm.create_model(**timm.models.resolve_model_input_args(args.model, vars(args), pretrained=False))
    device = init_distributed_device(args)
    words = beside.NAME, type(model.layer3[1]).__name__, sys.argv[1:], os.path.basename(sys.argv[0]), args.world_size
    sys.stdout.write(' '.join(map(str, words)) + chr(10))
    if args.distributed:
        dist.barrier()
        dist.destroy_process_group()

if __name__ == '__main__':
    main()
'''


@pytest.fixture
def script(tmp_path):
    (tmp_path / 'validate.py').write_text(SCRIPT)
    (tmp_path / 'beside.py').write_text('NAME = "beside"')
    return tmp_path / 'validate.py'


def test_a_script_runs_with_the_adaptive_models_and_its_own_arguments_and_neighbours(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [])
    monkeypatch.setattr(sys, 'path', ['', *sys.path])
    main([str(script), '--model', 'resnet18_aig'])
    assert capsys.readouterr().out == "beside GatedBasicBlock ['--model', 'resnet18_aig'] validate.py 1\n"
    with pytest.raises(RuntimeError, match=r'Unknown model \(no_such_aig\)'):  # its errors are its own
        main([str(script), '--model', 'no_such_aig'])


def test_it_works_under_torchrun(script):
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'timm_aig.run',
         script, '--model', 'resnet18_aig'], capture_output=True, text=True, timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.stdout.count("beside GatedBasicBlock ['--model', 'resnet18_aig'] validate.py 2") == 2, done.stderr


@pytest.mark.parametrize('args,code,message', [
    (['no/such.py', '--model', 'x'], 2, 'there is no file no/such.py'),
    ([], 2, 'usage: python -m timm_aig.run SCRIPT'), (['--help'], 0, 'usage: python -m timm_aig.run SCRIPT'),
])
def test_a_missing_script_is_named_and_help_is_printed(args, code, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(args)
    captured = capsys.readouterr()
    assert exit.value.code == code and message in captured.out + captured.err


def test_env_names_all_that_a_report_needs(capsys):
    main(['--env'])
    line = capsys.readouterr().out
    assert line.count('\n') == 1
    for package in (torch, timm, timm_aig):
        assert f'{package.__name__} {package.__version__}' in line
    assert f'python {platform.python_version()}' in line and line.startswith('cpu ')
