"""AIGTask: results, checkpoints, compiling, EMA, distribution (see also test_loss), distillation."""
import copy
import math

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver

from timm_aig import (
    AIGTask,
    AnyBudgetLoss,
    ComputeTargetLoss,
    InputError,
    TargetRateLoss,
    budget_table,
    compute_cost,
    forward_gates,
    gate_,
    gated_blocks,
    set_budget,
)

X, TARGET = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(4)


def create(**kwargs):
    """An adaptive model with four blocks."""
    return timm.create_model('cifar_resnet20_aig', layers=(1, 2, 1), **kwargs)


@pytest.fixture
def model(train_norms, train_gates):
    return train_gates(train_norms(create(target_rate=0.7)))


def compute_loss(model, gates, target):
    """10 (MACs share - target)^2 of the mean gates."""
    cost = compute_cost(model, (3, 32, 32))
    share = (cost.fixed + gates.mean(0).double() @ torch.tensor(cost.blocks).double()) / cost.total
    return 10 * (share - target) ** 2


def test_the_loss_is_the_sum_of_classification_and_gate_loss(model):
    reference = copy.deepcopy(model)
    task = AIGTask(model, nn.CrossEntropyLoss(), verbose=False)
    assert isinstance(task, ClassificationTask)
    torch.manual_seed(1)
    result = task(X, TARGET)
    torch.manual_seed(1)
    logits, gates = forward_gates(reference, X)
    rate_loss = compute_loss(reference, gates, 0.7)
    expected = nn.functional.cross_entropy(logits, TARGET) + rate_loss

    assert set(result) == {'loss', 'output', 'task_loss', 'rate_loss', 'execution_rate', 'block_rates'}
    assert torch.equal(result['output'], logits)
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(result['rate_loss'], rate_loss.detach())
    assert result['execution_rate'].item() == pytest.approx(gates.mean().item())
    torch.testing.assert_close(result['block_rates'], gates.mean(0).detach())
    assert not result['rate_loss'].requires_grad and not result['execution_rate'].requires_grad
    result['loss'].backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f'{name}: {m}')


def test_the_default_loss_on_the_gates_is_that_of_finetunes_default_recipe(finetune):
    args = finetune.parse_args(['--model', 'cifar_resnet20_aig', '--target-rate', '0.4', '--device', 'cpu'])
    model = timm.create_model('cifar_resnet20_aig', target_rate=0.4)
    recipe_task, _ = finetune.create_task(args, model, None, compute_cost(model, (3, 32, 32)))
    own, recipe = AIGTask(model, verbose=False).gate_loss, recipe_task.gate_loss
    assert type(own) is type(recipe) is ComputeTargetLoss
    assert own.target == pytest.approx(recipe.target)
    assert (own.weight, own.cost) == (recipe.weight, recipe.cost)


@pytest.mark.parametrize('kwargs,target', [
    (dict(target_rate=0.3), 0.3),
    (dict(target_rates=[1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1]), 5.5 / 9),
    (dict(schedule='paper', target_rate=0.3), (6 + 3 * 0.3) / 9),
])
def test_the_default_target_is_the_mean_target_rate_of_all_blocks(kwargs, target):
    model = timm.create_model('cifar_resnet20_aig', **kwargs)
    assert AIGTask(model, verbose=False).gate_loss.target == pytest.approx(target)


def test_another_loss_on_the_gates_can_be_given(model):
    loss = TargetRateLoss([0.5] * 4, weight=3.)
    torch.manual_seed(1)
    result = AIGTask(model, gate_loss=loss, verbose=False)(X, TARGET)
    torch.manual_seed(1)
    assert result['rate_loss'] == loss(forward_gates(model, X)[1]).detach()


def test_each_group_of_a_batch_runs_at_its_own_offset():
    model = timm.create_model('cifar_resnet20_aig', layers=(1, 2, 1))
    cost = compute_cost(model)
    loss = AnyBudgetLoss(cost, 0.5, largest_offset=1e4)
    task = AIGTask(model, gate_loss=loss, verbose=False)
    seen = []
    task.trainable_module.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    result = task(torch.randn(8, 3, 16, 16), torch.arange(8))
    assert seen[0][:2].sum() == 0 and seen[0][6:].all()  # the least budget, and all open
    shares = cost.executed(seen[0][:6].view(3, 2, 4).mean(1)) / cost.total
    expected = loss.weight * (shares - torch.tensor(loss.targets)).square().mean()
    torch.testing.assert_close(result['rate_loss'], expected, check_dtype=False)


@pytest.mark.parametrize('make,reason', [
    (lambda: timm.create_model('cifar_resnet20_aig', target_rate=0.01), r'target must be in \[0\.0'),
    (lambda: nn.Sequential(timm.create_model('cifar_resnet20_aig')), 'input_size'),
])
def test_a_model_without_a_default_loss_needs_one(make, reason):
    model = make()
    with pytest.raises(InputError, match=f'gate_loss must be given for this model: .*{reason}') as error:
        AIGTask(model, verbose=False)
    assert error.value.argument == 'gate_loss'
    AIGTask(model, gate_loss=TargetRateLoss([0.5] * 9), verbose=False)


def test_training_moves_the_execution_rate_to_the_target():
    model = create(target_rate=0.3)
    task = AIGTask(model, lambda output, target: output.sum() * 0, gate_loss=TargetRateLoss([0.3] * 4), verbose=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    x = torch.randn(16, 3, 8, 8)
    rates = []
    for _ in range(60):
        result = task(x, None)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        rates.append(result['execution_rate'].item())
    assert rates[0] > 0.7
    assert sum(rates[-20:]) / 20 == pytest.approx(0.3, abs=0.1)


def test_criterion_kwargs_create_timms_criterion_and_soft_targets_work(model):
    task = AIGTask(model, criterion_kwargs=dict(smoothing=0.1), verbose=False)
    assert type(task.criterion).__name__ == 'LabelSmoothingCrossEntropy'
    with pytest.raises(ValueError, match='not both'):
        AIGTask(model, nn.CrossEntropyLoss(), criterion_kwargs=dict(smoothing=0.1))
    soft = nn.functional.one_hot(TARGET, 10).float()
    assert AIGTask(model, nn.CrossEntropyLoss(), verbose=False)(X, soft)['loss'].isfinite()


def test_the_eval_model_is_the_adaptive_model_itself(model):
    task = AIGTask(model, verbose=False)
    assert task.get_eval_model() is model
    state = task.get_checkpoint_state()
    assert list(state) == ['state_dict']
    assert list(state['state_dict']) == list(model.state_dict())
    fresh = create()
    fresh.load_state_dict(state['state_dict'])


@pytest.mark.parametrize('compiled', [False, True])
def test_the_ema_follows_the_model_and_is_adaptive(model, compiled):
    torch.compiler.reset()
    task = AIGTask(model, verbose=False)
    task.setup_ema(decay=0.0)
    if compiled:
        task.compile(backend='eager')
        task.compile_ema(backend='eager')
        assert hasattr(task.get_eval_model(), '_orig_mod') and hasattr(task.get_eval_model(ema=True), '_orig_mod')
    task.eval()
    with torch.no_grad():
        before = task.get_eval_model(ema=True)(X).clone()
        for p in model.parameters():
            p.mul_(1.5)
        task.update_ema(step=2)
        after, current = task.get_eval_model(ema=True)(X), task.get_eval_model()(X)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, current)
    state = task.get_checkpoint_state(ema=True)
    assert list(state) == ['state_dict_ema']
    assert list(state['state_dict_ema']) == list(model.state_dict())
    assert state['state_dict_ema']['fc.weight'].data_ptr() != model.fc.weight.data_ptr()


def test_a_checkpoint_of_timms_saver_resumes(model, tmp_path):
    task = AIGTask(model, verbose=False)
    task.setup_ema(decay=0.0)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=tmp_path, task=task)._save(
        tmp_path / 'task.pth.tar', epoch=2)
    checkpoint = torch.load(tmp_path / 'task.pth.tar', weights_only=False)
    assert {'state_dict', 'state_dict_ema'} <= set(checkpoint)
    assert not {'task_state', 'task_state_ema'} & set(checkpoint)
    assert list(checkpoint['state_dict']) == list(model.state_dict())

    fresh = AIGTask(create(), verbose=False)
    fresh.setup_ema(decay=0.0)
    assert resume_task_checkpoint(fresh, tmp_path / 'task.pth.tar', log_info=False, weights_only=False) == 3
    load_task_ema_checkpoint(fresh, tmp_path / 'task.pth.tar', weights_only=False)
    for ema in (False, True):
        for k, v in fresh.get_eval_model(ema=ema).state_dict().items() if not ema else \
                fresh.get_checkpoint_state(ema=True)['state_dict_ema'].items():
            assert torch.equal(v, model.state_dict()[k]), k


def test_a_checkpoint_loads_into_a_compiled_task(model):
    state = AIGTask(model, verbose=False).get_checkpoint_state()['state_dict']
    task = AIGTask(create(), verbose=False)
    task.compile(backend='eager')
    task.load_checkpoint_state(state)
    assert torch.equal(task.get_eval_model()._orig_mod.fc.weight, model.fc.weight)
    assert list(task.get_checkpoint_state()['state_dict']) == list(state)


def test_a_compiled_task_trains_and_evaluates(model):
    torch.compiler.reset()
    task = AIGTask(model, nn.CrossEntropyLoss(), verbose=False)
    expected = copy.deepcopy(model).eval()(X).detach()
    eval_model = task.compile(backend='aot_eager')
    result = task(X, TARGET)
    result['loss'].backward()
    assert result['output'].shape == (4, 10)
    assert 0 < result['execution_rate'] < 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    fresh = create().eval()
    fresh.load_state_dict(task.get_checkpoint_state()['state_dict'])
    task.eval()
    with torch.no_grad():
        torch.testing.assert_close(eval_model(X), fresh(X))
    assert not torch.allclose(eval_model(X), expected)  # batch statistics moved


def test_it_trains_wrapped_for_distribution(model, tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        task = AIGTask(model, verbose=False)
        assert task.prepare_distributed() is task
        task(X, TARGET)['loss'].backward()
        assert all(p.grad is not None for p in model.parameters())
        with task.no_sync():
            task(X, TARGET)['loss'].backward()
        assert task.get_eval_model() is model
        assert list(task.get_checkpoint_state()['state_dict']) == list(model.state_dict())
    finally:
        dist.destroy_process_group()


def test_moving_the_task_keeps_its_device_dtype_and_exact_targets(model):
    task = AIGTask(model, verbose=False).to(torch.float64)
    assert task.dtype == next(model.parameters()).dtype == torch.float64
    assert task(X.double(), TARGET)['loss'].dtype == torch.float64
    task.to(torch.bfloat16)  # which cannot represent 0.7
    assert task.gate_loss.target == pytest.approx(0.7, abs=1e-12)
    task.to('meta')
    assert task.device.type == next(model.parameters()).device.type == 'meta'


def test_weight_decay_and_gradient_clipping_see_the_adaptive_models_parameters(model):
    task = AIGTask(model, verbose=False)
    assert {id(p) for p in task.get_clip_parameters()} == {id(p) for p in model.parameters()}
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='sgd', lr=0.1, weight_decay=0.2)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert decay[id(model.layer1[0].gate.fc1.weight)] == decay[id(model.layer1[0].conv1.weight)] == 0.2
    assert decay[id(model.layer1[0].gate.fc1.bias)] == decay[id(model.layer1[0].gate.bn.weight)] == 0.0
    assert len(decay) == len(list(model.parameters()))


@pytest.mark.parametrize('weight,temperature', [(0., 1.), (0.3, 1.), (0.3, 4.), (1., 4.)])
def test_distillation_is_the_divergence_of_softened_distributions_with_its_gradient(model, weight, temperature):
    teacher, reference = timm.create_model('cifar_resnet20'), copy.deepcopy(model)
    task = AIGTask(
        model, nn.CrossEntropyLoss(), teacher=teacher, distill_weight=weight, distill_temperature=temperature,
        verbose=False)
    torch.manual_seed(1)
    loss = task(X, TARGET)['loss']
    loss.backward()

    torch.manual_seed(1)
    logits, gates = forward_gates(reference, X)
    with torch.no_grad():
        p = (teacher(X) / temperature).softmax(1)
    log_q = logits / temperature - (logits / temperature).exp().sum(1, keepdim=True).log()
    divergence = (p * (p.log() - log_q)).sum(1).mean() * temperature ** 2
    expected = (1 - weight) * nn.functional.cross_entropy(logits, TARGET) + weight * divergence
    expected = expected + compute_loss(reference, gates, 0.7)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    expected.backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f'{name}: {m}')


def test_a_teacher_with_other_classes_is_an_error(model):
    teacher = timm.create_model('cifar_resnet20', num_classes=1)
    task = AIGTask(model, teacher=teacher, verbose=False)
    with pytest.raises(InputError, match=r'teacher must have the classes of the model: .* \[4, 1\]'):
        task(X, TARGET)


def test_the_teacher_stays_in_eval_frozen_and_untouched(model):
    teacher = timm.create_model('cifar_resnet20').train()
    before = copy.deepcopy(teacher.state_dict())
    task = AIGTask(model, nn.CrossEntropyLoss(), teacher=teacher, verbose=False)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    for mode in (True, False, True):
        task.train(mode)
        assert task.training is model.training is mode
        assert not any(module.training for module in teacher.modules())
        task(X, TARGET)['loss'].backward()
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not [k for k in task.get_checkpoint_state()['state_dict'] if 'teacher' in k]


def test_a_teacher_that_shares_its_parameters_with_the_model_is_refused_and_nothing_is_frozen():
    parent = timm.create_model('cifar_resnet20')
    with pytest.raises(InputError, match='teacher must not share parameters with the model'):
        AIGTask(gate_(parent), teacher=parent)
    assert parent.training and all(p.requires_grad for p in parent.parameters())


def test_training_starts_without_the_offset_and_budgets_of_the_weights():
    model = timm.create_model('cifar_resnet32_aig.fmnist_t06', pretrained=True)
    set_budget(model, .5)
    AIGTask(model, verbose=False)
    assert budget_table(model) == ()
    assert all(block.gate.offset == 0 for block in gated_blocks(model).values())


@pytest.mark.parametrize('kwargs,message', [
    (dict(distill_weight=1.1), r'distill_weight must be in \[0, 1\], not 1.1'),
    (dict(distill_weight=-0.1), r'distill_weight must be in \[0, 1\], not -0.1'),
    (dict(distill_weight=math.nan), r'distill_weight must be in \[0, 1\], not nan'),
    (dict(distill_temperature=0.), r'distill_temperature must be above 0, not 0.0'),
    (dict(model=nn.Linear(1, 1)), r'model \(Linear\) has no gated blocks'),
])
def test_bad_arguments_are_refused(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        AIGTask(**dict(dict(model=model), **kwargs))


def test_budgets_are_not_trained_with_gradient_checkpointing(model):
    """The gates would run again in the backward pass, without the offsets of their images."""
    model.set_grad_checkpointing(True)
    cost = compute_cost(model, (3, 16, 16))
    with pytest.raises(InputError, match='gate_loss must be another with gradient checkpointing'):
        AIGTask(model, gate_loss=AnyBudgetLoss(cost, 0.5))(X, TARGET)
    AIGTask(model, gate_loss=ComputeTargetLoss(cost, 0.6))(X, TARGET)['loss'].backward()
    teacher, student = create().eval(), create()
    teacher.set_grad_checkpointing(True)  # never runs backward
    AIGTask(student, gate_loss=AnyBudgetLoss(cost, 0.5), teacher=teacher)(X, TARGET)['loss'].backward()
