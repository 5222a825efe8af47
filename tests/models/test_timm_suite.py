"""timm's tests of its models, unmodified, run on the adaptive models.

They come from the sdist of the installed timm, which is downloaded once into pytest's cache. One process runs them for
all archs that are selected.
"""
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm

# Tests that timm runs for each model, except those that load weights from the Hub. Transformers have no pyramid of
# features, another test of their default_cfgs, and too many layers to prune each.
TESTS = {
    'test_model_forward', 'test_model_backward', 'test_model_forward_torchscript', 'test_model_forward_fx',
    'test_model_backward_fx', 'test_model_forward_fx_torchscript', 'test_model_forward_intermediates',
    'test_model_forward_intermediates_features',
}
CONVNETS = {'test_model_default_cfgs', 'test_model_forward_features', 'test_prune_intermediate_layers_contract'}
TRANSFORMERS = {'test_model_default_cfgs_non_std'}
NEED_WEIGHTS = ('test_model_load_pretrained', 'test_model_features_pretrained', 'test_model_inference')

# Runs pytest in a timm that lists the archs given and no others: pytest would collect 22,000 tests. It lists them for
# each of its modules, since the adaptive models are in modules of ours.
PROGRAM = '''
import sys
import pytest, timm, timm_aig
archs, list_models = sys.argv[1].split(','), timm.list_models

def list_archs(*args, module='', **kwargs):
    return [name for name in list_models(*args, **kwargs) if name.partition('.')[0] in archs]

timm.list_models = list_archs
sys.exit(pytest.main(sys.argv[2:]))
'''


@pytest.fixture(scope='session')
def timm_tests(kept) -> Path:
    """Folder with the tests of the installed timm. It has no source of timm, so the installed timm is imported."""
    name = f'timm-{timm.__version__}'
    cache = kept(name)
    folder = cache / name / 'tests'
    if not folder.exists():
        sdist = cache / f'{name}.tar.gz'
        if not sdist.exists():
            subprocess.run(
                [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
                 '--dest', str(cache), f'timm=={timm.__version__}'],
                check=True,
            )
        with tarfile.open(sdist) as tar:
            members = [m for m in tar.getmembers() if m.name.startswith(f'{name}/tests/')]
            tar.extractall(cache, members=members, filter='data')
    (folder / 'pytest.ini').write_text('[pytest]\n')  # or pytest would use this project's settings
    return folder


@pytest.fixture(scope='session')
def results(request, timm_tests, tmp_path_factory):
    """Test cases of timm's suite by adaptive arch, for all archs selected in this session."""
    params = [getattr(item, 'callspec', None) and item.callspec.params for item in request.session.items]
    archs = [f'{p["suite_parent"]}_aig' for p in params if p and 'suite_parent' in p]
    env = dict(os.environ, HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', TIMEOUT='1800')
    env.pop('GITHUB_ACTIONS', None)  # timm skips its largest models there
    report = tmp_path_factory.mktemp('timm') / 'results.xml'
    selected = f'_aig and not ({" or ".join(NEED_WEIGHTS)}) and not (contract and (vit or deit))'
    subprocess.run(
        [sys.executable, '-c', PROGRAM, ','.join(archs), 'test_models.py', '-q', '-p', 'no:cacheprovider', '-W',
         'ignore', f'--junitxml={report}', '-k', selected],
        cwd=timm_tests, env=env, check=False, timeout=1800 * len(archs),
    )
    cases = ElementTree.parse(report).findall('.//testcase')
    # ids are [batch-arch.tag] or [arch]
    return {arch: [c for c in cases if re.search(rf'[\[-]{arch}[\].]', c.get('name'))] for arch in archs}


@pytest.mark.timeout(0)  # the first test waits for the fixture, which has a limit of its own
def test_timms_tests_pass(suite_parent, results):
    arch = f'{suite_parent}_aig'
    assert [case.get('name') for case in results[arch] if len(case)] == []  # failures, errors and skips have a child
    names = [case.get('name').partition('[')[0] for case in results[arch]]
    tags = timm.list_models(f'{arch}.*', include_tags=True)
    assert len(tags) >= 1
    # one test of each kind, but that of default_cfgs for each tag
    expected = TESTS | (TRANSFORMERS if suite_parent.startswith(('vit', 'deit')) else CONVNETS)
    assert {name: names.count(name) for name in expected} == {
        name: len(tags) if 'default_cfgs' in name else 1 for name in expected}
