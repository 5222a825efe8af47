"""push_to_hub and loading from the Hub, against a Hub on this machine."""
import json
import re

import pytest
from loopback import Client

RESULTS = dict(
    architecture='cifar_resnet20_aig', parent='cifar_resnet20', dataset='torch/fashion_mnist', split='test',
    images=10000, metrics=dict(top1=94.5, top5=99.8, execution_rate=0.55, macs_share=0.6, paths=63), seed=0,
    command='scripts/finetune.py --epochs 1', environment=dict(torch='2.14', cpu='x'), recipe=dict(lr=0.1))

WHOLE = {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}


def push(repo_id, seed=0, **kwargs):
    return f'result = timm_aig.push_to_hub(make({seed}), {repo_id!r}, **{kwargs!r}).url'


def load(repo_id, cache, **kwargs):
    return f'result = outputs(load({repo_id!r}, cache_dir={str(cache)!r}, **{kwargs!r}))'


@pytest.fixture(scope='session')
def expected(client):
    """Outputs of the models with seeds 0 and 1."""
    first, second = (client.get(f'result = outputs(make({seed}))') for seed in (0, 1))
    assert first != second and 0 < sum(map(sum, first[1])) < 8 * len(first[1][0])
    return first, second


@pytest.mark.parametrize('xet,seed', [(False, 2), (True, 3)])
def test_what_is_pushed_loads_in_a_fresh_process_with_the_same_logits_and_gates(hub, xet, seed, tmp_path):
    repo_id, env = f'alice/roundtrip{seed}', dict(HF_HUB_DISABLE_XET='0' if xet else '1')
    pusher, loader = (Client(hub.url, tmp_path / home, **env) for home in ('a', 'b'))
    hub.log()
    url = pusher.get(push(repo_id, seed, results=RESULTS))
    uploads = {entry['path'].split('/')[1] for entry in hub.log() if entry['method'] in ('POST', 'PUT')}
    assert url.startswith(f'{hub.url}/{repo_id}/commit/') and ('cas' in uploads, 'lfs' in uploads) == (xet, not xet)
    outputs = loader.get(load(repo_id, tmp_path / 'cache'))
    assert outputs == pusher.get(f'result = outputs(make({seed}))')
    assert [e for e in hub.log() if e['path'].startswith('/cas/v1/reconstructions' if xet else '/lfs/get')]
    assert set(hub.files(repo_id)) == {*WHOLE, 'results.json'}
    assert len(hub.repo(repo_id)['commits']) == 2  # the Hub's own first one, and ours
    pusher.close(), loader.close()


def test_a_name_with_a_revision_loads_it_and_a_new_revision_is_created(hub, client, expected, tmp_path):
    client.get(push('alice/revisions', 0))
    client.get(push('alice/revisions', 1, revision='v2'))
    assert client.get(load('alice/revisions', tmp_path)) == expected[0]
    assert client.get(load('alice/revisions@v2', tmp_path)) == expected[1]
    commit = hub.repo('alice/revisions')['refs']['refs/heads/main']
    client.get(push('alice/revisions', 1))
    assert client.get(load('alice/revisions', tmp_path)) == expected[1]
    assert client.get(load(f'alice/revisions@{commit}', tmp_path)) == expected[0]
    assert b'hf-hub:alice/revisions@v2' in hub.files('alice/revisions', 'refs/heads/v2')['README.md']


def test_other_classes_and_channels_load_from_the_hub(client, tmp_path):
    client.get(push('alice/other'))
    shapes = client.get(
        f"m = load('alice/other', cache_dir={str(tmp_path)!r}, num_classes=3, in_chans=1)\n"
        "result = [list(m(torch.randn(1, 1, 32, 32)).shape), len(timm_aig.gated_blocks(m))]")
    assert shapes == [[1, 3], 9]


def test_weights_are_of_the_revision_of_the_config_even_if_the_branch_moves_in_between(client, expected, tmp_path):
    client.get(push('alice/moves', 0))
    # A push lands between timm's reading of config.json and of the weights, after the plugin pinned the revision.
    answer = client.run(f'''
import timm_aig.models.resnet_aig as module
build = module.build_model_with_cfg
def build_late(*args, **kwargs):
    module.build_model_with_cfg = build
    timm_aig.push_to_hub(make(1), 'alice/moves')
    return build(*args, **kwargs)
module.build_model_with_cfg = build_late
{load('alice/moves', tmp_path)}''')
    assert answer['result'] == expected[0], answer
    # And before it: the weights of the old config would not be the newest.
    answer = client.run(f'''
import timm_aig.models.resnet_aig as module
checked = module.checked_source
def checked_late(*args):
    module.checked_source = checked
    timm_aig.push_to_hub(make(0), 'alice/moves')
    return checked(*args)
module.checked_source = checked_late
{load('alice/moves', tmp_path)}''')
    assert 'RuntimeError: alice/moves changed from' in answer['error'] and 'Load it again' in answer['error']
    assert client.get(load('alice/moves', tmp_path)) == expected[0]


def test_an_update_deletes_an_old_pickle_keeps_the_persons_card_and_is_one_commit(hub, client, tmp_path):
    client.get('''
api = HfApi()
api.create_repo('alice/update')
api.upload_file(path_or_fileobj=b'pickle', path_in_repo='pytorch_model.bin', repo_id='alice/update')
api.upload_file(path_or_fileobj=b'mine', path_in_repo='notes.txt', repo_id='alice/update')
api.upload_file(path_or_fileobj=b'---\\nlicense: mit\\nthumbnail: x.png\\ntags:\\n- mine\\n---\\n# My own words\\n',
                path_in_repo='README.md', repo_id='alice/update')''')
    commits = len(hub.repo('alice/update')['commits'])
    client.get(push('alice/update', results=RESULTS))
    assert len(hub.repo('alice/update')['commits']) == commits + 1
    files = hub.files('alice/update')
    assert set(files) == {
        '.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'notes.txt', 'results.json'}
    card = files['README.md'].decode()
    assert '# My own words\n' in card and 'thumbnail: x.png' in card and '- mine' in card and 'value: 94.5' in card
    client.get(push('alice/update', results={**RESULTS, 'metrics': dict(top1=95.5)}))
    card = hub.files('alice/update')['README.md'].decode()
    assert card.count('# My own words') == 1 and 'value: 95.5' in card and '| 94.5 |' not in card
    assert card.count('generated, the next push replaces it') == 1


def test_a_pull_request_leaves_main_as_it_is(hub, client):
    client.get(push('alice/pr', 0))
    before = hub.repo('alice/pr')['refs']['refs/heads/main']
    assert client.get(push('alice/pr', 1, create_pr=True)).endswith('/alice/pr/discussions/1')
    assert hub.repo('alice/pr')['refs']['refs/heads/main'] == before
    assert client.get(push('alice/pr', 1, create_pr=True), token='hf_bob_write').endswith('/discussions/2')


def test_a_dry_run_says_what_it_would_do_and_asks_the_hub_for_nothing_but_what_is_there(hub, client):
    code = '''
u = timm_aig.push_to_hub(make(), {!r}, dry_run=True, revision='v2')
result = [u.exists, u.private, u.new_revision, sorted(u.files), list(u.deleted), u.url]'''
    hub.log()
    files = ['README.md', 'config.json', 'model.safetensors']
    assert client.get(code.format('alice/dry')) == [False, None, True, files, [], None]
    assert {entry['method'] for entry in hub.log()} == {'GET'} and hub.repo('alice/dry') is None
    client.get(push('alice/there', private=True))
    assert client.get(code.format('alice/there')) == [True, True, True, files, [], None]
    assert set(hub.repo('alice/there')['refs']) == {'refs/heads/main'}


def test_a_private_repository_is_read_by_its_owner_only(hub, client, expected, tmp_path):
    client.get(push('alice/private', private=True))
    assert hub.repo('alice/private')['private']
    assert client.get(load('alice/private', tmp_path / 'a')) == expected[0]
    for token in ('hf_bob_write', ''):
        answer = client.run(load('alice/private', tmp_path / 'b'), token=token)
        assert answer['error'].startswith('RepositoryNotFoundError')
    answer = client.run(push('alice/private', 1), token='hf_bob_write')
    assert answer['error'].startswith('HfHubHTTPError: 403') or answer['error'].startswith('RepositoryNotFoundError')
    assert len(hub.repo('alice/private')['commits']) == 2


def test_private_never_publishes_to_a_public_repository(hub, client):
    client.get(push('alice/public'))
    assert 'ValueError: alice/public exists and is public' in client.run(push('alice/public', private=True))['error']
    assert len(hub.repo('alice/public')['commits']) == 2


@pytest.mark.parametrize('token,repo_id,message', [
    ('hf_wrong_token', 'alice/no1', 'Invalid user token'),
    ('', 'alice/no2', 'LocalTokenNotFoundError'),
    ('hf_alice_read', 'alice/no3', 'token may only read'),
    ('hf_bob_write', 'alice/no4', "You don't have the rights to create a model"),
    ('hf_alice_write', 'bob/no5', "You don't have the rights to create a model"),
])
def test_a_token_that_may_not_write_gives_a_clear_error_and_nothing_is_created(hub, client, token, repo_id, message):
    assert message in client.run(push(repo_id), token=token)['error']
    assert hub.repo(repo_id) is None


def test_an_organisation_s_member_pushes_to_it(hub, client):
    client.get(push('team/model'))
    assert 'model.safetensors' in hub.files('team/model')


@pytest.mark.parametrize('token', ['hf_a\n', 'hf a', 'hf_ä', ''])
def test_a_token_that_no_header_can_hold_is_refused_without_showing_it(client, token):
    answer = client.run(push('alice/no', token=f'hf_secret{token}' if token else ''))
    assert answer['error'].startswith('ValueError: token must be') and 'secret' not in answer['error'] + answer['log']


@pytest.mark.parametrize(
    'repo_id', ['alice', 'a/b/c', '../x', 'alice/..', 'alice/x y', 'alice/x\n', '', 'hf-hub:alice/x'])
def test_a_bad_name_is_refused_before_anything_is_asked(hub, client, repo_id):
    hub.log()
    assert client.run(push(repo_id))['error'].startswith(('ValueError: repo_id', 'HFValidationError'))
    assert hub.log() == []


@pytest.mark.parametrize('name,message', [
    ('alice/nothing', 'RepositoryNotFoundError'), ('alice/public@v9', 'RevisionNotFoundError'),
])
def test_a_missing_repository_or_revision_is_said(client, name, message, tmp_path):
    client.get(push('alice/public'))
    assert message in client.run(load(name, tmp_path))['error']


def test_a_repository_with_nothing_but_a_pickle_is_refused_and_nothing_is_executed(client, tmp_path):
    client.get(f'''
import pickle
class Evil:
    def __reduce__(self):
        return open, ({str(tmp_path / 'executed')!r}, 'w')
api = HfApi()
api.create_repo('alice/evil')
folder = timm_aig.save_pretrained(make(), {str(tmp_path / 'm')!r})
api.upload_file(path_or_fileobj=folder / 'config.json', path_in_repo='config.json', repo_id='alice/evil')
api.upload_file(path_or_fileobj=pickle.dumps(Evil()), path_in_repo='pytorch_model.bin', repo_id='alice/evil')''')
    assert 'EntryNotFoundError' in client.run(load('alice/evil', tmp_path / 'cache'))['error']
    assert not (tmp_path / 'executed').exists()


# What fails during a push: a request, and whether the push still succeeds.
FAULTS = {
    'create answers 500 twice': (dict(method='POST', path='/repos/create', status=500, times=2), False),
    'whoami answers 500 twice': (dict(method='GET', path='/whoami', status=500, times=2), False),
    'the card is refused': (dict(method='POST', path='/validate-yaml', status=400), False),
    'batch answers 500 twice': (dict(method='POST', path='/objects/batch', status=500, times=2), True),
    'upload answers 500 twice': (dict(method='PUT', path='^/lfs/put', status=500, times=2), True),
    'upload drops': (dict(method='PUT', path='^/lfs/put', drop=300_000), True),
    'upload is refused': (dict(method='PUT', path='^/lfs/put', status=403), False),
    'commit answers 500 twice': (dict(method='POST', path='/commit/', status=500, times=2), False),
    'commit drops': (dict(method='POST', path='/commit/', drop=0), False),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_server_that_fails_gives_an_error_or_a_whole_repository(hub, client, name, tmp_path):
    fault, succeeds = FAULTS[name]
    repo_id = 'alice/' + name.replace(' ', '-')
    seed = 10 + list(FAULTS).index(name)  # weights that the server does not have
    hub.log()
    hub.fault(**fault)
    error = client.run(push(repo_id, seed))['error']
    assert [e for e in hub.log() if e['method'] == fault['method'] and re.search(fault['path'], e['path'])]
    if repo := hub.repo(repo_id):
        assert set(hub.files(repo_id)) == ({'.gitattributes'} if error else WHOLE) and len(repo['refs']) == 1
    else:
        assert error
    assert (error is None) == succeeds, error
    if error:  # another try completes it
        kinds = ('HfHubHTTPError', 'RemoteProtocolError', 'RuntimeError: Error while uploading', 'ValueError: {"error"')
        assert error.startswith(kinds), error
        errors = [client.run(push(repo_id, seed))['error'] for _ in range(fault.get('times', 1))]
        assert errors[-1] is None
    assert client.get(load(repo_id, tmp_path)) == client.get(f'result = outputs(make({seed}))')


def test_a_failed_commit_leaves_no_new_revision_with_the_older_weights(hub, client, tmp_path):
    client.get(push('alice/halfway', 0))
    hub.fault(method='POST', path='halfway/commit/', status=500)
    assert '500' in client.run(push('alice/halfway', 1, revision='v2'))['error']
    assert set(hub.repo('alice/halfway')['refs']) == {'refs/heads/main'}
    assert 'RevisionNotFoundError' in client.run(load('alice/halfway@v2', tmp_path))['error']
    hub.fault(method='POST', path='halfway/commit/', status=500)
    hub.fault(method='DELETE', path='halfway/branch/', status=500)
    error = client.run(push('alice/halfway', 1, revision='v3'))['error']
    assert 'the new branch v3 of alice/halfway still holds what main holds: push again. ' in error


def test_a_second_try_does_not_upload_again_what_has_arrived(hub, client):
    client.get(push('alice/again', 5, results={'description': 'first'}))
    hub.log()
    hub.fault(method='POST', path='/commit/', status=500)
    assert client.run(push('alice/again', 6))['error']
    assert [e for e in hub.log() if e['path'].startswith('/lfs/put')]
    client.get(push('alice/again', 6))
    assert not [e for e in hub.log() if e['path'].startswith('/lfs/put')]


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, client):
    client.get(push('alice/both'))
    answer = client.run('''
import timm_aig.hub.save as module
commit = module._commit
def commit_late(*args):
    HfApi().upload_file(path_or_fileobj=b'# Theirs', path_in_repo='README.md', repo_id='alice/both')
    return commit(*args)
module._commit = commit_late
try:
    timm_aig.push_to_hub(make(1), 'alice/both')
finally:
    module._commit = commit''')
    assert 'A commit has happened since' in answer['error']
    assert hub.files('alice/both')['README.md'] == b'# Theirs'


def test_a_model_that_cannot_be_saved_asks_the_hub_for_nothing(hub, client):
    hub.log()
    answer = client.run('''
model = make()
model.fc.weight.data[0, 0] = float('nan')
timm_aig.push_to_hub(model, 'alice/nan')''')
    assert 'fc.weight has no values or values that are not finite' in answer['error'] and hub.log() == []


def test_a_dropped_download_is_resumed_and_one_that_never_ends_is_an_error(hub, client, expected, tmp_path):
    client.get(push('alice/download'))
    sha256 = hub.repo('alice/download')['commits'][hub.repo('alice/download')['refs']['refs/heads/main']]['tree'][
        'model.safetensors']['sha256']
    hub.fault(drop_after=300_000, sha256=sha256)
    assert client.get(load('alice/download', tmp_path / 'a')) == expected[0]
    hub.fault(drop_after=0, sha256=sha256, times=6)
    error = client.run(load('alice/download', tmp_path / 'b'))['error']
    assert error is not None
    while client.run(load('alice/download', tmp_path / 'b'))['error']:
        pass
    assert client.get(load('alice/download', tmp_path / 'b')) == expected[0]


def test_older_weights_from_the_cache_are_never_loaded_without_a_word(hub, client, expected, tmp_path):
    client.get(push('alice/cached', 0))
    assert client.get(load('alice/cached', tmp_path)) == expected[0]
    client.get(push('alice/cached', 1))
    hub.fault(method='HEAD', path='cached/resolve', status=500)  # only timm gets no answer
    assert 'or the Hub did not answer at first. Load it again' in client.run(load('alice/cached', tmp_path))['error']
    hub.fault(method='HEAD', path='cached/resolve', status=500, times=2)  # the plugin gets no answer either
    answer = client.run(load('alice/cached', tmp_path))
    assert answer['result'] == expected[0]
    assert 'WARNING:timm_aig.source:alice/cached cannot be asked for its newest version' in answer['log']
    assert client.get(load('alice/cached', tmp_path)) == expected[1]


def test_offline_a_warm_cache_loads_and_a_cold_one_is_a_clear_error(hub, client, expected, tmp_path):
    client.get(push('alice/offline'))
    client.get(load('alice/offline', tmp_path / 'warm'))
    hub.log()
    offline = Client(hub.url, tmp_path / 'home', HF_HUB_OFFLINE='1')
    assert offline.get(load('alice/offline', tmp_path / 'warm')) == expected[0]
    error = offline.run(load('alice/offline', tmp_path / 'cold'))['error']
    assert error.startswith('LocalEntryNotFoundError') and 'cannot find the requested files in the local cache' in error
    assert 'OfflineModeIsEnabled' in offline.run(push('alice/offline2'))['error']
    dry = "u = timm_aig.push_to_hub(make(), 'alice/offline2', dry_run=True)\nresult = [u.exists, sorted(u.files)]"
    assert offline.get(dry) == [None, ['README.md', 'config.json', 'model.safetensors']]
    assert hub.log() == []
    offline.close()


def test_a_server_that_is_down_is_a_clear_error(expected, tmp_path):
    down = Client('http://127.0.0.1:9', tmp_path / 'home', HF_HUB_DISABLE_XET='1')
    assert 'ConnectError' in down.run(push('alice/down'))['error']
    assert 'LocalEntryNotFoundError' in down.run(load('alice/down', tmp_path))['error']
    down.close()


def test_the_card_passes_huggingface_hubs_own_validation(hub, client):
    odd = {**RESULTS, 'description': 'odd: "values" - {#: [ <!-- `x` --> | & ü', 'dataset': 'torch/a: "b" | c'}
    client.get(push('alice/card', results=odd))
    card = hub.files('alice/card')['README.md'].decode()
    metrics = client.get(f'''
card = ModelCard({card!r})
card.validate()
result = [[r.dataset_type, r.dataset_split, r.metric_type, r.metric_value] for r in card.data.eval_results]''')
    dataset = odd['dataset']
    assert metrics == [
        [dataset, 'test', 'accuracy', 94.5], [dataset, 'test', 'accuracy', 99.8],
        [dataset, 'test', 'execution_rate', 0.55], [dataset, 'test', 'macs_share', 0.6], [dataset, 'test', 'paths', 63]]
    assert json.loads(hub.files('alice/card')['results.json']) == odd
