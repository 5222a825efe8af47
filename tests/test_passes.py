"""forward_gates, record_gates, force_gates: threads, compiling, checkpointing, detectors."""
import copy
import math
import pickle
import threading

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import set_reentrant_ckpt
from timm.utils import ModelEmaV3

from timm_aig import (
    AIGConfig,
    InputError,
    TargetRateLoss,
    force_gates,
    forward_gates,
    gate_,
    gated_blocks,
    optimize_for_inference,
    record_gates,
    set_execution,
    set_gate_offset,
    use_gate_offset,
)


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
    model = timm.create_model('cifar_resnet20').eval()
    x = torch.randn(5, 3, 16, 16)
    logits, gates = forward_gates(model, x)
    assert gates.shape == (5, 0) and gated_blocks(model) == {}
    with record_gates(model) as record:
        assert torch.equal(model(x), logits)
    assert record.gates.shape == (0, 0)
    with pytest.raises(InputError, match='has no gated blocks'):
        force_gates(model, torch.ones(1, 0)).__enter__()


class Detector(nn.Module):
    """A toy detector: forward(images, targets) takes a list and returns losses."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model('cifar_resnet20_aig', features_only=True, out_indices=(3,))
        self.boxes = nn.Linear(64, 4)

    def forward(self, images, targets):
        features, = self.backbone(torch.stack(images))
        errors = self.boxes(features.mean((2, 3))) - torch.stack([target['box'] for target in targets])
        return {'l1': errors.abs().mean(), 'l2': errors.pow(2).mean()}


def detection_batch(size):
    return list(torch.randn(size, 3, 16, 16)), [{'box': box} for box in torch.rand(size, 4)]


def test_gates_of_a_detector_are_recorded_and_get_the_gradient_of_the_rate_loss():
    detector = Detector()
    names = list(gated_blocks(detector))
    assert len(names) == 9
    with record_gates(detector) as record:
        losses = detector(*detection_batch(5))
    assert set(losses) == {'l1', 'l2'}
    assert record.gates.shape == (5, 9)
    TargetRateLoss([0.] * 9)(record.gates).backward()
    for name in names:
        assert detector.get_submodule(name).gate.fc2.bias.grad.abs().sum() > 0, name


def test_recorded_gates_are_those_of_forward_gates(train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        logits, gates = forward_gates(model, x)
        with record_gates(model) as record:
            recorded_logits = model(x)
        model(-x)  # after the block: not recorded
    assert torch.equal(record.gates, gates) and torch.equal(recorded_logits, logits)
    assert 0 < gates.mean() < 1


def test_two_passes_in_one_record_are_an_error():
    model = timm.create_model('cifar_resnet20_aig').eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), record_gates(model) as record:
        model(x)
        model.layer1(model.act1(model.bn1(model.conv1(x))))
    with pytest.raises(RuntimeError, match='runs each gated block exactly once'):
        _ = record.gates


@pytest.mark.parametrize('optimized', [False, True])
def test_a_wrapper_in_training_mode_around_a_model_in_eval_needs_no_gradient(optimized, train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    wrapper = nn.Sequential(optimize_for_inference(model) if optimized else model)
    assert wrapper.training
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        expected = forward_gates(model, x)[1]
    assert torch.is_grad_enabled()
    gates = forward_gates(wrapper, x)[1]
    assert torch.equal(gates, expected)
    assert 0 < gates.mean() < 1


@pytest.mark.parametrize('training', [True, False])
def test_forward_gates_works_inside_torch_compile(training, train_norms, train_gates):
    torch.compiler.reset()
    model = train_norms(timm.create_model('cifar_resnet20', layers=(1, 1, 1)))
    train_gates(gate_(model, AIGConfig(gate_norm='none')))
    model.train(training)
    x = torch.randn(4, 3, 16, 16)
    if not training:
        with torch.no_grad():
            expected = forward_gates(model, x)
    compiled = torch.compile(lambda x: forward_gates(model, x), backend='aot_eager')
    with torch.set_grad_enabled(training):
        logits, gates = compiled(x)
    assert gates.shape == (4, 3)
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
    torch.compiler.reset()
    model = train_gates(gate_(train_norms(timm.create_model('cifar_resnet20', layers=(1, 1, 1))))).eval()
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


def test_checkpointing_without_reentry_gives_the_same_gates_and_gradients(train_norms):
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


def test_reentrant_checkpointing_is_an_error_since_it_drops_the_gradient_of_the_gates():
    model = timm.create_model('cifar_resnet20_aig')
    model.set_grad_checkpointing()
    set_reentrant_ckpt(True)
    try:
        with pytest.raises(RuntimeError, match='re-entrant checkpointing'):
            forward_gates(model, torch.randn(4, 3, 16, 16, requires_grad=True))
    finally:
        set_reentrant_ckpt(False)
    assert forward_gates(model, torch.randn(4, 3, 16, 16))[1].requires_grad


def test_forced_and_frozen_gates_need_no_gradient():
    model = timm.create_model('cifar_resnet20_aig')
    x = torch.randn(4, 3, 16, 16)
    with force_gates(model, torch.ones(4, 9)):
        assert not forward_gates(model, x)[1].requires_grad
    with record_gates(model) as record, force_gates(model, torch.ones(4, 9)):
        model(x)
    assert not record.gates.requires_grad
    assert not forward_gates(model.requires_grad_(False), x)[1].requires_grad


def test_gates_of_a_pass_without_grad_are_read_without_grad():
    model = timm.create_model('cifar_resnet20_aig')
    with record_gates(model) as record, torch.no_grad():
        model(torch.randn(4, 3, 16, 16))
    with pytest.raises(RuntimeError, match='no gradient: the pass ran under no_grad'):
        _ = record.gates
    with torch.no_grad():
        assert record.gates.shape == (4, 9)


def test_a_model_can_be_copied_and_pickled_after_a_training_step():
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


class Wrapper(nn.Module):
    """Chooses a module, and has its attributes, as adapters and checkpointing wrappers do."""

    def __init__(self, chosen, *others):
        super().__init__()
        self.others = nn.ModuleList(others)
        self.chosen = chosen

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('chosen'), name)

    def forward(self, x):
        return self.chosen(x)


@pytest.mark.parametrize('wrap_gate, wrap_block', [
    (lambda gate: Wrapper(gate, copy.deepcopy(gate)), lambda block: block),
    (lambda gate: gate, Wrapper),
    (lambda gate: torch.compile(gate, backend='eager'), lambda block: torch.compile(block, backend='eager')),
], ids=['gates', 'blocks', 'compiled'])
def test_wrapped_gates_and_blocks_are_recorded_and_forced(wrap_gate, wrap_block, train_gates):
    torch.compiler.reset()
    model = train_gates(timm.create_model('cifar_resnet20_aig', layers=(1, 2, 1))).eval()
    x, forced = torch.randn(4, 3, 16, 16), torch.rand(4, 4) < .5
    with torch.no_grad():
        expected, gates = forward_gates(model, x)
        with force_gates(model, forced):
            expected_forced = model(x)
    for stage in (model.layer1, model.layer2, model.layer3):
        for i, block in enumerate(stage):
            block.gate = wrap_gate(block.gate)
            stage[i] = wrap_block(block)
    assert len(gated_blocks(model)) == 4
    with torch.no_grad():
        logits, found = forward_gates(model, x)
        assert torch.equal(found, gates) and torch.allclose(logits, expected, atol=1e-5)
        with force_gates(model, forced):
            assert torch.allclose(model(x), expected_forced, atol=1e-5)
    set_gate_offset(model, -1e4)
    assert forward_gates(model, x)[1].sum() == 0


@pytest.mark.parametrize('mode', ['masked', 'sparse'])
def test_a_hook_on_a_gate_changes_which_blocks_run_and_what_is_recorded(mode, train_gates):
    model, x, ran = train_gates(timm.create_model('cifar_resnet20_aig')).eval(), torch.randn(4, 3, 16, 16), []
    set_execution(model, mode)
    block = model.layer2[1]
    block.gate.register_forward_hook(lambda gate, args, z: 1 - z)
    answers = []
    block.gate.fc2.register_forward_hook(lambda fc2, args, logits: answers.append(logits[:, 1] > logits[:, 0]))
    block.conv1.register_forward_hook(lambda conv, args, y: ran.append(len(y)))
    with torch.no_grad():
        gates = forward_gates(model, x)[1]
    assert torch.equal(gates[:, 4], (~answers[0]).float())
    assert sum(ran) == (4 if mode == 'masked' else gates[:, 4].sum())


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
    """Runs another adaptive model in the middle of its own pass."""

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


def test_forced_gates_nest_and_the_inner_ones_win_and_gates_still_run():
    model = timm.create_model('cifar_resnet20_aig').eval()
    x, calls = torch.randn(2, 3, 16, 16), []
    for block in gated_blocks(model).values():
        block.gate.fc2.register_forward_hook(lambda *args: calls.append(1))
    closed = torch.zeros(2, 9, dtype=torch.bool)
    with force_gates(model, open=closed):  # its old keyword
        with force_gates(model.layer2, ~closed[:, :3]):
            assert forward_gates(model, x)[1].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0, 0]] * 2
        assert forward_gates(model, x)[1].sum() == 0
        assert len(calls) == 18
        with pytest.raises(ValueError, match='for the 3 images of the input, not for 2'):
            model(torch.randn(3, 3, 16, 16))


@pytest.mark.parametrize('gates,what', [
    (torch.ones(2, 8), r'\[2, 8\]'), (torch.ones(2, 10), r'\[2, 10\]'), (torch.ones(9), r'\[9\]'),
    (torch.ones(2, 9, 1), r'\[2, 9, 1\]'), ([[1, 0]], r'\[\[1, 0\]\]'), (None, 'None'),
])
def test_forced_gates_of_another_shape_are_refused(gates, what):
    model = timm.create_model('cifar_resnet20_aig').eval()
    with pytest.raises(InputError, match=rf'gates must be a tensor \[batch, 9\] for 9 gated blocks, not {what}'):
        force_gates(model, gates).__enter__()


@pytest.mark.parametrize('grad', [False, True])
def test_forcing_the_gates_of_a_compiled_model_compiles_once(grad, train_norms):
    torch.compiler.reset()
    model = gate_(train_norms(timm.create_model('cifar_resnet20', layers=(1, 1, 1)))).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(4, 3, 16, 16)
    outputs = []
    with torch.set_grad_enabled(grad):
        for i in range(12):  # torch gives up after eight versions
            gates = torch.rand(4, 3) < 0.5
            with force_gates(compiled if i % 2 else model, gates):
                outputs.append(compiled(x))
                torch.testing.assert_close(outputs[-1], model(x))
    assert len(graphs) == 1
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize('optimized', [False, True])
def test_a_gate_offset_for_each_image_replaces_that_of_the_model(optimized, train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    set_gate_offset(model, -1000.)
    model = optimize_for_inference(model, micro_batch=2) if optimized else model
    x = torch.randn(5, 3, 32, 32)
    offsets = torch.tensor([1000., -1000., 0., 1000., -1000.])
    with torch.no_grad():
        with use_gate_offset(offsets):
            gates = forward_gates(model, x)[1]
        with use_gate_offset(0.):
            own = forward_gates(model, x)[1]
        assert gates.mean(1)[[0, 1, 3, 4]].tolist() == [1, 0, 1, 0]
        assert torch.equal(gates[2], own[2]) and 0 < own.mean() < 1
        assert forward_gates(model, x)[1].max() == 0  # outside the block
        for count in (2, 6):
            message = f'5 images of the input, not for {count}'
            with use_gate_offset(offsets.repeat(2)[:count]), pytest.raises(InputError, match=message):
                model(x)


def test_training_adds_the_offset_before_the_noise(train_gates):
    model = timm.create_model('cifar_resnet20_aig').train()
    for block in gated_blocks(model).values():
        nn.init.zeros_(block.gate.fc2.weight)
        nn.init.zeros_(block.gate.fc2.bias)
    x = torch.randn(3000, 3, 8, 8)
    with use_gate_offset(torch.tensor([-1., 0., 1.]).repeat(1000)):
        gates = forward_gates(model, x)[1]
    rates = gates.view(1000, 3, 9).mean((0, 2)).tolist()
    assert rates == pytest.approx(torch.tensor([-1., 0., 1.]).sigmoid().tolist(), abs=.02)


def test_bad_gate_offsets_are_refused():
    for offset in (math.nan, torch.zeros(2, 2)):
        with pytest.raises(InputError, match='offset must be a number'):
            with use_gate_offset(offset):
                pass
