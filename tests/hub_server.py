"""A double of the Hugging Face Hub: its HTTP API for pushing and loading, as far as the tests use it.

It runs in a thread of the test process and keeps everything in memory. No socket waits longer than SOCKET_TIMEOUT.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

SOCKET_TIMEOUT = 30  # seconds
# Token -> namespaces it may read, and whether it may write to them.
TOKENS = {
    'hf_alice_write': (('alice', 'team'), True),
    'hf_alice_read': (('alice', 'team'), False),
    'hf_bob_write': (('bob',), True),
}


class HubError(Exception):
    """An answer other than 200, with the code that huggingface_hub turns into an exception."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repo:
    id: str
    type: str  # 'model' or 'space'
    private: bool
    refs: dict = field(default_factory=dict)  # 'refs/heads/main' -> sha
    commits: dict = field(default_factory=dict)  # sha -> {path: bytes}, oldest first

    def commit(self, ref, files):
        sha = hashlib.sha1(f'{self.id} {len(self.commits)}'.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def at(self, revision):
        """Hash and files of a branch, a pull request or a full hash."""
        sha = self.refs.get(revision) or self.refs.get(f'refs/heads/{revision}') or revision
        if sha not in self.commits:
            raise HubError(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return sha, self.commits[sha]

    def info(self, revision):
        sha, files = self.at(revision)
        return dict(
            id=self.id, sha=sha, private=self.private, tags=[], downloads=0, likes=0,
            siblings=[dict(rfilename=path) for path in sorted(files)])


@dataclass
class Fault:
    """What goes wrong with the next requests of a method whose path matches a pattern."""
    method: str
    path: str  # pattern that is searched for
    status: int = 0  # of the answer
    cut: int = -1  # take this much of an upload, or send this much of an answer, then close the connection
    stall: bool = False  # never answer, or not after what cut lets through
    times: int = 1  # how many requests fail


class HubServer:
    """The double. Tests look at repos, add faults and read the log of requests."""

    def __init__(self):
        self.repos = {}  # (type, id) -> Repo
        self.objects = {}  # sha256 -> bytes uploaded by LFS
        self.faults, self.requests = [], []
        self.closed = threading.Event()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (Handler,), {'hub': self}))
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, kwargs=dict(poll_interval=.05), daemon=True).start()

    def close(self):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def repo(self, repo_id, repo_type='model'):
        """A repository, None if it does not exist."""
        return self.repos.get((repo_type, repo_id))

    def files(self, repo_id, ref='refs/heads/main', repo_type='model'):
        """Content of each file of a repository by its path."""
        return dict(self.repo(repo_id, repo_type).at(ref)[1])

    def fault(self, **kwargs):
        """Let the next requests fail, see Fault."""
        self.faults.append(Fault(**kwargs))

    def log(self):
        """'METHOD path' of each request since the last call."""
        requests, self.requests = self.requests, []
        return requests

    def take_fault(self, method, path):
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return Fault(method, path)


class Handler(BaseHTTPRequestHandler):
    """One connection."""
    hub: HubServer
    protocol_version = 'HTTP/1.1'
    timeout = SOCKET_TIMEOUT

    def log_message(self, *args):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(f'{self.command} {path}')
        fault = self.hub.take_fault(self.command, path)
        try:
            if fault.stall and fault.cut < 0:
                self.hub.closed.wait(SOCKET_TIMEOUT)
                self.close_connection = True
                return
            body = self.read_body(fault.cut if self.command in ('POST', 'PUT') else -1)
            if body is None:
                self.close_connection = True
                return
            if fault.status:
                raise HubError(fault.status, 'a fault of the test')
            if '/resolve/' in path:
                self.send_file(path, fault)
            else:
                self.send_json(200, self.answer(path, url.query, body))
        except HubError as e:
            headers = {'X-Error-Message': str(e), 'X-Error-Code': e.code}
            self.send_json(e.status, dict(error=str(e)), {k: v for k, v in headers.items() if v})
        except OSError:  # the client is gone
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self, cut):
        """The body of the request, None after `cut` bytes of it if that is not negative."""
        parts, length = [], int(self.headers.get('Content-Length', 0))
        if cut >= 0:
            self.rfile.read(min(cut, length))
            return None
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(length)
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def send_json(self, status, content, headers=()):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def send_file(self, path, fault):
        """Answer a request for a file, from the byte on that its Range header names."""
        match = re.fullmatch(r'/((?:spaces/)?)([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        repo = self.find('space' if match[1] else 'model', match[2])
        sha, files = repo.at(match[3])
        if match[4] not in files:
            raise HubError(404, 'Entry not found', 'EntryNotFound')
        data = files[match[4]]
        start = int(re.match(r'bytes=(\d+)', self.headers.get('Range', 'bytes=0'))[1])
        self.send_response(206 if start else 200)
        self.send_header('X-Repo-Commit', sha)
        self.send_header('ETag', f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header('Content-Length', str(len(data) - start))
        if start:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        self.end_headers()
        if self.command == 'HEAD':
            return
        self.wfile.write(data[start:] if fault.cut < 0 else data[start:start + fault.cut])
        if fault.stall:
            self.hub.closed.wait(SOCKET_TIMEOUT)
        self.close_connection = fault.cut >= 0

    def token(self):
        """Namespaces of the token and whether it may write, None without a token."""
        header = self.headers.get('Authorization')
        if header is None:
            return None
        token = header.removeprefix('Bearer ')
        if token not in TOKENS:
            raise HubError(401, 'Invalid credentials in Authorization header')
        return TOKENS[token]

    def find(self, repo_type, repo_id, write=False):
        """A repository that the token may read, or write to."""
        token, repo = self.token(), self.hub.repo(repo_id, repo_type)
        own = token is not None and repo_id.split('/')[0] in token[0]
        if repo is None or (repo.private and not own):
            raise HubError(404 if token else 401, 'Repository not found', 'RepoNotFound')
        if write and not (own and token[1]):
            raise HubError(403, f"You don't have the rights to write to {repo_id} with this token")
        return repo

    def answer(self, path, query, body):
        """Content of the answer to a request of the API."""
        method = self.command
        if path == '/api/repos/create':
            return self.create(json.loads(body))
        if path == '/api/validate-yaml':
            return self.validate_card(json.loads(body)['content'])
        if path.startswith('/lfs/'):
            return self.upload(path.removeprefix('/lfs/'), body)
        if match := re.fullmatch(r'/((?:spaces/)?)([^/]+/[^/]+)\.git/info/lfs/objects/batch', path):
            self.find('space' if match[1] else 'model', match[2])
            return self.offer_uploads(json.loads(body))
        match = re.fullmatch(r'/api/(model|space)s/([^/]+/[^/]+)(?:/(\w+)/(.+))?', path)
        if match is None:
            raise HubError(404, f'No such page: {method} {path}')
        repo_type, repo_id, action, revision = match.groups()
        if method == 'GET' and action in (None, 'revision'):
            return self.find(repo_type, repo_id).info(revision or 'main')
        if method == 'GET' and action == 'tree':
            files = self.find(repo_type, repo_id).at(revision)[1]
            return [dict(type='file', path=path, size=len(data), oid=hashlib.sha1(data).hexdigest())
                    for path, data in sorted(files.items())]
        create_pr = 'create_pr=1' in query
        repo = self.find(repo_type, repo_id, write=not create_pr)
        if action == 'branch':
            repo.refs[f'refs/heads/{revision}'] = repo.at(json.loads(body).get('startingPoint', 'main'))[0]
            return {}
        if action == 'preupload':
            repo.at(revision)
            return self.choose_upload_modes(json.loads(body))
        if action == 'commit':
            return self.commit(repo, revision, body, create_pr)
        raise HubError(404, f'No such page: {method} {path}')

    def create(self, content):
        repo_type, token = content.get('type') or 'model', self.token()
        if token is None:
            raise HubError(401, 'Invalid username or password.')
        namespace = content.get('organization') or token[0][0]
        if namespace not in token[0] or not token[1]:
            raise HubError(403, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"')
        repo = Repo(f"{namespace}/{content['name']}", repo_type, content.get('visibility') == 'private')
        if (repo_type, repo.id) in self.hub.repos:
            raise HubError(409, f'You already created this {repo_type} repo')
        repo.commit('refs/heads/main', {'.gitattributes': b'*.safetensors filter=lfs'})
        self.hub.repos[repo_type, repo.id] = repo
        return dict(url=self.url(repo))

    def url(self, repo):
        return f"{self.hub.url}/{'spaces/' if repo.type == 'space' else ''}{repo.id}"

    def validate_card(self, text):
        """Refuse a card whose front matter is not YAML with the types that the Hub wants."""
        match = re.match(r'---\n(.*?)\n---\n', text, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as e:
            raise HubError(400, f'Invalid YAML: {e}') from e
        for name in ('tags', 'datasets'):
            if not all(isinstance(value, str) for value in data.get(name, [])):
                raise HubError(400, f'"{name}" must be an array of strings')
        return dict(errors=[], warnings=[])

    def choose_upload_modes(self, content):
        """LFS for weights and whatever is not text."""
        files = []
        for file in content['files']:
            lfs = file['path'].endswith(('.safetensors', '.bin')) or b'\0' in base64.b64decode(file.get('sample', ''))
            files.append(dict(path=file['path'], uploadMode='lfs' if lfs else 'regular', shouldIgnore=False))
        return dict(files=files)

    def offer_uploads(self, content):
        """Where to upload each file that has not arrived yet."""
        objects = []
        for item in content['objects']:
            new = item['oid'] not in self.hub.objects
            actions = dict(actions=dict(upload=dict(href=f"{self.hub.url}/lfs/{item['oid']}"))) if new else {}
            objects.append(dict(oid=item['oid'], size=item['size'], **actions))
        return dict(transfer='basic', objects=objects)

    def upload(self, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, 'the bytes do not have the announced hash')
        self.hub.objects[oid] = body
        return {}

    def commit(self, repo, revision, body, create_pr):
        head, *operations = map(json.loads, body.splitlines())
        parent = head['value'].get('parentCommit')
        sha, files = repo.at(revision)
        if parent and parent != sha:
            raise HubError(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(files)
        for operation in operations:
            value = operation['value']
            if operation['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif operation['key'] == 'lfsFile':
                files[value['path']] = self.hub.objects[value['oid']]
            else:
                del files[value['path']]
        number = 1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)
        sha = repo.commit(f'refs/pr/{number}' if create_pr else f'refs/heads/{revision}', files)
        answer = dict(success=True, commitOid=sha, commitUrl=f'{self.url(repo)}/commit/{sha}')
        if create_pr:
            answer['pullRequestUrl'] = f'{self.url(repo)}/discussions/{number}'
        return answer
