"""The registered adaptive models: names, weights, timm's interface."""
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters

from timm_aig import (
    GatedBottleneck,
    budget_table,
    forward_gates,
    gated_blocks,
    list_trained,
)
from timm_aig.models import entry_points

PARENTS = timm.list_models(module=('resnet', 'cifar_resnet'))


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
    monkeypatch.setattr(entry_points, 'pretrained_cfgs', entry_points.pretrained_cfgs.__wrapped__)  # not cached
    cfgs = entry_points.default_cfgs_of(['resnet50', 'cifar_resnet32'])
    assert cfgs['resnet50_aig'].default_with_tag[0] == timm.get_pretrained_cfg('resnet50').tag
    assert cfgs['cifar_resnet32_aig'].default_with_tag[0] == 'untrained'


def test_a_family_whose_parent_has_no_weights_loads_its_trained_default():
    arch = 'cifar_resnet32_aig'
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
    assert {'cifar_resnet32_aig.fmnist', 'cifar_resnet32_aig.glyphs'} <= {*names}
    pretrained = timm.list_models('*_aig', pretrained=True)
    assert set(names) < set(pretrained) and len(names) == len(set(names))
    for name in pretrained:
        cfg = timm.get_pretrained_cfg(name)
        assert bool(cfg.file) != bool(cfg.hf_hub_id or cfg.url), name
        if cfg.file:
            assert any('.gate.' in key for key in timm.models.load_state_dict(cfg.file)) == (name in names), name


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


@pytest.mark.parametrize('arch,tag,rates', [
    *(('resnet50_aig', f't0{n}_paper', [.8, *[n / 10] * 8, .7]) for n in (4, 5, 6, 7)),
    *(('resnet101_aig', f't0{n}_paper', [n / 10] * 25) for n in (3, 5)),
])
def test_a_paper_tag_builds_the_papers_schedule(arch, tag, rates):
    model = timm.create_model(f'{arch}.{tag}', device='meta')
    assert [b.target_rate for b in gated_blocks(model).values()] == rates
    assert model.pretrained_cfg['tag'] == tag
    assert timm.data.resolve_data_config({}, model=model)['input_size'] == (3, 224, 224)


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


def test_a_training_step_compiles_into_one_graph():
    torch.compiler.reset()
    model = timm.create_model('cifar_resnet20_aig')
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        compiled(torch.randn(4, 3, 32, 32)).pow(2).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert not torch.equal(model.fc.weight, before['fc.weight'])


# Ported from timm's tests, which collect these for other names only.


@pytest.mark.parametrize('model_name', ['resnet18_aig', 'ecaresnet50d_pruned_aig', 'cifar_resnet20_aig'])
def test_features_only_grad_checkpointing_backward(model_name, train_norms):
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        model = train_norms(timm.create_model(model_name, features_only=True)).train()
        model.set_grad_checkpointing(grad_checkpointing)
        sum(f.pow(2).mean() for f in model(x)).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    assert all(a.any() for a in grads[0])


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
