"""Gated blocks: masked and sparse execution, their gradients, the gate offset."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_aig import force_gates, forward_gates, gate_, gated_blocks, set_execution, set_gate_offset
from timm_aig.blocks import _AddMasked


def image_size(parent: str) -> int:
    return 16 if parent.startswith('cifar') else 32


def patterns(batch: int, count: int):
    """Gates [B, L]: all open, all closed, and mixed in each block and sample."""
    mixed = (torch.arange(batch)[:, None] + torch.arange(count)) % 2 == 0
    return {'open': torch.ones_like(mixed), 'closed': torch.zeros_like(mixed), 'mixed': mixed}


def tolerance(dtype, reference):
    """Tolerances for rounding errors, relative to the largest value of the reference."""
    eps = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    return dict(rtol=eps, atol=eps * float(reference.abs().max()))


@pytest.mark.parametrize('dtype,channels_last', [
    (torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
@pytest.mark.usefixtures('slices')
def test_masked_and_sparse_both_equal_the_timm_block_where_open_and_its_shortcut_where_closed(
        parent, dtype, channels_last, train_norms):
    static = train_norms(timm.create_model(parent)).eval()
    names = [n for n in ('layer1.0', 'layer1.1', 'layer2.0', 'layer2.1') if n in dict(static.named_modules())]
    inputs = {}  # from the network, since its blocks may rely on inputs from a ReLU
    handles = [
        static.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: inputs.update({n: +args[0]}))
        for name in names
    ]
    with torch.no_grad():
        static(torch.randn(16, 3, image_size(parent), image_size(parent)))
    for handle in handles:
        handle.remove()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    static.to(dtype, memory_format=memory_format)
    model = gate_(copy.deepcopy(static))

    for name in names:
        block, timm_block = model.get_submodule(name), static.get_submodule(name)
        for batch in (1, 2, 7, 16) if dtype == torch.float32 else (1, 7):  # bfloat16 is slow on most CPUs
            x = inputs[name][:batch].to(dtype, memory_format=memory_format)
            original = x.clone()
            with torch.no_grad():
                run = timm_block(x.clone())
                skipped = x if timm_block.downsample is None else timm_block.downsample(x)
                skipped = skipped.clone().relu_()
                assert not torch.allclose(run, skipped, rtol=0.1, atol=0.1)
                for pattern, is_open in patterns(batch, 1).items():
                    expected = torch.where(is_open[:, :, None, None], run, skipped)
                    for execution in ('masked', 'sparse'):
                        set_execution(block, execution)
                        with force_gates(block, is_open):
                            y = block(x)
                        what = f'{name}, batch {batch}, {pattern}, {execution}'
                        assert y.dtype == dtype, what
                        torch.testing.assert_close(
                            y, expected, **tolerance(dtype, expected), msg=lambda m, what=what: f'{what}: {m}')
                        assert torch.equal(x, original), f'{what}: the input was modified'


@pytest.mark.usefixtures('slices')
def test_masked_equals_sparse_through_a_whole_network(parent, train_norms, train_gates):
    model = train_gates(gate_(train_norms(timm.create_model(parent)))).eval()
    for batch in (1, 5):
        x = torch.randn(batch, 3, image_size(parent), image_size(parent))
        with torch.no_grad():
            own = forward_gates(model, x)[1].bool()
        assert batch == 1 or 0 < own.float().mean() < 1
        outputs = []
        for is_open in (own, *patterns(batch, len(gated_blocks(model))).values()):
            pair = []
            for execution in ('masked', 'sparse'):
                set_execution(model, execution)
                with torch.no_grad(), force_gates(model, is_open):  # forced: rounding may not flip a later gate
                    pair.append(model(x))
            assert pair[0].isfinite().all()
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4 * float(pair[0].abs().max()))
            outputs.append(pair[0])
        assert not torch.allclose(outputs[1], outputs[2], rtol=1e-2)


@pytest.mark.parametrize('act_layer', ['silu', 'leaky_relu'])
def test_a_closed_block_applies_an_activation_other_than_relu(act_layer, train_norms):
    model = gate_(train_norms(timm.create_model('resnet18', act_layer=act_layer))).eval()
    x = torch.randn(3, 64, 6, 6)
    block = model.layer1[1]
    with torch.no_grad(), force_gates(block, torch.zeros(3, 1, dtype=torch.bool)):
        torch.testing.assert_close(block(x), timm.layers.create_act_layer(act_layer)(x))


def test_sparse_skips_the_activation_only_after_a_relu(train_norms):
    # the input of these blocks is unknown, so a closed block must clamp it
    blocks = nn.Sequential(*timm.create_model('resnet18').layer1)
    model = gate_(train_norms(nn.Sequential(blocks))).eval()
    x = torch.randn(2, 64, 6, 6)
    with torch.no_grad(), force_gates(model, torch.zeros(2, 2, dtype=torch.bool)):
        assert torch.equal(model(x), x.relu())


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50d', 'seresnet50', 'cifar_resnet20'])
@pytest.mark.usefixtures('slices')
def test_sparse_computes_the_residual_branches_of_open_samples_and_no_others(arch, train_norms):
    """Counted by FlopCounterMode and compared with timm's model."""
    static = timm.create_model(arch).eval()
    model = gate_(copy.deepcopy(static))
    names = list(gated_blocks(model))
    size = image_size(arch)

    def flops(model, batch):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            model(torch.randn(batch, 3, size, size))
        return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    parts = flops(static, 1)
    top = type(static).__name__
    branch = [
        sum(n for part, n in parts.items() if part.startswith(f'{top}.{name}.') and part.count('.') == 3
            and not part.startswith(f'{top}.{name}.downsample'))
        for name in names
    ]
    assert min(branch) > 0
    with force_gates(model, torch.ones(1, len(names), dtype=torch.bool)):
        gates = flops(model, 1)[top] - parts[top]
    assert 0 < gates < 0.01 * parts[top]

    for is_open in (*patterns(5, len(names)).values(), torch.eye(len(names), dtype=torch.bool)):
        with force_gates(model, is_open):
            counted = flops(model, len(is_open))[top]
        closed = (~is_open).sum(0)
        saved = sum(int(n) * per_sample for n, per_sample in zip(closed, branch))
        assert counted == len(is_open) * (parts[top] + gates) - saved

    set_execution(model, 'masked')
    with force_gates(model, torch.zeros(5, len(names), dtype=torch.bool)):
        assert flops(model, 5)[top] == 5 * (parts[top] + gates)


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50d', 'resnetblur18', 'ecaresnet26t'])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.usefixtures('slices')
def test_neither_the_input_nor_a_collected_feature_is_modified(arch, batch, train_norms):
    model = gate_(train_norms(timm.create_model(arch))).eval()
    kept = []
    for name in gated_blocks(model):
        model.get_submodule(name).register_forward_hook(lambda m, args, y: kept.append((y, y.clone())))
    x = torch.randn(batch, 3, 64, 64)
    original = x.clone()
    for pattern, is_open in patterns(batch, len(gated_blocks(model))).items():
        kept.clear()
        with torch.no_grad(), force_gates(model, is_open):
            _, features = model.forward_intermediates(x)
        assert torch.equal(x, original)
        assert len(kept) == len(gated_blocks(model))
        assert all(torch.equal(y, copied) for y, copied in kept), pattern
        assert torch.equal(features[-1], kept[-1][1])


@pytest.mark.parametrize('arch', ['resnet18', 'resnet26d', 'cifar_resnet20'])
def test_with_grad_in_eval_sparse_and_masked_have_the_same_gradients(arch, train_norms):
    model = gate_(train_norms(timm.create_model(arch))).double().eval()
    for pattern, is_open in patterns(4, len(gated_blocks(model))).items():
        x = torch.randn(4, 3, image_size(arch), image_size(arch), dtype=torch.float64, requires_grad=True)
        grads = {}
        for execution in ('masked', 'sparse'):
            set_execution(model, execution)
            model.zero_grad()
            with force_gates(model, is_open):
                output = model(x)
            grads[execution] = torch.autograd.grad(output.pow(2).sum(), x, retain_graph=True)
            output.pow(2).sum().backward()
            # the branch of a block that ran for nobody has gradient 0 in one and none in the other
            grads[execution] += tuple(
                torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
        assert grads['masked'][0].abs().max() > 1e-6
        for a, b in zip(grads['masked'], grads['sparse']):
            torch.testing.assert_close(a, b, **tolerance(torch.float64, a), msg=lambda m, p=pattern: f'{p}: {m}')


def test_training_is_masked_for_every_execution_mode(train_norms):
    model = gate_(train_norms(timm.create_model('cifar_resnet20')))
    seen = []
    for block in gated_blocks(model).values():
        block.conv2.register_forward_hook(lambda m, args, y: seen.append(len(args[0])))
    for execution in ('auto', 'sparse', 'masked'):
        set_execution(model, execution)
        with force_gates(model, torch.zeros(4, 9, dtype=torch.bool)):
            model.train()(torch.randn(4, 3, 16, 16))
    assert seen == [4] * 27


def test_every_parameter_has_a_gradient_from_the_logits_alone(train_norms):
    model = timm.create_model('resnet18_aig')
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    train_norms(model)
    model.zero_grad()
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(block.gate.fc2.bias.grad.abs().sum() > 0 for block in gated_blocks(model).values())


@pytest.mark.parametrize('arch,call,message', [
    ('cifar_resnet20_aig', lambda m: set_execution(m, 'dense'), "one of auto, masked, sparse, not 'dense'"),
    ('cifar_resnet20_aig', lambda m: set_execution(m, None), 'mode must be one of'),
    ('cifar_resnet20_aig', lambda m: set_execution(m, True), 'mode must be one of'),
    ('cifar_resnet20_aig', lambda m: set_gate_offset(m, float('nan')), 'offset must be a number, not nan'),
    ('cifar_resnet20', lambda m: set_execution(m, 'sparse'), 'has no gated blocks'),
    ('cifar_resnet20', lambda m: set_gate_offset(m, 0.3), 'has no gated blocks'),
])
def test_a_wrong_switch_is_refused(arch, call, message):
    with pytest.raises(ValueError, match=message):
        call(timm.create_model(arch))


def test_the_gate_offset_opens_and_closes_all_gates(train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    x = torch.randn(8, 3, 16, 16)
    rates = []
    for offset in (-1e9, -0.5, 0, 0.5, 1e9):
        set_gate_offset(model, offset)
        rates.append(forward_gates(model, x)[1].mean().item())
    assert rates[0] == 0 and rates[-1] == 1
    assert 0 < rates[2] < 1


def load_state(state, path):
    model = timm.create_model('cifar_resnet20_aig')
    model.load_state_dict(state)
    return model


def load_pretrained(state, path):
    save_file(state, path / 'model.safetensors')
    overlay = dict(file=str(path / 'model.safetensors'))
    return timm.create_model('cifar_resnet20_aig', pretrained=True, pretrained_cfg_overlay=overlay)


def load_checkpoint(state, path):
    save_file(state, path / 'model.safetensors')
    return timm.create_model('cifar_resnet20_aig', checkpoint_path=path / 'model.safetensors')


def load_ema(state, path):
    ema = ModelEmaV3(timm.create_model('cifar_resnet20_aig'))
    ema.set(load_state(state, path))
    return ema.module


def load_timms_checkpoint(state, path):
    model = load_state(state, path)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_dir=path)
    saver.save_checkpoint(epoch=0, metric=1.)
    return timm.create_model('cifar_resnet20_aig', checkpoint_path=path / 'model_best.pth.tar')


@pytest.mark.parametrize('load', [load_state, load_pretrained, load_checkpoint, load_ema, load_timms_checkpoint])
def test_the_gate_offset_comes_with_the_weights_and_is_0_with_weights_that_have_none(load, tmp_path, train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    x = torch.randn(8, 3, 16, 16)
    without = forward_gates(model, x)[1]
    set_gate_offset(model, -2.)
    moved = forward_gates(model, x)[1]
    assert not torch.equal(moved, without)
    state = model.state_dict()
    old = {k: v for k, v in state.items() if not k.endswith('.gate.offset')}
    assert len(old) == len(state) - 9
    for weights, expected in ((state, moved), (old, without)):
        assert torch.equal(forward_gates(load(weights, tmp_path).eval(), x)[1], expected)


def test_a_missing_gate_weight_is_still_an_error():
    model = timm.create_model('cifar_resnet20_aig')
    state = {k: v for k, v in model.state_dict().items() if k != 'layer1.0.gate.fc2.bias'}
    with pytest.raises(RuntimeError, match=r'layer1\.0\.gate\.fc2\.bias'):
        model.load_state_dict(state)


class Copies(TorchDispatchMode):
    """Shapes of the tensors that are copied."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize('y_format', FORMATS)
@pytest.mark.parametrize('grad_format', FORMATS)
def test_the_masked_sum_has_the_right_gradients_in_every_memory_format(y_format, grad_format):
    shortcut, y, grad = torch.randn(3, 5, 3, 4, 6, dtype=torch.float64)
    z = torch.tensor([1., 0., 1., 1., 0.], dtype=torch.float64)
    inputs = [t.clone(memory_format=f).requires_grad_() for t, f in ((shortcut, grad_format), (y, y_format))]
    inputs.append(z.clone().requires_grad_())
    output = _AddMasked.apply(*inputs)
    torch.testing.assert_close(output.detach(), shortcut + z[:, None, None, None] * y, rtol=1e-14, atol=0)
    grad = grad.clone(memory_format=grad_format)
    with Copies() as copies:
        got = torch.autograd.grad(output, inputs, grad)
    for a, b in zip(got, (grad, z[:, None, None, None] * grad, torch.einsum('bchw,bchw->b', grad, y))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert got[1].is_contiguous(memory_format=grad_format)
    if y_format == grad_format:
        assert copies.shapes == [], 'the backward pass copies'


def test_transforms_of_torch_func_and_forward_mode_give_what_plain_autograd_gives(train_norms, train_gates):
    model = train_gates(train_norms(timm.create_model('cifar_resnet20_aig'))).eval()
    x, direction = torch.randn(3, 3, 16, 16), torch.randn(3, 3, 16, 16)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    names = ('conv1.weight', 'layer2.1.conv1.weight')

    def loss(some, x):
        return functional_call(model, ({**params, **some}, buffers), (x[None],)).logsumexp(1).sum()

    some = {name: params[name] for name in names}
    each = vmap(grad(loss), in_dims=(None, 0))(some, x)
    for i in range(3):
        for name, expected in zip(names, torch.autograd.grad(loss(some, x[i]), [*some.values()])):
            assert torch.allclose(each[name][i], expected, atol=1e-4 * expected.abs().max())

    output, tangent = jvp(model, (x,), (direction,))
    _, expected = torch.autograd.functional.jvp(model, x, direction)  # by backward passes
    with torch.no_grad():
        assert torch.allclose(output, model(x), atol=1e-5)
    assert torch.allclose(tangent, expected, atol=1e-4 * expected.abs().max())
    with forward_ad.dual_level():
        assert torch.allclose(forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent, tangent)


def test_an_ensemble_of_gated_models_and_of_gate_offsets_runs_under_vmap(train_norms, train_gates):
    models = [train_gates(train_norms(timm.create_model('cifar_resnet20_aig'))).eval() for _ in range(2)]
    x, offsets = torch.randn(4, 3, 16, 16), torch.tensor([-1e4, 0., 1e4])
    name = 'layer1.0.gate.offset'
    with torch.no_grad():
        params, buffers = stack_module_state(models)
        together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
        assert torch.allclose(together, torch.stack([model(x) for model in models]), atol=1e-5)
        moved = vmap(lambda offset: functional_call(models[0], {name: offset}, (x,)))(offsets)
        assert not torch.equal(moved[0], moved[2])
        for logits, offset in zip(moved, offsets):
            assert torch.allclose(logits, functional_call(models[0], {name: offset}, (x,)), atol=1e-5)


@pytest.mark.parametrize('arch, block', [('convnextv2_atto', 'stages.0.blocks.0'), ('resnet18', 'layer1.0')])
@pytest.mark.parametrize('training', [False, True])
def test_under_autocast_the_sum_has_the_dtype_of_the_parents(arch, block, training):
    """ConvNeXt adds with +, which gives float32 to a float32 shortcut, ResNet with +=, which does not."""
    static = timm.create_model(arch).train(training)
    adaptive = gate_(copy.deepcopy(static))
    adaptive.get_submodule(block).gate.noise = False
    x = torch.randn(3, static.get_submodule(block).conv_dw.in_channels if 'conv' in arch else 64, 8, 8)
    with torch.autocast('cpu', torch.bfloat16):
        expected, found = static.get_submodule(block)(x), adaptive.get_submodule(block)(x)
        assert found.dtype == expected.dtype == (torch.float32 if 'conv' in arch else torch.bfloat16)
        assert torch.equal(found, expected)
        if not training:
            with torch.no_grad():
                assert torch.equal(adaptive.get_submodule(block)(x), expected)  # sparse
