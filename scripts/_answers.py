"""Accuracy, MACs and time of what compare.py compares: models, and cascades of two."""
import argparse
import csv
import shlex
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import validate
from _common import ResultError
from _comparison import CASCADES, OFFSETS, SHARES, TASKS, trainings
from _inputs import create_evaluation_loader, data_config, open_evaluation_split
from _timing import Run, sum_up, time_runs
from early_exits import open_exits
from timm.utils import natural_key
from tqdm import tqdm

import timm_aig
from timm_aig.export.cascade import CascadeRunner
from timm_aig.export.runtime import open_exported
from timm_aig.training.checkpoint import write_atomically
from timm_aig.training.thresholds import StageAnswers, answer_images, best_points, compare_thresholds, run_thresholds

TIMED, ROUNDS, BATCHES = 256, 7, (1, 32)  # images, rounds and batch sizes of a timing


class Measured(NamedTuple):
    """Answers of a model at a setting: its gate offset, the number of an early exit, or None for a static one."""
    setting: Optional[float]
    held_out: StageAnswers
    test: StageAnswers


def measure(args: argparse.Namespace, name: str) -> List[Measured]:
    """Answers of a trained model, at each of OFFSETS if it is adaptive, or at each exit. They are kept in a file."""
    path = Path(args.output, name, 'answers.pt')
    if path.is_file():
        return [Measured(setting, StageAnswers(*held_out), StageAnswers(*test))
                for setting, held_out, test in torch.load(path, weights_only=True)]
    model, settings = open_exits(path.parent) if name.startswith('exits-') else open_model(path.parent)
    task = TASKS[args.task]
    parts = [list(open_images(args, name, model, split)) for split in (task.held_out, task.test)]
    device = torch.device(args.device or 'cpu')
    model.to(device, memory_format=torch.channels_last)
    measured = [
        Measured(setting, *(answer_images(run, batches, device) for batches in parts)) for setting, run in settings]
    write_atomically(path, partial(torch.save, [(m.setting, tuple(m.held_out), tuple(m.test)) for m in measured]))
    return measured


def open_model(folder: Path) -> Tuple[Any, List[Tuple[Optional[float], Callable[..., Any]]]]:
    """A trained model, and its gate offsets, each with a function from images to logits and MACs of each image."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    cost = timm_aig.compute_cost(model)

    def run(offset: Optional[float], images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        if offset is not None:
            timm_aig.set_gate_offset(model, offset)
        logits, gates = timm_aig.forward_gates(model, images)
        return logits, cost.executed(gates)

    offsets = OFFSETS if timm_aig.gated_blocks(model) else (None,)
    return model, [(offset, partial(run, offset)) for offset in offsets]


def open_images(args: argparse.Namespace, name: str, model: Any, split: str) -> Any:
    """Loader of the images of a split, which is given as arguments of validate.py."""
    argv = ['--model', name, '--data-dir', args.data_dir, '--workers', str(args.workers), *shlex.split(split)]
    split_args = validate.parse_args([*argv, *(['--device', args.device] if args.device else [])])
    dataset = open_evaluation_split(split_args, model)
    return create_evaluation_loader(split_args, dataset, data_config(split_args, model), use_prefetcher=False)


Stages = Tuple[Tuple[str, Optional[float]], ...]  # models and gate offsets of a cascade


class Row(NamedTuple):
    """Results of one seed on the test images."""
    name: str
    setting: str
    macs: float
    top1: float
    right: torch.Tensor  # of each image, bool
    stages: Stages
    thresholds: Tuple[float, ...] = ()  # between them
    macs_of_quarters: Tuple[float, ...] = ()  # of the images, from the least severe; only of glyphs

    @property
    def used(self) -> str:
        return ' + '.join(name if offset is None else f'{name} at {offset:g}' for name, offset in self.stages)


def severities(args: argparse.Namespace) -> Optional[torch.Tensor]:
    """Severity of each test image of prepare_glyphs.py, in the order of the loader; None for other data."""
    path = Path(args.data_dir, 'glyphs.csv')
    if not path.is_file():
        return None
    with open(path, newline='', encoding='utf-8') as file:
        all_rows = {row['image']: float(row['severity']) for row in csv.DictReader(file)}
    images = sorted((image for image in all_rows if image.startswith('test/')), key=natural_key)  # as timm sorts
    return torch.tensor([all_rows[image] for image in images], dtype=torch.float64)


def create_row(
        name: str, setting: str, stages: Any, thresholds: Tuple[float, ...], right: torch.Tensor, macs: torch.Tensor,
        severity: Optional[torch.Tensor],
) -> Row:
    quarters = () if severity is None else tuple(part.mean().item() for part in macs[severity.argsort()].chunk(4))
    return Row(
        name, setting, macs.mean().item(), 100 * right.mean().item(), right.bool(), stages, thresholds, quarters)


def rows_of_seed(args: argparse.Namespace, seed: int) -> List[Row]:
    """Accuracy and MACs on the test images. Cascades are of nets that are trained for all seeds."""
    folder = Path(args.output)
    done = {other: [name for name in trainings(TASKS[args.task])
                    if (folder / f'{name}-s{other}' / 'results.json').is_file()] for other in args.seeds}
    names, shared = done[seed], set.intersection(*map(set, done.values()))
    measured = {name: measure(args, f'{name}-s{seed}') for name in tqdm(names, f'seed {seed}', unit='model')}
    severity = severities(args)
    rows = [
        create_row(name, '' if m.setting is None else f'offset {m.setting:g}', ((name, m.setting),), (), m.test.right,
                   m.test.macs, severity)
        for name, some in measured.items() if not name.startswith('exits-') for m in some]
    if 'static-r32' not in measured:
        return rows
    for name, pairs in CASCADES.items():
        stages = {
            ((first, a.setting), (second, b.setting)): (a, b)
            for first, second in pairs if {first, second} <= shared
            for a in measured[first] for b in measured[second] if a.held_out.macs.mean() < b.held_out.macs.mean()}
        rows += cascade_rows(f'cascade, {name}', stages, measured, severity)
    for name in (name for name in measured if name.startswith('exits-')):
        exits = {tuple((name, m.setting) for m in measured[name]): measured[name]}
        rows += cascade_rows(name, exits, measured, severity)
    return rows


def cascade_rows(
        name: str, cascades: Dict[Stages, Sequence[Measured]], measured: Dict[str, List[Measured]], severity: Any,
) -> List[Row]:
    """Cascades that are the best on the held-out images: for each of SHARES, and as accurate as each static net there.

    Models, gate offsets and thresholds are chosen on these images, then applied to the test images.
    """
    largest = measured['static-r32'][0].test.macs[0].item()
    points: List[Any] = best_points(
        point for key, stages in cascades.items()
        for point in compare_thresholds([m.held_out for m in stages], key, largest))  # type: ignore[arg-type]
    chosen = {f'{share:g} of the MACs': [p for p in points if p.macs_share <= share][-1:] for share in SHARES}
    for net in ('static-r20', 'static-r32'):
        if net in measured:
            top1 = 100 * measured[net][0].held_out.right.mean().item()
            chosen[f'as {net}'] = [p for p in points if p.top1 >= top1][:1]
    rows = []
    for setting, point in ((setting, point) for setting, some in chosen.items() for point in some):
        right, macs = run_thresholds([m.test for m in cascades[point.budgets]], point.thresholds)
        rows.append(create_row(name, setting, point.budgets, point.thresholds, right, macs, severity))
    return rows


def time_rows(args: argparse.Namespace, seed: int, rows: Sequence[Row]) -> List[Dict[str, Any]]:
    """Time of rows of a seed in ONNX Runtime, one thread, over that of the static ResNet-32. The rows take turns."""
    import onnxruntime

    runs: Dict[str, Any] = {}
    images = torch.empty(0)
    with tempfile.TemporaryDirectory() as folder:
        for name in tqdm(sorted({name for row in rows for name, _ in row.stages}), 'exporting', unit='model'):
            model = timm.create_model(f'local-dir:{args.output}/{name}-s{seed}', pretrained=True).eval()
            if not len(images):
                images = torch.cat([batch for batch, _ in open_images(args, name, model, TASKS[args.task].test)])
                images = images[::max(1, len(images) // TIMED)][:TIMED]  # spread over the classes
            file, blocks = Path(folder, f'{name}.onnx'), len(timm_aig.gated_blocks(model))
            timm_aig.export_onnx(model, file, 'sparse' if blocks else 'masked', images=images[:4])
            runs[name] = open_exported(file, threads=1, spinning=False), blocks

    def runner_of(row: Row) -> Run:
        runner = CascadeRunner(
            [runs[name][0] for name, _ in row.stages], row.thresholds,
            [None if offset is None else np.full(runs[name][1], offset, np.float32) for name, offset in row.stages])
        return lambda x: runner(x.numpy())

    if not any(row.name == 'static-r32' for row in rows):
        raise ResultError('times are over those of static-r32, which is not trained.')
    found = []
    for batch in BATCHES:
        seconds = time_runs({(row.name, row.setting): runner_of(row) for row in rows}, images, batch, ROUNDS)
        for row in rows:
            figures = sum_up(seconds[row.name, row.setting], seconds['static-r32', ''], batch)
            found.append({
                'task': args.task, 'model': row.name, 'setting': row.setting, 'used': row.used,
                'top1': round(row.top1, 3), 'batch_size': batch, **{k: round(v, 4) for k, v in figures.items()},
                'images': len(images), 'rounds': ROUNDS, 'seed': seed,
                'runtime': f'ONNX Runtime {onnxruntime.__version__}', 'threads': 1})
    return found
