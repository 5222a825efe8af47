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
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from _args import add_args, create_parser, integer
from _common import ResultError, check_file, run_script, write_csv
from _rivals import TASKS, trainings

EXAMPLES = """examples:
  scripts/compare.py glyphs --data-dir glyphs --jobs 2              # train, or go on with it; then the table
  scripts/compare.py glyphs --data-dir glyphs --table glyphs.csv    # the table of what is trained so far
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
    tables.add_argument('--times', metavar='FILE', help='train nothing, write a CSV file of times in ONNX Runtime')
    add_args(parser, 'workers', default=0)
    add_args(parser, 'device', 'amp', 'json')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

from _answers import Row, rows_of_seed, time_rows
from tqdm import tqdm

from timm_aig import InputError
from timm_aig.run import environment

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
        command = [sys.executable, str(Path(__file__).with_name('finetune.py')), *shlex.split(f'{common} {own}'),
                   '--output', args.output, '--experiment', f'{name}-s{seed}', '--resume', 'auto']
        plan.append(Training(f'{name}-s{seed}', command, needs and needs.rpartition('/')[2]))
    return plan


def train(args: argparse.Namespace) -> None:
    """Run the trainings that are not done, args.jobs at a time, each once what it needs is done."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    submitted: Dict[str, Future] = {}

    def run_training(training: Training) -> Optional[str]:
        """What went wrong, None if it is trained."""
        if training.needs in submitted:
            wait([submitted[training.needs]])
        if training.needs and not is_done(folder, training.needs):
            return f'{training.name} needs {training.needs}, which is not trained.'
        if is_done(folder, training.name):
            return None
        with open(folder / f'{training.name}.log', 'ab') as log:
            code = subprocess.run(training.command, stdout=log, stderr=log).returncode
        return f'{training.name} failed, see {log.name}.' if code else None

    pool = ThreadPoolExecutor(args.jobs)
    try:
        for training in planned(args):  # in an order in which none waits for a later one
            submitted[training.name] = pool.submit(run_training, training)
        problems = [future.result() for future in tqdm(submitted.values(), args.task, unit='training')]
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C reaches the trainings too, and they save
    if any(problems):
        raise ResultError(' '.join(filter(None, problems)))


def is_done(folder: Path, name: str) -> bool:
    return (folder / name / 'results.json').is_file()


# Sum up

TIMED_OFFSETS = ('offset -6', 'offset -3', 'offset -1', 'offset 1', 'offset 3', 'offset 10000')
TIMED_SHARES = ('0.35 of the MACs', '0.4 of the MACs', '0.5 of the MACs', '0.6 of the MACs', '0.8 of the MACs')


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
            'used': '; '.join(dict.fromkeys(row.used for row in found)) if ' + ' in found[0].used else '',
            'macs_by_severity': ' '.join(f'{share:.3f}' for share in quarters),
            'seeds': ', '.join(map(str, seeds)), 'epochs': TASKS[args.task].epochs})
    return table


def times(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Times of static nets, of adaptive ones at some offsets and of cascades at some shares of the MACs."""
    rows = rows_of_seed(args, args.seeds[0])
    shown = [row for row in rows if row.name.startswith('static-') or row.setting in TIMED_OFFSETS + TIMED_SHARES]
    return time_rows(args, args.seeds[0], shown)


def run(args: argparse.Namespace) -> None:
    if not Path(args.data_dir).is_dir():
        raise InputError(f'must be a folder, {args.data_dir!r} is not.', 'data_dir')
    for name in ('table', 'times'):
        if getattr(args, name):
            check_file(getattr(args, name), name)
    if not args.table and not args.times:
        train(args)
    source = {'machine': environment()['cpu'], 'source': ' '.join(sys.argv)}
    table = [{**row, **source} for row in (times(args) if args.times else summarize(args))]
    if (args.table or args.times) and not table:
        raise ResultError(f'no training of {args.task} is done in {args.output}.')
    if args.json:
        print(json.dumps(table, indent=2))
    else:
        for row in table:
            name, value = ('batch_size', 'ratio') if args.times else ('macs_over_resnet32', 'macs_by_severity')
            print(f'{row["model"]:36} {row["setting"]:18} {row[name]:7} {row["top1"]:6.2f} {row[value]}')
    if args.table or args.times:
        write_csv(args.times or args.table, table[0], [row.values() for row in table])


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
