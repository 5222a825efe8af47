"""scripts/push_space.py, against a Hub on this machine; what it publishes runs as a Space does."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from gradio import __version__ as gradio_version

SCRIPT = Path(__file__).parent.parent.parent / 'scripts' / 'push_space.py'


def push(hub, *args, token='hf_alice_write', **env):
    env = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_TOKEN': token, 'HF_HUB_DISABLE_XET': '1', 'OMP_NUM_THREADS': '1',
           'HF_HUB_DISABLE_TELEMETRY': '1', **env}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, env=env, timeout=300)
    assert not token or token not in done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return done


@pytest.fixture(scope='module')
def files(hub):
    """Content of a Space that was published."""
    done = push(hub, 'alice/page', '--private')
    assert done.returncode == 0, done.stderr
    assert f'{hub.url}/spaces/alice/page (new, private)' in done.stdout and '/commit/' in done.stdout
    assert len(hub.repo('alice/page', 'space')['commits']) == 2  # the Hub's own first one, and ours
    return hub.files('alice/page', repo_type='space')


def test_a_space_has_the_page_unchanged_its_settings_and_what_it_needs(hub, files):
    assert hub.repo('alice/page', 'space')['private']
    assert files['app.py'] == (SCRIPT.parent / 'space' / 'app.py').read_bytes()
    settings = yaml.safe_load(files['README.md'].decode().split('---')[1])
    assert settings['sdk'] == 'gradio' and settings['sdk_version'] == gradio_version
    assert settings['app_file'] == 'app.py' and len(settings['short_description']) <= 60  # the Hub's limit
    needed = files['requirements.txt'].decode().split('\n')
    assert {'torch>=2.6', 'timm>=1.0.31', 'safetensors'} <= set(needed)
    assert not [line for line in needed if line.startswith(('gradio', 'timm_aig'))]
    assert 'timm_aig/__init__.py' in files and 'hub_configs/cifar_resnet32_aig.fmnist_t06.safetensors' in files
    assert not [name for name in files if '..' in name or 'pycache' in name or name.startswith('/')]


def test_what_is_published_runs_by_itself_as_a_space(files, tmp_path):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    env = {**os.environ, 'SPACE_ID': 'alice/page', 'GRADIO_SERVER_PORT': str(port), 'HF_HUB_OFFLINE': '1',
           'OMP_NUM_THREADS': '1', 'GRADIO_TEMP_DIR': str(tmp_path / 'uploads')}
    env.pop('PYTHONPATH', None)
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen([sys.executable, 'app.py'], cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        answer, end = None, time.monotonic() + 120
        while answer is None and time.monotonic() < end and process.poll() is None:
            time.sleep(.5)
            try:
                answer = urllib.request.urlopen(f'http://127.0.0.1:{port}/config', timeout=5).read().decode()
            except OSError:
                pass
        assert answer is not None, (tmp_path / 'log').read_text()
        assert 'cifar_resnet32_aig.fmnist_t06' in answer and 'local-dir' not in answer
        page = urllib.request.urlopen(f'http://127.0.0.1:{port}/').read().decode()
        assert 'fonts.googleapis' not in page and 'Traceback' not in (tmp_path / 'log').read_text()
    finally:
        process.terminate()
        process.wait(30)
    code = 'import timm_aig, sys; sys.stdout.write(timm_aig.__file__)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == str(tmp_path / 'timm_aig' / '__init__.py')  # the package that ran is the one published
    shutil.rmtree(tmp_path / 'timm_aig')


def test_an_update_keeps_what_its_owner_wrote_and_removes_what_is_stale(hub, files):
    from huggingface_hub import HfApi
    api = HfApi(endpoint=hub.url, token='hf_alice_write')
    readme = files['README.md'].decode().replace('title: Adaptive', 'title: My')
    readme = readme.replace('sdk_version: 6', 'sdk_version: 5')
    readme = readme.replace('---\n', '---\nemoji: 🚪\n', 1) + '\nMy own words.\n'
    for name, content in {'README.md': readme, 'timm_aig/old.py': 'x', 'mine/notes.txt': 'x'}.items():
        api.upload_file(path_or_fileobj=content.encode(), path_in_repo=name, repo_id='alice/page', repo_type='space')
    done = push(hub, 'alice/page', '--json')
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result['exists'] and result['private'] and result['deleted'] == ['timm_aig/old.py']
    updated = hub.files('alice/page', repo_type='space')
    assert set(updated) == {*files, 'mine/notes.txt'}
    text = updated['README.md'].decode()
    settings = yaml.safe_load(text.split('---')[1])
    assert settings['emoji'] == '🚪' and settings['title'].startswith('My') and 'My own words.' in text
    assert settings['sdk_version'] == gradio_version


def test_a_dry_run_sends_nothing_and_shows_everything_with_and_without_a_hub(hub):
    done = push(hub, 'alice/dry', '--dry-run')
    assert done.returncode == 0 and '+ app.py' in done.stdout and 'sdk: gradio' in done.stdout
    assert hub.repo('alice/dry', 'space') is None
    done = push(hub, 'alice/dry', '--dry-run', '--json', token='', HF_ENDPOINT='http://127.0.0.1:9')
    result = json.loads(done.stdout)
    assert result['exists'] is None and result['url'] is None and result['files']['app.py'] > 1000


def test_the_package_may_come_from_elsewhere(hub):
    done = push(hub, 'alice/other', '--package', 'timm_aig @ git+https://example.org/timm_aig')
    assert done.returncode == 0, done.stderr
    files = hub.files('alice/other', repo_type='space')
    assert 'timm_aig @ git+https://example.org/timm_aig' in files['requirements.txt'].decode().split('\n')
    assert not [name for name in files if name.startswith('timm_aig')]


@pytest.mark.parametrize('args,code,message', [
    (['alice'], 2, "SPACE must be user/name, not 'alice'"),
    (['alice/x', '--package', 'evil'], 2, '--package must be a requirement of timm_aig'),
    (['alice/x', '--package', 'timm_aig\nevil'], 2, '--package must be a requirement of timm_aig'),
    (['a b/x'], 2, 'error: '),
    (['bob/x'], 1, "You don't have the rights to create a space"),
])
def test_bad_input_and_refusals_are_said_in_one_line_with_their_exit_code(hub, args, code, message):
    done = push(hub, *args)
    assert done.returncode == code and message in done.stderr
