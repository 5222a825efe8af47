"""Single images from many clients, served in batches by the static and the adaptive file: --requests of benchmark.py.

A closed loop: each client sends an image, waits for the answer and sends the next. One server thread takes the images
that wait, runs them as one batch in ONNX Runtime and answers. It never waits for a batch to fill. In every round each
file serves the same images in the same order, one file after the other. p50 and p99 are over the images of a round;
all figures are medians of the rounds.
"""
import argparse
import copy
import math
import statistics
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from _common import print_table
from tqdm import trange

import timm_aig

PARENT = 'static parent'
REQUESTS = 8  # of each client in a round, at least; all images are sent equally often

Run = Callable[[np.ndarray], Sequence[np.ndarray]]  # from images [B, C, H, W] to arrays of B rows


class BatchQueue:
    """Answers images from many threads by one thread, which runs those that wait as a batch."""

    def __init__(self, run: Run, max_batch: int) -> None:
        self.run = run
        self.max_batch = max_batch
        self.batches = 0  # so far
        self.waiting: SimpleQueue = SimpleQueue()
        self.server = Thread(target=self._serve, daemon=True)
        self.server.start()

    def ask(self, image: np.ndarray) -> List[np.ndarray]:
        """The row of an image [C, H, W] in each output. Waits for it, and raises what running its batch raised."""
        answer: Future = Future()
        self.waiting.put((image, answer))
        return answer.result()

    def close(self) -> None:
        """End the server thread, after the last answer."""
        self.waiting.put(None)
        self.server.join()

    def _serve(self) -> None:
        for first in iter(self.waiting.get, None):
            requests = [first]
            while len(requests) < self.max_batch and not self.waiting.empty():
                requests.append(self.waiting.get())
            images, answers = zip(*requests)
            self.batches += 1
            try:
                rows = list(zip(answers, *self.run(np.stack(images)), strict=True))
            except Exception as e:
                for answer in answers:
                    answer.set_exception(e)
            else:
                for answer, *row in rows:
                    answer.set_result(row)


class Segment(NamedTuple):
    """What a file did in a round."""
    images_per_s: float
    p50_ms: float
    p99_ms: float
    mean_batch: float
    gates: torch.Tensor  # of each image that it answered, [N, L]


def serve(run: Run, images: Sequence[np.ndarray], clients: int, max_batch: int) -> Segment:
    """Let clients send images.

    Args:
        run: Its outputs are logits and, of an adaptive model, gates.
        images: Each [C, H, W]. Client i sends images i, i + clients, i + 2 * clients and so on.
        clients: Number of clients.
        max_batch: Most images in a batch.
    """
    stop = Event()

    def send(client: int) -> List[Tuple[float, Any]]:
        answers = []
        for image in images[client::clients]:
            if stop.is_set():
                break
            begin = time.perf_counter()
            _, *gates = queue.ask(image)
            answers.append((time.perf_counter() - begin, gates[0] if gates else np.zeros(0)))
        return answers

    with closing(BatchQueue(run, max_batch)) as queue, ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        try:
            answers = [answer for part in pool.map(send, range(clients)) for answer in part]
        finally:
            stop.set()  # after an error or Ctrl-C the others send no more
        seconds = time.perf_counter() - begin
    latencies, gates = zip(*answers)
    p50, p99 = 1e3 * np.quantile(latencies, (.5, .99), method='inverted_cdf')
    return Segment(
        len(images) / seconds, p50, p99, len(images) / queue.batches, torch.from_numpy(np.stack(gates)))


def spread_gates(model: nn.Module, images: torch.Tensor, rate: float, seed: int = 0) -> Any:
    """A copy of an adaptive model whose gates differ from image to image, each open for a share of the images.

    They get random weights, and the bias that gives the share, in one forward pass: each when the pass comes to it.
    """
    model = copy.deepcopy(model)
    timm_aig.set_gate_offset(model, 0.)
    torch.manual_seed(seed)
    closed = len(images) - round(rate * len(images))

    def set_gate(gate: Any, args: Tuple[torch.Tensor]) -> None:
        for layer in gate.children():
            if not isinstance(layer, nn.Identity):
                layer.reset_parameters()
        gate.fc1.bias -= gate.fc1(args[0].mean((2, 3))).mean(0)  # about half of the hidden units are above 0
        scores = gate.logits(args[0]).diff(dim=1).flatten().sort().values
        ends = torch.cat([scores[:1] - 1, scores, scores[-1:] + 1])
        gate.fc2.bias[1] -= ends[closed:closed + 2].mean()

    hooks = [block.gate.register_forward_pre_hook(set_gate) for block in timm_aig.gated_blocks(model).values()]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return model


def open_file(args: argparse.Namespace, model: Any, images: torch.Tensor) -> Run:
    """The model as an ONNX file in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        path = Path(folder, 'model.onnx')
        mode = 'sparse' if timm_aig.gated_blocks(model) else 'masked'
        timm_aig.export_onnx(model, path, mode, images=images[:4].clone())
        session = timm_aig.load_onnx(path, args.threads or torch.get_num_threads(), spinning=False)
    return lambda x: session.run(None, {'x': x})


def measure_requests(
        args: argparse.Namespace, adaptive: Any, parent: Any, images: torch.Tensor,
) -> List[Dict[str, Any]]:
    """Rows of the table: each file with each number of clients."""
    import onnxruntime

    runs: List[Any] = [(PARENT, None, open_file(args, parent, images))]
    for rate in [None] if args.images else args.rate:
        name = 'adaptive, own gates' if rate is None else f'adaptive, r = {rate:g}'
        model = adaptive if rate is None else spread_gates(adaptive, images, rate, args.seed)
        runs.append((name, rate, open_file(args, model, images)))
    cost = timm_aig.compute_cost(adaptive, tuple(images.shape[1:]))
    generator = np.random.default_rng(args.seed)
    results = []
    for clients in args.clients:
        passes = math.ceil(REQUESTS * clients / len(images))
        segments: List[List[Segment]] = [[] for _ in runs]
        for _ in trange(args.rounds + 1, desc=f'{clients} clients', unit='round'):
            order = np.concatenate([generator.permutation(len(images)) for _ in range(passes)])
            sent = [images[i].numpy() for i in order]
            for (_, _, run), rounds in zip(runs, segments):
                rounds.append(serve(run, sent, clients, args.max_batch))
        for (name, rate, _), (_, *rounds) in zip(runs, segments):  # the first round warms up
            gates = torch.cat([segment.gates for segment in rounds])
            results.append(dict(
                clients=clients, run=name, rate=rate, **sum_up(rounds, segments[0][1:]),
                macs_share=1. if name == PARENT else cost.share(gates).mean().item(),
                max_batch=args.max_batch, runtime=f'ONNX Runtime {onnxruntime.__version__}'))
    return results


def sum_up(rounds: Sequence[Segment], reference: Sequence[Segment]) -> Dict[str, float]:
    """Medians of the rounds of a file, and their ratios to those of another."""
    def median(name: str) -> float:
        return statistics.median(getattr(segment, name) for segment in rounds)

    def ratios(name: str) -> List[float]:
        return [getattr(own, name) / getattr(other, name) for own, other in zip(rounds, reference)]

    throughput = ratios('images_per_s')
    return dict(
        **{name: median(name) for name in ('images_per_s', 'p50_ms', 'p99_ms', 'mean_batch')},
        throughput_ratio=statistics.median(throughput), throughput_low=min(throughput), throughput_high=max(throughput),
        p50_ratio=statistics.median(ratios('p50_ms')), p99_ratio=statistics.median(ratios('p99_ms')))


def print_requests(results: List[Dict[str, Any]]) -> None:
    print_table([{
        'clients': r['clients'], '': r['run'], 'images/s': f'{r["images_per_s"]:.1f}',
        'ratio': f'{r["throughput_ratio"]:.3f}', 'range': f'{r["throughput_low"]:.3f}-{r["throughput_high"]:.3f}',
        'p50 ms': f'{r["p50_ms"]:.2f}', 'p50 ratio': f'{r["p50_ratio"]:.3f}', 'p99 ms': f'{r["p99_ms"]:.2f}',
        'p99 ratio': f'{r["p99_ratio"]:.3f}', 'batch': f'{r["mean_batch"]:.1f}', 'MACs': f'{r["macs_share"]:.3f}',
    } for r in results], '')
