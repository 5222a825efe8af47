"""scripts/push_space.py, against a double of the Hub. The page that it publishes runs as in a Space."""
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parent.parent.parent / 'scripts' / 'push_space.py'


@pytest.fixture(scope='session')  # a second time it would not be new
def files(hub, client):
    """Content of a published Space."""
    code, out, err = client.script('push_space.py', 'alice/page', '--private')
    assert code == 0, err
    assert f'alice/page on {hub.url} (new, private)' in out and '/spaces/alice/page/commit/' in out
    assert len(hub.repo('alice/page', 'space').commits) == 2  # the Hub's own first one, and ours
    return hub.files('alice/page', repo_type='space')


def test_a_space_has_the_page_unchanged_its_settings_and_what_it_needs(hub, files):
    assert hub.repo('alice/page', 'space').private
    assert files['app.py'] == (SCRIPT.parent / 'space' / 'app.py').read_bytes()
    settings = yaml.safe_load(files['README.md'].decode().split('---')[1])
    assert settings['sdk'] == 'gradio' and settings['sdk_version'] == version('gradio')
    assert settings['app_file'] == 'app.py' and len(settings['short_description']) <= 60  # the Hub's limit
    needed = files['requirements.txt'].decode().split('\n')
    assert {'torch>=2.9', 'timm>=1.0.31', 'safetensors'} <= set(needed)
    assert not [line for line in needed if line.startswith(('gradio', 'timm_aig'))]
    page = {str(file.relative_to(SCRIPT.parent / 'space')) for file in (SCRIPT.parent / 'space').rglob('*.*')}
    assert {name for name in page if 'pycache' not in name} <= set(files)  # the licence of the examples too
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
    for name in ('PYTHONPATH', 'PYTHONDONTWRITEBYTECODE'):
        env.pop(name, None)
    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen([sys.executable, 'app.py'], cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        answer, end = None, time.monotonic() + 180  # a busy machine takes a minute
        while answer is None and time.monotonic() < end and process.poll() is None:
            time.sleep(.5)
            try:
                answer = urllib.request.urlopen(f'http://127.0.0.1:{port}/config', timeout=5).read().decode()
            except OSError:
                pass
        assert answer is not None, (tmp_path / 'log').read_text()
        assert 'cifar_resnet32_aig.fmnist_t06' in answer and 'local-dir' not in answer
        page = urllib.request.urlopen(f'http://127.0.0.1:{port}/', timeout=30).read().decode()
        assert 'fonts.googleapis' not in page and 'Traceback' not in (tmp_path / 'log').read_text()
    finally:
        process.terminate()
        process.wait(30)
    assert list(tmp_path.glob('timm_aig/__pycache__/convert.*.pyc'))  # it ran the published package


def test_an_update_keeps_what_its_owner_wrote_and_removes_what_is_stale(hub, client, files):
    readme = files['README.md'].decode().replace('title: Adaptive', 'title: My')
    readme = readme.replace('sdk_version: 6', 'sdk_version: 5')
    readme = readme.replace('---\n', '---\nemoji: 🚪\n', 1) + '\nMy own words.\n'
    space = hub.repo('alice/page', 'space')
    changes = {'README.md': readme.encode(), 'timm_aig/old.py': b'x', 'mine/notes.txt': b'x'}
    space.commit('refs/heads/main', {**files, **changes})
    code, out, err = client.script('push_space.py', 'alice/page', '--json')
    assert code == 0, err
    result = json.loads(out)
    assert result['exists'] and result['private'] and result['deleted'] == ['timm_aig/old.py']
    updated = hub.files('alice/page', repo_type='space')
    assert set(updated) == {*files, 'mine/notes.txt'}
    text = updated['README.md'].decode()
    settings = yaml.safe_load(text.split('---')[1])
    assert settings['emoji'] == '🚪' and settings['title'].startswith('My') and 'My own words.' in text
    assert settings['sdk_version'] == version('gradio')


def test_a_dry_run_shows_everything_and_uploads_nothing(hub, client):
    code, out, _ = client.script('push_space.py', 'alice/dry', '--dry-run')
    assert code == 0 and '+ app.py' in out and 'sdk: gradio' in out
    assert hub.repo('alice/dry', 'space') is None


def test_bad_input_and_refusals_are_one_line_with_their_exit_code(hub, client):
    hub.fault(method='POST', path='/repos/create', stall=True)
    for args, expected, message in (
            (['alice/x', '--timeout', '.2'], 3, 'TimeoutError: the Hub stalled for 0.2 s at POST'),
            (['bob/x'], 3, "You don't have the rights to create a space"),
            (['alice'], 2, "REPO must be 'user/name', not 'alice'"),
            (['a b/x'], 2, "REPO must be 'user/name', not 'a b/x'")):
        code, _, err = client.script('push_space.py', *args)
        assert code == expected and message in err and err.splitlines()[-1].startswith('error: '), err
        assert 'Traceback' not in err
