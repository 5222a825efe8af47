"""A Hub on this machine and clients of it, in processes of their own: huggingface_hub reads settings at import."""
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

TOKENS = {
    'hf_alice_write': 'alice:write:team', 'hf_alice_read': 'alice:read:team', 'hf_bob_write': 'bob:write',
}

# Executes what it is sent; the models are tiny, and every call may have its own cache_dir.
CLIENT = '''
import contextlib, io, json, logging, os, sys
import timm, timm_aig, torch
from huggingface_hub import HfApi, ModelCard
torch.set_num_threads(1)
log = io.StringIO()
logging.basicConfig(stream=log, level=logging.INFO)
answers = sys.stdout

def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model('cifar_resnet20_aig', **kwargs)
    with torch.no_grad():
        for block in timm_aig.gated_blocks(model).values():
            block.gate.fc1.weight.normal_(std=4.)
            block.gate.fc2.weight.normal_()
            block.gate.fc2.bias.zero_()
        for norm in model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.weight.uniform_(0.2, 0.6)
    return model.eval()

def outputs(model):
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, gates = timm_aig.forward_gates(model, x)
    return [logits.tolist(), gates.tolist()]

def load(name, **kwargs):
    return timm.create_model(f'hf-hub:{name}', pretrained=True, **kwargs).eval()

for line in sys.stdin:
    request, space, error = json.loads(line), dict(globals(), result=None), None
    os.environ.update(request['env'])
    log.seek(0), log.truncate()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            exec(request['code'], space)
        except Exception as e:
            error = f'{type(e).__name__}: {e}'
    print(json.dumps(dict(result=space['result'], error=error, log=log.getvalue())), file=answers, flush=True)
'''


class Client:
    """A process with timm_aig; its environment is fixed, but for the token."""

    def __init__(self, url, home, **env):
        env = {**os.environ, 'HF_ENDPOINT': url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_TELEMETRY': '1',
               'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_TOKEN': 'hf_alice_write', 'OMP_NUM_THREADS': '1', **env}
        self.process = subprocess.Popen(
            [sys.executable, '-c', CLIENT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, code, token='hf_alice_write'):
        """Execute code; its `result`, its error ('Type: message' or None), what it printed and logged."""
        self.process.stdin.write(json.dumps(dict(code=code, env=dict(HF_TOKEN=token))) + '\n')
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        shown = f"{answer['error']}{answer['log']}"
        assert not [secret for secret in (*TOKENS, token) if secret and secret in shown]
        return answer

    def get(self, code, **kwargs):
        """The result of code that must not fail."""
        answer = self.run(code, **kwargs)
        assert answer['error'] is None, answer
        return answer['result']

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)


class Hub:
    """The server: its address, what it stores, its faults and its log."""

    def __init__(self, root):
        self.root = root
        tokens = [arg for token, who in TOKENS.items() for arg in ('--token', f'{token}={who}')]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name('hub_server.py')), '--root', str(root), '--port', '0',
             '--xet', '--test-hooks', *tokens],
            stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().removeprefix('READY ').strip()

    def repo(self, repo_id, repo_type='model'):
        """All that the server knows of a repository, None if there is none."""
        file = self.root / 'repos' / f'{repo_type}s' / f'{repo_id}.json'
        return json.loads(file.read_text()) if file.exists() else None

    def files(self, repo_id, ref='refs/heads/main', repo_type='model'):
        """Content of each file of a repository."""
        repo = self.repo(repo_id, repo_type)
        tree = repo['commits'][repo['refs'][ref]]['tree']
        return {name: (self.root / 'objects' / f['sha256'][:2] / f['sha256']).read_bytes() for name, f in tree.items()}

    def fault(self, **fault):
        """See request_fault in hub_server.py."""
        data = json.dumps(fault).encode()
        urllib.request.urlopen(urllib.request.Request(f'{self.url}/_test/fault', data, method='POST')).read()

    def log(self):
        """The requests since the last call."""
        return json.load(urllib.request.urlopen(f'{self.url}/_test/log'))

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='session')
def hub(tmp_path_factory):
    hub = Hub(tmp_path_factory.mktemp('hub'))
    yield hub
    hub.close()


@pytest.fixture(scope='session')
def client(hub, tmp_path_factory):
    client = Client(hub.url, tmp_path_factory.mktemp('home'), HF_HUB_DISABLE_XET='1')
    yield client
    client.close()
