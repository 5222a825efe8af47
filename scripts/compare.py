#!/usr/bin/env python3
"""Train adaptive networks and their baselines, and sum up their accuracy and MACs in one table.

    static       nets of several depths, also distilled from the deepest or at a lower resolution
    any budget   one adaptive checkpoint at many gate offsets
    two stages   a static parent, then its gates, as --recipe distill and --recipe paper do
    early exits  of earlyon, in the largest net
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
import signal
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from _args import add_args, create_parser, integer
from _common import ResultError, blame, check_file, print_table, require, run_script, write_csv
from _comparison import PAIRS, TASKS, trainings

EXAMPLES = """examples:
  scripts/compare.py glyphs --data-dir glyphs --jobs 2              # train, or go on with it; then the table
  scripts/compare.py glyphs --data-dir glyphs --table glyphs.csv    # the table of what is trained so far
  scripts/compare.py glyphs --data-dir glyphs --pairs pairs.csv     # its paired tests on the images
  scripts/compare.py glyphs --data-dir glyphs --times times.csv     # and the time of its rows, of the first seed"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    arg('task', choices=TASKS, help='data set and trainings')
    add_args(parser, 'data_dir', required=True)
    add_args(parser, 'output', default='output/compare')
    arg('--seeds', type=integer(0), nargs='+', default=[0, 1, 2], metavar='N', help='default: 0 1 2')
    arg('--only', metavar='TEXT', nargs='+', help='only trainings whose names contain one of these')
    arg('--jobs', type=integer(1), default=1, metavar='N', help='trainings at a time (default: %(default)s)')
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument('--table', metavar='FILE', help='train nothing, write a CSV file of what is trained')
    tables.add_argument('--pairs', metavar='FILE', help='train nothing, write a CSV file of exact McNemar tests')
    tables.add_argument('--times', metavar='FILE', help='train nothing, write a CSV file of times in ONNX Runtime')
    arg('--add', metavar='FILE', help='table of other seeds, made elsewhere, for --table to take in')
    add_args(parser, 'workers', default=0)
    add_args(parser, 'device', 'amp', 'json')
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

from _answers import Row, rows_of_seed, time_rows
from tqdm import tqdm
from validate import mcnemar

from timm_aig import InputError
from timm_aig.run import environment
from timm_aig.training.trainer import Stopped

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
        if args.amp:
            common += ' --amp'
        own = own.format(output=shlex.quote(args.output), seed=seed)
        needs = next((word for word in shlex.split(own) if word.startswith('local-dir:')), None)
        script = 'early_exits.py' if name.startswith('exits-') else 'finetune.py'
        command = [sys.executable, str(Path(__file__).with_name(script)), *shlex.split(f'{common} {own}'),
                   '--output', args.output, '--experiment', f'{name}-s{seed}', '--resume', 'auto']
        plan.append(Training(f'{name}-s{seed}', command, needs and needs.rpartition('/')[2]))
    return plan


def train(args: argparse.Namespace) -> None:
    """Run the trainings that are not done, args.jobs at a time, each once what it needs is done."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    submitted: Dict[str, Future] = {}
    running: Set[subprocess.Popen] = set()

    def run_training(training: Training) -> Optional[str]:
        """What went wrong, None if it is trained."""
        if training.needs in submitted:
            wait([submitted[training.needs]])
        if training.needs and not is_done(folder, training.needs):
            return f'{training.name} needs {training.needs}, which is not trained.'
        if is_done(folder, training.name):
            return None
        with open(folder / f'{training.name}.log', 'ab') as log:
            process = subprocess.Popen(training.command, stdout=log, stderr=log)
            running.add(process)
            code = process.wait()
            running.discard(process)
        return f'{training.name} failed, see {log.name}.' if code else None

    def stop(signum: int, frame: Any) -> None:
        for process in tuple(running):
            process.terminate()  # it saves
        raise Stopped(f'stopped by {signal.Signals(signum).name}. Run it again to go on.', signum)

    pool = ThreadPoolExecutor(args.jobs)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        for training in planned(args):  # in an order in which none waits for a later one
            submitted[training.name] = pool.submit(run_training, training)
        problems = [future.result() for future in tqdm(submitted.values(), args.task, unit='training')]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C reaches the trainings too, and they save
        signal.signal(signal.SIGTERM, before)
    if any(problems):
        raise ResultError(' '.join(filter(None, problems)))


def is_done(folder: Path, name: str) -> bool:
    return (folder / name / 'results.json').is_file()


# Sum up

TIMED_OFFSETS = ('offset -6', 'offset -3', 'offset -1', 'offset 1', 'offset 3', 'offset 10000')
TIMED_SHARES = ('0.35 of the MACs', '0.4 of the MACs', '0.5 of the MACs', '0.6 of the MACs', '0.8 of the MACs')
SHOWN = {  # columns that are printed
    'table': ('macs_over_resnet32', 'top1', 'macs_by_severity'), 'times': ('batch_size', 'top1', 'ratio'),
    'pairs': ('against', 'against_setting', 'seed', 'only_model', 'only_against', 'p'),
}


class Result(NamedTuple):
    """What a seed adds to a row of the table."""
    seed: int
    macs: float
    top1: float
    used: str
    macs_of_quarters: Sequence[float]
    precision: str


def read_results(args: argparse.Namespace) -> List[Tuple[Tuple[str, str], Result]]:
    """Results of args.add, a table that this script wrote, with model and setting. MACs are the mean of its seeds."""
    found = []
    faults = OSError, KeyError, ValueError, TypeError
    with blame('add', args.add, faults), open(args.add, newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            if (row['task'], int(row['epochs'])) != (args.task, TASKS[args.task].epochs):
                raise ValueError(f'it is of {row["task"]}, {row["epochs"]} epochs.')
            macs = 1e6 * float(row['macs'])
            largest = macs / float(row['macs_over_resnet32'])
            if math.isnan(largest):
                raise ValueError('it has no static-r32.')
            quarters = [float(share) * largest for share in row['macs_by_severity'].split()]
            columns = (row[name].split(', ') for name in ('seeds', 'top1_seeds', 'precision'))
            for seed, top1, precision in zip(*columns):
                result = Result(int(seed), macs, float(top1), row['used'], quarters, precision)
                found.append(((row['model'], row['setting']), result))
    return found


def summarize(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Rows of the table: means over seeds."""
    groups: Dict[Tuple[str, str], List[Result]] = {}
    for key, result in read_results(args) if args.add else []:
        groups.setdefault(key, []).append(result)
    for seed in args.seeds:
        for row in rows_of_seed(args, seed):
            result = Result(seed, row.macs, row.top1, row.used, row.macs_of_quarters, precision(args, row, seed))
            groups.setdefault((row.name, row.setting), []).append(result)
    largest = groups['static-r32', ''][0].macs if ('static-r32', '') in groups else math.nan
    table = []
    for (name, setting), found in groups.items():
        seeds, all_macs, accuracies, used, quarters, precisions = zip(*found)
        if len(set(seeds)) < len(seeds):
            raise InputError(f'has seeds {sorted(set(seeds))}, of which some are in {args.output!r} as well.', 'add')
        macs = statistics.mean(all_macs)
        shares = [statistics.mean(part) / largest for part in zip(*quarters)]
        table.append({
            'task': args.task, 'model': name, 'setting': setting, 'macs': round(macs / 1e6, 3),
            'macs_over_resnet32': round(macs / largest, 4), 'top1': round(statistics.mean(accuracies), 2),
            'top1_std': round(statistics.stdev(accuracies), 2) if len(seeds) > 1 else '',
            'top1_seeds': ', '.join(f'{accuracy:.2f}' for accuracy in accuracies),
            'used': '; '.join(dict.fromkeys('; '.join(used).split('; '))) if ' + ' in used[0] else '',
            'macs_by_severity': ' '.join(f'{share:.3f}' for share in shares),
            'seeds': ', '.join(map(str, seeds)), 'precision': ', '.join(precisions),
            'epochs': TASKS[args.task].epochs})
    return table


def precision(args: argparse.Namespace, row: Row, seed: int) -> str:
    """What the models of a row were trained in: float32, --amp, or both."""
    found = set()
    for name, _ in row.stages:
        results = json.loads(Path(args.output, f'{name}-s{seed}', 'results.json').read_text(encoding='utf-8'))
        recipe = results['recipe']
        found.add(recipe['amp_dtype'] if recipe['amp'] else 'float32')
    return ' and '.join(sorted(found))


def pairs(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Paired tests on the test images of each seed, for those of PAIRS that are trained."""
    found = []
    for seed in args.seeds:
        rows = {(row.name, row.setting): row for row in rows_of_seed(args, seed)}
        for key, other in PAIRS:
            if {key, other, ('static-r32', '')} <= rows.keys():
                largest = rows['static-r32', ''].macs
                first, second = rows[key], rows[other]
                test = mcnemar(first.right, second.right)
                found.append({
                    'task': args.task, 'model': first.name, 'setting': first.setting,
                    'macs_over_resnet32': round(first.macs / largest, 3), 'against': second.name,
                    'against_setting': second.setting, 'against_macs_over_resnet32': round(second.macs / largest, 3),
                    'seed': seed, 'images': len(first.right),
                    'only_model': test['only_first_right'], 'only_against': test['only_second_right'],
                    'points': f'{test["difference"]:+.2f}', 'p': f'{test["p_value"]:.2g}'})
    return found


def times(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Times of static and distilled nets, of adaptive ones at some offsets, of cascades at some shares of the MACs."""
    shown = [row for row in rows_of_seed(args, args.seeds[0])
             if row.name.startswith(('static-', 'distilled-'))
             or (row.name.startswith(('any-', 'cascade')) and row.setting in TIMED_OFFSETS + TIMED_SHARES)]
    return time_rows(args, args.seeds[0], shown)


def run(args: argparse.Namespace) -> None:
    if not Path(args.data_dir).is_dir():
        raise InputError(f'must be a folder, {args.data_dir!r} is not.', 'data_dir')
    outputs = {'table': summarize, 'pairs': pairs, 'times': times}
    wanted = next((name for name in outputs if getattr(args, name)), None)
    if args.add and wanted != 'table':
        raise InputError('is for --table only.', 'add')
    for name in ('only', 'amp') if wanted else ():
        if getattr(args, name):
            raise InputError(f'is for trainings, not for --{wanted}.', name)
    if wanted:
        check_file(getattr(args, wanted), wanted)
        if args.times:
            require('export', 'onnx', 'onnxruntime', 'onnxscript')
    else:
        train(args)
    source = {'machine': environment()['cpu'], 'source': ' '.join(sys.argv)}
    table = [{**row, **source} for row in outputs[wanted or 'table'](args)]
    if wanted and not table:
        raise ResultError(f'{args.output} has no trainings of {args.task} to sum up.')
    if args.json:
        print(json.dumps(table, indent=2))
    elif table:
        columns = ('model', 'setting', *SHOWN[wanted or 'table'])
        print_table([{name: row[name] for name in columns} for row in table], 'model', 'setting')
    if wanted:
        write_csv(getattr(args, wanted), table[0], [row.values() for row in table])


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
