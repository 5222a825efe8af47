"""benchmark.py --requests: the queue, its clients, gates that differ from image to image, and what is reported."""
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Event
from time import sleep

import benchmark
import numpy as np
import pytest
import timm
import torch
from _serving import BatchQueue, serve, spread_gates

import timm_aig

pytestmark = pytest.mark.timeout(60, method='thread')  # ends the process, whatever a thread waits for

IMAGES = np.random.default_rng(0).random((50, 3, 2, 2), np.float32)


def recorded(run):
    """run, and the sizes of the batches that it gets."""
    sizes = []

    def record(x):
        sizes.append(len(x))
        return run(x)

    return record, sizes


def name(x):
    """For logits the first pixel, for two gates the next ones: which image a row is of."""
    return x[:, 0, 0, :1], x[:, 1:, 0, 0]


@pytest.mark.parametrize('max_batch', [1, 3, 32])
def test_every_client_gets_the_answer_to_its_own_image_and_no_batch_is_too_large(max_batch):
    run, sizes = recorded(name)
    with closing(BatchQueue(run, max_batch)) as queue, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(queue.ask, IMAGES))
    for found, expected in zip(zip(*answers), name(IMAGES)):
        assert np.array_equal(found, expected)
    assert max(sizes) <= max_batch and sum(sizes) == len(IMAGES) and len(sizes) == queue.batches


def test_the_images_that_wait_while_a_batch_runs_are_the_next_one():
    running, finish = Event(), Event()

    def wait(x):
        running.set()
        finish.wait()
        return name(x)

    run, sizes = recorded(wait)
    with closing(BatchQueue(run, 4)) as queue, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(queue.ask, IMAGES[0])]
        running.wait()
        answers += [pool.submit(queue.ask, image) for image in IMAGES[1:6]]
        while queue.waiting.qsize() < 5:
            sleep(.001)
        finish.set()
        assert [answer.result()[0] for answer in answers] == name(IMAGES[:6])[0].tolist()
    assert sizes == [1, 4, 1]


def fail(x):
    raise ValueError('no memory.')


@pytest.mark.parametrize('run', [fail, lambda x: (x[1:],)])
def test_what_a_batch_raises_reaches_its_clients_and_the_queue_goes_on(run):
    with closing(BatchQueue(run, 4)) as queue, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(queue.ask, image) for image in IMAGES[:8]]
        assert all(isinstance(answer.exception(), ValueError) for answer in answers)
        queue.run = name
        assert queue.ask(IMAGES[0])[0] == IMAGES[0, 0, 0, 0]
    with pytest.raises(ValueError):
        serve(run, IMAGES, clients=4, max_batch=2)


@pytest.mark.parametrize('clients', [1, 4, 60])
def test_each_image_is_sent_once_and_the_gates_are_those_that_the_file_returned(clients):
    run, sizes = recorded(name)
    segment = serve(run, IMAGES, clients, max_batch=8)
    assert segment.gates[:, 0].sort().values.tolist() == sorted(IMAGES[:, 1, 0, 0].tolist())
    assert segment.mean_batch == len(IMAGES) / len(sizes)
    assert 0 < segment.p50_ms <= segment.p99_ms <= 1e3 * len(IMAGES) / segment.images_per_s
    assert max(sizes) <= min(clients, 8)


def test_each_image_of_a_static_file_has_no_gates():
    assert serve(lambda x: (x[:, 0, 0],), IMAGES, 2, 8).gates.shape == (len(IMAGES), 0)


@pytest.mark.parametrize('arch, size', [('cifar_resnet20_aig', 16), ('vit_tiny_patch16_224_aig', 224)])
@pytest.mark.parametrize('rate', [0., .3, 1.])
def test_each_gate_opens_for_the_share_of_the_images_whatever_it_was_trained_to(train_gates, arch, size, rate):
    kwargs = {} if 'cifar' in arch else {'depth': 2}
    model = train_gates(timm.create_model(arch, **kwargs)).eval()
    timm_aig.set_gate_offset(model, 3.)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.constant_(module.running_mean, 9.)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(10, 3, size, size)
    spread = spread_gates(model, x, rate)
    with torch.no_grad():
        gates = timm_aig.forward_gates(spread, x)[1]
    assert gates.mean(0).tolist() == pytest.approx([rate] * gates.shape[1])
    assert rate in (0, 1) or len(gates.T.unique(dim=0)) > 1 < len(gates.unique(dim=0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


ARGS = ['--requests', '--model', 'cifar_resnet8_aig', '--input-size', '3', '8', '8', '--device', 'cpu']


def test_there_is_a_row_for_each_file_and_number_of_clients(run_script, capsys):
    args = [*ARGS, '--num-images', 10, '--rounds', 1, '--rate', .3, '--clients', 1, 3, '--threads', 1]
    assert run_script('benchmark.py', *args, '--json') == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown['setting']['images'] == 10 and shown['setting']['input_size'] == [3, 8, 8]
    rows = shown['results']
    runs = [('static parent', None), ('adaptive, r = 0.3', .3)]
    assert [(r['clients'], r['run'], r['rate']) for r in rows] == [(n, *run) for n in (1, 3) for run in runs]
    cost = timm_aig.compute_cost(timm.create_model('cifar_resnet8_aig'), (3, 8, 8))
    for row in rows:
        adaptive = row['rate'] is not None
        rates = torch.full((1, len(cost.blocks)), .3)
        assert row['macs_share'] == pytest.approx(cost.share(rates).item() if adaptive else 1, abs=1e-6)
        assert 1 <= row['mean_batch'] <= row['clients']
        assert 0 < row['p50_ms'] <= row['p99_ms'] and row['images_per_s'] > 0
        assert 0 < row['throughput_low'] <= row['throughput_ratio'] <= row['throughput_high']
        assert adaptive or row['throughput_ratio'] == row['p50_ratio'] == row['p99_ratio'] == 1


@pytest.mark.parametrize('args, message', [
    *(([*ARGS, *other], f'{other[0]} cannot be combined with --requests') for other in (
        ['--torchcompile'], ['--memory'], ['--runtimes'], ['--batch-size', '8'])),
    *(([*ARGS, *other], f'{other[0]} not allowed with argument --requests') for other in (
        ['--train'], ['--cascade', 'a', 'b'])),
    *((other, '--clients and --max-batch are for --requests') for other in (
        ['--clients', '4'], ['--max-batch', '4'])),
    ([*ARGS, '--clients', '0'], '--clients must be a whole number from 1'),
    ([*ARGS, '--max-batch', '0'], '--max-batch must be a whole number from 1'),
    ([*ARGS[:-1], 'meta'], '--device must be cpu for --runtimes, --memory and --requests, not meta'),
])
def test_what_makes_no_sense_is_refused(capsys, args, message):
    try:
        code = benchmark.main(args)
    except SystemExit as e:
        code = e.code
    assert code == 2
    assert message in capsys.readouterr().err
