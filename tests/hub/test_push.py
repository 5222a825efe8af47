"""push_to_hub, and loading from the Hub, against a double of the Hub."""
import json
import time

import pytest
import timm
from hub_server import Repo

from timm_aig import InputError, save_pretrained
from timm_aig.hub.push import Upload, _write_card

RESULTS = dict(
    architecture='cifar_resnet20_aig', parent='cifar_resnet20', dataset='torch/fashion_mnist', split='test',
    images=10000, metrics=dict(top1=94.5, top5=99.8, execution_rate=0.55, macs_share=0.6, paths=63), seed=0,
    command='scripts/finetune.py --epochs 1', environment=dict(torch='2.14', cpu='x'), recipe=dict(lr=0.1))

WHOLE = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}


def push(repo_id, seed=0, **kwargs):
    return f'result = timm_aig.push_to_hub(make({seed}), {repo_id!r}, **{kwargs!r}).url'


def load(repo_id, cache, **kwargs):
    return f'result = outputs(load({repo_id!r}, cache_dir={str(cache)!r}, **{kwargs!r}))'


@pytest.fixture(scope='module')
def expected(client):
    """Outputs of the models with seeds 0 and 1."""
    first, second = (client.get(f'result = outputs(make({seed}))') for seed in (0, 1))
    assert first != second and 0 < sum(map(sum, first[1])) < 8 * len(first[1][0])
    return first, second


def test_a_pushed_model_loads_with_the_same_logits_and_gates_and_arrives_in_one_commit(hub, client, tmp_path):
    hub.log()
    url = client.get(push('alice/roundtrip', 2, results=RESULTS))
    assert url.startswith(f'{hub.url}/alice/roundtrip/commit/')
    assert sum('/lfs/' in request for request in hub.log()) == 2  # batch and upload, whether or not hf_xet is installed
    assert set(hub.files('alice/roundtrip')) == {*WHOLE, 'results.json'}
    assert len(hub.repo('alice/roundtrip').commits) == 2  # the Hub's own first one, and ours
    assert client.get(load('alice/roundtrip', tmp_path)) == client.get('result = outputs(make(2))')
    shapes = client.get(
        f"model = load('alice/roundtrip', cache_dir={str(tmp_path)!r}, num_classes=3, in_chans=1)\n"
        "result = [list(model(torch.randn(1, 1, 32, 32)).shape), len(timm_aig.gated_blocks(model))]")
    assert shapes == [[1, 3], 3]


def test_a_name_with_a_revision_loads_it_and_a_missing_branch_is_created(hub, client, expected, tmp_path):
    client.get(push('alice/revisions', 0))
    client.get(push('alice/revisions', 1, revision='v2'))
    assert client.get(load('alice/revisions', tmp_path)) == expected[0]
    assert client.get(load('alice/revisions@v2', tmp_path)) == expected[1]
    commit = hub.repo('alice/revisions').refs['refs/heads/main']
    client.get(push('alice/revisions', 1))
    assert client.get(load('alice/revisions', tmp_path)) == expected[1]
    assert client.get(load(f'alice/revisions@{commit}', tmp_path)) == expected[0]
    assert b'hf-hub:alice/revisions@v2' in hub.files('alice/revisions', 'refs/heads/v2')['README.md']
    client.get(push('alice/new-with-branch', 0, revision='v1'))
    assert set(hub.files('alice/new-with-branch', 'refs/heads/v1')) == WHOLE
    assert set(hub.files('alice/new-with-branch')) == {'.gitattributes'}


def test_weights_are_of_the_commit_of_the_config_even_if_the_branch_moves_in_between(client, expected, tmp_path):
    client.get(push('alice/moves', 0))
    answer = client.run(f'''
import timm_aig.models.entry_points as module
build = module.build_model_with_cfg
def build_late(*args, **kwargs):
    module.build_model_with_cfg = build
    timm_aig.push_to_hub(make(1), 'alice/moves')
    return build(*args, **kwargs)
module.build_model_with_cfg = build_late
{load('alice/moves', tmp_path)}''')
    assert answer['result'] == expected[0], answer
    assert client.get(load('alice/moves', tmp_path)) == expected[1]


def test_an_update_keeps_the_users_card_and_files_and_is_one_commit(hub, client):
    client.get('''
HfApi().create_repo('alice/update')
card = b'---\\nlicense: mit\\nthumbnail: x.png\\ntags:\\n- mine\\n---\\n# My own words\\n'
upload('alice/update', {'notes.txt': b'mine', 'README.md': card})''')
    commits = len(hub.repo('alice/update').commits)
    client.get(push('alice/update', results=RESULTS))
    assert len(hub.repo('alice/update').commits) == commits + 1
    files = hub.files('alice/update')
    assert set(files) == {*WHOLE, 'notes.txt', 'results.json'} and json.loads(files['results.json']) == RESULTS
    card = files['README.md'].decode()
    assert '# My own words\n' in card and 'thumbnail: x.png' in card and '- mine' in card and 'value: 94.5' in card
    client.get(push('alice/update', results={**RESULTS, 'metrics': dict(top1=95.5)}))
    card = hub.files('alice/update')['README.md'].decode()
    assert card.count('# My own words') == 1 and 'value: 95.5' in card and '| 94.5 |' not in card
    assert card.count('generated, the next push replaces it') == 1


def test_a_pull_request_leaves_main_as_it_is(hub, client):
    client.get(push('alice/pr', 0))
    before = hub.repo('alice/pr').refs['refs/heads/main']
    assert client.get(push('alice/pr', 1, create_pr=True)).endswith('/alice/pr/discussions/1')
    assert client.get(push('alice/pr', 1, create_pr=True), token='hf_bob_write').endswith('/discussions/2')
    assert hub.repo('alice/pr').refs['refs/heads/main'] == before


def test_a_dry_run_changes_nothing(hub, client):
    code = '''
u = timm_aig.push_to_hub(make(), {!r}, dry_run=True, revision='v2')
result = [u.exists, u.private, u.new_revision, sorted(u.files), u.url]'''
    hub.log()
    files = ['README.md', 'config.json', 'model.safetensors']
    assert client.get(code.format('alice/dry')) == [False, None, True, files, None]
    assert {request.split()[0] for request in hub.log()} == {'GET'} and hub.repo('alice/dry') is None
    client.get(push('alice/there', private=True))
    assert client.get(code.format('alice/there')) == [True, True, True, files, None]
    assert set(hub.repo('alice/there').refs) == {'refs/heads/main'}


def test_a_private_repository_is_read_and_written_by_its_owner_only(hub, client, expected, tmp_path):
    client.get(push('alice/private', private=True))
    assert hub.repo('alice/private').private
    assert client.get(load('alice/private', tmp_path / 'a')) == expected[0]
    for token in ('hf_bob_write', ''):
        error = client.run(load('alice/private', tmp_path / 'b'), token=token)['error']
        assert error.startswith('RepositoryNotFoundError')
    assert "don't have the rights" in client.run(push('alice/private', 1), token='hf_bob_write')['error']
    assert len(hub.repo('alice/private').commits) == 2


def test_private_never_publishes_to_a_public_repository(hub, client):
    client.get(push('alice/public'))
    error = client.run(push('alice/public', private=True))['error']
    assert error == 'InputError: private is True, but alice/public exists and is public.'
    assert len(hub.repo('alice/public').commits) == 2


def test_a_token_that_may_not_write_gives_a_clear_error_and_nothing_is_created(hub, client):
    for token, repo_id, message in (
            ('hf_wrong_token', 'alice/no1', 'Invalid credentials'),
            ('', 'alice/no2', '401'),
            ('hf_alice_read', 'alice/no3', "You don't have the rights to create a model"),
            ('hf_bob_write', 'alice/no4', "You don't have the rights to create a model"),
            ('hf_alice_write', 'bob/no5', "You don't have the rights to create a model")):
        assert message in client.run(push(repo_id), token=token)['error']
        assert hub.repo(repo_id) is None
    client.get(push('team/model'))  # a member of the organisation
    assert 'model.safetensors' in hub.files('team/model')


def test_bad_arguments_are_refused_before_the_hub_is_asked(hub, client):
    hub.log()
    for token in ('hf_secret\n', 'hf_secret x', 'hf_secretä', ''):
        for publish in (push, push_cascade):
            answer = client.run(publish('alice/no', token=token))
            assert answer['error'].startswith('InputError: token must be') and 'secret' not in answer['error']
    for repo_id in ('alice', 'a/b/c', '../x', 'alice/..', 'alice/x y', 'alice/x\n', '', 'hf-hub:alice/x'):
        assert client.run(push(repo_id))['error'].startswith("InputError: repo_id must be 'user/name', not")
    assert client.run(push('alice/no', timeout=0))['error'] == 'InputError: timeout must be above 0 seconds, not 0.'
    error = client.run('''
model = make()
model.fc.weight.data[0, 0] = float('nan')
timm_aig.push_to_hub(model, 'alice/nan')''')['error']
    assert 'fc.weight has no values or values that are not finite' in error and hub.log() == []


def test_a_missing_repository_or_revision_is_named(client, tmp_path):
    client.get(push('alice/present'))
    assert 'RepositoryNotFoundError' in client.run(load('alice/nothing', tmp_path))['error']
    assert 'RevisionNotFoundError' in client.run(load('alice/present@v9', tmp_path))['error']


def test_a_repository_with_only_a_pickle_is_refused_and_nothing_is_executed(client, tmp_path):
    client.get(f'''
import pickle
class Evil:
    def __reduce__(self):
        return open, ({str(tmp_path / 'executed')!r}, 'w')
HfApi().create_repo('alice/evil')
folder = timm_aig.save_pretrained(make(), {str(tmp_path / 'm')!r})
upload('alice/evil', {{'config.json': folder / 'config.json', 'pytorch_model.bin': pickle.dumps(Evil())}})''')
    assert 'EntryNotFoundError' in client.run(load('alice/evil', tmp_path / 'cache'))['error']
    assert not (tmp_path / 'executed').exists()


# What fails during the push to a new repository, whether the push still succeeds, and else what its error says.
FAULTS = {
    'create': (dict(method='POST', path='/repos/create', status=500), False, 'HfHubHTTPError'),
    'card': (dict(method='POST', path='/validate-yaml', status=400), False, 'Invalid metadata in README.md'),
    'batch': (dict(method='POST', path='/objects/batch', status=500, times=2), True, ''),
    'upload-500': (dict(method='PUT', path='^/lfs/', status=500, times=2), True, ''),
    'upload-cut': (dict(method='PUT', path='^/lfs/', cut=100_000), True, ''),
    'upload-403': (dict(method='PUT', path='^/lfs/', status=403), False, 'Error while uploading'),
    'commit-500': (dict(method='POST', path='/commit/', status=500), False, 'HfHubHTTPError'),
    'commit-cut': (dict(method='POST', path='/commit/', cut=0), False, 'RemoteProtocolError'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_hub_that_fails_gives_a_clear_error_or_a_whole_repository(hub, client, name):
    fault, succeeds, message = FAULTS[name]
    repo_id = f'alice/fails-{name}'
    seed = 10 + list(FAULTS).index(name)  # weights that have not been uploaded yet
    hub.fault(**fault)
    error = client.run(push(repo_id, seed))['error']
    assert hub.faults[-1].times == 0 and (error is None) == succeeds, error
    if error:
        assert message in error
        repo = hub.repo(repo_id)
        assert repo is None or (set(hub.files(repo_id)) == {'.gitattributes'} and len(repo.refs) == 1)
        client.get(push(repo_id, seed))
    assert set(hub.files(repo_id)) == WHOLE


STEPS = {
    'look-up': dict(method='GET', path='/api/models/alice'), 'create': dict(method='POST', path='/repos/create'),
    'card': dict(method='POST', path='/validate-yaml'), 'preupload': dict(method='POST', path='/preupload/'),
    'batch': dict(method='POST', path='/objects/batch'), 'upload': dict(method='PUT', path='^/lfs/'),
    'commit': dict(method='POST', path='/commit/'),
}


@pytest.mark.parametrize('step', STEPS)
def test_a_hub_that_stalls_at_any_step_of_a_push_is_an_error_and_nothing_is_half_written(hub, client, step):
    repo_id, seed = f'alice/stalls-{step}', 30 + list(STEPS).index(step)
    hub.fault(**STEPS[step], stall=True, times=100)
    start = time.monotonic()
    error = client.run(push(repo_id, seed, timeout=.2))['error']
    assert time.monotonic() - start < 20  # 6 tries, and what it takes to save the model
    request = f"TimeoutError: the Hub stalled for 0.2 s at {STEPS[step]['method']} {hub.url}/"
    assert error.startswith(request) and '?' not in error, error
    repo = hub.repo(repo_id)
    assert repo is None or set(hub.files(repo_id)) == {'.gitattributes'}
    hub.faults.clear()
    client.get(push(repo_id, seed, timeout=10))
    assert set(hub.files(repo_id)) == WHOLE


def test_a_hub_that_stalls_during_a_load_is_an_error_under_hub_timeout(hub, client, expected, tmp_path):
    client.get(push('alice/stalls-load'))
    for method, file in (('HEAD', 'config.json'), ('GET', 'config.json'), ('GET', 'model.safetensors')):
        hub.fault(method=method, path=f'stalls-load/resolve/.*{file}', stall=True, times=100)
        error = client.run(f'with hub_timeout(.2):\n    {load("alice/stalls-load", tmp_path)}')['error']
        assert error.startswith(f'TimeoutError: the Hub stalled for 0.2 s at {method} {hub.url}/alice/stalls-load/')
        hub.faults.clear()
    assert client.get(load('alice/stalls-load', tmp_path)) == expected[0]


@pytest.mark.parametrize('stall', ['at once', 'in the middle'])
@pytest.mark.parametrize('name', ['hf-hub:alice/stalls-plain', 'resnet18_aig'])
def test_a_hub_that_stalls_during_a_plain_load_is_an_error_after_the_time_of_huggingface_hub(
        hub, client, tmp_path, name, stall):
    repo_id = name.removeprefix('hf-hub:') if ':' in name else 'timm/resnet18.a1_in1k'
    if ':' in name:
        client.get(push(repo_id))
    else:
        hub.repos['model', repo_id] = Repo(repo_id, 'model', False)
        hub.repos['model', repo_id].commit('refs/heads/main', {'model.safetensors': bytes(10_000)})
    path = f'{repo_id}/resolve/.*model.safetensors'
    if stall == 'in the middle':
        hub.fault(method='GET', path=path, stall=True, cut=1000)
    hub.fault(method='GET', path=path, stall=True, times=100)
    error = client.run(f'''
from huggingface_hub import constants
constants.HF_HUB_DOWNLOAD_TIMEOUT = .2  # of the environment variable of this name
try:
    timm.create_model({name!r}, pretrained=True, cache_dir={str(tmp_path)!r})
finally:
    constants.HF_HUB_DOWNLOAD_TIMEOUT = 10''')['error']
    assert error.startswith(f'TimeoutError: the Hub stalled at GET {hub.url}/{repo_id}/resolve/'), error
    assert 'HF_HUB_DOWNLOAD_TIMEOUT' in error


def test_hub_timeout_leaves_the_settings_of_huggingface_hub_as_they_were(hub, client):
    result = client.get('''
from huggingface_hub import constants, get_session, set_client_factory
from timm_aig.compat import hub_client_factory
before, xet = hub_client_factory(), constants.HF_HUB_DISABLE_XET
own = lambda: before()
set_client_factory(own)
try:
    with hub_timeout(5):
        inside = len(get_session().event_hooks['request'])
    result = [hub_client_factory() is own, constants.HF_HUB_DISABLE_XET == xet,
              inside - len(get_session().event_hooks['request'])]
finally:
    set_client_factory(before)''')
    assert result == [True, True, 1]


def test_a_second_try_does_not_upload_again_what_has_arrived(hub, client):
    client.get(push('alice/again', 5, results={'description': 'first'}))
    hub.log()
    hub.fault(method='POST', path='/commit/', status=500)
    assert client.run(push('alice/again', 6))['error'].startswith('HfHubHTTPError')
    assert [request for request in hub.log() if request.startswith('PUT')]
    client.get(push('alice/again', 6))
    assert not [request for request in hub.log() if request.startswith('PUT')]


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, client):
    client.get(push('alice/both'))
    answer = client.run('''
import timm_aig.hub.push as module
write_card = module._write_card
def write_late(*args):
    upload('alice/both', {'README.md': b'# Theirs'})
    return write_card(*args)
module._write_card = write_late
try:
    timm_aig.push_to_hub(make(1), 'alice/both')
finally:
    module._write_card = write_card''')
    assert 'A commit has happened since' in answer['error']
    assert hub.files('alice/both')['README.md'] == b'# Theirs'


def test_a_cut_download_is_resumed_and_one_that_never_ends_is_an_error(hub, client, expected, tmp_path):
    client.get(push('alice/download'))
    path = 'alice/download/resolve/.*/model.safetensors'
    hub.log()
    hub.fault(method='GET', path=path, cut=100_000)
    assert client.get(load('alice/download', tmp_path / 'a')) == expected[0]
    assert sum(request.startswith('GET') and 'model.safetensors' in request for request in hub.log()) == 2
    hub.fault(method='GET', path=path, cut=0, times=100)
    assert client.run(load('alice/download', tmp_path / 'b'))['error'] is not None
    hub.faults.clear()
    assert client.get(load('alice/download', tmp_path / 'b')) == expected[0]


def test_without_a_connection_a_warm_cache_loads_and_all_else_is_a_clear_error(
        hub, client, make_client, expected, tmp_path):
    client.get(push('alice/offline'))
    client.get(load('alice/offline', tmp_path / 'warm'))
    down = make_client('http://127.0.0.1:9')  # where nothing listens
    for error in ('ConnectError', 'OfflineModeIsEnabled'):
        assert error in down.run(push('alice/down'))['error']
        assert down.get(load('alice/offline', tmp_path / 'warm')) == expected[0]
        cold = down.run(load('alice/down', tmp_path / 'cold'))['error']
        assert cold.startswith('LocalEntryNotFoundError') and 'cannot find the requested files in the local' in cold
        down.get("import huggingface_hub\nhuggingface_hub.constants.HF_HUB_OFFLINE = True")


def test_the_front_matter_of_a_card_is_read_back_as_it_was_meant(hub, client):
    odd = {**RESULTS, 'description': 'odd: "values" - {#: [ | & ü', 'dataset': 'torch/a: "b" | c'}
    client.get(push('alice/card', results=odd))
    card = hub.files('alice/card')['README.md'].decode()
    metrics = client.get(f'''
read = ModelCard({card!r}).data.eval_results
result = [[r.dataset_type, r.dataset_split, r.metric_type, r.metric_value] for r in read]''')
    dataset = odd['dataset']
    assert metrics == [
        [dataset, 'test', 'accuracy', 94.5], [dataset, 'test', 'accuracy', 99.8],
        [dataset, 'test', 'execution_rate', 0.55], [dataset, 'test', 'macs_share', 0.6], [dataset, 'test', 'paths', 63]]
    assert json.loads(hub.files('alice/card')['results.json']) == odd


def push_cascade(repo_id, license='apache-2.0', **kwargs):
    return (f"models = make(0), make(1)\nmodels[0].pretrained_cfg['license'] = {license!r}\n"
            f'result = timm_aig.Cascade(models, .5).push_to_hub({repo_id!r}, **{kwargs!r})')


def test_a_pushed_cascade_loads_at_any_revision(client):
    client.get(push_cascade('alice/loads'))
    client.get("timm_aig.Cascade((make(2), make(3)), .9).push_to_hub('alice/loads', revision='v2')")
    (first, expected), (second, of_v2) = client.get("""
x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))

def run(cascade):
    with torch.no_grad():
        return [list(cascade.thresholds), cascade.eval()(x).tolist()]

result = [
    [run(timm_aig.Cascade.from_pretrained(name)), run(timm_aig.Cascade([make(a), make(b)], threshold))]
    for name, a, b, threshold in (('hf-hub:alice/loads', 0, 1, .5), ('hf-hub:alice/loads@v2', 2, 3, .9))]""")
    assert first == expected and second == of_v2 and first != second


def test_a_cascade_keeps_the_own_text_of_its_card_and_takes_the_licence_of_its_models(hub, client):
    client.get(push_cascade('alice/two'))
    files = hub.files('alice/two')
    assert set(files) == {'.gitattributes', 'README.md', 'config.json', *(
        f'model_{i}/{name}' for i in (1, 2) for name in ('config.json', 'model.safetensors'))}
    card = files['README.md'].decode()
    assert 'license: apache-2.0' in card and "from_pretrained('hf-hub:alice/two')" in card
    client.get(f"upload('alice/two', {{'README.md': {(card + 'My own words.').encode()!r}}})")
    client.get(push_cascade('alice/two', revision='v2'))
    card = hub.files('alice/two', 'refs/heads/v2')['README.md'].decode()
    assert 'My own words.' in card and '| 1 | cifar_resnet20_aig |  | 0.5 |' in card and 'alice/two@v2' in card
    client.get(push_cascade('alice/mixed', 'cc-by-nc-4.0'))
    assert 'license:' not in hub.files('alice/mixed')['README.md'].decode()


def test_a_private_cascade_is_not_pushed_to_a_public_repository(hub, client):
    client.get(push('alice/open'))
    error = client.run(push_cascade('alice/open', private=True))['error']
    assert 'alice/open exists and is public' in error and len(hub.repo('alice/open').commits) == 2


def test_pictures_that_would_overwrite_each_other_or_the_weights_are_refused(tmp_path):
    model = timm.create_model('cifar_resnet8_aig')
    for folder in ('a', 'b'):
        (tmp_path / folder).mkdir()
        for name in ('rates.png', 'model.safetensors'):
            (tmp_path / folder / name).write_text(folder)
    for pictures in (['a/rates.png', 'b/rates.png'], ['a/model.safetensors']):
        saved = save_pretrained(model, tmp_path / pictures[-1].replace('/', '-'))
        with pytest.raises(InputError, match='pictures must have file names that nothing else has'):
            _write_card(model, saved, Upload('user/name'), None, None, [tmp_path / name for name in pictures])
