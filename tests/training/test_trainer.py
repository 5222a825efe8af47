"""Trainer: updates, skipped updates, resuming, and two processes."""
import copy
import ctypes
import dataclasses
import math
import os
import signal
import sys
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from timm.data import Mixup
from timm.layers import GroupNorm
from timm.models.resnet import BasicBlock
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import timm_aig
from timm_aig import AIGTask, ComputeTargetLoss, InputError, TargetRateLoss
from timm_aig.training.checkpoint import CheckpointError, Checkpoints
from timm_aig.training.schedule import GateSchedule
from timm_aig.training.trainer import NonFiniteError, Stopped, Trainer
from timm_aig.training.update import UpdateConfig


def batches(count=6, size=4, classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(size) % classes)
        for _ in range(count)]


def small_model(**kwargs):
    """Adaptive model with four blocks: layer1.0, layer2.0, layer2.1, layer3.0."""
    torch.manual_seed(0)
    return timm.create_model('cifar_resnet20_aig', layers=(1, 2, 1), num_classes=3, **kwargs)


UPDATE_FIELDS = {field.name for field in dataclasses.fields(UpdateConfig)}


def make_trainer(model=None, loader=None, epochs=2, criterion=None, ema=False, sched='cosine', opt='sgd', **kwargs):
    """Trainer of small_model; its keywords may include those of UpdateConfig."""
    model = small_model() if model is None else model
    loader = batches() if loader is None else loader
    task = AIGTask(model, criterion or nn.CrossEntropyLoss(), verbose=False)
    if ema:
        task.setup_ema(decay=0.9)
    optimizer = create_optimizer_v2(model, opt=opt, lr=0.02, momentum=0.9)
    scheduler = create_scheduler_v2(
        optimizer, sched, num_epochs=epochs, decay_milestones=[1], step_on_epochs=False, updates_per_epoch=6)[0]
    update = UpdateConfig(**{name: kwargs.pop(name) for name in UPDATE_FIELDS & kwargs.keys()})
    return Trainer(task, loader, optimizer, epochs, scheduler, update=update, **kwargs)


def fit(trainer):
    """Train to the end; returns the results of each epoch."""
    results = []
    trainer.fit(lambda epoch, result: results.append(result))
    return results


def watch_updates(trainer, before=lambda: None, after=lambda done: None):
    """Call before() ahead of each update and after(whether it was done) behind it."""
    finish = trainer.updater.finish

    def watched(*args, **kwargs):
        before()
        problem = finish(*args, **kwargs)
        after(problem is None)
        return problem

    trainer.updater.finish = watched


def weights(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class NaNAt:
    """Cross-entropy that is NaN or infinite in the calls `at`; `detached` keeps its gradients finite."""

    def __init__(self, at, value=math.nan, detached=False):
        self.at, self.value, self.detached, self.calls = at, value, detached, 0

    def __call__(self, output, target):
        loss = nn.functional.cross_entropy(output, target)
        self.calls += 1
        if self.calls - 1 not in self.at:
            return loss
        return loss + self.value if self.detached else loss * self.value


def test_memory_allocation_is_the_callers(monkeypatch):
    monkeypatch.setattr(ctypes, 'CDLL', lambda *args: pytest.fail('a library of the system is changed'))
    assert len(fit(make_trainer(epochs=1))) == 1


def test_an_epoch_is_the_plain_loop_over_its_batches():
    trainer = make_trainer(epochs=1, sched='none', cost=timm_aig.compute_cost(small_model(), (3, 8, 8)))
    reference = copy.deepcopy(trainer.model)
    results, = fit(trainer)

    optimizer = create_optimizer_v2(reference, opt='sgd', lr=0.02, momentum=0.9)
    task = AIGTask(reference, nn.CrossEntropyLoss(), verbose=False).train()
    timm.utils.random_seed(0, 0)
    losses, rates = [], []
    for x, y in batches():
        result = task(x.to(memory_format=torch.channels_last), y)
        losses.append(result['loss'].item())
        rates.append(result['block_rates'])
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
    assert_equal(weights(trainer), dict(reference.state_dict()))
    assert results['loss'] == pytest.approx(sum(losses) / 6)
    mean = torch.stack(rates).mean(0).tolist()
    assert [results[f'rate_{name}'] for name in timm_aig.gated_blocks(reference)] == pytest.approx(mean)
    assert results['execution_rate'] == pytest.approx(sum(mean) / 4)
    cost = trainer.cost
    share = (cost.fixed + sum(m * b for m, b in zip(mean, cost.blocks))) / (cost.total - cost.gates)
    assert results['macs_share'] == pytest.approx(share)


@pytest.mark.parametrize('amp_dtype', [None, torch.float16])
@pytest.mark.parametrize('value,detached', [(math.nan, False), (math.inf, False), (math.inf, True), (math.nan, True)])
def test_stop_says_at_which_step_and_keeps_the_weights(value, detached, amp_dtype):
    trainer = make_trainer(criterion=NaNAt({8}, value, detached), amp_dtype=amp_dtype)
    with pytest.raises(NonFiniteError, match=r'epoch 2, step 8: the loss is not finite, the outputs of all gates are'):
        trainer.fit()
    assert trainer.step == 8
    assert all(v.isfinite().all() for k, v in weights(trainer).items() if 'running' not in k)


def test_gradients_that_overflow_float16_lower_the_scale_and_leave_out_the_step():
    trainer = make_trainer(epochs=1, amp_dtype=torch.float16)
    scaler, fc = trainer.updater.scaler, trainer.model.fc.weight
    fc.register_hook(lambda grad: grad * (math.inf if trainer.step == 0 else 1))
    before, scale = fc.clone(), scaler.get_scale()
    scales, moved = [], []
    watch_updates(trainer, after=lambda done: (scales.append(scaler.get_scale()), moved.append(not fc.equal(before))))
    trainer.fit()
    assert scales == [scale / 2] * 6 and moved == [False] + [True] * 5
    assert trainer.skipped == 0 and trainer.step == 6


@pytest.mark.parametrize('nonfinite', ['stop', 'skip'])
def test_gradients_that_are_never_finite_in_float16_are_an_error_once_the_scale_is_below_1(nonfinite):
    trainer = make_trainer(epochs=3, amp_dtype=torch.float16, nonfinite=nonfinite)
    trainer.updater.scaler = torch.amp.GradScaler('cpu', init_scale=2. ** 4)
    trainer.model.fc.weight.register_hook(lambda grad: grad * math.nan)
    before = trainer.model.fc.weight.clone()
    if nonfinite == 'stop':
        with pytest.raises(NonFiniteError, match='step 5: the loss is finite, gradients outside the gates are not'):
            trainer.fit()
    else:
        trainer.fit()
        assert trainer.skipped == 18 - 5  # the scale takes five updates to fall below 1
    assert torch.equal(trainer.model.fc.weight, before)


@pytest.mark.parametrize('amp_dtype', [None, torch.float16])
def test_an_epoch_of_skipped_updates_keeps_weights_and_statistics_and_has_no_results(amp_dtype):
    trainer = make_trainer(epochs=1, criterion=NaNAt(set(range(6))), nonfinite='skip', amp_dtype=amp_dtype)
    before = weights(trainer)
    assert fit(trainer) == [{}] and trainer.skipped == 6
    assert_equal(weights(trainer), before)


def test_stop_names_the_gate_whose_output_or_gradient_is_not_finite():
    trainer = make_trainer()
    trainer.model.layer3[0].gate.fc2.bias.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError, match=r'step 0: the loss is finite, gradients of gates layer3.0 are not$'):
        trainer.fit()
    trainer = make_trainer()
    trainer.model.layer2[1].gate.fc1.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r'step 0: gate layer2\.1 is the first whose output is not finite'):
        trainer.fit()


@pytest.mark.parametrize('detached', [False, True])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_skipped_update_keeps_weights_statistics_and_ema_and_the_training_goes_on(accumulate, detached):
    bad = {2, 3} if accumulate == 2 else {2}  # calls of the second or third update
    trainer = make_trainer(
        epochs=1, criterion=NaNAt(bad, detached=detached), ema=True, nonfinite='skip', grad_accum_steps=accumulate)
    seen = []

    def after(done):
        ema = trainer.task.get_checkpoint_state(ema=True)['state_dict_ema']
        seen.append((done, weights(trainer), {k: v.clone() for k, v in ema.items()}))

    watch_updates(trainer, after=after)
    result, = fit(trainer)
    bad_update = 1 if accumulate == 2 else 2
    assert [done for done, _, _ in seen] == [i != bad_update for i in range(6 // accumulate)]
    assert_equal(seen[bad_update][1], seen[bad_update - 1][1])
    assert_equal(seen[bad_update][2], seen[bad_update - 1][2])
    assert any('num_batches_tracked' in k for k in seen[0][1])
    assert not torch.equal(seen[-1][1]['fc.weight'], seen[bad_update][1]['fc.weight'])
    assert trainer.skipped == 1 and trainer.step == 6 // accumulate
    assert all(math.isfinite(value) for value in result.values())
    assert all(v.isfinite().all() for v in weights(trainer).values())


def test_results_are_means_over_the_updates_that_were_not_skipped():
    class Call(NaNAt):
        def __call__(self, output, target):
            return super().__call__(output, target) * 0 + self.calls

    trainer = make_trainer(epochs=1, criterion=Call({2}), nonfinite='skip')
    trainer.task.gate_loss.weight = 0.
    assert fit(trainer)[0]['loss'] == (1 + 2 + 4 + 5 + 6) / 5


class DeviceReads(TorchDispatchMode):
    """Counts what would wait for an accelerator: item(), bool() and the like, tolist(), cpu(), numpy()."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        for name in ('tolist', 'cpu', 'numpy'):
            monkeypatch.setattr(torch.Tensor, name, self.counted(getattr(torch.Tensor, name)))

    def counted(self, method):
        def call(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)
        return call

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('amp_dtype,nonfinite', [(None, 'stop'), (torch.bfloat16, 'stop'), (torch.float16, 'skip')])
def test_an_update_reads_the_device_once_however_many_batches_it_has(amp_dtype, nonfinite, monkeypatch):
    trainer = make_trainer(
        loader=batches(12), epochs=1, grad_accum_steps=2, ema=True, clip_grad=1., amp_dtype=amp_dtype,
        nonfinite=nonfinite, cost=timm_aig.compute_cost(small_model(), (3, 8, 8)))
    before, dtypes = trainer.model.fc.weight.clone(), set()
    trainer.model.fc.register_forward_hook(lambda fc, args, logits: dtypes.add(logits.dtype))
    with DeviceReads(monkeypatch) as reads:
        result, = fit(trainer)
    assert dtypes == {amp_dtype or torch.float32} and not torch.equal(trainer.model.fc.weight, before)
    assert all(math.isfinite(v) for v in result.values())
    assert trainer.step == 6 and trainer.skipped == 0 and 'macs_share' in result
    assert reads.count <= 6 + 2  # two for the results of the epoch


def test_the_progress_bar_reads_the_results_once_an_interval(monkeypatch):
    monkeypatch.setattr('timm_aig.training.trainer.LOG_INTERVAL', 4)
    shown = []
    monkeypatch.setattr(tqdm, 'set_postfix', lambda self, values, refresh: shown.append(values))
    trainer = make_trainer(loader=batches(10), epochs=1, cost=timm_aig.compute_cost(small_model(), (3, 8, 8)))
    trainer.fit()
    assert [list(values) for values in shown] == [['loss', 'top1', 'execution_rate', 'macs_share']] * 2


def snapshots(trainer):
    """List that collects the states that a trainer saves."""
    states = []
    trainer.checkpoints.save = lambda step, state: states.append(copy.deepcopy(state))
    return states


@pytest.mark.parametrize('opt,sched,ema,accumulate,mixup', [
    ('sgd', 'cosine', False, 1, False), ('adamw', 'multistep', True, 1, False), ('sgd', 'cosine', True, 2, True)])
def test_resumed_from_any_checkpoint_it_ends_with_the_same_weights_optimizer_and_scheduler(
        opt, sched, ema, accumulate, mixup, tmp_path):
    def make():
        model = small_model(drop_rate=0.1)
        return make_trainer(
            model, opt=opt, sched=sched, ema=ema, grad_accum_steps=accumulate, checkpoint_interval=1,
            criterion=timm.loss.SoftTargetCrossEntropy() if mixup else None,
            mixup=Mixup(0.4, num_classes=3, label_smoothing=0.) if mixup else None, clip_grad=1.,
            gate_schedule=GateSchedule(model, noise_off=.2), checkpoints=Checkpoints(tmp_path, {}))

    trainer = make()
    states = snapshots(trainer)
    results = fit(trainer)
    steps = 12 // accumulate
    assert [state['step'] for state in states] == list(range(steps + 1))
    for state in [states[step] for step in (1, steps // 2, steps // 2 + 1, steps)]:
        resumed = make()
        snapshots(resumed)
        torch.randn(5)  # the state of the generators must not matter
        resumed.load_state_dict(copy.deepcopy(state))
        again = {}
        resumed.fit(again.__setitem__)
        assert_equal(weights(resumed), weights(trainer))
        assert again == {epoch: results[epoch] for epoch in range(state['epoch'], 2)}
        a, b = (t.optimizer.state_dict() for t in (resumed, trainer))
        assert a['param_groups'] == b['param_groups']
        for key in a['state']:
            for name, value in a['state'][key].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(b['state'][key][name]))
        assert resumed.scheduler.state_dict() == trainer.scheduler.state_dict()
        if ema:
            assert_equal(*(t.task.get_checkpoint_state(ema=True)['state_dict_ema'] for t in (resumed, trainer)))


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_checkpoint_after_the_running_update(signum, tmp_path):
    trainer = make_trainer(checkpoints=Checkpoints(tmp_path, {}))
    handler = signal.getsignal(signum)
    watch_updates(trainer, before=lambda: os.kill(os.getpid(), signum) if trainer.step == 3 else None)
    with pytest.raises(Stopped, match=f'by {signum.name} in epoch 1 after step 4, saved') as stopped:
        trainer.fit()
    assert stopped.value.signum == signum and signal.getsignal(signum) is handler
    assert trainer.checkpoints.load_last()[0]['step'] == 4


def test_a_second_ctrl_c_does_not_wait_for_the_running_update(tmp_path):
    trainer = make_trainer(checkpoints=Checkpoints(tmp_path, {}))
    watch_updates(trainer, before=lambda: [os.kill(os.getpid(), 2) for _ in range(2)] if trainer.step == 3 else None)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 3


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_update(tmp_path):
    trainer = make_trainer(checkpoints=Checkpoints(tmp_path, {}))
    tmp_path.rmdir()
    tmp_path.write_text('a file')
    with pytest.raises((CheckpointError, OSError)):
        trainer.fit()
    assert trainer.step == 0


def test_a_loader_with_fewer_batches_than_its_length_is_refused():
    class Short(list):
        def __len__(self):
            return 8

    trainer = make_trainer(loader=Short(batches(6)), grad_accum_steps=4)
    with pytest.raises(InputError, match='only 6 of the 8 batches'):
        trainer.fit()


@pytest.mark.parametrize('label', [-1, 3])
@pytest.mark.parametrize('mixup', [False, True])
def test_a_label_out_of_range_is_refused_before_the_weights_change(label, mixup):
    good = batches(1, 2)[0]
    loader = [good, (torch.randn(2, 3, 8, 8), torch.tensor([1, label])), good]
    kwargs = dict(mixup=Mixup(0.4, num_classes=3), criterion=timm.loss.SoftTargetCrossEntropy()) if mixup else {}
    trainer = make_trainer(loader=loader, grad_accum_steps=3, **kwargs)
    before = trainer.model.fc.weight.clone()
    lowest, highest = min(label, 0), max(label, 1)
    with pytest.raises(InputError, match=rf'is 3: labels must be in \[0, 3\), not from {lowest} to {highest}') as error:
        trainer.fit()
    assert error.value.argument == 'num_classes' and torch.equal(trainer.model.fc.weight, before)


@pytest.mark.parametrize('kwargs', [dict(grad_accum_steps=0), dict(nonfinite='ignore')])
def test_an_update_config_out_of_range_is_refused(kwargs):
    with pytest.raises(InputError, match='must be') as error:
        UpdateConfig(**kwargs)
    assert error.value.argument == next(iter(kwargs))


def test_a_static_model_is_trained_too():
    model = timm.create_model('cifar_resnet20', layers=(1, 1, 1), num_classes=3)
    before = model.fc.weight.clone()
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    result, = fit(Trainer(task, batches(), torch.optim.SGD(model.parameters(), 0.1), 1))
    assert set(result) == {'loss', 'top1'} and not torch.equal(before, model.fc.weight)


def test_clipping_bounds_the_norm_of_an_update():
    trainer = make_trainer(epochs=1, loader=batches(1), clip_grad=1e-2, sched='none')
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit()
    moved = torch.cat([(p - before[name]).flatten() for name, p in trainer.model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.02 * 1e-2 * 1.9, rel=.01)  # lr, norm, Nesterov's first step


def test_a_compiled_model_recompiles_only_where_the_noise_ends():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = timm_aig.gate_(nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(1),
        nn.Linear(4, 3)))
    model.num_classes = 3
    task = AIGTask(model, nn.CrossEntropyLoss(), gate_loss=timm_aig.TargetRateLoss([0.6] * 2), verbose=False)
    task.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    Trainer(task, batches(12), optimizer, 1, gate_schedule=GateSchedule(model, noise_off=.3)).fit()
    assert model[1][0].gate.noise  # again, after the training
    pieces = 3 if torch.__version__.startswith('2.9.') else 1  # that version does not trace contextlib
    assert pieces <= len(graphs) <= 2 * pieces  # with noise and without


# Two processes. The model has no batch statistics and no noise, so that its results depend on the global batch alone.

def exact_model():
    model = small_model(gate_norm='none', norm_layer=partial(GroupNorm, num_groups=8)).double()
    with torch.no_grad():
        for block in timm_aig.gated_blocks(model).values():
            block.gate.fc1.weight.normal_(std=4.)
            block.gate.fc2.weight.normal_()
            block.gate.fc2.bias.zero_()
            block.bn2.weight.fill_(0.5)
            block.gate.noise = False
    return model


def gate_losses(model):
    return {'rate': TargetRateLoss([0.6] * 4, 2.),
            'macs': ComputeTargetLoss(timm_aig.compute_cost(model, (3, 8, 8)), 0.5, 10.)}


def exact_run(name, accumulate, loader, distributed=False):
    """Mean results, gradients of the first update and weights after the epoch."""
    model = exact_model()
    task = AIGTask(model, nn.CrossEntropyLoss(), gate_loss=gate_losses(model)[name], verbose=False)
    if distributed:
        task.prepare_distributed()
    trainer = Trainer(
        task, loader, torch.optim.SGD(model.parameters(), 0.01), 1, update=UpdateConfig(grad_accum_steps=accumulate))
    gradients = []
    watch_updates(trainer, before=lambda: gradients.append({n: p.grad.clone() for n, p in model.named_parameters()}))
    result, = fit(trainer)
    return result, gradients[0], weights(trainer)


def run_process(rank, folder):
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo' if sys.platform == 'linux' else 'lo0'
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    shards = [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches(4, dtype=torch.float64)]
    reduced, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (reduced.append(tensor.numel()), all_reduce(tensor, *args))[1]
    runs = {(name, n): exact_run(name, n, shards, True) for name in ('rate', 'macs') for n in (1, 2)}
    reductions = reduced.count(3 + 4)  # batches, loss, top1, rates of four blocks
    dist.all_reduce = all_reduce
    torch.save((runs, reductions, train_shard(rank)), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def train_shard(rank):
    """State of a model with batch norms, and of its average, after an epoch on images of this process."""
    task = AIGTask(timm.create_model('cifar_resnet8_aig', num_classes=3), nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=.5)
    task.prepare_distributed()
    torch.manual_seed(rank)
    loader = [(torch.randn(4, 3, 8, 8), torch.arange(4) % 3) for _ in range(2)]
    Trainer(task, loader, torch.optim.SGD(task.parameters(), .01), 1).fit()
    return task.get_checkpoint_state()['state_dict'], task.get_checkpoint_state(ema=True)['state_dict_ema']


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('gloo'))
    mp.spawn(run_process, args=(folder,), nprocs=2)  # not forked: this process has threads by now
    return [torch.load(f'{folder}/{rank}.pt') for rank in (0, 1)]


def test_the_results_of_an_epoch_are_reduced_over_processes_once(two_processes):
    assert [reductions for _, reductions, _ in two_processes] == [4, 4]  # trainings of one epoch


def test_all_processes_end_with_the_same_statistics_and_averages(two_processes):
    for state, other in zip(*(states for *_, states in two_processes)):
        assert 'bn1.running_mean' in state
        assert all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize('name', ['rate', 'macs'])
def test_two_processes_train_as_one_with_the_whole_batch(name, accumulate, two_processes):
    result, gradients, final = exact_run(name, accumulate, batches(4, dtype=torch.float64))
    a, b = (runs[name, accumulate] for runs, *_ in two_processes)
    assert a[0] == b[0] == pytest.approx(result, rel=1e-6)
    for part, expected in ((1, gradients), (2, final)):
        for key, value in expected.items():
            torch.testing.assert_close(a[part][key], value, rtol=1e-6, atol=1e-12, msg=lambda m, k=key: f'{k}: {m}')
            assert torch.equal(a[part][key], b[part][key])
    assert all(gradients[f'layer{i}.0.gate.fc2.bias'].abs().sum() > 0 for i in (1, 2, 3))


def test_a_gate_loss_on_local_batches_gives_other_gradients(two_processes):
    halves = [exact_run('macs', 1, [(x.chunk(2)[i], y.chunk(2)[i]) for x, y in batches(4, dtype=torch.float64)])
              for i in (0, 1)]
    local = {k: (halves[0][1][k] + halves[1][1][k]) / 2 for k in halves[0][1]}
    pooled = two_processes[0][0]['macs', 1][1]
    assert any(not torch.allclose(local[k], pooled[k], rtol=1e-3) for k in local if '.gate.' in k)


def test_the_gate_loss_sees_each_accumulated_batch_by_itself():
    x, y = batches(1, dtype=torch.float64)[0]
    parts = list(zip(x.chunk(2), y.chunk(2)))
    accumulated = exact_run('macs', 2, parts)[1]
    separate = [exact_run('macs', 1, [part])[1] for part in parts]
    whole = exact_run('macs', 1, [(x, y)])[1]
    for key in whole:
        torch.testing.assert_close(accumulated[key], (separate[0][key] + separate[1][key]) / 2, rtol=1e-6, atol=1e-12)
    assert any(not torch.allclose(accumulated[k], whole[k], rtol=1e-3) for k in whole)
