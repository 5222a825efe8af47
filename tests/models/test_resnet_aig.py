"""The registered adaptive models: names, weights, timm's interface."""
import copy
import logging
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters

from timm_aig import (
    AIGConfig,
    GatedBasicBlock,
    GatedBottleneck,
    budget_table,
    forward_gates,
    gate_,
    gated_blocks,
    list_trained,
)
from timm_aig.models import entry_points, resnet_aig

PARENTS = timm.list_models(module=('resnet', 'cifar_resnet'))
PORTED = ['resnet18_aig', 'resnet50d_aig', 'ecaresnet50d_pruned_aig', 'cifar_resnet20_aig']  # timm's tests, by name


def save_weights(model, path, **extra):
    save_file({**{k: v.contiguous() for k, v in model.state_dict().items()}, **extra}, path)
    return dict(file=str(path))


def test_every_resnet_of_timm_and_every_cifar_resnet_has_an_adaptive_counterpart():
    assert len(timm.list_models(module='resnet')) == 81
    assert len(timm.list_models(module='cifar_resnet')) == 7
    assert sorted(timm.list_models('*_aig', module='resnet_aig')) == sorted(f'{parent}_aig' for parent in PARENTS)


def test_each_pretrained_tag_of_a_parent_is_a_tag_of_its_counterpart_with_the_same_repository():
    parents = set(timm.list_models(module='resnet'))
    tags = [name for name in timm.list_pretrained() if name.partition('.')[0] in parents]
    assert len(tags) == 150
    expected = {f"{arch}_aig.{tag}": f'{arch}.{tag}' for arch, _, tag in (name.partition('.') for name in tags)}
    adaptive = {f'{parent}_aig' for parent in (*parents, *timm.list_models(module='cifar_resnet'))}
    found = [name for name in timm.list_pretrained('*_aig*') if name.partition('.')[0] in adaptive]
    shipped = [name for name in found if timm.get_pretrained_cfg(name).file]
    assert sorted(found) == sorted([*expected, *shipped])
    assert not set(shipped) & set(expected)
    for name, parent in expected.items():
        cfg, parent_cfg = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(parent)
        assert cfg.hf_hub_id == parent_cfg.hf_hub_id == f'timm/{parent}'
        assert cfg.architecture == name.partition('.')[0]
        assert cfg.to_dict() == {**parent_cfg.to_dict(), 'architecture': cfg.architecture}
    assert timm.get_pretrained_cfg('resnet50_aig').tag == timm.get_pretrained_cfg('resnet50').tag


def test_the_registered_default_tag_is_the_parents_even_if_hub_configs_have_weights(monkeypatch):
    for name in ('resnet50_aig.t05_paper', 'cifar_resnet32_aig.fmnist_t06'):
        config = entry_points._HUB_CONFIGS[name]
        monkeypatch.setitem(entry_points._HUB_CONFIGS, name, {
            **config, 'pretrained_cfg': {**config['pretrained_cfg'], 'hf_hub_id': 'user/x'}})
    cfgs = entry_points.default_cfgs_of(['resnet50', 'cifar_resnet32'])
    assert cfgs['resnet50_aig'].default_with_tag[0] == timm.get_pretrained_cfg('resnet50').tag
    assert cfgs['cifar_resnet32_aig'].default_with_tag[0] == 'untrained'


@pytest.mark.parametrize('arch', ['cifar_resnet32_aig', 'cifar_resnet110_aig'])
def test_a_family_whose_parent_has_no_weights_loads_its_trained_default(arch, tmp_path):
    model, named = (timm.create_model(name, pretrained=True).eval() for name in (arch, f'{arch}.fmnist_t06'))
    assert model.pretrained_cfg == named.pretrained_cfg
    assert timm.models.get_model_args(model) == timm.models.get_model_args(named)
    assert budget_table(model) == budget_table(named) != ()
    assert {b.target_rate for b in gated_blocks(model).values()} == {0.6}
    state = named.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    backbone = timm.create_model(arch, pretrained=True, features_only=True)
    assert torch.equal(backbone.layer3[1].gate.fc1.weight, model.layer3[1].gate.fc1.weight)


def test_only_pretrained_models_take_the_trained_default():
    model = timm.create_model('cifar_resnet32_aig')
    assert model.conv1.in_channels == 3 and model.pretrained_cfg['tag'] == 'untrained'
    assert budget_table(model) == ()
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):  # no trained model of this depth
        timm.create_model('cifar_resnet44_aig', pretrained=True)


def test_given_weights_win_over_the_trained_default(tmp_path):
    source = timm.create_model('cifar_resnet32_aig')
    overlay = save_weights(source, tmp_path / 'model.safetensors')
    model = timm.create_model('cifar_resnet32_aig', pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert budget_table(model) == ()


def test_list_trained_names_the_models_with_trained_gates():
    names = list_trained()
    assert {'cifar_resnet32_aig.fmnist_t04', 'cifar_resnet110_aig.fmnist_t06'} <= {*names}
    pretrained = timm.list_models('*_aig', pretrained=True)
    assert set(names) < set(pretrained) and len(names) == len(set(names))
    for name in names:
        weights = timm.models.load_state_dict(timm.get_pretrained_cfg(name).file)
        assert any('.gate.' in key for key in weights), name
    others = [timm.get_pretrained_cfg(name) for name in {*pretrained} - {*names}]
    assert all(cfg.hf_hub_id or cfg.url for cfg in others)


def test_registering_the_adaptive_models_leaves_the_parents_alone():
    model = timm.create_model('resnet50')
    assert not gated_blocks(model) and model.pretrained_cfg['architecture'] == 'resnet50'


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50d'])
def test_a_parents_weights_give_its_logits_and_the_log_says_that_the_gates_are_untrained(
        arch, tmp_path, caplog, train_norms):
    static = train_norms(timm.create_model(arch)).eval()
    overlay = save_weights(static, tmp_path / 'model.safetensors')
    with caplog.at_level(logging.INFO):
        model = timm.create_model(f'{arch}_aig', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    count = len(gated_blocks(model))
    assert f'The {count} gates are untrained and open for every image' in caplog.text
    assert 'timm_aig.list_trained()' in caplog.text
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), static(x))
    assert torch.equal(model(x), static(x))


def test_a_parents_weights_fit_other_heads_inputs_and_backbones(tmp_path, train_norms):
    static = train_norms(timm.create_model('resnet18')).eval()
    overlay = save_weights(static, tmp_path / 'model.safetensors')
    kwargs = dict(pretrained=True, pretrained_cfg_overlay=overlay)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        headed = timm.create_model('resnet18_aig', num_classes=7, **kwargs).eval()
        assert headed(x).shape == (2, 7)
        assert torch.equal(headed.forward_features(x), static.forward_features(x))
        gray = timm.create_model('resnet18_aig', in_chans=1, **kwargs).eval()
        assert torch.equal(gray(x[:, :1]), timm.create_model('resnet18', in_chans=1, **kwargs).eval()(x[:, :1]))
        backbone = timm.create_model('resnet18_aig', features_only=True, **kwargs).eval()
        assert torch.equal(backbone(x)[-1], static.forward_features(x))
        always_on = timm.create_model('resnet18_aig', target_rate=1, **kwargs).eval()
        assert torch.equal(always_on(x), static(x))


def test_an_adaptive_checkpoint_loads_with_its_gates_and_without_the_message(tmp_path, caplog, train_gates):
    source = train_gates(timm.create_model('resnet18_aig', schedule='paper')).eval()
    overlay = save_weights(source, tmp_path / 'model.safetensors')
    model = timm.create_model('resnet18_aig', pretrained=True, pretrained_cfg_overlay=overlay, schedule='paper').eval()
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(forward_gates(model, x)[1], forward_gates(source, x)[1])
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    assert 'untrained' not in caplog.text


@pytest.mark.parametrize('kwargs,message', [
    ({}, r'it has gates on 2 blocks \(layer2.1, layer3.1\), the model on 8 blocks .* Pass the target_rate, schedule'),
    (dict(target_rate=1), 'it has gates on 2 blocks .* the model on no block'),
    (dict(schedule='paper', gate_channels=8), r'bias is \[16\] .* and \[8\] in the model. Pass the gate_channels'),
    (dict(schedule='paper', gate_norm='none'), r'bn.bias is \[16\] .* and missing in the model.'),
])
def test_a_checkpoint_whose_gates_do_not_fit_is_explained(kwargs, message, tmp_path):
    source = timm.create_model('resnet18_aig', schedule='paper')
    overlay = save_weights(source, tmp_path / 'model.safetensors')
    with pytest.raises(RuntimeError, match=f'The checkpoint does not fit: .*{message}'):
        timm.create_model('resnet18_aig', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def test_a_checkpoint_with_a_part_of_a_gate_missing_is_explained(tmp_path):
    source = timm.create_model('resnet18_aig')
    state = {k: v for k, v in source.state_dict().items() if k != 'layer3.1.gate.fc2.bias'}
    save_file(state, tmp_path / 'model.safetensors')
    with pytest.raises(RuntimeError, match=r'layer3.1.gate.fc2.bias is missing in the checkpoint and \[2\] in'):
        timm.create_model('resnet18_aig', pretrained=True,
                          pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')))


@pytest.mark.parametrize('tag', ['t04_paper', 't05_paper', 't06_paper', 't07_paper'])
def test_a_paper_tag_of_resnet50_builds_the_papers_schedule(tag):
    t = int(tag[1:3]) / 10
    model = timm.create_model(f'resnet50_aig.{tag}', device='meta')
    rates = [1, 1, 0.8, 1, t, t, t, 1, t, t, t, t, t, 1, 0.7, 1]
    assert [b.target_rate for b in gated_blocks(model).values()] == [r for r in rates if r < 1]
    assert model.pretrained_cfg['tag'] == tag
    assert timm.data.resolve_data_config({}, model=model)['input_size'] == (3, 224, 224)


@pytest.mark.parametrize('tag,t', [('t03_paper', 0.3), ('t05_paper', 0.5)])
def test_a_paper_tag_of_resnet101_builds_the_papers_schedule(tag, t):
    model = timm.create_model(f'resnet101_aig.{tag}', device='meta')
    assert [b.target_rate for b in gated_blocks(model).values()] == [t] * 25
    assert next(iter(gated_blocks(model))) == 'layer3.1'


def test_a_keyword_wins_over_the_tags_config():
    model = timm.create_model('resnet50_aig.t06_paper', target_rate=0.4, device='meta')
    assert [b.target_rate for b in gated_blocks(model).values()] == [0.8] + [0.4] * 8 + [0.7]


def test_a_paper_tag_has_no_weights_to_load():
    with pytest.raises(RuntimeError, match='pretrained weights'):
        timm.create_model('resnet50_aig.t06_paper', pretrained=True)
    assert not [name for name in timm.list_pretrained() if name.endswith('_paper')]


@pytest.mark.parametrize('kwargs', [dict(gate=1), dict(version=1), dict(rate=0.5)])
def test_an_unknown_keyword_is_a_type_error(kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        timm.create_model('resnet18_aig', **kwargs)


@pytest.mark.parametrize('kwargs,message', [
    (dict(target_rate=0), 'target_rate must be a number'), (dict(schedule='x'), 'schedule must be'),
    (dict(target_rates=[0.5] * 7), 'target_rates has 7 rates, the network has 8 blocks'),
    (dict(gate_norm='gn'), 'gate_norm must be None or one of'),
])
def test_a_bad_keyword_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('resnet18_aig', **kwargs)


def test_the_config_comes_as_keywords():
    model = timm.create_model('seresnet50_aig', target_rate=0.5, gate_channels=8, gate_norm='none', device='meta')
    blocks = gated_blocks(model)
    assert len(blocks) == 16
    assert {(b.target_rate, b.gate.fc1.out_features, type(b.gate.bn).__name__) for b in blocks.values()} == {
        (0.5, 8, 'Identity')}


@pytest.mark.parametrize('kwargs', [
    dict(drop_path_rate=0.2), dict(drop_rate=0.2), dict(output_stride=8), dict(output_stride=16), dict(in_chans=5),
    dict(num_classes=3), dict(num_classes=0), dict(global_pool='catavgmax'), dict(act_layer='silu'),
    dict(block_args=dict(attn_layer='se')), dict(drop_block_rate=0.1),
])
def test_it_takes_the_arguments_of_its_parent(kwargs, train_norms):
    model = train_norms(timm.create_model('resnet26_aig', **kwargs))
    x = torch.randn(2, kwargs.get('in_chans', 3), 64, 64)
    model(x).sum().backward()
    static = timm.create_model('resnet26', **kwargs)
    static.load_state_dict(model.state_dict(), strict=False)
    for a, b in ((model.eval()(x), static.eval()(x)), (model.forward_features(x), static.forward_features(x))):
        assert torch.equal(a, b)
    assert {type(b) for b in gated_blocks(model).values()} == {GatedBottleneck}


@pytest.mark.parametrize('kwargs', [{}, dict(feature_cls='getter'), dict(out_indices=(1, 3)), dict(output_stride=8)])
def test_features_only_gives_its_parents_features(kwargs, train_norms):
    static = train_norms(timm.create_model('resnet18', features_only=True, **kwargs)).eval()
    model = timm.create_model('resnet18_aig', features_only=True, **kwargs).eval()
    missing, unexpected = model.load_state_dict(static.state_dict(), strict=False)
    assert not unexpected and all('.gate.' in key for key in missing)
    assert model.feature_info.channels() == static.feature_info.channels()
    assert model.feature_info.reduction() == static.feature_info.reduction()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), static(x)))


def test_the_parameters_of_a_gate_are_grouped_with_its_block():
    model = timm.create_model('resnet50_aig', device='meta')
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        for name in gated_blocks(model):
            own = {groups[n] for n, _ in model.named_parameters() if n.startswith(f'{name}.')}
            assert own == {groups[f'{name}.conv1.weight']}
        assert len(set(groups.values())) > 5 - coarse


@pytest.mark.parametrize('arch', ['resnet18_aig', 'cifar_resnet20_aig'])
def test_a_training_step_compiles_into_one_graph(arch):
    torch.compiler.reset()
    model = timm.create_model(arch)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        compiled(torch.randn(4, 3, 32, 32)).pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert not torch.equal(model.fc.weight, before['fc.weight'])


def test_compiled_in_eval_it_gives_the_same_logits(train_norms, train_gates):
    torch.compiler.reset()
    model = train_gates(train_norms(timm.create_model('cifar_resnet20_aig'))).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend='aot_eager')(x), model(x))


@pytest.mark.parametrize('arch', ['resnet18_aig', 'cifar_resnet20_aig'])
def test_it_can_be_copied_and_pickled(arch, train_gates):
    model = train_gates(timm.create_model(arch)).eval()
    x = torch.randn(4, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other.pretrained_cfg == model.pretrained_cfg
        assert timm.models.get_model_args(other) == timm.models.get_model_args(model)


def test_the_written_out_entry_points_and_the_generated_ones_behave_alike():
    config = AIGConfig(0.5, schedule='paper')
    for arch, kind in (('resnet18', GatedBasicBlock), ('resnet50', GatedBottleneck)):
        direct = gate_(timm.create_model(arch, device='meta'), config)
        model = timm.create_model(f'{arch}_aig', target_rate=0.5, schedule='paper', device='meta')
        assert list(model.state_dict()) == list(direct.state_dict())
        assert {type(b) for b in gated_blocks(model).values()} == {kind}
        entry = getattr(resnet_aig, f'{arch}_aig')
        assert entry.__name__ == f'{arch}_aig' and entry.__doc__


# Ported from timm's tests, which collect these for other names only.


@pytest.mark.parametrize('model_name', PORTED)
def test_model_forward_intermediates(model_name):
    model = timm.create_model(model_name).eval()
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    x = torch.randn(1, 3, 64, 64)
    output, intermediates = model.forward_intermediates(x)
    assert [f.shape[1] for f in intermediates] == info.channels()
    assert [f.shape[-1] for f in intermediates] == [64 // r for r in info.reduction()]
    torch.testing.assert_close(output, model.forward_features(x), rtol=1e-5, atol=1e-8)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('model_name', PORTED)
def test_prune_intermediate_layers(model_name):
    model = timm.create_model(model_name, drop_rate=0.5, gate_norm='none').eval()
    x = torch.randn(2, 3, 64, 64)
    count = len(model.feature_info)
    taps = model.forward_intermediates(x, intermediates_only=True)
    unpruned = copy.deepcopy(model)
    unpruned.prune_intermediate_layers([count - 1], prune_head=False)
    torch.testing.assert_close(unpruned(x), model(x))
    for indices in ([0], [1], [count - 1], list(range(count))):
        pruned = copy.deepcopy(model)
        take_indices = pruned.prune_intermediate_layers(indices, prune_norm=True)
        with torch.no_grad():
            selected = pruned.forward_intermediates(x, indices=take_indices, intermediates_only=True)
            for index, feature in zip(take_indices, selected):
                torch.testing.assert_close(feature, taps[index])
            assert torch.equal(pruned(x), pruned(x))
        pruned.train()
        features = pruned.forward_intermediates(x, indices=take_indices, intermediates_only=True)
        sum(f.sum() for f in features).backward()
        assert not [n for n, p in pruned.named_parameters() if p.grad is None]
        pruned.set_grad_checkpointing()
        final, _ = pruned.forward_intermediates(x, indices=take_indices)
        (final.sum() + pruned.forward_features(x).sum()).backward()


@pytest.mark.parametrize('model_name', PORTED)
def test_features_only_grad_checkpointing_backward(model_name):
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(model_name, features_only=True).train()
        model.set_grad_checkpointing(grad_checkpointing)
        sum(f.pow(2).mean() for f in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('model_name', PORTED)
def test_reset_classifier_keeps_pool(model_name):
    model = timm.create_model(model_name, global_pool='max').eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(5)
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)
        assert model(x).shape == (2, 5)
        model.reset_classifier(5, 'avg')
        assert not torch.allclose(model.forward_head(model.forward_features(x), pre_logits=True), expected)


@pytest.mark.parametrize('model_name', PORTED)
def test_head_hidden_size(model_name):
    model = timm.create_model(model_name, num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)

    def check_width(num_classes):
        features = model.forward_features(x)
        assert model.forward_head(features, pre_logits=True).shape[1] == model.head_hidden_size
        assert model(x).shape[1] == (num_classes or model.head_hidden_size)

    with torch.no_grad():
        check_width(0)
        for pool in ('avg', 'catavgmax'):
            model.reset_classifier(7, pool)
            check_width(7)
        index = len(model.feature_info) - 2
        width = model.feature_info[index]['num_chs']
        model.prune_intermediate_layers([index], prune_norm=True)
        model.reset_classifier(7, 'avg')
        check_width(7)
        assert model.head_hidden_size == width


def test_pruned_feature_info_matches_forward():
    model = timm.create_model('ecaresnet50d_pruned_aig', features_only=True).eval()
    assert [f.shape[1] for f in model(torch.randn(1, 3, 64, 64))] == model.feature_info.channels()


def test_feature_wrapper_retains_input_contract():
    model = timm.create_model('resnet18_aig', in_chans=4, features_only=True, device='meta')
    traits = timm.models.get_model_traits(model)
    assert model.in_chans == traits['in_chans'] == 4
    assert traits['first_conv'] == 'conv1'
    assert 'num_classes' not in traits
    assert timm.models.get_model_input_config(model)['input_size'][0] == 4


def test_model_traits_follow_a_head_reset():
    model = timm.create_model('resnet18_aig', in_chans=4, num_classes=7, device='meta')
    other = timm.create_model('resnet18_aig', device='meta')
    model.reset_classifier(5)
    assert timm.models.get_model_traits(model)['num_classes'] == timm.models.get_model_args(model)['num_classes'] == 5
    assert timm.models.get_model_traits(other)['num_classes'] == 1000
    kwargs = timm.models.resolve_model_input_args('resnet18_aig', dict(input_size=(4, 96, 64)))
    assert 'img_size' not in kwargs and timm.create_model(**kwargs, device='meta').in_chans == 4
