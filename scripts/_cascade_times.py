"""Times of a cascade beside those of its models: --cascade of benchmark.py.

The ratio is to the static parent of the last stage, or to the last stage if that is static. p50 and p99 are over the
batches, of each the median of its rounds.
"""
import argparse
import copy
import tempfile
from typing import Any, Dict, List, Tuple

import torch
from _cascade import at_offset, open_cascade
from _common import blame, print_table
from _inputs import load_images
from _timing import Run, sum_up, time_runs
from timm.data import resolve_data_config

import timm_aig
from timm_aig import Cascade, InputError
from timm_aig.export.cascade import export_cascade, load_exported_cascade


def load_cascade(args: argparse.Namespace) -> Tuple[Cascade, torch.Tensor]:
    """The cascade and images [N, C, H, W]."""
    if not args.images:
        raise InputError('must be given: how sure a model is depends on the images.', 'images')
    cascade = open_cascade(args).to(args.device)
    config = resolve_data_config({'input_size': args.input_size}, model=cascade.models[0])
    images = load_images(args, config).to(args.device)
    if max(args.batch_size) > len(images):
        raise InputError(f'{max(args.batch_size)} needs as many images, there are {len(images)}.', 'batch_size')
    return cascade, images


def measure_cascade(args: argparse.Namespace, cascade: Cascade, images: torch.Tensor) -> List[Dict[str, Any]]:
    """Rows of the table: each stage's model by itself and the cascade, in each runtime, at each batch size."""
    largest = max(cost.static for cost in cascade.costs(tuple(images.shape[1:])))
    share = cascade.rounds(images).macs.mean().item() / largest
    last = cascade.models[cascade.order[-1]]
    parent = timm_aig.ungate_(copy.deepcopy(last)) if timm_aig.gated_blocks(last) else None
    reference = f'stage {len(cascade.order)}' if parent is None else 'parent'
    runs = {('PyTorch, optimized', name): run for name, run in torch_runs(cascade, parent).items()}
    for runtime, suffix in {'ONNX Runtime': 'onnx', 'OpenVINO': 'openvino'}.items() if args.runtimes else ():
        files = file_runs(args, cascade, parent, suffix, images[:4])
        runs.update({(runtime, name): run for name, run in files.items()})
    results = []
    for batch in args.batch_size:
        seconds = time_runs(runs, images, batch, args.rounds)
        results += [
            dict(batch_size=batch, runtime=runtime, name=name, macs_share=share if name == 'cascade' else None,
                 **sum_up(rounds, seconds[runtime, reference], batch))
            for (runtime, name), rounds in seconds.items()]
    return results


def torch_runs(cascade: Cascade, parent: Any) -> Dict[str, Run]:
    """The parent, the model of each stage by itself, and the cascade, all optimized."""
    models = [optimized(model) for model in cascade.models]
    pairs = [(models[index], budget) for index, budget in zip(cascade.order, cascade.budgets)]
    stages = {f'stage {i}': at_offset(models[index], offset)
              for i, (index, offset) in enumerate(zip(cascade.order, cascade.offsets), 1)}
    return {
        **({'parent': optimized(parent)} if parent else {}), **stages,
        'cascade': Cascade(pairs, cascade.thresholds).eval()}


def optimized(model: Any) -> Any:
    try:
        return timm_aig.optimize_for_inference(model)
    except InputError:  # no blocks that timm_aig knows
        return model.to(memory_format=torch.channels_last)


def file_runs(
        args: argparse.Namespace, cascade: Cascade, parent: Any, runtime: str, images: torch.Tensor,
) -> Dict[str, Run]:
    """The same in another runtime."""
    def load(cascade: Cascade) -> Any:
        with tempfile.TemporaryDirectory() as folder, blame('cascade', ' '.join(args.cascade)), \
                torch.inference_mode(False):
            export_cascade(cascade, folder, runtime, images.cpu().clone())
            return load_exported_cascade(folder, args.threads or torch.get_num_threads(), spinning=False)

    def stage_of(runner: Any, stage: int) -> Run:
        run, offset = runner.runs[stage], runner.offsets[stage]
        return lambda x: run({'x': x.numpy()} if offset is None else {'x': x.numpy(), 'gate_offset': offset})

    runner = load(cascade)
    return {
        **({'parent': stage_of(load(Cascade([parent, parent])), 0)} if parent else {}),
        **{f'stage {i + 1}': stage_of(runner, i) for i in range(len(cascade.order))},
        'cascade': lambda x: runner(x.numpy())}


def print_cascade_times(results: List[Dict[str, Any]]) -> None:
    print_table([{
        'batch': r['batch_size'], 'runtime': r['runtime'], '': r['name'], 'ms/img': f'{r["ms_per_image"]:.2f}',
        'ratio': f'{r["ratio"]:.3f}', 'range': f'{r["ratio_min"]:.3f}-{r["ratio_max"]:.3f}',
        'p50 ms': f'{r["p50_ms"]:.2f}', 'p99 ms': f'{r["p99_ms"]:.2f}',
        'MACs': '' if r['macs_share'] is None else f'{r["macs_share"]:.3f}',
    } for r in results], 'runtime', '')
