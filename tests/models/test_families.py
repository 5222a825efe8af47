"""The contract of every family: gates that start open, rows that are skipped, keys of the parent, MACs."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torchvision

import timm_aig
from timm_aig import gate_, gated_blocks, ungate_

ARCHS = {  # with their arguments, for small images
    'resnet18': {}, 'seresnext26d_32x4d': {},
    'resnetv2_18': {}, 'resnetv2_50x1_bit': {}, 'resnetv2_18d': {},
    'regnetx_002': {}, 'regnety_002': {}, 'regnetz_005': {}, 'regnetv_040': {},
    'convnext_atto': {}, 'convnextv2_atto': {}, 'convnext_atto_ols': {},
    'vit_tiny_patch16_224': dict(img_size=32), 'deit_tiny_patch16_224': dict(img_size=32),
    'vit_wee_patch16_reg1_gap_256': dict(img_size=32),
    'res2net50_26w_4s': {}, 'res2net50_48w_2s': {}, 'res2next50': {},
    'resnest14d': {}, 'resnest50d_1s4x24d': {}, 'resnest50d_4s2x40d': {},
    'skresnet18': {}, 'skresnet50': {}, 'skresnext50_32x4d': {},
    'efficientnet_b1_pruned': {}, 'mobilenet_edgetpu_v2_xs': {}, 'mobilenetv4_hybrid_medium': {},
    'torchvision resnet18': {}, 'torchvision resnet50': {}, 'torchvision resnext50_32x4d': {},
}


def create(arch):
    """A static model in eval, with random weights that no branch ends in zero, and images of two sizes of batch."""
    torch.manual_seed(0)
    library, _, name = arch.rpartition(' ')
    if library:
        model = getattr(torchvision.models, name)(num_classes=5)
    else:
        model = timm.create_model(name, num_classes=5, **ARCHS[arch])
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.uniform_(p, 0.2, 0.6)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    for m in norms:
        m.momentum = 1.  # or the statistics of new norms let the biases hide the images and the first blocks
    with torch.no_grad():
        model.train()(images(16))
    for m in norms:
        m.momentum = 0.1
    return model.eval()


def images(batch):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope='module', params=ARCHS)
def pair(request):
    """A static model and the same one with gates. Tests must not change them."""
    model = create(request.param)
    return model, gate_(copy.deepcopy(model), target_rate=0.5)


def test_right_after_gating_the_outputs_are_the_parents_bit_for_bit(pair):
    parent, model = pair
    with torch.inference_mode():
        assert torch.equal(model(images(2)), parent(images(2)))


def test_without_its_gates_it_is_the_parent_again(pair):
    parent, model = pair
    plain = ungate_(copy.deepcopy(model))
    assert list(plain.state_dict()) == list(parent.state_dict())
    assert [type(m) for m in plain.modules()] == [type(m) for m in parent.modules()]
    with torch.inference_mode():
        assert torch.equal(plain(images(2)), parent(images(2)))


@pytest.mark.parametrize('batch', [1, 2, 7])
@pytest.mark.parametrize('share', [1., 0., .5])
@pytest.mark.usefixtures('slices')
def test_open_rows_give_what_masking_gives_and_only_they_run(pair, batch, share):
    model = copy.deepcopy(pair[1])
    blocks = gated_blocks(model)
    gates = torch.rand(batch, len(blocks), generator=torch.Generator().manual_seed(0)) < share
    seen = {name: 0 for name in blocks}

    def count(name, residual):
        def counted(x, *args, **kwargs):
            seen[name] += len(x)
            return residual(x, *args, **kwargs)
        return counted

    outputs = []
    for mode in ('masked', 'sparse'):
        timm_aig.set_execution(model, mode)
        if mode == 'sparse':
            for name, block in blocks.items():
                block.residual = count(name, block.residual)
        with torch.inference_mode(), timm_aig.force_gates(model, gates):
            outputs.append(model(images(batch)))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5 * outputs[0].abs().max().item())
    assert list(seen.values()) == gates.sum(0).tolist()


def test_a_closed_network_computes_something_else(pair):
    parent, model = copy.deepcopy(pair)
    timm_aig.set_gate_offset(model, -1e4)
    with torch.inference_mode():
        closed = model(images(2))
        assert timm_aig.forward_gates(model, images(2))[1].sum() == 0
        assert not torch.allclose(closed, parent(images(2)))


def test_an_open_network_trains_as_the_parent_and_normalises_as_often(pair):
    parent, model = (m.train() for m in copy.deepcopy(pair))
    x = images(4)
    with torch.no_grad(), timm_aig.force_gates(model, torch.ones(4, len(gated_blocks(model)))):
        torch.testing.assert_close(model(x), parent(x), rtol=1e-4, atol=1e-4)
    found = dict(model.named_buffers())
    for name, value in parent.named_buffers():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_every_gate_and_weight_gets_a_finite_gradient(pair):
    model = copy.deepcopy(pair[1]).train()
    for m in model.modules():
        if isinstance(m, timm_aig.Gate):
            nn.init.normal_(m.fc2.weight)
    output, gates = timm_aig.forward_gates(model, images(4))
    (output.square().mean() + gates.mean()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert '.gate.fc2' not in name or p.grad.any(), name


def test_macs_are_the_parents_and_those_of_the_gates(pair):
    parent, model = pair
    cost = timm_aig.compute_cost(model, (3, 32, 32))
    assert cost.static == timm_aig.compute_cost(parent, (3, 32, 32)).total
    assert min(cost.blocks) > 0 and sum(cost.blocks) > cost.total / 2
    gates = [block.gate for block in gated_blocks(model).values()]
    assert cost.gates == sum(gate.fc1.weight.numel() + gate.fc2.weight.numel() for gate in gates)


@pytest.mark.parametrize('arch', [arch for arch in ARCHS if not arch.startswith('torchvision')])
def test_gates_take_less_than_a_thousandth_of_the_macs(arch):
    cost = timm_aig.compute_cost(timm.create_model(f'{arch}_aig', device='meta'))
    assert 0 < cost.gates < 1e-3 * cost.static


def test_copies_pickles_and_optimized_models_compute_the_same(pair):
    model = pair[1]
    with torch.inference_mode():
        expected = model(images(3))
        assert torch.equal(pickle.loads(pickle.dumps(model))(images(3)), expected)
        fast = timm_aig.optimize_for_inference(model)
        torch.testing.assert_close(fast(images(3)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        gates = torch.rand(3, len(gated_blocks(model))) < .5
        with timm_aig.force_gates(model, gates):
            expected = model(images(3))
        with timm_aig.force_gates(fast, gates):
            torch.testing.assert_close(fast(images(3)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


MACS = {  # of one branch at 32 px, counted by hand
    'resnetv2_18': ('stages.1.blocks.1', 2 * 4 * 4 * 9 * 128 * 128),  # two 3x3 convolutions on 4x4 pixels
    'regnetx_002': ('s2.b1', 8 * 8 * 24 * 56 + 4 * 4 * (9 * 8 * 56 + 56 * 56)),  # groups of 8, stride 2 in the second
    'convnext_atto': ('stages.1.blocks.0', 4 * 4 * (49 * 80 + 2 * 80 * 320)),  # depthwise 7x7, two layers of the MLP
    'skresnet18': (  # a 3x3 convolution of half of the channels for each path, attention, a 3x3 convolution
        'layer2.1', 2 * 4 * 4 * 9 * 64 * 128 + 128 * 16 + 16 * 256 + 4 * 4 * 9 * 128 * 128),
    'vit_tiny_patch16_224': ('blocks.0.mlp', 5 * 2 * 192 * 768),  # four patches and the class token
    'torchvision resnet18': ('layer2.1', 2 * 4 * 4 * 9 * 128 * 128),
}


@pytest.mark.parametrize('arch', MACS)
def test_macs_of_a_branch_are_those_counted_by_hand(arch):
    model = gate_(create(arch))
    name, macs = MACS[arch]
    assert timm_aig.compute_cost(model, (3, 32, 32)).blocks[list(gated_blocks(model)).index(name)] == macs


@pytest.mark.parametrize('arch', [
    'resnetv2_18', 'regnety_002', 'convnext_atto', 'skresnet18', 'efficientnet_b1_pruned', 'vit_tiny_patch16_224'])
def test_entry_points_create_save_and_load_trained_gates(arch, train_gates, tmp_path):
    kwargs = dict(num_classes=5, **ARCHS[arch])
    model = train_gates(timm.create_model(f'{arch}_aig', target_rate=0.3, **kwargs)).eval()
    assert model.pretrained_cfg['architecture'] == f'{arch}_aig'
    assert {block.target_rate for block in gated_blocks(model).values()} == {0.3}
    timm_aig.save_pretrained(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.inference_mode():
        for a, b in zip(timm_aig.forward_gates(model, images(3)), timm_aig.forward_gates(loaded, images(3))):
            assert torch.equal(a, b)
    parent = timm.create_model(arch, **kwargs)  # takes the weights without the gates
    parent.load_state_dict(timm_aig.convert.checkpoint_filter_fn(model.state_dict(), parent))


def test_tags_of_the_parents_are_tags_of_the_adaptive_models():
    for arch in ('resnetv2_50x1_bit', 'regnety_008', 'convnext_tiny', 'res2net50d', 'mobilenetv3_large_100',
                 'efficientnet_b0', 'vit_base_patch16_224'):
        tag = timm.get_pretrained_cfg(arch).tag
        assert timm.get_pretrained_cfg(f'{arch}_aig').tag == tag
        assert timm.get_pretrained_cfg(f'{arch}_aig.{tag}').hf_hub_id == timm.get_pretrained_cfg(arch).hf_hub_id


@pytest.mark.parametrize('arch, outputs', [
    ('resnetv2_18', 5), ('regnetx_002', 5), ('convnext_atto', 4), ('skresnet18', 5), ('efficientnet_b1_pruned', 5),
    ('mobilenetv4_hybrid_medium', 5), ('vit_tiny_patch16_224', 3)])
def test_features_only_backbones_have_gates(arch, outputs, train_norms):
    kwargs = ARCHS[arch]
    model = train_norms(timm.create_model(f'{arch}_aig', features_only=True, **kwargs)).eval()
    parent = timm.create_model(arch, features_only=True, **kwargs).eval()
    parent.load_state_dict({k: v for k, v in model.state_dict().items() if '.gate.' not in k})
    with torch.inference_mode():
        features, gates = timm_aig.forward_gates(model, images(2))
        assert len(features) == outputs and gates.shape == (2, len(gated_blocks(model)))
        assert all(map(torch.equal, features, parent(images(2))))


def test_a_static_model_is_optimized_as_far_as_its_family_can_be(pair):
    parent = pair[0]
    with torch.inference_mode():
        expected = parent(images(3))
        found = timm_aig.optimize_for_inference(parent)(images(3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_batch_is_cut_into_micro_batches_where_the_family_gains_from_them(pair, request, monkeypatch):
    monkeypatch.setattr('timm_aig.inference.optimize.MICRO_BATCH_PIXELS', 2 * 32 * 32)
    fast, sizes = timm_aig.optimize_for_inference(pair[1]), []
    fast.model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    with torch.inference_mode():
        expected = pair[1](images(5))
        torch.testing.assert_close(fast(images(5)), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    transformer = 'vit' in request.node.name or 'deit' in request.node.name
    assert sizes == ([5] if transformer else [2, 2, 1])


@pytest.mark.parametrize('arch', ['resnet18', 'torchvision resnet18'])
def test_the_stem_is_fused_where_the_family_names_its_layers(arch):
    stem = timm_aig.optimize_for_inference(gate_(create(arch))).conv1
    assert len(stem) == 1 and stem[0].relu


def test_compile_needs_a_family_whose_blocks_are_fused():
    with pytest.raises(timm_aig.InputError, match='compile is not for the blocks of this family'):
        timm_aig.optimize_for_inference(gate_(create('convnext_atto')), compile=True)


def test_a_mask_reaches_gated_attention():
    parent = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=5).eval()
    model, x = gate_(copy.deepcopy(parent)), torch.randn(3, 3, 32, 32)
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    mask[0, ..., 3:] = False
    with torch.inference_mode():
        expected = parent(x, attn_mask=mask)
        assert torch.equal(model(x, attn_mask=mask), expected) and not torch.allclose(parent(x), expected)


def test_attention_with_a_gate_of_its_own_gets_no_second_one():
    model = create('vit_tiny_patch16_224')
    model.blocks[0].attn.gate = nn.Linear(192, 192)
    with torch.inference_mode():
        expected = model(images(2))
        assert torch.equal(gate_(model)(images(2)), expected)
    assert 'blocks.0.attn' not in gated_blocks(model) and 'blocks.0.mlp' in gated_blocks(model)


def test_blocks_without_a_shortcut_get_no_gate():
    model = create('regnetz_005')
    names = [name for name, m in model.named_modules() if type(m).__name__ == 'Bottleneck']
    without = [name for name in names if model.get_submodule(name).downsample is None]
    assert without and list(gated_blocks(gate_(model))) == [name for name in names if name not in without]
    model = timm.create_model('mobilenetv4_hybrid_medium', device='meta')
    skips = {name: m.has_skip for name, m in model.named_modules() if hasattr(m, 'has_skip')}
    assert not all(skips.values()) and list(gated_blocks(gate_(model))) == [name for name in skips if skips[name]]


def test_archs_without_a_block_to_gate_have_no_entry_point():
    assert timm.is_model('mobilenetv1_100') and not timm.is_model('mobilenetv1_100_aig')
    with pytest.raises(timm_aig.InputError, match='no supported blocks'):
        gate_(timm.create_model('mobilenetv1_100', device='meta'))
