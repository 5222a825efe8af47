#!/usr/bin/env python3
"""Draw the pictures of hub_configs/README.md from the tables in hub_configs/results."""
import argparse
import csv
import sys
from pathlib import Path
from statistics import mean
from typing import Dict, List, Optional, Tuple

from _args import create_parser
from _common import run_script

EXAMPLES = """examples:
  scripts/draw_results.py              # after a change of fmnist*.csv, glyphs*.csv or segment.csv"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    return create_parser(__doc__, EXAMPLES).parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

from timm_aig.analysis.figures import COLOURS, plot_accuracy_macs

ROOT = Path(__file__).resolve().parents[1] / 'hub_configs'
RESNET_32 = ('cifar_resnet32', 'cifar_resnet32_aig', 'cifar_resnet20')  # ResNet-110 costs 3.7 times as much
ADAPTIVE = ('target 0.6', 'target 0.6, `--recipe paper`')
FMNIST = 'Fashion-MNIST, 10,000 test images. The parent is ResNet-32. Bars are the range over seeds.'

# Rows of glyphs.csv that are joined by a line, by the start of their names.
GLYPHS = '2,000 damaged characters at 20 px, 10,000 test images. The parent is ResNet-32.'
CURVES = {
    'any-r20': 'one ResNet-20 for any budget', 'any-r32': 'one ResNet-32 for any budget',
    'cascade, static or adaptive nets': 'cascade with adaptive nets',
}
BASELINES = {
    'static-': 'static ResNet-8, 14, 20, 32', 'distilled-': 'distilled ResNet-8, 14, 20, 32',
    'cascade, static nets': 'cascade of static nets', 'small-r32': 'ResNet-32 at 16 px',
    'exits-r32': 'ResNet-32 with early exits', 'distill-r32': 'ResNet-32, recipe distill',
    'paper-r32': 'ResNet-32, recipe of the paper',
}

SEVERITY = {  # rows of glyphs.csv
    'one ResNet-32 for any budget, offset -1': ('any-r32', 'offset -1'),
    'one ResNet-32 for any budget, offset 1': ('any-r32', 'offset 1'),
    'cascade with adaptive nets, 0.35 of the MACs': ('cascade, static or adaptive nets', '0.35 of the MACs'),
    'cascade of static nets, 0.5 of the MACs': ('cascade, static nets', '0.5 of the MACs'),
}

SEGMENT = 'Pages of 2,000 characters, 2,496 test pages, one seed. The parent is ResNet-32.'
SEGMENT_CURVES = {'any-r32': 'one ResNet-32 for any budget'}
SEGMENT_BASELINES = {
    'static-': 'static ResNet-14, 20, 32', 'distilled-': 'distilled ResNet-14, 20',
    'cascade, distilled': 'cascade of these two',
}

Point = Tuple[str, float, float]


def read(name: str) -> List[Dict[str, str]]:
    with open(ROOT / 'results' / name, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def trainings(rows: List[Dict[str, str]], ranges: Dict[str, Tuple[float, float]]) -> List[Point]:
    """A point for each row, the mean of its seeds. Adds the range of the seeds to `ranges`."""
    points = []
    for row in rows:
        top1 = [float(value) for value in row['top1_seeds'].split(', ')]
        macs = [float(value) for value in row['macs_over_resnet32'].split(', ')]
        how = row['training'].replace('`--recipe paper`', 'recipe of the paper').removeprefix('static').lstrip(', ')
        seeds = f'{len(top1)} seeds' if len(top1) > 1 else ''
        name = ', '.join(filter(None, (architecture(row['model']), how, f'{row["epochs"]} epochs', seeds)))
        points.append((name, mean(macs), mean(top1)))
        ranges[name] = (min(top1), max(top1))
    return points


def architecture(model: str) -> str:
    return model.removeprefix('cifar_').replace('resnet', 'ResNet-').replace('_aig', '-AIG')


def curves_of(rows: List[Dict[str, str]], names: Dict[str, str], x: str) -> List[Point]:
    """The points of some rows of a comparison, ascending in the column x."""
    found: List[Point] = []
    for start, name in names.items():
        same = {(float(row[x]), float(row['top1'])) for row in rows
                if row['model'].startswith(start) and not row['setting'].startswith('as ')}
        found += [(name, *point) for point in sorted(same)]
    return found


def draw_glyphs() -> None:
    rows = read('glyphs.csv')
    plot_accuracy_macs(
        curves_of(rows, CURVES, 'macs_over_resnet32'), curves_of(rows, BASELINES, 'macs_over_resnet32'),
        ROOT / 'glyphs_accuracy_macs.png', GLYPHS)
    for batch in ('1', '32'):
        rows = [row for row in read('glyphs_speed.csv') if row['batch_size'] == batch]
        time = {row['model'].replace('static-', 'distilled-'): row['ratio'] for row in rows if not row['setting']}
        rows += [{**row, 'ratio': time[row['model']], 'top1': row['top1_seeds'].split(', ')[0]}  # of seed 0
                 for row in read('glyphs.csv') if row['model'] in time
                 and row['model'].startswith('distilled-')]  # a net takes the same time however it was trained
        plot_accuracy_macs(
            curves_of(rows, CURVES, 'ratio'), curves_of(rows, BASELINES, 'ratio'),
            ROOT / f'glyphs_accuracy_time_{batch}.png',
            f'{GLYPHS} Mean time of an image in ONNX Runtime, one thread, batch {batch}, seed 0.', over='time')


def draw_severity() -> None:
    """MACs of the test images, from the least to the most damaged quarter."""
    from matplotlib.figure import Figure

    rows = {(row['model'], row['setting']): row for row in read('glyphs.csv')}
    figure = Figure(figsize=(8, 4.5), layout='constrained')  # inches
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=COLOURS)
    for (name, key), style in zip(SEVERITY.items(), ('o-', 'o-', 's--', 's--')):
        shares = [float(share) for share in rows[key]['macs_by_severity'].split()]
        axes.plot(range(4), shares, style, label=f'{name}, {float(rows[key]["top1"]):.1f} %', markersize=5)
    axes.set_xticks(range(4), ['least damaged quarter', 'second', 'third', 'most damaged quarter'], fontsize=8)
    axes.set(ylabel="MACs over ResNet-32's", ylim=(0, 1.05))
    axes.grid(alpha=.3)
    axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f'Harder images take more MACs\n{GLYPHS}', x=.012, ha='left', fontsize=10.5)
    figure.savefig(ROOT / 'glyphs_severity_macs.png', dpi=200)


def draw_segment() -> None:
    rows = [{**row, 'model': row['network'], 'top1': row['miou']} for row in read('segment.csv')
            if 'r8' not in row['network']]
    plot_accuracy_macs(
        curves_of(rows, SEGMENT_CURVES, 'macs_over_resnet32'), curves_of(rows, SEGMENT_BASELINES, 'macs_over_resnet32'),
        ROOT / 'segment_miou_macs.png', SEGMENT, accuracy='mean IoU, %')


def draw_fmnist() -> None:
    rows = [row for row in read('fmnist.csv') if row['model'] in RESNET_32]
    curves = [
        (f'{row["model"].removeprefix("cifar_")} at many budgets', float(row['macs_share']), float(row['top1']))
        for row in read('fmnist_budgets.csv')]
    cascades = [
        (f'cascade of {row["first"].partition(".")[2]} and {row["second"].partition(".")[2]}',
         float(row['macs_share']), float(row['top1'])) for row in read('fmnist_cascades.csv')]
    ranges: Dict[str, Tuple[float, float]] = {}
    adaptive = trainings([row for row in rows if row['training'] in ADAPTIVE and not row['tag']], ranges)
    static = trainings([row for row in rows if not row['model'].endswith('_aig')], ranges)
    plot_accuracy_macs([*curves, *cascades, *adaptive], static, ROOT / 'fmnist_accuracy_macs.png', FMNIST, ranges)


def run(args: argparse.Namespace) -> None:
    draw_fmnist()
    draw_glyphs()
    draw_severity()
    draw_segment()


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
