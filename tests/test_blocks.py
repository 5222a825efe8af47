"""Gated blocks: masked and sparse execution, forward_gates, force_gates."""
import copy
import pickle
import threading

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import set_reentrant_ckpt
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode

from timm_aig import AIGConfig, force_gates, forward_gates, gate_, gated_blocks, set_execution, set_gate_offset


def image_size(parent: str) -> int:
    return 16 if parent.startswith('cifar') else 32


def patterns(batch: int, count: int):
    """Gates [B, L]: all open, all closed, and a mix where each block has both if it can."""
    mixed = (torch.arange(batch)[:, None] + torch.arange(count)) % 2 == 0
    return {'open': torch.ones_like(mixed), 'closed': torch.zeros_like(mixed), 'mixed': mixed}


def tolerance(dtype, reference):
    """Rounding of sums of the size of the reference."""
    eps = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    return dict(rtol=eps, atol=eps * float(reference.abs().max()))


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures('slices')
def test_masked_and_sparse_both_equal_the_timm_block_where_open_and_its_shortcut_where_closed(
        parent, dtype, channels_last, train_norms):
    static = train_norms(timm.create_model(parent)).eval()
    names = [n for n in ('layer1.0', 'layer1.1', 'layer2.0', 'layer2.1') if n in dict(static.named_modules())]
    inputs = {}  # as they come in the network, whose blocks may count on inputs that a ReLU made
    handles = [
        static.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: inputs.update({n: +args[0]}))
        for name in names
    ]
    with torch.no_grad():
        static(torch.randn(32, 3, image_size(parent), image_size(parent)))
    for handle in handles:
        handle.remove()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    static.to(dtype, memory_format=memory_format)
    model = gate_(copy.deepcopy(static))

    for name in names:
        block, timm_block = model.get_submodule(name), static.get_submodule(name)
        for batch in (1, 2, 7, 32) if dtype == torch.float32 else (1, 7):  # bfloat16 is slow on most CPUs
            x = inputs[name][:batch].to(dtype, memory_format=memory_format)
            original = x.clone()
            with torch.no_grad():
                run = timm_block(x.clone())
                skipped = x if timm_block.downsample is None else timm_block.downsample(x)
                skipped = skipped.clone().relu_()
                assert not torch.allclose(run, skipped, rtol=0.1, atol=0.1)
                for pattern, is_open in patterns(batch, 1).items():
                    expected = torch.where(is_open[:, :, None, None], run, skipped)
                    for execution in ('masked', 'sparse', 'auto'):
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
def test_a_closed_block_still_applies_an_activation_that_is_no_relu(act_layer, train_norms):
    model = gate_(train_norms(timm.create_model('resnet18', act_layer=act_layer))).eval()
    x = torch.randn(3, 64, 6, 6)
    block = model.layer1[1]
    with torch.no_grad(), force_gates(block, torch.zeros(3, 1, dtype=torch.bool)):
        torch.testing.assert_close(block(x), timm.layers.create_act_layer(act_layer)(x))


def test_sparse_counts_on_a_relu_only_where_there_is_one(train_norms):
    # gated blocks in a module of their own: nobody knows what goes in, so a closed block must clamp
    blocks = nn.Sequential(*timm.create_model('resnet18').layer1)
    model = gate_(train_norms(nn.Sequential(blocks))).eval()
    x = torch.randn(2, 64, 6, 6)
    with torch.no_grad(), force_gates(model, torch.zeros(2, 2, dtype=torch.bool)):
        assert torch.equal(model(x), x.relu())


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50d', 'seresnet50', 'cifar_resnet20'])
@pytest.mark.usefixtures('slices')
def test_sparse_computes_the_residual_branches_of_open_samples_and_no_others(arch, train_norms):
    """Counted by torch where the convolutions are dispatched, and compared with timm's model."""
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


def test_training_is_masked_whatever_the_execution(train_norms):
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


@pytest.mark.parametrize('mode,message', [('dense', "mode must be one of auto, masked, sparse, not 'dense'"),
                                          (None, 'mode must be one of'), (True, 'mode must be one of')])
def test_an_unknown_execution_is_refused(mode, message):
    model = timm.create_model('cifar_resnet20_aig')
    with pytest.raises(ValueError, match=message):
        set_execution(model, mode)


def test_the_switches_refuse_a_static_model():
    model = timm.create_model('resnet18')
    for call in (
            lambda: set_execution(model, 'sparse'),
            lambda: set_gate_offset(model, 0.3),
            lambda: force_gates(model, torch.ones(1, 0, dtype=torch.bool)).__enter__(),
    ):
        with pytest.raises(ValueError, match='has no gated blocks'):
            call()


def test_the_gate_offset_opens_and_closes_all_gates(train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    x = torch.randn(8, 3, 16, 16)
    rates = []
    for offset in (-1e9, -0.5, 0, 0.5, 1e9):
        set_gate_offset(model, offset)
        rates.append(forward_gates(model, x)[1].mean().item())
    assert rates[0] == 0 and rates[-1] == 1
    assert 0 < rates[2] < 1
    with pytest.raises(ValueError, match='offset must be a number, not nan'):
        set_gate_offset(model, float('nan'))


# forward_gates


def test_the_gates_of_a_pass_come_in_the_order_of_the_blocks():
    model = timm.create_model('resnet26_aig').eval()
    names = [f'layer{s}.{i}' for s in (1, 2, 3, 4) for i in (0, 1)]
    assert list(gated_blocks(model)) == names
    x = torch.randn(3, 3, 32, 32)
    logits, gates = forward_gates(model, x)
    assert logits.shape == (3, 1000)
    assert torch.equal(gates, torch.ones(3, 8))
    for i, name in enumerate(names):
        closed = copy.deepcopy(model)
        closed.get_submodule(name).gate.fc2.bias.data = torch.tensor([9., -9.])
        expected = torch.ones(3, 8)
        expected[:, i] = 0
        assert torch.equal(forward_gates(closed, x)[1], expected)


def test_the_gates_of_a_pass_are_what_each_gate_answers_for_its_blocks_input(train_gates, train_norms):
    model = train_gates(gate_(train_norms(timm.create_model('resnet26d')))).eval()
    inputs = []
    for block in gated_blocks(model).values():
        block.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()))
    x = torch.randn(6, 3, 48, 48)
    with torch.no_grad():
        expected_logits = model(x)
        expected = [block.gate(x) for block, x in zip(gated_blocks(model).values(), list(inputs))]
        logits, gates = forward_gates(model, x)
    assert torch.equal(logits, expected_logits)
    assert torch.equal(gates, torch.stack(expected, dim=1))
    assert 0 < gates.mean() < 1


def test_a_static_model_has_no_gates():
    model = timm.create_model('resnet18').eval()
    x = torch.randn(5, 3, 32, 32)
    logits, gates = forward_gates(model, x)
    assert gates.shape == (5, 0)
    assert torch.equal(logits, model(x))
    assert gated_blocks(model) == {}


def test_forward_gates_works_on_a_backbone():
    model = timm.create_model('resnet18_aig', features_only=True)
    features, gates = forward_gates(model, torch.randn(2, 3, 64, 64))
    assert [f.shape[1] for f in features] == [64, 64, 128, 256, 512]
    assert gates.shape == (2, 8)
    assert gates.requires_grad


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
@pytest.mark.parametrize('training', [True, False])
def test_forward_gates_works_inside_torch_compile(backend, training, train_norms, train_gates):
    torch._dynamo.reset()
    model = train_gates(gate_(train_norms(timm.create_model('cifar_resnet20')), AIGConfig(gate_norm='none')))
    model.train(training)
    x = torch.randn(4, 3, 16, 16)
    if not training:
        with torch.no_grad():
            expected = forward_gates(model, x)
    compiled = torch.compile(lambda x: forward_gates(model, x), backend=backend)
    with torch.set_grad_enabled(training):
        logits, gates = compiled(x)
    assert gates.shape == (4, 9)
    assert ((gates == 0) | (gates == 1)).all()
    if training:
        (logits.sum() + gates.sum()).backward()
        assert all(block.gate.fc2.bias.grad.abs().sum() > 0 for block in gated_blocks(model).values())
    else:
        assert torch.equal(gates, expected[1])
        torch.testing.assert_close(logits, expected[0])
        # the gates are data of the graph, not constants of the trace
        assert torch.equal(compiled(-x)[1], forward_gates(model, -x)[1])


def test_forward_gates_works_around_a_compiled_model(train_norms, train_gates):
    torch._dynamo.reset()
    model = train_gates(gate_(train_norms(timm.create_model('cifar_resnet20')))).eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = forward_gates(model, x)
        compiled = torch.compile(model, backend='aot_eager')
        plain = compiled(x)
        logits, gates = forward_gates(compiled, x)
        again = compiled(x)
    assert torch.equal(gates, expected[1])
    for y in (plain, logits, again):
        torch.testing.assert_close(y, expected[0])


def test_checkpointing_that_is_not_reentrant_gives_the_same_gates_and_gradients(train_norms):
    x = torch.randn(4, 3, 32, 32)
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = gate_(train_norms(timm.create_model('resnet18')))
        model.set_grad_checkpointing(checkpointing)
        logits, gates = forward_gates(model, x)
        assert gates.requires_grad
        (logits.pow(2).mean() + (gates.mean(0) - 0.5).pow(2).sum()).backward()
        runs.append((gates.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(runs[0][0], runs[1][0])
    assert 0 < runs[0][0].mean() < 1
    for name, grad in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], grad, msg=lambda m, name=name: f'{name}: {m}')
    assert all(g.abs().sum() > 0 for n, g in runs[1][1].items() if n.endswith('gate.fc2.bias'))


def test_reentrant_checkpointing_is_refused_since_it_cuts_the_gates_gradient():
    model = timm.create_model('cifar_resnet20_aig')
    model.set_grad_checkpointing()
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match='re-entrant checkpointing'):
            forward_gates(model, torch.randn(4, 3, 16, 16, requires_grad=True))
    finally:
        set_reentrant_ckpt(False)
    assert forward_gates(model, torch.randn(4, 3, 16, 16))[1].requires_grad


def test_forced_gates_need_no_gradient():
    model = timm.create_model('cifar_resnet20_aig')
    with force_gates(model, torch.ones(4, 9)):
        assert not forward_gates(model, torch.randn(4, 3, 16, 16))[1].requires_grad


def test_frozen_gates_need_no_gradient():
    model = timm.create_model('cifar_resnet20_aig').requires_grad_(False)
    assert not forward_gates(model, torch.randn(4, 3, 16, 16))[1].requires_grad


def test_a_training_step_leaves_nothing_behind_that_would_stop_a_copy():
    model = timm.create_model('cifar_resnet20_aig')
    ema = ModelEmaV3(model, decay=0.5)
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits, gates = forward_gates(model, torch.randn(4, 3, 16, 16))
    (logits.sum() + gates.sum()).backward()
    optimizer.step()
    ema.update(model)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    tensors = [v for m in model.modules() for v in vars(m).values() if torch.is_tensor(v)]
    assert not tensors
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), ModelEmaV3(model).module]
    x = torch.randn(4, 3, 16, 16)
    for other in copies:
        assert torch.equal(other.eval()(x), model.eval()(x))
        other.train()
        model.train()
    assert not torch.equal(ema.module.fc.weight, model.fc.weight)


def test_an_error_in_the_model_ends_the_recording():
    model = timm.create_model('cifar_resnet20_aig').eval()
    with pytest.raises(RuntimeError):
        forward_gates(model, torch.randn(4, 5, 16, 16))  # 5 channels
    assert forward_gates(model, torch.randn(4, 3, 16, 16))[1].shape == (4, 9)


def test_a_block_that_does_not_run_is_an_error():
    model = timm.create_model('cifar_resnet20_aig').eval()
    model.layer3[2].forward = lambda x: x
    with pytest.raises(RuntimeError, match='runs each gated block exactly once'):
        forward_gates(model, torch.randn(2, 3, 16, 16))


def test_passes_of_another_thread_do_not_mix_with_this_ones(train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    x, other_x = torch.randn(4, 3, 16, 16), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, other_expected = forward_gates(model, x), forward_gates(model, other_x)
    results = []

    def other():  # in the middle of this thread's pass, with its forced gates
        with torch.no_grad():
            plain = model(other_x)
            results.append((plain, *forward_gates(model, other_x)))

    entered = []

    def hook(module, args):
        if not entered:  # the other thread's passes come here too
            entered.append(True)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handle = model.layer2[1].register_forward_pre_hook(hook)
    with torch.no_grad():
        logits, gates = forward_gates(model, x)
        entered.clear()
        closed = torch.zeros(4, 9, dtype=torch.bool)
        with force_gates(model, closed):
            _, forced = forward_gates(model, x)
    handle.remove()
    assert torch.equal(gates, expected[1]) and torch.equal(logits, expected[0])
    assert torch.equal(forced, closed.float())
    assert len(results) == 2
    for plain, other_logits, other_gates in results:
        assert torch.equal(plain, other_expected[0]) and torch.equal(other_logits, other_expected[0])
        assert torch.equal(other_gates, other_expected[1])


class Ensemble(nn.Module):
    """Asks another adaptive model in the middle of its own pass."""

    def __init__(self, model, teacher):
        super().__init__()
        self.model = model
        self.teacher = [teacher]  # not a submodule

    def forward(self, x):
        y, self_gates = self.model.layer1(self.model.act1(self.model.bn1(self.model.conv1(x)))), None
        _, self_gates = forward_gates(self.teacher[0], x)
        return self.model.forward_head(self.model.layer3(self.model.layer2(y))), self_gates


def test_forward_gates_can_be_called_inside_forward_gates(train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    teacher = timm.create_model('cifar_resnet32_aig').eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = forward_gates(model, x)
        (logits, teacher_gates), gates = forward_gates(Ensemble(model, teacher), x)
    assert torch.equal(logits, expected[0])
    assert torch.equal(gates, expected[1])
    assert torch.equal(teacher_gates, torch.ones(4, 15))


# force_gates


def test_forced_gates_answer_inside_the_block_only(train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    x = torch.randn(4, 3, 16, 16)
    own = forward_gates(model, x)[1]
    is_open = torch.rand(4, 9) < 0.5
    with force_gates(model, is_open):
        assert torch.equal(forward_gates(model, x)[1], is_open.float())
    assert torch.equal(forward_gates(model, x)[1], own)
    with pytest.raises(KeyError), force_gates(model, is_open):
        raise KeyError
    assert torch.equal(forward_gates(model, x)[1], own)
    assert not torch.equal(own, is_open.float())


def test_forced_gates_nest_and_the_inner_ones_win():
    model = timm.create_model('cifar_resnet20_aig').eval()
    x = torch.randn(2, 3, 16, 16)
    closed = torch.zeros(2, 9, dtype=torch.bool)
    with force_gates(model, closed):
        with force_gates(model.layer2, ~closed[:, :3]):
            assert forward_gates(model, x)[1].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0]] * 2
        assert forward_gates(model, x)[1].sum() == 0


def test_forced_gates_are_still_computed():
    model = timm.create_model('cifar_resnet20_aig').eval()
    calls = []
    for block in gated_blocks(model).values():
        block.gate.fc2.register_forward_hook(lambda *args: calls.append(1))
    with force_gates(model, torch.zeros(2, 9, dtype=torch.bool)):
        model(torch.randn(2, 3, 16, 16))
    assert len(calls) == 9


@pytest.mark.parametrize('shape', [(2, 8), (2, 10), (9,), (2, 9, 1)])
def test_forced_gates_of_the_wrong_shape_are_refused(shape):
    model = timm.create_model('cifar_resnet20_aig').eval()
    with pytest.raises(ValueError, match=r'gates must be \[batch, 9\] for 9 gated blocks'):
        with force_gates(model, torch.ones(shape, dtype=torch.bool)):
            raise AssertionError('must not get here')


def test_forced_gates_for_another_batch_are_refused():
    model = timm.create_model('cifar_resnet20_aig').eval()
    with force_gates(model, torch.ones(2, 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match='for the 3 images of the input, not for 2'):
            model(torch.randn(3, 3, 16, 16))
