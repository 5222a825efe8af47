"""The Hub's double and clients of it, in processes of their own: huggingface_hub reads its settings at import."""
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_server import TOKENS, HubServer

CLIENT_TIMEOUT = 180  # seconds; a busy machine takes a minute to start one
SCRIPTS = Path(__file__).parent.parent / 'scripts'

# Executes the code it is sent and answers with its `result`.
CLIENT = '''
import contextlib, io, json, logging, os, runpy, sys, time
import timm, timm_aig, torch
from huggingface_hub import HfApi, ModelCard
from timm_aig.hub.timeout import hub_timeout
torch.set_num_threads(1)
time.sleep = lambda seconds: None  # huggingface_hub waits seconds before it tries again
log = io.StringIO()
logging.basicConfig(stream=log, level=logging.INFO)
answers = sys.stdout

def make(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model('cifar_resnet20_aig', layers=(1, 1, 1), **kwargs)
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

def upload(repo_id, files):
    with hub_timeout(30):  # without Xet
        for name, content in files.items():
            HfApi().upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo_id)

def run_script(path, *args):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = [path, *args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as e:
            code = e.code or 0
    return [code, out.getvalue(), err.getvalue()]

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
    """A process with timm_aig and an environment of its own."""

    def __init__(self, url, home, **env):
        env = {**os.environ, 'HF_ENDPOINT': url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_TELEMETRY': '1',
               'HF_TOKEN': 'hf_alice_write', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(map(str, [
                   SCRIPTS.parent, SCRIPTS])), **env}
        self.process = subprocess.Popen(
            [sys.executable, '-c', CLIENT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.answers.put(json.loads(line))

    def run(self, code, token='hf_alice_write'):
        """Execute code. Returns its `result`, its error as 'Type: message' or None, and what it printed and logged."""
        self.process.stdin.write(json.dumps(dict(code=code, env=dict(HF_TOKEN=token))) + '\n')
        self.process.stdin.flush()
        try:
            answer = self.answers.get(timeout=CLIENT_TIMEOUT)
        except queue.Empty:
            self.process.kill()
            raise TimeoutError(f'no answer within {CLIENT_TIMEOUT} s to {code}') from None
        shown = json.dumps(answer)
        assert not [secret for secret in (*TOKENS, token) if secret and secret in shown]
        return answer

    def get(self, code, **kwargs):
        """The result of code that must not fail."""
        answer = self.run(code, **kwargs)
        assert answer['error'] is None, answer
        return answer['result']

    def script(self, name, *args, **kwargs):
        """Run a script. Returns its exit code, stdout and stderr."""
        return self.get(f'result = run_script(*{[str(SCRIPTS / name), *map(str, args)]!r})', **kwargs)

    def close(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope='session')
def hub():
    hub = HubServer()
    yield hub
    hub.close()


@pytest.fixture(scope='session')
def make_client(hub, tmp_path_factory):
    """Starts a client of the double with other environment variables."""
    clients = []

    def _make_client(url=hub.url, **env):
        clients.append(Client(url, tmp_path_factory.mktemp('home'), **env))
        return clients[-1]

    yield _make_client
    for client in clients:
        client.close()


@pytest.fixture(scope='session')
def client(make_client):
    return make_client()


@pytest.fixture(autouse=True)
def no_faults_left(request):
    """A test that fails must not leave its faults to the next one."""
    yield
    if 'hub' in request.fixturenames:
        request.getfixturevalue('hub').faults.clear()
