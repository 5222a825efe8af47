"""compute_cost and summary: known values, the paper's shares, and a network counted by hand."""
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.resnet import BasicBlock, Bottleneck
from torch.utils.flop_counter import FlopCounterMode

import timm_aig
from timm_aig import AIGConfig, Cost, InputError, compute_cost, gate_


def resnet(arch: str, **kwargs):
    return timm.create_model(arch, device='meta', **kwargs)


@pytest.mark.parametrize('arch,size,macs', [
    ('resnet18', 224, 1_814_073_344),
    ('resnet50', 224, 4_089_184_256),
    ('resnet101', 224, 7_801_405_440),
    ('cifar_resnet20', 32, 40_813_184),
])
def test_a_static_model_has_the_known_macs_and_all_are_fixed(arch, size, macs):
    cost = compute_cost(resnet(arch), (3, size, size))
    assert cost == Cost(fixed=macs, blocks=(), gates=0)
    assert cost.total == macs
    assert cost.executed(torch.zeros(3, 0)).tolist() == [macs] * 3


@pytest.mark.parametrize('arch,t,share', [
    ('resnet50_aig', 0.4, 0.717), ('resnet50_aig', 0.5, 0.760), ('resnet50_aig', 0.6, 0.802),
    ('resnet50_aig', 0.7, 0.845), ('resnet101_aig', 0.3, 0.506), ('resnet101_aig', 0.5, 0.647),
])
def test_the_schedules_of_the_paper_execute_the_shares_it_reports(arch, t, share):
    model = resnet(arch, target_rate=t, schedule='paper')
    cost = compute_cost(model, (3, 224, 224))
    rates = torch.tensor([[block.target_rate for block in timm_aig.gated_blocks(model).values()]])
    assert f'{cost.executed(rates).item() / cost.total:.3f}' == f'{share:.3f}'
    # the paper: the gates are under 0.04 %
    assert f'{100 * cost.gates / cost.total:.3f}' == {'resnet50_aig': '0.004', 'resnet101_aig': '0.006'}[arch]


class Tiny(nn.Module):
    """A stem, a block of each kind and a head, small enough to count by hand."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(BasicBlock(8, 8))
        self.layer2 = nn.Sequential(Bottleneck(8, 4, stride=2, downsample=nn.Conv2d(8, 16, 1, stride=2, bias=False)))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


STEM = 10 * 6 * 8 * 3 * 9
BASIC = 10 * 6 * 2 * 8 * 8 * 9
BOTTLENECK = 10 * 6 * 4 * 8 + 5 * 3 * 4 * 4 * 9 + 5 * 3 * 16 * 4
SHORTCUT = 5 * 3 * 16 * 8
HEAD = 16 * 5
GATE = 8 * 16 + 16 * 2


def test_a_tiny_network_matches_a_count_by_hand():
    model = gate_(Tiny())
    cost = compute_cost(model, (3, 10, 6))
    assert cost.blocks == (BASIC, BOTTLENECK)
    assert cost.gates == 2 * GATE
    assert cost.fixed == STEM + SHORTCUT + HEAD + 2 * GATE
    assert cost.total == STEM + BASIC + BOTTLENECK + SHORTCUT + HEAD + 2 * GATE
    assert compute_cost(Tiny(), (3, 10, 6)).total == cost.static == cost.total - 2 * GATE


def test_a_block_without_a_gate_is_fixed_and_adds_no_gate():
    cost = compute_cost(gate_(Tiny(), AIGConfig(target_rates=[1, 0.5])), (3, 10, 6))
    assert cost.blocks == (BOTTLENECK,)
    assert cost.gates == GATE
    assert cost.fixed == STEM + BASIC + SHORTCUT + HEAD + GATE


def test_executed_counts_each_sample():
    cost = Cost(fixed=100, blocks=(20, 3), gates=1)
    gates = torch.tensor([[0., 0.], [1., 0.], [0., 1.], [1., 1.]])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.bool):
        assert cost.executed(gates.to(dtype)).tolist() == [100, 120, 103, 123]
    with pytest.raises(ValueError, match=r'gates must be \[batch, 2\], not \[4, 1\]'):
        cost.executed(gates[:, :1])
    with pytest.raises(ValueError, match=r'gates must be \[batch, 2\], not \[2\]'):
        cost.executed(gates[0])


def test_executed_is_exact_for_gigamacs_and_differentiable():
    cost = Cost(fixed=4_000_000_001, blocks=(300_000_007, 10), gates=0)
    gates = torch.tensor([[1., 0.], [0.5, 1.]], requires_grad=True)
    executed = cost.executed(gates)
    assert executed.tolist() == [4_300_000_008, 4_150_000_014.5]
    executed.sum().backward()
    torch.testing.assert_close(gates.grad, torch.tensor([[300_000_007., 10.]] * 2))


def test_counting_leaves_the_model_as_it_was():
    model = timm.create_model('cifar_resnet20_aig').train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    compute_cost(model, (3, 32, 32))
    assert torch.equal(torch.rand(4), expected)  # no random number drawn
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_count_is_the_same_while_another_thread_runs_another_model():
    model, other = gate_(Tiny()), Tiny().eval()
    expected = compute_cost(model, (3, 10, 6))
    x, stop = torch.randn(1, 3, 10, 6), threading.Event()

    def run():
        passes = 0
        while not stop.is_set():
            with torch.no_grad():
                other(x)
            passes += 1
        return passes

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        counts = [compute_cost(model, (3, 10, 6)) for _ in range(30)]
        stop.set()
        assert running.result() > 30
    assert counts == [expected] * 30


def test_a_model_runs_and_is_counted_at_once():
    model = timm.create_model('cifar_resnet20_aig').eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        expected = model(x)
        counting = pool.submit(lambda: [compute_cost(model, (3, 8, 8)) for _ in range(5)])
        while not counting.done():
            assert torch.equal(model(x), expected)
        assert counting.result() == [compute_cost(model, (3, 8, 8))] * 5


@pytest.mark.parametrize('arch', ['vit_tiny_patch16_224', 'resnet50_clip', 'convnext_atto'])
def test_attention_and_other_networks_are_counted_as_pytorch_counts_them(arch):
    model = resnet(arch)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.empty(1, 3, 224, 224, device='meta'))
    assert compute_cost(model).fixed == counter.get_total_flops() // 2


def test_the_input_size_is_the_models_own_with_its_own_channels():
    model = resnet('resnet18_aig', in_chans=1)
    assert compute_cost(model) == compute_cost(model, (1, 224, 224))
    assert compute_cost(resnet('cifar_resnet20_aig')) == compute_cost(resnet('cifar_resnet20_aig'), (3, 32, 32))
    assert timm_aig.summary(model) == timm_aig.summary(model, (1, 224, 224))
    model = timm.create_model('vit_tiny_patch16_224_aig', img_size=64, in_chans=1, depth=2)
    assert compute_cost(model) == compute_cost(model, (1, 64, 64))


@pytest.mark.parametrize('make', [
    lambda: timm.create_model('resnet18_aig').to(torch.bfloat16),
    lambda: timm.create_model('resnet18_aig').double(),
    lambda: timm.create_model('resnet18_aig').to(memory_format=torch.channels_last),
    lambda: timm.create_model('resnet18_aig', features_only=True, out_indices=(4,)),
])
def test_dtype_layout_and_a_missing_head_do_not_change_the_block_counts(make):
    cost = compute_cost(resnet('resnet18_aig'), (3, 64, 64))
    other = compute_cost(make(), (3, 64, 64))
    assert other.blocks == cost.blocks and other.gates == cost.gates
    assert cost.fixed - other.fixed in (0, 512 * 1000)


def test_the_count_does_not_depend_on_execution_gate_offset_and_inference_mode():
    model = timm.create_model('cifar_resnet20_aig')
    expected = compute_cost(model, (3, 16, 16))
    timm_aig.set_gate_offset(model, -100.)
    for execution in ('auto', 'masked', 'sparse'):
        timm_aig.set_execution(model, execution)
        assert compute_cost(model, (3, 16, 16)) == expected
    with torch.inference_mode():
        assert compute_cost(model, (3, 16, 16)) == expected


@pytest.mark.parametrize('input_size', [(224, 224), (3, 0, 224), (1, 3, 224, 224), (3, -1, 4), 224])
def test_a_bad_input_size_is_an_error(input_size):
    for count in (compute_cost, timm_aig.summary):
        with pytest.raises(ValueError, match=r'input_size must be \(C, H, W\), each above 0'):
            count(resnet('resnet18'), input_size)


def test_counting_does_not_call_the_users_hooks():
    model, seen = timm.create_model('cifar_resnet20_aig'), []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(output.numpy()))
    expected = compute_cost(timm.create_model('cifar_resnet20_aig'), (3, 16, 16))
    assert compute_cost(model, (3, 16, 16)) == expected and not seen
    with torch.no_grad():
        model(torch.zeros(2, 3, 16, 16))
    assert len(seen) == 1  # of the model itself they stay


def test_a_model_that_cannot_be_counted_is_an_error():
    optimized = timm_aig.optimize_for_inference(timm.create_model('cifar_resnet20_aig'))
    vit = timm.create_model('vit_tiny_patch16_224', img_size=32)
    for model, size, message in (
            (resnet('resnet18'), (1, 64, 64), r'input_size \(1, 64, 64\) cannot be run by the model'),
            (vit, (3, 64, 64), r'input_size \(3, 64, 64\) cannot be run by the model'),
            (nn.Sequential(nn.Conv2d(3, 4, 1)), None, r'input_size must be given .*: Sequential has no pretrained_cfg'),
            (optimized, (3, 32, 32), 'Take the original of an optimized one')):
        for count in (compute_cost, timm_aig.summary):
            with pytest.raises(InputError, match=message):
                count(model, size)


def cells(table):
    """Cells of each line of a summary."""
    return [[cell.strip() for cell in line.split('  ') if cell.strip()] for line in table.splitlines()]


def test_the_summary_has_every_block_and_adds_up():
    model = resnet('resnet50_aig', schedule='paper', target_rate=.5)
    cost = compute_cost(model, (3, 224, 224))
    head, *rows, other, total = cells(timm_aig.summary(model))
    assert head == ['block', 'kind', 'target', 'measured', 'MACs', 'share']
    assert [row[0] for row in rows] == [f'layer{s}.{i}' for s, n in enumerate((3, 4, 6, 3), 1) for i in range(n)]
    gated = timm_aig.gated_blocks(model)
    targets = {row[0]: row[2] for row in rows if row[2] != 'always on'}
    assert targets == {name: f'{block.target_rate:g}' for name, block in gated.items()}
    macs = {row[0]: int(row[-2].replace(',', '')) for row in (*rows, other, total)}
    assert [macs[name] for name in gated] == list(cost.blocks)
    assert macs.pop('total') == cost.total == sum(macs.values())
    assert f'{len(gated)} of 16 blocks gated' in total[1]
    assert sum(float(row[-1][:-1]) for row in (*rows, other)) == pytest.approx(100, abs=1)


def test_the_summary_shows_measured_rates_and_their_macs():
    model = resnet('cifar_resnet20_aig', in_chans=1)
    gates = torch.bernoulli(torch.full((50, 9), .4))
    cost = compute_cost(model, (1, 32, 32))
    table = timm_aig.summary(model, rates=gates.mean(0))
    assert [float(row[3]) for row in cells(table)[1:10]] == pytest.approx(gates.mean(0).tolist(), abs=6e-4)
    executed = cost.executed(gates).mean().item()
    assert f'mean image: {executed:,.0f} MACs, {executed / (cost.total - cost.gates):.1%} of' in table


@pytest.mark.parametrize('rates', [[.5] * 8, torch.zeros(0, 9)])
def test_rates_that_do_not_fit_are_an_error(rates):
    with pytest.raises(ValueError, match=r'rates must be 9, one for each gated block, not [08]'):
        timm_aig.summary(resnet('cifar_resnet20_aig'), rates=rates)


def test_the_summary_of_a_static_model_has_no_gates():
    rows = cells(timm_aig.summary(resnet('resnet18'), (3, 64, 64)))
    assert len(rows) == 11 and all('always on' in row for row in rows[1:10]) and '0 of 8 blocks gated' in rows[-1][1]


def test_counting_inside_a_gate_offset_changes_neither_the_count_nor_the_offset():
    model = timm.create_model('cifar_resnet8_aig').eval()
    x = torch.randn(3, 3, 32, 32)
    expected = compute_cost(model)
    for offset in (-100., torch.tensor([-100., 100., -100.])):
        with timm_aig.use_gate_offset(offset):
            assert compute_cost(model) == expected
            gates = timm_aig.forward_gates(model, x)[1]
        assert gates.mean(1).tolist() == [float(o > 0) for o in torch.as_tensor(offset).expand(3)]
