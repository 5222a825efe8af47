"""Weights that ship with the package: they load offline and reproduce their published figures."""
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from analyze import print_results
from PIL import Image
from safetensors.torch import save_file
from scipy.stats import entropy, spearmanr
from sklearn.metrics import mutual_info_score

import timm_aig

ROOT = Path(__file__).parent.parent.parent


def test_weights_beside_a_hub_config_are_loaded_and_listed(tmp_path, train_gates):
    package = tmp_path / 'timm_aig'
    shutil.copytree(ROOT / 'timm_aig', package, ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT / 'hub_configs', package / 'hub_configs', ignore=shutil.ignore_patterns('*.safetensors'))
    config = json.loads((ROOT / 'hub_configs' / 'resnet50_aig.t05_paper.json').read_text())
    config.update(architecture='cifar_resnet20_aig', tag='test')
    config['aig'] = {'target_rate': 0.3, 'version': 1}
    config['pretrained_cfg'].update(num_classes=4, input_size=[1, 28, 28], mean=[0.3], std=[0.4], pool_size=[7, 7])
    (package / 'hub_configs' / 'cifar_resnet20_aig.test.json').write_text(json.dumps(config))
    model = train_gates(timm.create_model('cifar_resnet20_aig', target_rate=0.3, num_classes=4, in_chans=1)).eval()
    save_file(model.state_dict(), package / 'hub_configs' / 'cifar_resnet20_aig.test.safetensors')
    x = torch.randn(8, 1, 28, 28)
    torch.save((x, *timm_aig.forward_gates(model, x)), tmp_path / 'expected.pt')

    program = '''
import timm, timm_aig, torch
x, logits, gates = torch.load('expected.pt')
model = timm.create_model('cifar_resnet20_aig.test', pretrained=True).eval()
with torch.no_grad():
    assert all(map(torch.equal, timm_aig.forward_gates(model, x), (logits, gates)))
assert next(iter(timm_aig.gated_blocks(model).values())).target_rate == 0.3
assert 'cifar_resnet20_aig.test' in timm.list_pretrained()
assert timm.create_model('cifar_resnet20_aig').conv1.in_channels == 3  # those of the weights only with their tag
'''
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={'PYTHONPATH': str(tmp_path), 'HF_HUB_OFFLINE': '1', 'PATH': '/usr/bin'})
    assert done.returncode == 0, done.stderr


SHIPPED = sorted(file.stem for file in (ROOT / 'hub_configs').glob('*.safetensors'))
FASHION = [name for name in SHIPPED if '.fmnist' in name]
ADAPTIVE = [name for name in SHIPPED if name in timm_aig.list_trained()]


@pytest.fixture(scope='session')
def fashion_mnist(kept):
    """Folder with Fashion-MNIST from Debian's package dataset-fashion-mnist or a download."""
    root = kept('fashion_mnist')
    if not (root / 'FashionMNIST' / 'raw' / 't10k-labels-idx1-ubyte').exists():
        subprocess.run([sys.executable, ROOT / 'scripts' / 'prepare_fashion_mnist.py', root], check=True)
    return root


@pytest.mark.parametrize('name', FASHION)
def test_shipped_weights_reproduce_their_published_figures(name, fashion_mnist, run_script, capsys):
    """Exactly on the machine that trained them. Rounding on another may change one or two images."""
    published = json.loads((ROOT / 'hub_configs' / f'{name}.json').read_text())
    assert run_script(
        'validate.py', '--model', name, '--pretrained', '--dataset', published['dataset'], '--data-dir', fashion_mnist,
        '--split', published['split'], '--workers', 0, '--json') == 0
    row = json.loads(capsys.readouterr().out)['rows'][0]
    assert row['images'] == published['images'] == 10000
    tolerances = dict(top1=0.03, top5=0.03, execution_rate=1e-4, macs_share=1e-4, paths=3)
    for key, tolerance in tolerances.items():
        assert row[key] == pytest.approx(published['metrics'][key], abs=tolerance), key


@pytest.fixture(scope='session')
def glyphs():
    """The first test image of every fifth class of prepare_glyphs.py, [400, 1, 20, 20], normalised, and labels."""
    with Image.open(Path(__file__).with_name('glyphs.png')) as sheet:
        pixels = torch.from_numpy(np.array(sheet)).reshape(20, 20, 20, 20).transpose(1, 2).reshape(400, 1, 20, 20)
    return (pixels / 255 - .5) / .3, torch.arange(0, 2000, 5)


@torch.inference_mode()
def test_the_networks_for_characters_and_their_cascades_answer_as_published(glyphs):
    """On 400 of the 10,000 images. Rounding on another machine may change one."""
    images, labels = glyphs
    models = {name: timm.create_model(name, pretrained=True).eval() for name in SHIPPED if name.endswith('.glyphs')}
    small, deep = models['cifar_resnet8.glyphs'], models['cifar_resnet32_aig.glyphs']
    right = {name: int((model(images).argmax(1) == labels).sum()) for name, model in models.items()}
    expected = {'cifar_resnet8.glyphs': 321, 'cifar_resnet20.glyphs': 348, 'cifar_resnet32.glyphs': 349,
                'cifar_resnet32_aig.glyphs': 347}
    assert right == pytest.approx(expected, abs=1)
    for second, threshold, count in ((models['cifar_resnet20.glyphs'], .9155, 348), ((deep, .5), .9141, 347)):
        cascade = timm_aig.Cascade([small, second], threshold)  # hub_configs/README.md
        assert int((cascade(images).argmax(1) == labels).sum()) == pytest.approx(count, abs=1)


@pytest.mark.parametrize('name', ADAPTIVE)
def test_shipped_weights_take_budgets(name):
    published = json.loads((ROOT / 'hub_configs' / f'{name}.json').read_text())['gate_budgets']
    model = timm.create_model(name, pretrained=True).eval()
    assert [point.to_dict() for point in timm_aig.budget_table(model)] == published
    assert {.5, .6, .7, .8, .9, 1.} <= {row['budget'] for row in published}
    assert all(abs(row['macs_share'] - row['budget']) <= .005 for row in published)
    assert timm_aig.budget_table(timm.create_model(name)) == ()  # not calibrated
    size = model.pretrained_cfg['input_size']
    cost, images = timm_aig.compute_cost(model, size), torch.rand(32, *size)
    shares = {}
    for budget in (.5, 1.):
        timm_aig.set_budget(model, budget)
        with torch.inference_mode():
            gates = timm_aig.forward_gates(model, images)[1]
        shares[budget] = cost.executed(gates) / (cost.total - cost.gates)
    assert shares[.5].mean() < .8 < shares[1.].mean()


ANALYSED = sorted(file.parent.name for file in (ROOT / 'hub_configs').glob('*/analysis.json'))


def read_table(name, table):
    with open(ROOT / 'hub_configs' / name / f'{table}.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('name', ANALYSED)
def test_the_figures_of_the_published_analysis_are_those_of_its_tables(name, capsys):
    """Each is computed anew, from paths.csv and likeness.csv. hub_configs/README.md shows what analysis.json says."""
    results = json.loads((ROOT / 'hub_configs' / name / 'analysis.json').read_text(encoding='utf-8'))
    published = json.loads((ROOT / 'hub_configs' / f'{name}.json').read_text())
    rates, table = read_table(name, 'rates'), read_table(name, 'paths')
    names, group_of = [row['class'] for row in rates], {row['class']: row['group'] for row in rates}
    n = [int(row['images']) for row in table]
    label = np.repeat([names.index(row['class']) for row in table], n)
    path = np.repeat([row['path'] for row in table], n)
    gates = np.array([list(map(int, p)) for p in path])
    run = gates.sum(1)

    assert len(gates) == results['images'] == published['images']
    assert results['top1'] == pytest.approx(published['metrics']['top1'])
    for key in ('execution_rate', 'macs_share'):
        assert results[key] == pytest.approx(published['metrics'][key], abs=1e-9), 'made with other weights'
    assert gates.mean() == pytest.approx(results['execution_rate'])
    assert [block['rate'] for block in results['blocks'].values()] == pytest.approx(gates.mean(0).tolist())
    of_class = np.array([gates[label == i].mean(0) for i in range(len(names))])
    written = [[float(row[block]) for block in results['blocks']] for row in rates]
    assert written == [pytest.approx(row, abs=1e-6) for row in of_class.tolist()]
    for i, row in enumerate(read_table(name, 'blocks_run')):
        counts = [int(row[str(k)]) for k in range(gates.shape[1] + 1)]
        assert counts == np.bincount(run[label == i], minlength=gates.shape[1] + 1).tolist()

    assert results['paths']['paths'] == len(set(path)) == published['metrics']['paths']
    assert results['paths']['entropy'] == pytest.approx(entropy(np.unique(path, return_counts=True)[1], base=2))
    assert results['paths']['class_entropy'] == pytest.approx(entropy(np.bincount(label), base=2))
    information = mutual_info_score(np.unique(path, return_inverse=True)[1], label) / np.log(2)
    assert results['paths']['mutual_information'] == pytest.approx(information)

    key, confused, group, counts, arbitrary, tells = results['claims']
    kinds = {kind: [i for i, block in enumerate(results['blocks'].values()) if kind in block['kinds']]
             for kind in ('first', 'downsampling', 'last')}
    for kind, blocks in kinds.items():
        assert key['figures'][f'rate_{kind}'] == pytest.approx(gates[:, blocks].mean())
    special = sorted({i for blocks in kinds.values() for i in blocks})
    others = sorted(set(range(gates.shape[1])) - set(special))
    assert key['figures']['value'] == pytest.approx(gates[:, special].mean() - gates[:, others].mean())
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    distance = [round(abs(of_class[i] - of_class[j]).mean(), 6) for i, j in pairs]
    likeness = [[float(row[other]) for other in names] for row in read_table(name, 'likeness')]
    assert [sum(row) for row in likeness] == pytest.approx([1] * len(names), abs=2e-3)
    alike = [likeness[i][j] + likeness[j][i] for i, j in pairs]
    same = [group_of[names[i]] == group_of[names[j]] for i, j in pairs]
    assert confused['figures']['value'] == pytest.approx(-spearmanr(alike, distance).statistic, abs=2e-3)
    assert group['figures']['value'] == pytest.approx(-spearmanr(same, distance).statistic, abs=1e-4)
    assert group['figures']['difference_like'] == pytest.approx(np.mean(np.array(distance)[same]), abs=1e-5)
    between = 0.
    for members in set(group_of.values()):
        part = run[[group_of[names[i]] == members for i in label]]
        assert counts['figures'][f'blocks_{members}'] == pytest.approx(part.mean())
        between += len(part) * (part.mean() - run.mean()) ** 2
    share = between / ((run - run.mean()) ** 2).sum()
    assert counts['figures']['value'] == arbitrary['figures']['value'] == pytest.approx(share)
    assert tells['figures']['value'] == pytest.approx(information)
    for claim in results['claims']:
        assert (claim['verdict'] == 'holds') == (claim['p_value'] < .05)
        for figure in ('value', 'chance'):
            assert np.isfinite(claim['figures'][figure])

    readme = (ROOT / 'hub_configs' / 'README.md').read_text(encoding='utf-8')
    print_results(results)
    assert f'```\n{capsys.readouterr().out}```' in readme, 'hub_configs/README.md: put in what analyze.py printed'


@pytest.mark.parametrize('name', ANALYSED)
def test_the_published_pictures_are_small_and_in_the_readme(name):
    pictures = sorted((ROOT / 'hub_configs' / name).glob('*.png'))
    assert {'execution_rates.png', 'blocks_run.png'} <= {picture.name for picture in pictures}
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.width <= 1600 and picture.stat().st_size < 200_000, picture
    readme = (ROOT / 'hub_configs' / 'README.md').read_text(encoding='utf-8')
    shown = [p for p in pictures if f']({name}/{p.name})' in readme]
    assert len(shown) >= 2


def test_shipped_weights_are_small_and_analysed():
    assert ANALYSED and set(ANALYSED) <= set(ADAPTIVE)
    assert sum((ROOT / 'hub_configs' / f'{name}.safetensors').stat().st_size for name in SHIPPED) < 8e6
