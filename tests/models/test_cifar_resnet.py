"""The paper's CIFAR ResNets."""
import pytest
import timm
import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, ResNet

ARCHS = {
    'cifar_resnet8': 1, 'cifar_resnet14': 2, 'cifar_resnet20': 3, 'cifar_resnet32': 5, 'cifar_resnet44': 7,
    'cifar_resnet56': 9, 'cifar_resnet110': 18}


def test_the_networks_are_registered():
    assert set(timm.list_models('cifar_resnet*', exclude_filters='*_aig')) == set(ARCHS)
    static = timm.list_pretrained('cifar_resnet*', exclude_filters='*_aig*')
    assert set(static) == {'cifar_resnet8.fmnist', 'cifar_resnet8.glyphs', 'cifar_resnet20.glyphs',
                           'cifar_resnet32.fmnist', 'cifar_resnet32.glyphs'}
    assert {timm.get_pretrained_cfg(arch).tag for arch in ARCHS} == {'untrained'}  # the default is for 32 px


@pytest.mark.parametrize('arch', ARCHS)
def test_it_has_the_papers_layers(arch):
    model = timm.create_model(arch)
    n = ARCHS[arch]
    assert isinstance(model, ResNet)
    assert model.conv1.weight.shape == (16, 3, 3, 3) and model.conv1.stride == (1, 1)
    assert isinstance(model.maxpool, nn.Identity)
    for i, width in enumerate((16, 32, 64)):
        stage = getattr(model, f'layer{i + 1}')
        assert len(stage) == n and all(type(block) is BasicBlock for block in stage)
        assert all(block.conv2.weight.shape == (width, width, 3, 3) for block in stage)
        assert [block.downsample is not None for block in stage] == [i > 0] + [False] * (n - 1)
        if i > 0:
            conv, norm = stage[0].downsample
            assert conv.weight.shape == (width, width // 2, 1, 1) and conv.stride == (2, 2)
            assert isinstance(norm, nn.BatchNorm2d)
    assert model.fc.weight.shape == (10, 64)
    # weighted layers, shortcuts not counted: what the name says
    convs = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and 'downsample' not in name]
    assert len(convs) + 1 == 6 * n + 2 == int(arch.removeprefix('cifar_resnet'))


def test_its_keys_are_those_of_a_timm_resnet():
    keys = set(timm.create_model('cifar_resnet20').state_dict())
    timm_keys = set(timm.create_model('resnet34').state_dict())
    assert {k for k in keys if not k.startswith(('layer2.0', 'layer3.0'))} <= timm_keys
    assert {'conv1.weight', 'bn1.weight', 'layer2.0.downsample.0.weight', 'fc.weight'} <= keys


def test_the_forward_pass_equals_its_layers_in_sequence(train_norms):
    model = train_norms(timm.create_model('cifar_resnet20')).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = model.bn1(model.conv1(x)).relu()
        for block in (*model.layer1, *model.layer2, *model.layer3):
            residual = block.bn2(block.conv2(block.bn1(block.conv1(y)).relu()))
            y = (residual + (y if block.downsample is None else block.downsample(y))).relu()
        assert y.shape == (2, 64, 8, 8)
        torch.testing.assert_close(model.forward_features(x), y)
        torch.testing.assert_close(model(x), model.fc(y.mean((2, 3))))


@pytest.mark.parametrize('kwargs,x,shape', [
    (dict(num_classes=100), (2, 3, 32, 32), (2, 100)),
    (dict(in_chans=1), (2, 1, 28, 28), (2, 10)),
    (dict(num_classes=0), (2, 3, 32, 32), (2, 64)),
    (dict(global_pool='catavgmax'), (2, 3, 32, 32), (2, 10)),
    (dict(num_classes=0, global_pool=''), (2, 3, 32, 32), (2, 64, 8, 8)),
    (dict(act_layer='silu', norm_layer='groupnorm1', drop_rate=0.1, drop_path_rate=0.1), (2, 3, 40, 24), (2, 10)),
])
def test_it_takes_timms_arguments(kwargs, x, shape):
    model = timm.create_model('cifar_resnet20', **kwargs)
    assert model.train()(torch.randn(x)).shape == shape
    assert model.eval()(torch.randn(x)).shape == shape


def test_drop_path_grows_linearly_to_its_rate():
    model = timm.create_model('cifar_resnet20', drop_path_rate=0.4)
    rates = [getattr(b.drop_path, 'drop_prob', 0.) for s in (model.layer1, model.layer2, model.layer3) for b in s]
    assert rates == pytest.approx([0.05 * i for i in range(9)])


@pytest.mark.parametrize('arch,kwargs', [('cifar_resnet20', {}), ('cifar_resnet20_aig', dict(feature_cls='getter'))])
def test_features_only_gives_the_stem_and_three_stages(arch, kwargs):
    model = timm.create_model(arch, features_only=True, **kwargs)
    assert model.feature_info.channels() == [16, 16, 32, 64]
    assert model.feature_info.reduction() == [1, 1, 2, 4]
    shapes = [tuple(f.shape) for f in model(torch.randn(2, 3, 32, 32))]
    assert shapes == [(2, 16, 32, 32), (2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    last = timm.create_model(arch, features_only=True, out_indices=(-1,), **kwargs)
    assert [f.shape[1] for f in last(torch.randn(2, 3, 32, 32))] == [64]


def test_intermediates_are_the_activations_of_the_stages(train_norms):
    model = train_norms(timm.create_model('cifar_resnet20')).eval()
    seen = []
    for name in ('act1', 'layer1', 'layer2', 'layer3'):
        getattr(model, name).register_forward_hook(lambda m, args, y: seen.append(y.clone()))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        final, intermediates = model.forward_intermediates(x)
        assert len(intermediates) == 4
        assert all(torch.equal(a, b) for a, b in zip(intermediates, seen))
        assert torch.equal(final, model.forward_features(x))
        only, = model.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)
        assert torch.equal(only, intermediates[2])
        last, = model.forward_intermediates(x, indices=1, intermediates_only=True)
        assert torch.equal(last, intermediates[3])
        with pytest.raises(AssertionError, match='NCHW'):
            model.forward_intermediates(x, output_fmt='NHWC')


def test_its_default_config_is_for_cifar_images():
    cfg = timm.create_model('cifar_resnet20').default_cfg
    assert cfg['input_size'] == (3, 32, 32) and cfg['num_classes'] == 10 and cfg['pool_size'] == (8, 8)
    assert timm.data.resolve_data_config({}, model=timm.create_model('cifar_resnet20'))['crop_pct'] == 1.0
