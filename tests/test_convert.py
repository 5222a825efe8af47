"""gate_ and ungate_: what they change, keep and refuse."""
import copy
import pickle
import threading
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
import torchvision
from timm.layers import DropBlock2d
from timm.models.resnet import BasicBlock, Bottleneck

import timm_aig
from timm_aig import (
    AIGConfig,
    GatedBasicBlock,
    GatedBottleneck,
    InputError,
    gate_,
    gated_blocks,
    optimize_for_inference,
    ungate_,
)


def input_size(parent: str) -> int:
    return 32 if parent.startswith('cifar') else 64


def structure(model: nn.Module):
    """Names, types, modes and tensors of a model, which must not change if a call fails."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [(k, v.data_ptr(), v.dtype, v.clone()) for k, v in model.state_dict(keep_vars=True).items()]
    return modules, [t[:3] for t in tensors], [t[3] for t in tensors]


def assert_unchanged(model: nn.Module, before) -> None:
    after = structure(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(a, b) for a, b in zip(after[2], before[2]))


def test_a_freshly_gated_model_equals_its_parent_bit_for_bit(parent, train_norms):
    model = train_norms(timm.create_model(parent)).eval()
    x = torch.randn(2, 3, input_size(parent), input_size(parent))
    with torch.no_grad():
        expected = model(x)
    assert expected.isfinite().all() and expected[0].ne(expected[1]).any()
    branches = [m for m in model.modules() if type(m) in (BasicBlock, Bottleneck)]

    assert gate_(model) is model
    assert len(gated_blocks(model)) == len(branches)
    with torch.no_grad():
        sparse, gates = timm_aig.forward_gates(model, x)
    assert gates.min() == 1
    assert torch.equal(sparse, expected)
    assert torch.equal(model(x).detach(), expected)  # with grad: masked
    # The test could not see a lost branch if the branches did nothing.
    with torch.no_grad(), timm_aig.force_gates(model, torch.zeros(2, len(branches), dtype=torch.bool)):
        assert not torch.allclose(model(x), expected, rtol=1e-2)


def test_ungating_restores_timms_model(parent, train_norms):
    model = train_norms(timm.create_model(parent)).eval()
    x = torch.randn(1, 3, input_size(parent), input_size(parent))
    with torch.no_grad():
        expected = model(x)
    types = {name: type(m) for name, m in model.named_modules()}
    tensors = {k: v.data_ptr() for k, v in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    arch = model.pretrained_cfg['architecture']

    assert ungate_(gate_(model)) is model
    assert {name: type(m) for name, m in model.named_modules()} == types
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == tensors
    assert list(model.state_dict()) == list(tensors)
    assert {name: set(vars(m)) for name, m in model.named_modules() if name} == {
        name: names for name, names in attributes.items() if name}
    assert model.pretrained_cfg['architecture'] == arch
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_a_gated_block_has_its_parents_keys_plus_its_gates():
    model = timm.create_model('seresnet50')
    before = {k: v.data_ptr() for k, v in model.state_dict().items()}
    gate_(model)
    after = {k: v.data_ptr() for k, v in model.state_dict().items()}
    assert before.items() <= after.items()
    added = set(after) - set(before)
    gate_keys = {f'{layer}.{p}' for layer in ('fc1', 'bn', 'fc2') for p in ('weight', 'bias')} | {
        f'bn.{b}' for b in ('running_mean', 'running_var', 'num_batches_tracked')} | {'offset'}
    assert added == {f'{name}.gate.{key}' for name in gated_blocks(model) for key in gate_keys}
    assert len(gated_blocks(model)) == 16


def test_blocks_with_rate_1_get_no_gate():
    rates = [1, 0.5, 1., 0.25, 1, 0.75, 1, 1]
    model = gate_(timm.create_model('resnet18'), AIGConfig(target_rates=rates))
    blocks = gated_blocks(model)
    assert {name: block.target_rate for name, block in blocks.items()} == {
        'layer1.1': 0.5, 'layer2.1': 0.25, 'layer3.1': 0.75}
    assert type(model.layer1[0]) is BasicBlock
    assert {k.partition('.gate.')[0] for k in model.state_dict() if '.gate.' in k} == set(blocks)
    # nothing to gate is no error: the model stays as it was
    static = timm.create_model('resnet18')
    keys = list(static.state_dict())
    assert list(gate_(static, AIGConfig(target_rate=1)).state_dict()) == keys


@pytest.mark.parametrize('norm,channels', [('bn', 16), ('none', 4)])
@pytest.mark.parametrize('arch,kind', [('resnet18', GatedBasicBlock), ('resnet26', GatedBottleneck)])
def test_blocks_and_gates_are_made_as_the_network_and_the_config_say(arch, kind, norm, channels):
    model = gate_(timm.create_model(arch), AIGConfig(0.3, gate_norm=norm, gate_channels=channels))
    for block in gated_blocks(model).values():
        assert type(block) is kind and issubclass(kind, (BasicBlock, Bottleneck)) and block.target_rate == 0.3
        assert block.gate.fc1.weight.shape == (channels, block.conv1.in_channels)
        assert isinstance(block.gate.bn, nn.BatchNorm1d if norm == 'bn' else nn.Identity)


@pytest.mark.parametrize('schedule_arch,names', [
    ('resnet34', '2.1 2.2 2.3 3.1 3.2 3.3 3.4 3.5 4.1'), ('resnet50', '1.2 2.1 2.2 2.3 3.1 3.2 3.3 3.4 3.5 4.1'),
    ('cifar_resnet20', '2.1 2.2 3.1'),
])
def test_the_papers_schedule_gates_these_blocks(schedule_arch, names):
    model = gate_(timm.create_model(schedule_arch, device='meta'), AIGConfig(schedule='paper'))
    assert list(gated_blocks(model)) == [f'layer{name}' for name in names.split()]


@pytest.mark.parametrize('make,prefix', [
    (lambda: timm.create_model('resnet26', features_only=True), ''),
    (lambda: timm.create_model('resnet26', features_only=True, feature_cls='getter'), 'model.'),
    (lambda: nn.Sequential(nn.Sequential(timm.create_model('resnet26', features_only=True))), '0.0.'),
])
def test_any_module_that_holds_resnet_blocks_can_be_gated_and_back(make, prefix, train_norms):
    model = train_norms(make()).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = [y.clone() for y in model(x)]
    keys = list(model.state_dict())
    gate_(model, AIGConfig(schedule='paper'))
    assert list(gated_blocks(model)) == [f'{prefix}layer2.1', f'{prefix}layer3.1']  # of stages (2, 2, 2, 2)
    with torch.no_grad():
        outputs, gates = timm_aig.forward_gates(model, x)
    assert gates.shape == (2, 2)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected))
    ungate_(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected))


def test_two_backbones_in_one_module_each_get_the_schedule():
    model = nn.ModuleDict({'left': timm.create_model('resnet18'), 'right': timm.create_model('resnet34')})
    gate_(model, AIGConfig(schedule='paper'))
    right = ['layer2.1', 'layer2.2', 'layer2.3', *(f'layer3.{i}' for i in range(1, 6)), 'layer4.1']
    assert list(gated_blocks(model)) == ['left.layer2.1', 'left.layer3.1', *(f'right.{name}' for name in right)]


@pytest.mark.parametrize('training', [True, False])
def test_train_or_eval_mode_of_each_module_is_kept(training):
    model = timm.create_model('resnet18').train(training)
    model.layer1.train(not training)
    for convert in (gate_, ungate_):
        convert(model)
        assert {m.training for m in model.layer1.modules()} == {not training}
        assert {m.training for m in model.layer2.modules()} == {training}


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_gates_take_the_models_dtype(dtype):
    model = gate_(timm.create_model('resnet18').to(dtype)).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32, dtype=dtype)).dtype == dtype
    assert gate_(timm.create_model('resnet18', dtype=dtype)).layer1[0].gate.fc1.weight.dtype == dtype


def test_a_model_on_the_meta_device_stays_there():
    model = gate_(timm.create_model('resnet18', device='meta'))
    assert {t.device.type for t in model.state_dict().values()} == {'meta'}
    assert model.eval()(torch.empty(2, 3, 64, 64, device='meta')).shape == (2, 1000)
    assert model.train()(torch.empty(2, 3, 64, 64, device='meta')).shape == (2, 1000)


def test_memory_format_and_frozen_parameters_are_kept():
    model = timm.create_model('resnet18').to(memory_format=torch.channels_last).requires_grad_(False)
    gate_(model)
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for name, p in model.named_parameters() if '.gate.' not in name)
    assert all(p.requires_grad for name, p in model.named_parameters() if '.gate.' in name)


def test_hooks_on_a_block_stay_on_it():
    model = timm.create_model('resnet18').eval()
    seen = []
    model.layer2[1].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    gate_(model)
    model(torch.randn(1, 3, 32, 32))
    ungate_(model)
    model(torch.randn(1, 3, 32, 32))
    assert seen == [GatedBasicBlock, BasicBlock]


def test_drop_path_and_drop_block_are_kept():
    model = gate_(timm.create_model('resnet26', drop_path_rate=0.2, drop_block_rate=0.2))
    assert model.layer4[1].drop_path.drop_prob == pytest.approx(0.2)
    assert isinstance(model.layer4[1].drop_block, DropBlock2d)
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()


class Shared(nn.Module):
    """One block in two places of one module, one in two modules, and one in one place."""

    def __init__(self):
        super().__init__()
        self.loop = nn.Sequential(*[BasicBlock(4, 4)] * 2, BasicBlock(4, 4))
        self.first = nn.Sequential(BasicBlock(4, 4))
        self.second = nn.Sequential(self.first[0])

    def forward(self, x):
        return self.second(self.first(self.loop(x)))


def test_a_block_shared_in_two_places_stays_shared(train_norms):
    model = train_norms(Shared()).eval()
    x = torch.randn(3, 4, 4, 4)
    expected = model(x)
    keys = list(model.state_dict())
    gate_(model)
    assert model.loop[0] is model.loop[1] and isinstance(model.loop[0], GatedBasicBlock)
    assert model.first[0] is model.second[0] and isinstance(model.first[0], GatedBasicBlock)
    assert len(gated_blocks(model)) == 3
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match='exactly once'):
        timm_aig.forward_gates(model, x)
    ungate_(model)
    assert model.loop[0] is model.loop[1] and type(model.loop[0]) is BasicBlock
    assert model.first[0] is model.second[0] and type(model.first[0]) is BasicBlock
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize('call,message', [
    (lambda m: gate_(m, AIGConfig(target_rates=[0.5] * 7)), 'target_rates has 7 rates, the network has 8 blocks'),
    (lambda m: gate_(m, AIGConfig(target_rates=[0.5] * 9)), 'target_rates has 9 rates, the network has 8 blocks'),
    (lambda m: gate_(m, AIGConfig(target_rates=[])), 'target_rates has 0 rates, the network has 8 blocks'),
    (lambda m: gate_(m, {'target_rate': 0.5}), 'config must be an AIGConfig, not dict'),
    (lambda m: gate_(m, 0.5), 'config must be an AIGConfig, not float'),
    (lambda m: gate_(m, 0), 'config must be an AIGConfig, not int'),
    (lambda m: gate_(m, AIGConfig(), target_rate=0.5), r'config must not be given together .* \(target_rate\)'),
    (lambda m: gate_(m, target_rate=2), r'target_rate must be a number in \(0, 1\], not 2'),
    (lambda m: ungate_(m), 'has no gated blocks'),
])
def test_a_bad_call_on_a_static_model_is_explained_and_changes_nothing(call, message):
    model = timm.create_model('resnet18').eval()
    before, cfg = structure(model), copy.deepcopy(model.pretrained_cfg)
    with pytest.raises(InputError, match=message):
        call(model)
    assert_unchanged(model, before)
    assert model.pretrained_cfg == cfg


def test_the_fields_of_the_config_are_keywords():
    fields = dict(target_rate=0.25, schedule='paper', gate_channels=4, gate_norm='none')
    model = gate_(timm.create_model('resnet18'), **fields)
    expected = gate_(timm.create_model('resnet18'), AIGConfig(**fields))
    assert [(n, b.target_rate) for n, b in gated_blocks(model).items()] == [('layer2.1', 0.25), ('layer3.1', 0.25)]
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in expected.state_dict().items()]
    assert timm.models.get_model_args(model) == timm.models.get_model_args(expected)
    with pytest.raises(TypeError, match='rate'):
        gate_(timm.create_model('resnet18'), rate=0.5)


def test_an_optimized_model_is_not_ungated():
    model = optimize_for_inference(timm.create_model('cifar_resnet20_aig').eval())
    with pytest.raises(ValueError, match='ungate_ the original'):
        ungate_(model)
    assert model.pretrained_cfg['architecture'] == 'cifar_resnet20_aig'


@pytest.mark.parametrize('config', [None, AIGConfig(0.3)])
def test_gating_twice_is_refused_and_changes_nothing(config):
    model = gate_(timm.create_model('resnet18'), AIGConfig(target_rates=[1, 1, 1, 1, 1, 0.5, 1, 1]))
    before = structure(model)
    with pytest.raises(ValueError, match='model is gated already'):
        gate_(model, config)
    assert_unchanged(model, before)
    detector = nn.Sequential(model)
    with pytest.raises(ValueError, match='model is gated already'):
        gate_(detector, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize('make,message', [
    (lambda: nn.Linear(3, 3), r'model \(Linear\) has no .* Supported are the residual blocks with a shortcut of timm'),
    (lambda: timm.create_model('test_efficientnet'), r'model \(EfficientNet\) has no supported blocks'),
    (lambda: torchvision.models.vgg11(), r'model \(VGG\) has no supported blocks'),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), r'model \(Sequential\) .* timm.models.sknet, .*torchv'),
    (lambda: BasicBlock(4, 4), r'model \(BasicBlock\) is a block itself'),
])
def test_a_model_without_resnet_blocks_is_refused(make, message):
    model = make()
    before = structure(model)
    with pytest.raises(ValueError, match=message):
        gate_(model)
    assert_unchanged(model, before)


def test_the_recorded_architecture_and_arguments_follow_the_model():
    other = timm.create_model('resnet18', num_classes=7)
    model = timm.create_model('resnet18', num_classes=7)
    gate_(model, AIGConfig(0.25, gate_channels=8))
    assert model.pretrained_cfg['architecture'] == 'resnet18_aig'
    assert timm.models.get_model_args(model)['target_rate'] == 0.25
    assert timm.models.get_model_args(model)['gate_channels'] == 8
    assert other.pretrained_cfg['architecture'] == 'resnet18'  # models share no record
    assert timm.get_pretrained_cfg('resnet18').architecture == 'resnet18'
    ungate_(model)
    assert model.pretrained_cfg['architecture'] == 'resnet18'
    assert timm.models.get_model_args(model) == timm.models.get_model_args(other)


def test_a_gated_model_can_be_gated_again_after_ungating():
    model = gate_(timm.create_model('resnet18'))
    gate_(ungate_(model), AIGConfig(0.4))
    assert {b.target_rate for b in gated_blocks(model).values()} == {0.4}
    adaptive = timm.create_model('resnet18_aig', target_rate=0.3)
    ungate_(adaptive)
    assert list(adaptive.state_dict()) == list(timm.create_model('resnet18').state_dict())
    assert adaptive.pretrained_cfg['architecture'] == 'resnet18'


def test_a_gated_model_can_be_copied_and_pickled(train_norms, train_gates):
    model = train_gates(gate_(train_norms(timm.create_model('resnet18')))).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected, gates = timm_aig.forward_gates(model, x)
        assert 0 < gates.mean() < 1
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.pretrained_cfg == model.pretrained_cfg
            assert timm.models.get_model_args(other) == timm.models.get_model_args(model)
            assert torch.equal(other(x), expected)
            assert torch.equal(timm_aig.forward_gates(other, x)[1], gates)
            assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_gating_in_one_thread_does_not_touch_a_model_of_another():
    models = [timm.create_model('resnet18') for _ in range(4)]
    threads = [threading.Thread(target=gate_, args=(m, AIGConfig(0.1 * (i + 1)))) for i, m in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, model in enumerate(models):
        assert [b.target_rate for b in gated_blocks(model).values()] == [0.1 * (i + 1)] * 8


def test_a_compiled_block_is_refused_since_it_would_run_as_before():
    for arch, convert in (('cifar_resnet20', gate_), ('cifar_resnet20_aig', ungate_)):
        model = timm.create_model(arch)
        model.layer1[1] = torch.compile(model.layer1[1], backend='eager')
        before = {name: type(m) for name, m in model.named_modules()}
        with pytest.raises(InputError, match=r'has a compiled block, layer1.1: convert the model first'):
            convert(model)
        assert {name: type(m) for name, m in model.named_modules()} == before


def test_a_model_that_is_wrapped_for_several_processes_is_refused_since_its_gates_would_not_be_synchronised(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(timm.create_model('cifar_resnet20'))
        with pytest.raises(InputError, match='convert the model first, then wrap it'):
            gate_(wrapped)
        assert not gated_blocks(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_batch_norms_without_running_statistics_are_refused_since_samples_would_depend_on_each_other():
    model = timm.create_model('cifar_resnet20', norm_layer=partial(nn.BatchNorm2d, track_running_stats=False))
    with pytest.raises(InputError, match='has a batch norm without running statistics in layer1'):
        gate_(model)
    assert not gated_blocks(model)


def test_what_is_no_module_is_refused_and_a_target_rate_that_leaves_no_gate_is_said(caplog):
    with pytest.raises(InputError, match="model must be a module, not 'resnet50'"):
        gate_('resnet50')
    gate_(timm.create_model('cifar_resnet20', device='meta'), target_rate=1)
    assert 'A target rate of 1 leaves none of the 9 blocks a gate.' in caplog.text


def test_a_model_with_adapters_is_gated(train_norms):
    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, x):
            return self.base_layer(x)

    model, x = train_norms(timm.create_model('cifar_resnet20')).eval(), torch.randn(2, 3, 16, 16)
    model.layer2[0].conv1 = Adapter(model.layer2[0].conv1)
    expected = model(x)
    assert torch.equal(gate_(model)(x), expected)
    assert model.layer2[0].gate.fc1.in_features == 16


@pytest.mark.parametrize('arch, gated', [('resnetv2_50', 10), ('convnext_atto', 6), ('regnetx_002', 8)])
def test_the_papers_schedule_finds_the_stages_of_other_families(arch, gated):
    model = gate_(timm.create_model(arch, device='meta'), AIGConfig(schedule='paper'))
    expected = AIGConfig(schedule='paper').block_rates(
        [len(list(stage.children())) for stage in stages_of(model)], arch != 'convnext_atto')
    assert len(gated_blocks(model)) == sum(rate < 1 for rate in expected) == gated


def stages_of(model):
    return [model.s1, model.s2, model.s3, model.s4] if hasattr(model, 's1') else [s.blocks for s in model.stages]


def test_a_schedule_that_leaves_no_gate_is_refused():
    model = timm.create_model('cifar_resnet8')
    with pytest.raises(InputError, match="schedule 'paper' leaves none of the 3 blocks a gate"):
        gate_(model, schedule='paper')
    assert not gated_blocks(model)
