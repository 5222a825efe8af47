"""Losses on the gates, against values computed by hand, in one process and in three."""
import os
import sys

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from hypothesis import given, settings, strategies as st
from torch.nn.parallel import DistributedDataParallel

import timm_aig
from timm_aig import AnyBudgetLoss, ComputeTargetLoss, Cost, TargetRateLoss

# Rates of the blocks: 3/4, 1/4, 1.
GATES = torch.tensor([[1., 0., 1.], [1., 0., 1.], [0., 1., 1.], [1., 0., 1.]])
TARGETS = [0.5, 0.5, 0.4]  # errors 1/4, -1/4, 3/5; squares 1/16, 1/16, 9/25, together 0.485
COST = Cost(fixed=100, blocks=(200, 300, 400), gates=1)  # executed 100 + 150 + 75 + 400 = 725 of 1000


@pytest.mark.parametrize('reduction,weight,expected', [
    ('sum', 1., 0.485), ('mean', 1., 0.485 / 3), ('sum', 3., 1.455), ('mean', 0.5, 0.485 / 6), ('sum', 0., 0.),
])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_rate_loss_and_its_gradient_have_the_hand_computed_values(reduction, weight, expected, dtype):
    gates = GATES.to(dtype, copy=True).requires_grad_()
    loss = TargetRateLoss(TARGETS, weight=weight, reduction=reduction)(gates)
    assert TargetRateLoss(TARGETS)(gates).item() == pytest.approx(0.485)  # by default the sum, with weight 1
    assert loss.shape == () and loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    # d/dz of (mean z - t)^2 = 2 (mean z - t) / 4
    gradient = weight * torch.tensor([0.125, -0.125, 0.3], dtype=dtype) / (3 if reduction == 'mean' else 1)
    torch.testing.assert_close(gates.grad, gradient.expand(4, 3))


@pytest.mark.parametrize('annealed,target', [(1., 0.3), (0.5, 0.65), (0., 1.)])
def test_annealing_moves_the_compute_target_from_1(annealed, target):
    loss = ComputeTargetLoss(COST, 0.3)
    loss.annealed = annealed
    assert loss(GATES).item() == pytest.approx((0.725 - target) ** 2)


def test_each_budget_has_an_offset_and_a_target_on_a_line():
    loss = AnyBudgetLoss(COST, least=0.2, groups=5, largest_offset=3.)
    drawn = []
    for _ in range(20):
        offsets = loss.draw_offsets(10)
        assert torch.equal(offsets[::2], offsets[1::2])  # two images each
        groups = offsets[::2].tolist()
        assert groups == sorted(groups) and groups[0] == -3 and groups[4] > 1000  # least and full budget
        assert loss.targets[0] == pytest.approx(0.2)
        for offset, target in zip(groups, loss.targets):  # -3: 0.2, 3: 1
            assert target == pytest.approx(0.2 + 0.8 * (offset + 3) / 6)
        drawn.append(groups[2])
    assert len(set(drawn)) == 20 and -0.6 < min(drawn) < max(drawn) < 0.6  # from the middle fifth


def test_annealing_moves_all_budgets_from_1():
    loss = AnyBudgetLoss(COST, least=0.2)
    loss.annealed = 0.
    assert loss.draw_offsets(4)[:3].tolist() == [0, 0, 0] and loss.targets == [1, 1, 1]
    loss.annealed = 0.5
    assert loss.draw_offsets(4)[0] == -3 and loss.targets[0] == pytest.approx(0.6)


def test_the_budget_loss_and_its_gradient_have_the_hand_computed_values():
    loss = AnyBudgetLoss(COST, least=0.2, groups=3, weight=2.)
    loss.draw_offsets(3)
    loss.targets = [0.2, 0.5]
    # shares: 0.5, 0.8 and, of the last group, which has no target, 1
    gates = torch.tensor([[0., 0., 1.], [0., 1., 1.], [1., 1., 1.]], dtype=torch.float64, requires_grad=True)
    value = loss(gates)
    assert value.item() == pytest.approx(2 * (0.3 ** 2 + 0.3 ** 2) / 2)
    value.backward()
    row = 2 * 0.3 * torch.tensor([0.2, 0.3, 0.4])  # weight / 2 * 2 * error * MACs share of each block
    torch.testing.assert_close(gates.grad, torch.stack([row, row, 0 * row]).double())


def test_groups_of_the_loss_are_those_of_the_offsets():
    loss = AnyBudgetLoss(COST, groups=4)
    for batch in range(4, 12):
        offsets = loss.draw_offsets(batch)
        gates = (offsets[:, None] == offsets.unique()[None, :3]).double()  # block i runs in group i
        with_error = loss(gates)
        loss.targets = [(100 + macs) / 1000 for macs in COST.blocks]
        assert loss(gates).item() == pytest.approx(0, abs=1e-12) and with_error > 0
    with pytest.raises(timm_aig.InputError, match='batch_size must be at least 4'):
        loss.draw_offsets(3)
    assert loss.state_dict() == TargetRateLoss(TARGETS).state_dict() == {}


@pytest.mark.parametrize('weight', [1., 4.])
def test_the_compute_loss_and_its_gradient_have_the_hand_computed_values(weight):
    gates = GATES.double().requires_grad_()
    loss = ComputeTargetLoss(COST, 0.5, weight=weight)(gates)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(weight * 0.225 ** 2)
    loss.backward()
    # 2 (share - t) * block / total / 4
    gradient = weight * 2 * 0.225 * torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64) / 4
    torch.testing.assert_close(gates.grad, gradient.expand(4, 3))


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 9), data=st.data())
def test_the_rate_loss_is_0_exactly_at_its_targets(batch, data):
    gates = torch.tensor(data.draw(st.lists(
        st.lists(st.sampled_from([0., 1.]), min_size=3, max_size=3), min_size=batch, max_size=batch)),
        dtype=torch.float64)
    rates = gates.mean(0).tolist()
    assert TargetRateLoss(rates)(gates).item() == pytest.approx(0, abs=1e-15)
    assert TargetRateLoss([abs(r - 0.5) for r in rates])(gates).item() == pytest.approx(
        sum((r - abs(r - 0.5)) ** 2 for r in rates))


def test_gates_of_half_precision_are_averaged_in_float32():
    gates = torch.zeros(4096, 1, dtype=torch.bfloat16)
    gates[:1229] = 1
    assert TargetRateLoss([0.])(gates).item() == pytest.approx((1229 / 4096) ** 2, rel=1e-6)


@pytest.mark.parametrize('call,message', [
    (lambda: TargetRateLoss([0.5, 1.1]), r'target_rates must be numbers in \[0, 1\]'),
    (lambda: TargetRateLoss(0.5), 'target_rates must be a list, one for each gated block, not 0.5'),
    (lambda: AnyBudgetLoss(COST, 0.5, groups=1), 'groups must be at least 3, not 1'),
    (lambda: TargetRateLoss([-0.1]), r'target_rates must be numbers in \[0, 1\]'),
    (lambda: TargetRateLoss([float('nan')]), r'target_rates must be numbers in \[0, 1\]'),
    (lambda: TargetRateLoss([0.5], reduction='none'), "reduction must be 'sum' or 'mean', not 'none'"),
    (lambda: TargetRateLoss(TARGETS)(GATES[:, :2]), r'gates must be \[batch, 3\], not \[4, 2\]'),
    (lambda: TargetRateLoss(TARGETS)(GATES[0]), r'gates must be \[batch, 3\], not \[3\]'),
    (lambda: TargetRateLoss(TARGETS)(GATES[:0]), 'gates must be .* with a batch of at least 1'),
    (lambda: ComputeTargetLoss(COST, 0.09), r'target must be in \[0.100, 1\]'),
    (lambda: ComputeTargetLoss(COST, 1.1), r'target must be in \[0.100, 1\]'),
    (lambda: ComputeTargetLoss(COST, float('nan')), r'target must be in \[0.100, 1\]'),
    (lambda: ComputeTargetLoss(COST, 0.5)(GATES[:, :2]), r'gates must be \[batch, 3\], not \[1, 2\]|\[4, 2\]'),
])
def test_bad_arguments_are_named_with_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def losses(group=None):
    return {
        'sum': TargetRateLoss(TARGETS, weight=2., process_group=group),
        'mean': TargetRateLoss(TARGETS, reduction='mean', process_group=group),
        'compute': ComputeTargetLoss(COST, 0.3, process_group=group)}


class Answers(nn.Module):
    """Gates with a straight-through gradient to its parameters, without noise."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3).double()
        with torch.no_grad():
            self.fc.weight.copy_(torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5))

    def forward(self, x):
        soft = self.fc(x).sigmoid()
        return (soft > 0.5).double() + (soft - soft.detach())


def inputs():
    return torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def run_process(rank: int, folder: str) -> None:
    """Losses of one process on its share of the batch, with gradients averaged by DDP.

    Of three processes, two are a group and share a batch. The third runs alone in a group of its own.
    """
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo' if sys.platform == 'linux' else 'lo0'
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=3)
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    group = groups[rank // 2]
    results = {}
    for name, loss_fn in losses(group).items():
        for split, sizes in {'equal': [4, 4], 'unequal': [3, 5], 'empty': [8, 0]}.items():
            torch.manual_seed(0)
            model = DistributedDataParallel(Answers(), process_group=group)
            loss = loss_fn(model(inputs().split(sizes)[rank % 2]))
            loss.backward()
            results[name, split] = loss.item(), [p.grad.clone() for p in model.parameters()]

    torch.manual_seed(0)
    model = timm.create_model('cifar_resnet20_aig', gate_norm='none')
    task = timm_aig.AIGTask(model, verbose=False)
    task.prepare_distributed()
    torch.manual_seed(rank)
    result = task(torch.randn(4, 3, 16, 16), torch.arange(4))
    result['loss'].backward()
    results['task'] = (
        result['rate_loss'], result['execution_rate'], {n: p.grad.clone() for n, p in model.named_parameters()},
        sorted(task.get_checkpoint_state()['state_dict']))
    budgets = AnyBudgetLoss(COST)
    results['budgets'] = budgets.draw_offsets(4), budgets.targets
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('gloo'))
    mp.spawn(run_process, args=(folder,), nprocs=3)  # not forked: this process has threads by now
    return [torch.load(f'{folder}/{rank}.pt') for rank in range(3)]


def test_all_processes_draw_the_same_budgets(processes):
    (offsets, targets), *others = (results['budgets'] for results in processes)
    assert len(others) == 2
    assert all(torch.equal(own, offsets) and own_targets == targets for own, own_targets in others)


@pytest.mark.parametrize('split', ['equal', 'unequal', 'empty'])
@pytest.mark.parametrize('name', ['sum', 'mean', 'compute'])
def test_a_group_of_processes_has_the_loss_and_gradient_of_one_process_with_its_whole_batch(name, split, processes):
    torch.manual_seed(0)
    model = Answers()
    expected = losses()[name](model(inputs()))
    expected.backward()
    local = losses()[name](model(inputs()[:4]))
    assert local.item() != pytest.approx(expected.item(), rel=1e-2)  # a local mean would be seen
    if split == 'equal':  # the third process is a group of its own
        assert processes[2][name, split][0] == pytest.approx(local.item(), rel=1e-6)
    for loss, grads in (results[name, split] for results in processes[:2]):
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        for grad, p in zip(grads, model.parameters()):
            assert p.grad.abs().max() > 1e-4
            torch.testing.assert_close(grad, p.grad, rtol=1e-6, atol=1e-12)


def test_the_task_shares_its_rate_loss_and_gradients_between_all_processes(processes):
    (rate_loss, rate, grads, keys), (other_loss, other_rate, other_grads, _), third = (r['task'] for r in processes)
    assert rate_loss == other_loss == third[0]  # global batch
    assert rate != other_rate  # each process has its own images and draws
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name
    assert any(g.abs().sum() > 0 for n, g in grads.items() if '.gate.' in n)
    assert keys == sorted(timm.create_model('cifar_resnet20_aig', gate_norm='none').state_dict())
