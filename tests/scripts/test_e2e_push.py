"""scripts/push_to_hub.py, against a Hub on this machine."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_aig import gated_blocks, save_pretrained
from timm_aig.analysis.figures import plot_execution_rates

SCRIPT = Path(__file__).parent.parent.parent / 'scripts' / 'push_to_hub.py'
RESULTS = dict(
    architecture='cifar_resnet20_aig', parent='cifar_resnet20', dataset='torch/fashion_mnist', split='test',
    images=10000, metrics=dict(top1=94.5), parent_metrics=dict(top1=94.0), seed=0, command='scripts/finetune.py',
    macs=40_000_000, block_rates={'layer1.0': 0.5}, skipped_steps=0, unreadable={}, environment={}, recipe={})


def push(hub, *args, token='hf_alice_write', **env):
    env = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_TOKEN': token, 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1',
           'HF_HUB_DISABLE_TELEMETRY': '1', **env}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, env=env, timeout=300)
    assert not token or token not in done.stdout + done.stderr
    return done


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An output folder of finetune.py."""
    folder = tmp_path_factory.mktemp('output')
    model = timm.create_model('cifar_resnet20_aig', target_rate=0.5)
    save_pretrained(model, folder, model_config=dict(label_names=list('abcdefghij'), budgets=[[0.5, 0.1]]))
    (folder / 'results.json').write_text(json.dumps(RESULTS))
    picture = folder / 'execution_rates.png'
    plot_execution_rates(torch.rand(10, 9), list(gated_blocks(model)), list('abcdefghij'), picture)
    (folder / 'args.yaml').write_text('secret: path')
    (folder / 'checkpoints').mkdir()
    torch.save(model.state_dict(), folder / 'checkpoints' / 'last.pth.tar')
    return folder


PUBLISHED = {'README.md', 'config.json', 'execution_rates.png', 'model.safetensors', 'results.json'}


def test_a_folder_is_published_with_what_belongs_to_it_and_its_config_whole(hub, folder):
    done = push(hub, folder, 'alice/script', '--private', '--message', 'First')
    assert done.returncode == 0, done.stderr
    assert f'{hub.url}/alice/script (new, private), branch main' in done.stdout
    assert '+ model.safetensors' in done.stdout and ' MB' in done.stdout and '/alice/script/commit/' in done.stdout
    assert 'model.safetensors' in done.stderr and '100%' in done.stderr  # the progress bar
    files = hub.files('alice/script')
    assert set(files) == PUBLISHED | {'.gitattributes'} and hub.repo('alice/script')['private']
    config = json.loads(files['config.json'])
    assert config['label_names'] == list('abcdefghij') and config['budgets'] == [[0.5, 0.1]]
    assert config == json.loads((folder / 'config.json').read_text())
    assert files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert '![execution rates](execution_rates.png)' in files['README.md'].decode()


def test_a_dry_run_sends_nothing_and_shows_everything_with_and_without_a_hub(hub, folder):
    done = push(hub, folder, 'alice/script-dry', '--dry-run')
    assert done.returncode == 0 and '(new, the namespace' in done.stdout
    assert '| Top-1 accuracy (%) | 94.5 (static parent: 94) |' in done.stdout
    assert hub.repo('alice/script-dry') is None
    done = push(hub, folder, 'alice/script-dry', '--dry-run', '--json', token='', HF_ENDPOINT='http://127.0.0.1:9')
    upload = json.loads(done.stdout)
    assert upload['exists'] is None and set(upload['files']) == PUBLISHED and upload['url'] is None


def test_a_checkpoint_and_a_hub_config_are_published(hub, folder, tmp_path):
    budget = dict(budget=0.5, gate_offset=-1, macs_share=0.5, images=50)
    config = dict(
        RESULTS, tag='mine', description='From a checkpoint.', gate_budgets=[budget],
        aig=dict(target_rate=0.5, version=1),
        pretrained_cfg=dict(num_classes=10, input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.5] * 3, license='mit',
                            first_conv='conv1', classifier='fc'))
    (tmp_path / 'mine.json').write_text(json.dumps(config))
    checkpoint = folder / 'checkpoints' / 'last.pth.tar'
    done = push(hub, checkpoint, 'alice/checkpoint', '--hub-config', tmp_path / 'mine.json', '--json')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)['url'].startswith(f'{hub.url}/alice/checkpoint/commit/')
    card = hub.files('alice/checkpoint')['README.md'].decode()
    assert 'From a checkpoint.' in card and 'license: mit' in card
    args = json.loads(hub.files('alice/checkpoint')['config.json'])['model_args']
    assert args['target_rate'] == 0.5 and [row['budget'] for row in args['gate_budgets']] == [0.5]


@pytest.mark.parametrize('args,code,message', [
    (['{folder}/none', 'alice/x'], 2, 'SOURCE must be a folder or a checkpoint, there is no'),
    (['{folder}/checkpoints', 'alice/x'], 2, 'config.json cannot be read'),
    (['{folder}/checkpoints/last.pth.tar', 'alice/x'], 2, 'a checkpoint needs --hub-config'),
    (['{folder}', 'alice/x', '--hub-config', 'no'], 2,
     '--hub-config must be a JSON file or one of cifar_resnet110_aig'),
    (['{folder}', 'alice', '--dry-run'], 1, "ValueError: repo_id must be 'user/name', not 'alice'"),
])
def test_bad_input_is_said_in_one_line_with_its_exit_code(folder, args, code, message, capsys, run_script):
    assert run_script('push_to_hub.py', *[arg.format(folder=folder) for arg in args]) == code
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error


def test_a_refusal_of_the_hub_is_said_in_one_line(hub, folder):
    done = push(hub, folder, 'bob/x')
    assert done.returncode == 1 and "You don't have the rights to create a model" in done.stderr
    assert 'Traceback' not in done.stderr and hub.repo('bob/x') is None


def test_its_help_has_examples(capsys, run_script):
    assert run_script('push_to_hub.py', '--help') == 0
    assert 'examples:' in (text := capsys.readouterr().out) and '--dry-run' in text and 'token' in text
