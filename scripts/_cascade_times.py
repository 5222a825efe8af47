"""Times of a cascade beside those of its models: --cascade of benchmark.py.

The ratio is to the static parent of the last stage, or to the last stage if that is static. p50 and p99 are over the
batches, of each the median of its rounds.
"""
import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from _cascade import open_cascade
from _common import blame
from _inputs import read_image_folder
from timm.data import resolve_data_config

import timm_aig
from timm_aig import Cascade, InputError
from timm_aig.export.cascade import CascadeRunner, export_cascade, load_exported_cascade

__all__ = ['measure_cascade', 'print_cascade_times', 'quantile', 'sum_up', 'time_runs']


def measure_cascade(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of the table: each stage's model by itself and the cascade, in each runtime, at each batch size."""
    if not args.images:
        raise InputError('must be given: how sure a model is depends on the images.', 'images')
    cascade = open_cascade(args).to(args.device)
    config = resolve_data_config({'input_size': args.input_size}, model=cascade.models[0])
    images = read_image_folder(args, config).to(args.device)
    if max(args.batch_size) > len(images):
        raise InputError(f'{max(args.batch_size)} needs as many images, there are {len(images)}.', 'batch_size')
    rounds = cascade.rounds(images)
    largest = max(cost.static for cost in cascade.costs(config['input_size']))
    share = rounds.macs.mean().item() / largest
    results = []
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {'PyTorch, optimized': torch_runs(cascade)}
        if args.runtimes:
            for name, runtime in (('ONNX Runtime', 'onnx'), ('OpenVINO', 'openvino')):
                with torch.inference_mode(False):
                    runtimes[name] = file_runs(args, cascade, Path(folder, runtime), runtime, images[:4].clone())
        for batch in args.batch_size:
            seconds = time_runs(runtimes, images, batch, args.rounds, args.device)
            for runtime, times in seconds.items():
                reference = times['parent' if 'parent' in times else f'stage {len(cascade.order)}']
                for name, rounds_of in times.items():
                    results.append(dict(
                        batch_size=batch, runtime=runtime, name=name, macs_share=share if name == 'cascade' else None,
                        **sum_up(rounds_of, reference, len(images) // batch * batch)))
    return results


def sum_up(rounds_of: List[List[float]], reference: List[List[float]], images: int) -> Dict[str, float]:
    """Figures of one run from its seconds and those of another, of each batch in each round, for so many images."""
    ratios = [sum(own) / sum(other) for own, other in zip(rounds_of, reference)]
    single = sorted(statistics.median(turns) for turns in zip(*rounds_of))
    return dict(
        ms_per_image=1e3 * statistics.median(map(sum, rounds_of)) / images, ratio=statistics.median(ratios),
        ratio_min=min(ratios), ratio_max=max(ratios), p50_ms=1e3 * quantile(single, .5),
        p99_ms=1e3 * quantile(single, .99))


def quantile(ordered: List[float], share: float) -> float:
    """The smallest of some ascending numbers that a share of them does not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1]


def torch_runs(cascade: Cascade) -> Dict[str, Callable[[torch.Tensor], Any]]:
    """The stages, the cascade and the last stage's static parent with optimized models, by name."""
    models: Any = [optimized(model) for model in cascade.models]
    fast = Cascade(
        [(models[index], budget) for index, budget in zip(cascade.order, cascade.budgets)], cascade.thresholds).eval()
    parent = static_parent(cascade)
    return {
        **({} if parent is None else {'parent': optimized(parent)}),
        **{f'stage {stage + 1}': only_stage(fast, stage) for stage in range(len(fast.order))}, 'cascade': fast}


def static_parent(cascade: Cascade) -> Any:
    """Of the last stage's model, None if that has no gates."""
    model = cascade.models[cascade.order[-1]]
    return timm_aig.ungate_(copy.deepcopy(model)) if timm_aig.gated_blocks(model) else None


def optimized(model: Any) -> Any:
    try:
        return timm_aig.optimize_for_inference(model)
    except InputError:  # no ResNet blocks
        return model.to(memory_format=torch.channels_last)


def only_stage(cascade: Cascade, stage: int) -> Callable[[torch.Tensor], Any]:
    """One stage for every image: in a cascade of it, twice, whose first answer is always sure."""
    pair = (cascade.models[cascade.order[stage]], cascade.budgets[stage])
    return Cascade([pair, pair], 0.).eval()


def file_runs(
        args: argparse.Namespace, cascade: Cascade, folder: Path, runtime: str, images: torch.Tensor,
) -> Dict[str, Callable[[torch.Tensor], Any]]:
    """The stages and the cascade in another runtime, by name."""
    with blame('cascade', ' '.join(args.cascade)):
        export_cascade(cascade, folder, runtime, images.cpu())
        parent = static_parent(cascade)
        if parent is not None:
            export_cascade(Cascade([parent, parent]), folder / 'parent', runtime, images.cpu())
    threads = args.threads or torch.get_num_threads()
    runner = load_exported_cascade(folder, threads, spinning=False)
    static = {} if parent is None else {'parent': load_exported_cascade(folder / 'parent', threads, spinning=False)}

    def only(runner: CascadeRunner, stage: int) -> Callable[[torch.Tensor], Any]:
        run, offset = runner.runs[stage], runner.offsets[stage]
        return lambda x: run({'x': x.numpy()} if offset is None else {'x': x.numpy(), 'gate_offset': offset})

    stages = {f'stage {stage + 1}': only(runner, stage) for stage in range(len(cascade.order))}
    parents = {name: only(files, 0) for name, files in static.items()}
    return {**parents, **stages, 'cascade': lambda x: runner(x.numpy())}


@torch.inference_mode()
def time_runs(
        runtimes: Dict[str, Dict[str, Any]], images: torch.Tensor, batch: int, rounds: int, device: str = 'cpu',
) -> Dict[str, Dict[str, List[List[float]]]]:
    """Seconds of each batch in each round, all runs in turns of 8 images or one batch.

    A turn starts with a call that is not timed: else a run would be the faster for sharing weights with the one before.
    """
    synchronize = torch.cuda.synchronize if device.startswith('cuda') else lambda: None
    seconds: Dict[str, Dict[str, List[List[float]]]] = {
        runtime: {name: [] for name in runs} for runtime, runs in runtimes.items()}
    for round in range(-1, rounds):  # round -1 warms up
        for runtime, runs in runtimes.items():
            for name in runs:
                seconds[runtime][name].append([])
        for turn in images[:len(images) // batch * batch].split(max(8 // batch, 1) * batch):
            for runtime, runs in runtimes.items():
                for name, run in runs.items():
                    run(turn[:batch])
                    for x in turn.split(batch):
                        synchronize()
                        begin = time.perf_counter()
                        run(x)
                        synchronize()
                        seconds[runtime][name][-1].append(time.perf_counter() - begin)
        print(f'\rbatch {batch}: round {round + 1} of {rounds}', end='', file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {runtime: {name: times[1:] for name, times in runs.items()} for runtime, runs in seconds.items()}


def print_cascade_times(results: List[Dict[str, Any]]) -> None:
    print(f'{"batch":>5}  {"runtime":20} {"":10} {"ms/img":>8}  {"ratio":>6} {"range":>13} {"p50 ms":>8} {"p99 ms":>8} '
          f'{"MACs":>6}')
    for r in results:
        macs = '' if r['macs_share'] is None else f'{r["macs_share"]:.3f}'
        print(f'{r["batch_size"]:>5}  {r["runtime"]:20} {r["name"]:10} {r["ms_per_image"]:8.2f}  {r["ratio"]:6.3f} '
              f'{r["ratio_min"]:6.3f}-{r["ratio_max"]:<6.3f} {r["p50_ms"]:8.2f} {r["p99_ms"]:8.2f} {macs:>6}')
