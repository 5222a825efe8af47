"""timm's own tests of its models, unmodified, run on the adaptive ones.

They come from the sdist of the installed timm, downloaded once into pytest's cache.
"""
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm

# What timm tests of a model, beside the tests that load weights from the Hub.
TESTS = {
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
    'test_model_forward_features', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}
NEED_WEIGHTS = ('test_model_load_pretrained', 'test_model_features_pretrained', 'test_model_inference')


@pytest.fixture(scope='session')
def timm_tests(request) -> Path:
    """Folder of the tests of the installed timm, without timm's source, which would be imported instead."""
    name = f'timm-{timm.__version__}'
    cache = request.config.cache.mkdir(name)
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
    (folder / 'pytest.ini').write_text('[pytest]\n')  # or it would take this project's settings
    return folder


@pytest.mark.timeout(3600)
def test_timms_tests_pass(parent, timm_tests, tmp_path):
    arch = f'{parent}_aig'
    env = dict(os.environ, TORCH_BACKEND='timm_aig', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', TIMEOUT='1800')
    env.pop('GITHUB_ACTIONS', None)  # timm leaves out the largest there
    subprocess.run(
        [sys.executable, '-m', 'pytest', 'test_models.py', '-q', '-p', 'no:cacheprovider', '-W', 'ignore',
         f'--junitxml={tmp_path}/results.xml',
         '-k', f'(-{arch}] or -{arch}.) and not ({" or ".join(NEED_WEIGHTS)})'],  # ids are [batch-arch.tag]
        cwd=timm_tests, env=env, check=False,
    )
    cases = ElementTree.parse(tmp_path / 'results.xml').findall('.//testcase')
    assert [case.get('name') for case in cases if len(case)] == []  # failures, errors and skips have a child
    names = [case.get('name', '').partition('[')[0] for case in cases]
    assert set(names) >= TESTS
    # one test each, but of the configs one for each tag
    tags = timm.list_models(f'{arch}.*', include_tags=True)
    assert len(tags) >= 1
    assert {name: names.count(name) for name in TESTS} == {
        name: len(tags) if name == 'test_model_default_cfgs' else 1 for name in TESTS}
