"""Gate: draws, gradient, eval threshold."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from timm.models.resnet import BasicBlock
from timm.utils import ModelEmaV3

import timm_aig
from timm_aig import Gate, InputError


def constant_gate(closed: float, open: float, dtype=torch.float32) -> Gate:
    """A gate in training whose logits are (closed, open) for every input of one channel."""
    gate = Gate(1, 4, norm='none').to(dtype)
    with torch.no_grad():
        gate.fc2.weight.zero_()
        gate.fc2.bias.copy_(torch.tensor([closed, open]))
    return gate


LOGITS = [(0., 0.), (0.1, 2.), (2., 0.1), (-2., 1.), (5., -2.), (1000., 1001.)]


@pytest.mark.parametrize('closed,open', LOGITS)
def test_it_opens_with_the_softmax_probability(closed, open):
    n = 1_000_000
    with torch.no_grad():
        rate = constant_gate(closed, open)(torch.zeros(n, 1, 1, 1)).double().mean()
    p = torch.tensor([closed, open], dtype=torch.float64).softmax(0)[1]
    assert abs(rate - p) <= 4 * (p * (1 - p) / n).sqrt()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision_does_not_change_the_probability(dtype, autocast):
    # Noise of 8 bits would tie in one draw of a hundred, and a tie is closed.
    n = 1_000_000
    gate = constant_gate(0., 0., torch.float32 if autocast else dtype)
    with torch.no_grad(), torch.autocast('cpu', dtype=dtype, enabled=autocast):
        rate = gate(torch.zeros(n, 1, 1, 1, dtype=gate.fc1.weight.dtype)).double().mean()
    assert abs(rate - 0.5) <= 4 * 0.5 / n ** 0.5


def test_draws_are_independent_between_samples():
    n = 1_000_000
    with torch.no_grad():
        z = constant_gate(0., 0.)(torch.zeros(n, 1, 1, 1)).double() - 0.5
    covariance = (z[1:] * z[:-1]).mean()  # its standard error is 0.25 / sqrt(n)
    assert abs(covariance) <= 4 * 0.25 / n ** 0.5


def test_the_gradient_is_that_of_the_gumbel_softmax_with_the_same_noise():
    gate = Gate(3, 5).double()
    with torch.no_grad():
        gate.fc2.weight.normal_()
    x = torch.randn(64, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(64, dtype=torch.float64)

    torch.manual_seed(7)
    z = gate(x)
    got = torch.autograd.grad(z @ upstream, [x, *gate.parameters()])

    torch.manual_seed(7)
    noise = -torch.log(-torch.log(torch.rand(64, 2)))
    hidden = F.relu(F.batch_norm(
        x.mean((2, 3)) @ gate.fc1.weight.T + gate.fc1.bias, None, None, gate.bn.weight, gate.bn.bias, training=True))
    logits = hidden @ gate.fc2.weight.T + gate.fc2.bias
    soft = (logits + noise.double()).softmax(1)[:, 1]
    expected = torch.autograd.grad(soft @ upstream, [x, *gate.parameters()])

    assert torch.equal(z.detach(), (logits + noise)[:, 1].gt((logits + noise)[:, 0]).to(z.dtype))
    assert 0 < z.sum() < 64
    assert expected[0].abs().max() > 1e-3
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_training_without_noise_answers_as_eval_with_the_gradient_of_the_softmax():
    gate = Gate(3, 5, norm='none').double()
    gate.noise = False
    with torch.no_grad():
        gate.fc2.weight.normal_()
        gate.fc2.bias.zero_()
    x = 3 * torch.randn(64, 3, 2, 2, dtype=torch.float64)
    x.requires_grad_()
    upstream = torch.randn(64, dtype=torch.float64)
    z = gate(x)
    got = torch.autograd.grad(z @ upstream, [x, *gate.parameters()])
    soft = gate.logits(x).softmax(1)[:, 1]
    for a, b in zip(got, torch.autograd.grad(soft @ upstream, [x, *gate.parameters()])):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert torch.equal(z.detach(), gate(x).detach())  # nothing is drawn
    assert torch.equal(z.detach().float(), gate.eval()(x))
    assert 0 < z.sum() < 64


def test_the_offset_acts_in_eval_only_with_noise_and_without():
    gate = constant_gate(0., 0.)
    gate.set_offset(1e6)
    with torch.no_grad():
        assert 0.4 < gate(torch.zeros(10_000, 1, 1, 1)).mean() < 0.6
        gate.noise = False
        assert gate(torch.zeros(2, 1, 1, 1)).tolist() == [0., 0.]
        assert gate.eval()(torch.zeros(2, 1, 1, 1)).tolist() == [1., 1.]


def test_sampling_in_eval_draws_even_if_training_does_not_and_changes_nothing():
    model = timm_aig.gate_(nn.Sequential(nn.Sequential(BasicBlock(1, 1))), timm_aig.AIGConfig()).eval()
    model[0][0].gate = constant_gate(0., 1.).eval()
    x = torch.zeros(10_000, 1, 1, 1)
    for noise in (True, False):
        model[0][0].gate.noise = noise
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            drawn = timm_aig.forward_gates(model, x, sample=True)[1]
            assert timm_aig.forward_gates(model, x)[1].min() == 1
        assert drawn.mean().item() == pytest.approx(0.731, abs=4 * 0.0045)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('optimized', [False, True])
def test_sampling_in_eval_adds_the_offset(optimized):
    model = timm_aig.gate_(timm.create_model('cifar_resnet8')).eval()
    for block in timm_aig.gated_blocks(model).values():
        nn.init.zeros_(block.gate.fc2.weight)
        nn.init.zeros_(block.gate.fc2.bias)
    timm_aig.set_gate_offset(model, 1.)
    model = timm_aig.optimize_for_inference(model) if optimized else model
    x = torch.zeros(3000, 3, 8, 8)
    with torch.no_grad():
        own = timm_aig.forward_gates(model, x, sample=True)[1].mean().item()
        with timm_aig.use_gate_offset(-1.):
            other = timm_aig.forward_gates(model, x, sample=True)[1].mean().item()
    assert (own, other) == pytest.approx((0.731, 0.269), abs=4 * .0047)


def test_an_infinite_offset_stays_finite_in_the_mean_of_weights():
    model = timm.create_model('cifar_resnet8_aig').eval()
    x = torch.randn(4, 3, 16, 16)
    for offset, open in ((float('inf'), 1), (float('-inf'), 0)):
        timm_aig.set_gate_offset(model, offset)
        ema = ModelEmaV3(model, decay=.5)
        timm_aig.set_gate_offset(model, offset)
        ema.update(model)
        with torch.no_grad():
            assert (timm_aig.forward_gates(ema.module, x)[1] == open).all()
        with timm_aig.use_gate_offset(offset):
            assert model.train()(x).isfinite().all()


def test_an_unknown_norm_is_named():
    with pytest.raises(InputError, match="norm must be one of bn, ln, none, not 'batch'"):
        Gate(8, norm='batch')


@settings(max_examples=50, deadline=None)
@given(
    closed=st.floats(-1e4, 1e4), open=st.floats(-1e4, 1e4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_answers_are_exactly_0_or_1_and_float32(closed, open, dtype):
    gate = constant_gate(closed, open, dtype)
    z = gate(torch.randn(64, 1, 2, 2, dtype=dtype))
    assert z.shape == (64,)
    assert z.requires_grad
    assert z.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ((z == 0) | (z == 1)).all()
    with torch.no_grad():
        assert gate.eval()(torch.randn(3, 1, 2, 2, dtype=dtype)).tolist() == [float(open > closed)] * 3 or \
            gate.fc2.bias[0] == gate.fc2.bias[1]  # equal after rounding


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('norm', ['bn', 'none'])
def test_training_with_extreme_logits_gives_no_nan(dtype, norm):
    gate = Gate(4, 4, norm)
    with torch.no_grad():
        gate.fc2.weight.copy_(torch.tensor([[1e4, -1e4, 0., 1.], [-1e4, 1e4, 1., 0.]]))
    optimizer = torch.optim.SGD(gate.parameters(), lr=1e-3)
    x = torch.randn(16, 4, 1, 1)
    exact = torch.tensor(True)
    with torch.autocast('cpu', dtype=dtype):
        assert gate.logits(x).abs().max() > 5e3
        assert gate.logits(x).dtype == dtype
        for _ in range(1_000):
            z = gate(x)
            exact &= ((z == 0) | (z == 1)).all()
            optimizer.zero_grad()
            z.sum().backward()
            optimizer.step()  # one NaN in a gradient would stay in the weights
    assert exact
    assert all(p.isfinite().all() for p in gate.parameters())


@pytest.mark.parametrize('uniform', [0., 1.])
def test_uniforms_at_the_ends_of_their_interval_give_finite_noise(monkeypatch, uniform):
    # log(-log(u)) is infinite at both ends, and two infinite logits make softmax NaN.
    calls = []

    def ends(like, **kwargs):
        calls.append(like)
        return torch.full_like(like, uniform, **kwargs)

    monkeypatch.setattr(torch, 'rand_like', ends)
    gate = constant_gate(0.1, 2.)
    z = gate(torch.zeros(2, 1, 1, 1))
    z.sum().backward()
    assert calls
    assert z.tolist() == [1., 1.]
    s = torch.tensor([0.1, 2.]).softmax(0).prod()
    torch.testing.assert_close(gate.fc2.bias.grad, 2 * torch.stack([-s, s]))


def test_a_new_gate_opens_with_probability_0_87():
    gate = Gate(8, 4096)
    assert gate.fc2.bias.tolist() == pytest.approx([0.1, 2.0])
    assert gate.fc2.bias.softmax(0)[1].item() == pytest.approx(0.87, abs=5e-4)
    assert gate.fc2.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert gate.fc2.weight.mean().item() == pytest.approx(0., abs=1e-4)


def test_a_new_gate_is_open_for_every_sample_in_eval():
    z = Gate(8).eval()(torch.randn(1000, 8, 2, 2))
    assert torch.equal(z, torch.ones(1000))


def test_gates_made_on_the_meta_device_are_open_once_timm_has_initialized_the_model():
    with torch.device('meta'):
        model = timm.create_model('vit_tiny_patch16_224_aig', img_size=32)
    for tensor in model.to_empty(device='cpu').state_dict().values():
        tensor.fill_(torch.nan)
    model.init_weights()
    assert timm_aig.forward_gates(model.eval(), torch.randn(2, 3, 32, 32))[1].all()


def test_it_has_the_papers_layers():
    gate = Gate(24, 16)
    assert isinstance(gate.fc1, nn.Linear) and gate.fc1.weight.shape == (16, 24)
    assert isinstance(gate.bn, nn.BatchNorm1d) and gate.bn.num_features == 16
    assert isinstance(gate.fc2, nn.Linear) and gate.fc2.weight.shape == (2, 16)
    assert {k.partition('.')[0] for k in gate.state_dict()} == {'fc1', 'bn', 'fc2', 'offset'}
    assert not [k for k in Gate(24, norm='none').state_dict() if k.startswith('bn')]


def test_in_eval_it_compares_the_logits_of_the_pooled_input():
    gate = Gate(6, 5).double().eval()
    with torch.no_grad():
        for p in gate.parameters():
            p.normal_()
        gate.bn.running_mean.normal_()
        gate.bn.running_var.uniform_(0.5, 2.)
    x = torch.randn(200, 6, 3, 4, dtype=torch.float64)
    pooled = x.sum((2, 3)) / 12
    hidden = pooled @ gate.fc1.weight.T + gate.fc1.bias
    hidden = (hidden - gate.bn.running_mean) / (gate.bn.running_var + gate.bn.eps).sqrt()
    logits = (hidden * gate.bn.weight + gate.bn.bias).clamp(min=0) @ gate.fc2.weight.T + gate.fc2.bias
    expected = (logits[:, 1] > logits[:, 0]).float()
    assert 0 < expected.sum() < 200
    assert torch.equal(gate(x), expected)
    assert torch.equal(gate(x), gate(x))


@settings(max_examples=100, deadline=None)
@given(closed=st.integers(-80, 80), open=st.integers(-80, 80), offset=st.integers(-160, 160))
def test_the_offset_shifts_the_threshold(closed, open, offset):
    # eighths are exact in float32, so that ties, which are closed, are ties
    gate = constant_gate(closed / 8, open / 8).eval()
    gate.set_offset(offset / 8)
    assert gate(torch.zeros(1, 1, 1, 1)).item() == float(open + offset > closed)


def test_without_a_norm_it_trains_at_batch_1():
    gate = Gate(8, norm='none')
    gate(torch.randn(1, 8, 2, 2)).sum().backward()
    assert gate.fc2.bias.grad.abs().sum() > 0


def test_training_a_batch_norm_with_one_image_is_an_error_that_says_what_to_do():
    gate = Gate(8)
    with pytest.raises(InputError, match=r"one image .* drop_last .* gate_norm='none'"):
        gate(torch.randn(1, 8, 4, 4))
    gate.bn.eval()
    assert gate(torch.randn(1, 8, 4, 4)).shape == (1,)


def test_a_training_pass_leaves_nothing_on_the_gate():
    gate = Gate(4)
    before = set(vars(gate))
    gate(torch.randn(8, 4, 2, 2))
    assert set(vars(gate)) == before
    assert not [k for k, v in vars(gate).items() if torch.is_tensor(v)]


def test_scripted_it_answers_the_same():
    gate = Gate(4).eval()
    with torch.no_grad():
        for p in gate.parameters():
            p.normal_()
    gate.set_offset(0.25)
    x = torch.randn(100, 4, 2, 2)
    gate.offset += (gate.logits(x) @ torch.tensor([1., -1.])).median().item()  # open for half of them
    z = gate(x)
    assert 0 < z.sum() < 100
    assert torch.equal(torch.jit.script(gate)(x), z)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_it_has_the_given_dtype_and_device(dtype):
    gate = Gate(4, device='meta', dtype=dtype)
    assert {(p.device.type, p.dtype) for p in gate.parameters()} == {('meta', dtype)}
    assert gate(torch.empty(2, 4, 8, 8, device='meta', dtype=dtype)).shape == (2,)
