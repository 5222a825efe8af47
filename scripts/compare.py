#!/usr/bin/env python3
"""Train all rivals of a comparison, and sum up their accuracy and MACs in one table.

    static       nets of several depths, also distilled from the deepest or at a lower resolution
    any budget   one adaptive checkpoint at many gate offsets
    two stages   a static parent, then its gates, as --recipe distill and --recipe paper do
    cascades     of two of these, with thresholds from held-out images, at several mean MACs

All trainings of a task have the same number of epochs; those of a parent count. A training that was stopped goes on
from its last checkpoint, and one that is done is not repeated. The test images are used for the table only.
"""
import argparse
import csv
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from _common import ResultError, add_args, check_file, create_parser, integer, run_script, write_csv

EXAMPLES = """examples:
  scripts/prepare_glyphs.py glyphs
  scripts/compare.py glyphs --data-dir glyphs --jobs 2              train, or go on with it; then the table
  scripts/compare.py glyphs --data-dir glyphs --only 'static' --seeds 0
  scripts/compare.py glyphs --data-dir glyphs --table glyphs.csv    the table of what is trained so far"""

TEACHER = '--teacher local-dir:{output}/static-r32-s{seed}'
PARENT = '--model local-dir:{output}/half-r32-s{seed}'
NETS = {'r8': 'cifar_resnet8', 'r14': 'cifar_resnet14', 'r20': 'cifar_resnet20', 'r32': 'cifar_resnet32'}


class Task(NamedTuple):
    """Data and length of the trainings of a comparison.

    data: Arguments of finetune.py for the data.
    held_out, test: Arguments of validate.py for the images that choose thresholds, and for those of the table.
    epochs: Of a training; a parent has half of them, its gates the rest.
    small: Lower resolution for the largest net, pixels.
    """
    data: str
    held_out: str
    test: str
    epochs: int
    small: int


TASKS = {
    'glyphs': Task(
        '--num-classes 2000 --input-size 1 20 20 --mean 0.5 --std 0.3 --crop-padding 2 --hflip 0 --keep last',
        '--split validation', '--split test', epochs=5, small=16),
    'fmnist': Task(
        '--dataset torch/fashion_mnist --holdout 5000 --input-size 1 28 28 --mean 0.286 --std 0.353 --crop-padding 2 '
        '--keep last',
        '--dataset torch/fashion_mnist --split train --holdout 5000',
        '--dataset torch/fashion_mnist --split validation', epochs=12, small=22),
}


def trainings(task: Task) -> Dict[str, str]:
    """Arguments of finetune.py by name, each after those it needs."""
    long, first = f'--epochs {task.epochs}', task.epochs // 2
    rest = f'--epochs {task.epochs - first} --target-rate 0.5'
    runs = {f'static-{name}': f'--static --model {model} {long}' for name, model in reversed(NETS.items())}
    for name, model in NETS.items():
        if name != 'r32':
            runs[f'distilled-{name}'] = f'--static --model {model} {long} --distill-weight 0.5 {TEACHER}'
    runs['small-r32'] = f'--static --model {NETS["r32"]} {long} --input-size 1 {task.small} {task.small}'
    runs['any-r20'] = f'--recipe any --model {NETS["r20"]} {long} {TEACHER}'
    runs['any-r32'] = f'--recipe any --model {NETS["r32"]} {long} {TEACHER}'
    runs['half-r32'] = f'--static --model {NETS["r32"]} --epochs {first}'
    runs['distill-r32'] = f'--recipe distill {PARENT} {rest}'
    runs['paper-r32'] = f'--recipe paper {PARENT} {rest}'
    return runs


STATIC_CASCADES = (
    ('static-r8', 'static-r14'), ('static-r8', 'static-r20'), ('static-r8', 'static-r32'),
    ('static-r14', 'static-r32'), ('distilled-r8', 'distilled-r14'), ('distilled-r8', 'distilled-r20'),
    ('distilled-r8', 'static-r32'), ('distilled-r14', 'static-r32'),
)
ADAPTIVE_CASCADES = (
    ('static-r8', 'any-r20'), ('distilled-r8', 'any-r20'), ('any-r20', 'any-r20'), ('any-r20', 'static-r32'),
    ('static-r8', 'any-r32'), ('distilled-r8', 'any-r32'), ('distilled-r14', 'any-r32'), ('any-r32', 'any-r32'),
)
# Of each group the pair with the best answers on the held-out images, at each share of the MACs.
CASCADES = {
    'static-r8 + static-r32': STATIC_CASCADES[2:3], 'any-r20 + any-r20': ADAPTIVE_CASCADES[2:3],
    'any-r32 + any-r32': ADAPTIVE_CASCADES[-1:], 'static nets': STATIC_CASCADES,
    'static or adaptive nets': STATIC_CASCADES + ADAPTIVE_CASCADES,
}
OFFSETS = (-6., -4.5, -3., -2., -1., 0., 1., 2., 3., 4.5, 6., 1e4)
SHARES = [share / 100 for share in range(30, 105, 5)]  # mean MACs of the cascades of the table


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    arg('task', choices=TASKS, help='data set and trainings')
    add_args(parser, 'data_dir')
    add_args(parser, 'output', default='output/compare')
    arg('--seeds', type=integer(0), nargs='+', default=[0, 1, 2], metavar='N', help='default: 0 1 2')
    arg('--only', metavar='TEXT', nargs='+', help='only trainings whose names contain one of these')
    arg('--jobs', type=integer(1), default=1, metavar='N', help='trainings at a time (default: %(default)s)')
    arg('--table', metavar='FILE', help='train nothing, write a CSV file of what is trained')
    add_args(parser, 'workers', default=0)
    add_args(parser, 'device', 'json')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

import timm
import torch
import validate
from _inputs import create_evaluation_loader, data_config, open_evaluation_split
from tqdm import tqdm

import timm_aig
from timm_aig.training.thresholds import StageAnswers, answer_images, best_points, compare_thresholds, run_thresholds

# Train

class Training(NamedTuple):
    name: str  # static-r20-s0
    command: List[str]
    needs: Optional[str]  # name of another one


def planned(args: argparse.Namespace) -> List[Training]:
    task = TASKS[args.task]
    plan = []
    for seed, (name, own) in itertools.product(args.seeds, trainings(task).items()):
        if args.only and not any(text in name for text in args.only):
            continue
        common = f'{task.data} --data-dir {shlex.quote(args.data_dir)} --workers {args.workers} --seed {seed}'
        if args.device:
            common += f' --device {args.device}'
        own = own.format(output=args.output, seed=seed)
        needs = next((word for word in own.split() if word.startswith('local-dir:')), None)
        command = shlex.split(f'{sys.executable} {Path(__file__).with_name("finetune.py")} {common} {own} '
                              f'--output {args.output} --experiment {name}-s{seed} --resume auto')
        plan.append(Training(f'{name}-s{seed}', command, needs and needs.rpartition('/')[2]))
    return plan


def train(args: argparse.Namespace) -> None:
    """Run the trainings that are not done, args.jobs at a time, each once what it needs is done."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    plan = planned(args)
    waiting = [training for training in plan if not is_done(folder, training.name)]
    running: Dict[str, subprocess.Popen] = {}
    failed: List[str] = []
    try:
        with tqdm(total=len(plan), initial=len(plan) - len(waiting), unit='training', desc=args.task) as bar:
            while waiting or running:
                for training in list(waiting):
                    ready = training.needs is None or is_done(folder, training.needs)
                    if ready and len(running) < args.jobs:
                        log = open(folder / f'{training.name}.log', 'ab')
                        running[training.name] = subprocess.Popen(training.command, stdout=log, stderr=log)
                        waiting.remove(training)
                if not running:
                    raise ResultError(f'{waiting[0].name} needs {waiting[0].needs}, which is not trained.')
                time.sleep(1)
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        bar.update(not process.returncode)
                        failed += [name] if process.returncode else []
                bar.set_postfix_str(', '.join(running), refresh=False)
    finally:
        for process in running.values():  # SIGTERM lets finetune.py save
            process.terminate()
        for process in running.values():
            process.wait()
    if failed:
        raise ResultError(f'{", ".join(failed)} failed, see {folder}/{failed[0]}.log.')


def is_done(folder: Path, name: str) -> bool:
    return (folder / name / 'results.json').is_file()


# Sum up

class Measured(NamedTuple):
    """Answers of a model at a gate offset (None for a static one)."""
    offset: Optional[float]
    held_out: StageAnswers
    test: StageAnswers


def measure(args: argparse.Namespace, name: str) -> List[Measured]:
    """Answers of a trained model, at each of OFFSETS if it is adaptive. They are kept in a file beside it."""
    path = Path(args.output, name, 'answers.pt')
    if path.is_file():
        return [Measured(offset, StageAnswers(*held_out), StageAnswers(*test))
                for offset, held_out, test in torch.load(path, weights_only=True)]
    model = timm.create_model(f'local-dir:{path.parent}', pretrained=True).eval()
    cost = timm_aig.compute_cost(model)
    parts = []
    for split in (TASKS[args.task].held_out, TASKS[args.task].test):
        argv = ['--model', name, '--data-dir', args.data_dir, '--workers', str(args.workers), *shlex.split(split)]
        split_args = validate.parse_args([*argv, *(['--device', args.device] if args.device else [])])
        split_args.input_size = split_args.crop_pct = None
        dataset = open_evaluation_split(split_args, model)
        parts.append(list(create_evaluation_loader(
            split_args, dataset, data_config(split_args, model), use_prefetcher=False)))
    device = torch.device(args.device or 'cpu')
    model = model.to(device, memory_format=torch.channels_last)

    def run(images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        logits, gates = timm_aig.forward_gates(model, images)
        return logits, cost.executed(gates).double()

    measured = []
    for offset in OFFSETS if timm_aig.gated_blocks(model) else (None,):
        if offset is not None:
            timm_aig.set_gate_offset(model, offset)
        measured.append(Measured(offset, *(answer_images(run, batches, device) for batches in parts)))
    torch.save([(m.offset, tuple(m.held_out), tuple(m.test)) for m in measured], path)
    return measured


class Row(NamedTuple):
    """Results of one seed on the test images."""
    name: str
    setting: str
    macs: float
    top1: float
    macs_of_quarters: Tuple[float, ...] = ()  # of the images, from the least severe; only of glyphs
    used: str = ''  # models and offsets of a cascade


def severities(args: argparse.Namespace) -> Optional[torch.Tensor]:
    """Of the test images in the order of their loader, from prepare_glyphs.py; None for other data."""
    path = Path(args.data_dir, 'glyphs.csv')
    if not path.is_file():
        return None
    with open(path, newline='', encoding='utf-8') as file:
        rows = sorted((row['image'], float(row['severity'])) for row in csv.DictReader(file))
    return torch.tensor([severity for image, severity in rows if image.startswith('test/')], dtype=torch.float64)


def create_row(name: str, setting: str, right: torch.Tensor, macs: torch.Tensor, severity: Any) -> Row:
    quarters = () if severity is None else tuple(part.mean().item() for part in macs[severity.argsort()].chunk(4))
    return Row(name, setting, macs.mean().item(), 100 * right.mean().item(), quarters)


def rows_of_seed(args: argparse.Namespace, seed: int) -> List[Row]:
    """Accuracy and MACs on the test images."""
    folder = Path(args.output)
    names = [name for name in trainings(TASKS[args.task]) if is_done(folder, f'{name}-s{seed}')]
    measured = {name: measure(args, f'{name}-s{seed}') for name in tqdm(names, f'seed {seed}', unit='model')}
    severity = severities(args)
    rows = [
        create_row(name, '' if m.offset is None else f'offset {m.offset:g}', m.test.right, m.test.macs, severity)
        for name, some in measured.items() for m in some]
    if 'static-r32' not in measured:
        return rows
    largest = measured['static-r32'][0].test.macs[0].item()
    for name, pairs in CASCADES.items():
        rows += cascade_rows(f'cascade, {name}', pairs, measured, largest, severity)
    return rows


def cascade_rows(
        name: str, pairs: Sequence[Tuple[str, str]], measured: Dict[str, List[Measured]], largest: float, severity: Any,
) -> List[Row]:
    """Cascades that are the best on the held-out images: for each of SHARES, and as accurate as each static net there.

    Pair of models, gate offsets and threshold are chosen on these images, then applied to the test images.
    """
    stages = {
        (first, a.offset, second, b.offset): (a, b) for first, second in pairs if {first, second} <= measured.keys()
        for a in measured[first] for b in measured[second] if a.held_out.macs.mean() < b.held_out.macs.mean()}
    points: List[Any] = best_points(
        point for key, (a, b) in stages.items()
        for point in compare_thresholds([a.held_out, b.held_out], key, largest))  # type: ignore[arg-type]
    chosen = {f'{share:g} of the MACs': [p for p in points if p.macs_share <= share][-1:] for share in SHARES}
    for net in ('static-r20', 'static-r32'):
        if net in measured:
            top1 = 100 * measured[net][0].held_out.right.mean().item()
            chosen[f'as {net}'] = [p for p in points if p.top1 >= top1][:1]
    rows = []
    for setting, point in ((setting, point) for setting, some in chosen.items() for point in some):
        right, macs = run_thresholds([m.test for m in stages[point.budgets]], point.thresholds)
        first, first_offset, second, second_offset = point.budgets
        used = ' + '.join(model if offset is None else f'{model} at {offset:g}'
                          for model, offset in ((first, first_offset), (second, second_offset)))
        rows.append(create_row(name, setting, right, macs, severity)._replace(used=used))
    return rows


def summarize(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of the table: means over seeds."""
    by_seed = {seed: rows_of_seed(args, seed) for seed in args.seeds}
    groups: Dict[Tuple[str, str], List[Tuple[int, Row]]] = {}
    for seed, rows in by_seed.items():
        for row in rows:
            groups.setdefault((row.name, row.setting), []).append((seed, row))
    largest = groups['static-r32', ''][0][1].macs if ('static-r32', '') in groups else math.nan
    table = []
    for (name, setting), some in groups.items():
        seeds, found = zip(*some)
        accuracies = [row.top1 for row in found]
        macs = statistics.mean(row.macs for row in found)
        quarters = [statistics.mean(part) / largest for part in zip(*(row.macs_of_quarters for row in found))]
        table.append({
            'task': args.task, 'model': name, 'setting': setting, 'macs': round(macs / 1e6, 3),
            'macs_over_resnet32': round(macs / largest, 4), 'top1': round(statistics.mean(accuracies), 3),
            'top1_std': round(statistics.stdev(accuracies), 3) if len(seeds) > 1 else '',
            'top1_seeds': ', '.join(f'{accuracy:.2f}' for accuracy in accuracies),
            'used': '; '.join(dict.fromkeys(row.used for row in found)),
            'macs_by_severity': ' '.join(f'{share:.3f}' for share in quarters),
            'seeds': ', '.join(map(str, seeds)), 'epochs': TASKS[args.task].epochs})
    return table


def run(args: argparse.Namespace) -> None:
    if args.table:
        check_file(args.table, 'table')
    else:
        train(args)
    table = summarize(args)
    if args.json:
        print(json.dumps(table, indent=2))
    else:
        for row in table:
            print(f'{row["model"]:32} {row["setting"]:18} {row["macs_over_resnet32"]:6} {row["top1"]:6.2f} '
                  f'{row["macs_by_severity"]}')
    if args.table and table:
        write_csv(args.table, table[0], [row.values() for row in table])


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
