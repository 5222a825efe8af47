"""Model cards: what is generated, and what of the user's own card is kept."""
import pytest
import timm
import yaml
from huggingface_hub import ModelCard

from timm_aig import BudgetPoint, InputError
from timm_aig.hub.card import BEGIN, END, PROJECT_URL, checked_results, make_card

RESULTS = dict(
    parent='resnet18.a1_in1k', dataset='hfds/user/birds', split='test', images=500, seed=3, command='a.py --b',
    metrics=dict(top1=91.25, execution_rate=0.5, parent_top1=92.), environment=dict(cpu='EPYC'), recipe=dict(lr=0.1),
    parent_metrics=dict(top1=92.5, macs_share=1.),
    reported=dict(top1_error=23.0, source='the paper'), description='Birds.', card='## Mine\n\nText.')


@pytest.fixture(scope='module')
def model():
    return timm.create_model('cifar_resnet20_aig')


CONFIG = dict(
    architecture='resnet18_aig', num_classes=10, model_args={},
    pretrained_cfg=dict(license='cc-by-4.0', input_size=[3, 32, 32], origin_url='https://example.org/x'))


def card(model, results=RESULTS, existing=None, **kwargs):
    return make_card(model, 'user/name', CONFIG, results, ['execution_rates.png'], existing, **kwargs)


def test_the_front_matter_has_licence_parent_tags_and_results(model):
    data = yaml.safe_load(card(model).split('---')[1])
    assert data['license'] == 'cc-by-4.0' and data['base_model'] == 'timm/resnet18.a1_in1k'
    assert data['library_name'] == 'timm' and data['pipeline_tag'] == 'image-classification'
    assert {'timm', 'timm_aig', 'transformers', 'convnet-aig'} <= set(data['tags'])
    assert data['datasets'] == ['user/birds']
    (entry,) = data['model-index']
    (result,) = entry['results']
    assert entry['name'] == 'name' and result['dataset'] == dict(
        name='hfds/user/birds', type='hfds/user/birds', split='test')
    assert [(m['type'], m['value']) for m in result['metrics']] == [
        ('accuracy', 91.25), ('execution_rate', 0.5), ('parent_top1', 92.)]


def test_the_body_shows_results_and_their_source_usage_and_pictures(model):
    text = ModelCard(card(model)).text
    assert '| Top-1 accuracy (%) | 91.25 (static parent: 92.5) |' in text
    assert 'Measured on 500 images' in text and 'seed 3' in text
    assert 'with `a.py --b`' in text and 'EPYC' in text and '| top1_error | 23.0 |' in text
    assert '![execution rates](execution_rates.png)' in text and '## Mine\n\nText.' in text
    assert text.index('Birds.') < text.index('| Architecture |') < text.index('## Results') < text.index('## Mine')
    assert PROJECT_URL in text and f'pip install git+{PROJECT_URL}' in text
    assert "create_model('hf-hub:user/name', pretrained=True)" in text
    assert "pipeline('image-classification', model='user/name')" in text
    assert "'hf-hub:user/name@v2'" in card(model, revision='v2') and "revision='v2'" in card(model, revision='v2')


def test_the_usage_code_reads_images_with_the_channels_of_the_model(model):
    grey = {**CONFIG, 'pretrained_cfg': {**CONFIG['pretrained_cfg'], 'input_size': [1, 28, 28]}}
    text = make_card(timm.create_model('cifar_resnet20_aig', in_chans=1), 'user/name', grey, {})
    assert "Image.open('image.jpg').convert('L')" in text and 'pipeline(' not in text  # a pipeline makes RGB images
    assert "Image.open('image.jpg').convert('RGB')" in card(model)


def test_the_table_of_budgets_says_what_it_was_measured_on(model):
    assert '## Budgets' not in card(model)
    points = [BudgetPoint(.4, -1.5, .4012, 500, 81.25), BudgetPoint(1., 9., 1.0002, 500)]
    calibrated = timm.create_model('cifar_resnet20_aig', gate_budgets=[point.to_dict() for point in points])
    text = card(calibrated)
    assert '| 0.4 | 0.4012 | 81.25 % | -1.5 |' in text and '| 1 | 1.0002 |  | 9 |' in text
    assert 'from 0.4 to 1' in text and 'on 500 calibration images' in text and 'timm_aig.set_budget(model, 0.4)' in text


def test_a_card_claims_nothing_unknown(model):
    config = {**CONFIG, 'pretrained_cfg': dict(input_size=[3, 32, 32])}
    for results in (
            {}, dict(parent='resnet18'), dict(parent='cifar_resnet20.untrained'), dict(parent='no.such'),
            dict(parent='resnet18.a1_in1k', recipe=dict(pretrained=False)), dict(parent='local-dir:/home/me/secret'),
    ):
        text = make_card(model, 'user/name', config, results)
        data = yaml.safe_load(text.split('---')[1])
        assert not {'license', 'base_model', 'datasets', 'model-index'} & set(data)
        assert '## Results' not in text and '.png' not in text and 'secret' not in text


def test_a_parent_from_the_hub_is_linked_and_a_static_model_claims_no_gates(model):
    data = yaml.safe_load(card(model, dict(parent='hf-hub:user/parent@v1')).split('---')[1])
    assert data['base_model'] == 'user/parent'
    for name, plugin in (('cifar_resnet20', True), ('resnet18', False)):  # timm has the second one
        text = make_card(timm.create_model(name), 'user/name', {**CONFIG, 'architecture': name}, {})
        text = text.replace(BEGIN, '').replace(END, '')
        assert 'A static network.' in text and ('import timm_aig' in text) == ('timm_aig' in text) == plugin
        for of_gates in ('forward_gates', 'An adaptive network', '@inproceedings', 'adaptive-inference', ' gate'):
            assert of_gates not in text


def test_an_update_keeps_the_users_text_and_front_matter_byte_for_byte(model):
    first = card(model)
    above, below = 'Words above.\r\n', '\n\n# Below\n  *mine*   \n'
    edited = first.replace(BEGIN, above + BEGIN).replace(END, END + below)
    edited = edited.replace('---\n', '---\nthumbnail: https://x/y.png\nlanguage: [en]\n', 1)
    second = card(model, {**RESULTS, 'metrics': dict(top1=95.)}, edited)
    assert above in second and second.endswith(below + '\n') and second.count(BEGIN) == second.count(END) == 1
    data = ModelCard(second).data
    assert data.thumbnail == 'https://x/y.png' and data.language == ['en']
    assert [r.metric_value for r in data.eval_results if r.metric_name == 'Top-1 accuracy (%)'] == [95.]
    assert card(model, {**RESULTS, 'metrics': dict(top1=95.)}, second) == second


def test_a_card_without_a_generated_part_gets_one_above_its_text(model):
    text = card(model, existing='# Only mine\n\nNo front matter.')
    assert text.index(BEGIN) < text.index(END) < text.index('# Only mine') and text.endswith('No front matter.')
    data = ModelCard(card(model, existing='---\ntags: mine\nlicense: mit\n---\n# Mine')).data
    assert data.tags[0] == 'mine' and 'timm_aig' in data.tags and data.license == 'cc-by-4.0'


def test_the_users_own_results_stay(model):
    own = '''---
model-index:
- name: x
  results:
  - task: {type: image-classification}
    dataset: {type: mine, name: Mine}
    metrics: [{type: accuracy, value: 12}]
---
'''
    values = [r.metric_value for r in ModelCard(card(model, existing=own)).data.eval_results]
    assert values == [12, 91.25, 0.5, 92.]


@pytest.mark.parametrize('existing', ['---\na: [\n---\n', '---\n- a\n---\n', '---\nmodel-index: 3\n---\n'])
def test_unreadable_front_matter_is_an_error_and_not_overwritten(model, existing):
    with pytest.raises(InputError, match=r'README\.md of user/name has front matter that cannot be read'):
        card(model, existing=existing)


@pytest.mark.parametrize('value', ['a: b', '- x', '"quoted"', "it's", '{a}', '#', '---', '%', 'yes', '1e3', 'ü\u2028'])
def test_any_name_of_a_data_set_survives_yaml_and_an_update(model, value):
    results = dict(dataset=value, split=value, metrics=dict(top1=1))
    text = card(model, results)
    assert [r.dataset_name for r in ModelCard(text).data.eval_results] == [value]
    assert card(model, results, text) == text


def test_a_bar_stays_inside_its_cell(model):
    assert '| a\\|b | c\\|d |' in card(model, dict(recipe={'a|b': 'c|d'}))


def test_gates_that_all_stay_open_run_slightly_more_than_the_static_parent():
    results = dict(metrics=dict(macs_share=1.0001), dataset='a', split='b')
    assert checked_results(results) == results


@pytest.mark.parametrize('results,message', [
    (dict(metrics=dict(top1='94')), 'metrics.top1 must be a finite number'),
    (dict(metrics=dict(mine=float('nan'))), 'metrics.mine must be'),
    (dict(parent_metrics=dict(top1='x')), 'parent_metrics.top1 must be'),
    (dict(metrics=dict(top1=94)), 'metrics need the dataset and the split'),
    (dict(architecture='resnet34_aig'), "results are for 'resnet34_aig', the model is 'resnet18_aig'"),
])
def test_wrong_results_are_named(results, message):
    with pytest.raises(InputError, match=message):
        checked_results(results, 'resnet18_aig')
