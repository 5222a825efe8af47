"""scripts/push_to_hub.py, against a double of the Hub."""
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from timm_aig import save_pretrained

RESULTS = dict(
    architecture='cifar_resnet20_aig', parent='cifar_resnet20', dataset='torch/fashion_mnist', split='test',
    images=10000, metrics=dict(top1=94.5), parent_metrics=dict(top1=94.0), seed=0, command='scripts/finetune.py',
    macs=40_000_000, block_rates={'layer1.0': 0.5}, skipped_steps=0, unreadable={}, environment={}, recipe={})
PUBLISHED = {'README.md', 'config.json', 'execution_rates.png', 'model.safetensors', 'results.json'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An output folder of finetune.py."""
    folder = tmp_path_factory.mktemp('output')
    model = timm.create_model('cifar_resnet20_aig', layers=(1, 1, 1), target_rate=0.5)
    save_pretrained(model, folder, model_config=dict(label_names=list('abcdefghij'), budgets=[[0.5, 0.1]]))
    (folder / 'results.json').write_text(json.dumps(RESULTS))
    Image.new('RGB', (8, 8)).save(folder / 'execution_rates.png')
    (folder / 'args.yaml').write_text('secret: path')
    return folder


def test_a_folder_is_published_with_its_whole_config(hub, client, folder):
    code, out, err = client.script('push_to_hub.py', folder, 'alice/script', '--private', '--message', 'First')
    assert code == 0, err
    assert f'alice/script on {hub.url} (new, private), branch main' in out
    assert '+ model.safetensors' in out and ' kB' in out and '/alice/script/commit/' in out
    assert 'model.safetensors' in err and '100%' in err  # the progress bar
    files = hub.files('alice/script')
    assert set(files) == PUBLISHED | {'.gitattributes'} and hub.repo('alice/script').private
    config = json.loads(files['config.json'])
    assert config['label_names'] == list('abcdefghij') and config['budgets'] == [[0.5, 0.1]]
    assert config == json.loads((folder / 'config.json').read_text())
    assert files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert '![execution rates](execution_rates.png)' in files['README.md'].decode()


def test_a_dry_run_shows_everything_and_uploads_nothing(hub, client, folder):
    code, out, _ = client.script('push_to_hub.py', folder, 'alice/script-dry', '--dry-run')
    assert code == 0 and '(new, the namespace' in out
    assert '| Top-1 accuracy (%) | 94.5 (static parent: 94) |' in out
    assert hub.repo('alice/script-dry') is None


def test_a_checkpoint_is_published_with_what_a_hub_config_says(hub, client, tmp_path):
    torch.save(timm.create_model('cifar_resnet20_aig').state_dict(), tmp_path / 'last.pth.tar')
    budget = dict(budget=0.5, gate_offset=-1, macs_share=0.5, images=50)
    config = dict(
        RESULTS, tag='mine', description='From a checkpoint.', gate_budgets=[budget],
        aig=dict(target_rate=0.5, version=1),
        pretrained_cfg=dict(num_classes=10, input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.5] * 3, license='mit',
                            first_conv='conv1', classifier='fc'))
    (tmp_path / 'mine.json').write_text(json.dumps(config))
    args = ['alice/checkpoint', '--hub-config', tmp_path / 'mine.json', '--json']
    code, out, err = client.script('push_to_hub.py', tmp_path / 'last.pth.tar', *args)
    assert code == 0, err
    assert json.loads(out)['url'].startswith(f'{hub.url}/alice/checkpoint/commit/')
    card = hub.files('alice/checkpoint')['README.md'].decode()
    assert 'From a checkpoint.' in card and 'license: mit' in card
    args = json.loads(hub.files('alice/checkpoint')['config.json'])['model_args']
    assert args['target_rate'] == 0.5 and [row['budget'] for row in args['gate_budgets']] == [0.5]


def test_a_static_checkpoint_is_published_too(hub, client):
    weights = Path(__file__).parents[2] / 'hub_configs' / 'cifar_resnet8.glyphs.safetensors'
    code, _, err = client.script('push_to_hub.py', weights, 'alice/static', '--hub-config', 'cifar_resnet8.glyphs')
    assert code == 0, err
    assert json.loads(hub.files('alice/static')['config.json'])['architecture'] == 'cifar_resnet8'


def test_bad_input_is_one_line_with_exit_code_2(client, folder, tmp_path):
    (tmp_path / 'model.pth').write_bytes(b'no checkpoint')
    (tmp_path / 'cascade').mkdir()
    (tmp_path / 'cascade' / 'config.json').write_text('{"cascade": {"stages": []}}')
    for args, message in (
            ([tmp_path / 'cascade', 'alice/x'], 'SOURCE is a cascade: publish it by '),
            ([folder / 'none', 'alice/x'], 'SOURCE must be a folder or a checkpoint, there is no'),
            ([tmp_path, 'alice/x'], 'config.json: [Errno 2] No such file'),
            ([tmp_path / 'model.pth', 'alice/x'], 'SOURCE is a checkpoint, --hub-config must describe its model.'),
            ([tmp_path / 'model.pth', 'alice/x', '--hub-config', 'cifar_resnet32_aig.fmnist_t06'], 'cannot be loaded'),
            ([folder, 'alice/x', '--hub-config', 'no'], '--hub-config must be a JSON file or one of '),
            ([folder, 'alice', '--dry-run'], "REPO must be 'user/name', not 'alice'"),
            ([folder, 'alice/x', '--timeout', '0'], '--timeout must be a number in (0, inf), not')):
        code, out, err = client.script('push_to_hub.py', *args)
        assert code == 2 and out == '' and message in err.splitlines()[-1], err
        assert err.splitlines()[-1].startswith('error: ') and 'Traceback' not in err


def test_a_hub_that_refuses_or_stalls_is_one_line_with_exit_code_3(hub, client, folder):
    code, _, err = client.script('push_to_hub.py', folder, 'bob/x')
    assert code == 3 and "error: HfHubHTTPError: 403 Forbidden: You don't have the rights to create a model" in err
    code, _, err = client.script('push_to_hub.py', folder, 'alice/x', token='')
    assert code == 3 and 'Log in with `hf auth login`, or set HF_TOKEN.' in err
    hub.fault(method='POST', path='/repos/create', stall=True)
    code, _, err = client.script('push_to_hub.py', folder, 'alice/x', '--timeout', '.2')
    assert code == 3 and 'error: TimeoutError: the Hub stalled for 0.2 s at POST' in err
    assert 'Traceback' not in err and hub.repo('bob/x') is None and hub.repo('alice/x') is None
