#!/usr/bin/env python3
"""Draw the pictures of hub_configs/README.md from the tables in hub_configs/results."""
import argparse
import csv
import sys
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from _args import create_parser
from _common import run_script

EXAMPLES = """examples:
  scripts/draw_results.py              # after a change of fmnist_comparison.csv, glyphs*.csv or segment.csv"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    return create_parser(__doc__, EXAMPLES).parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

from timm_aig.analysis.figures import COLOURS, plot_accuracy_macs

ROOT = Path(__file__).resolve().parents[1] / 'hub_configs'
GLYPHS = '2,000 damaged characters at 20 px, 10,000 test images. The parent is ResNet-32.'
FMNIST = 'Fashion-MNIST, 10,000 test images, one seed. The parent is ResNet-32.'

# Rows of compare.py that are joined by a line, by the start of their names.
CURVES = {
    'any-r20': 'one ResNet-20 for any budget', 'any-r32': 'one ResNet-32 for any budget',
    'cascade, static or adaptive nets': 'cascade of static or adaptive networks',
}
BASELINES = {
    'static-': 'static networks', 'distilled-': 'distilled networks',
    'cascade, static nets': 'cascade of static networks', 'small-r32': 'ResNet-32 at a lower resolution',
    'exits-r32': 'ResNet-32 with early exits', 'distill-r32': 'ResNet-32, recipe distill',
    'paper-r32': 'ResNet-32, recipe of the paper',
}
COLOUR_OF = dict(zip([*CURVES.values(), *BASELINES.values()], COLOURS))  # the same in all pictures

SPAN = 8.5  # points of accuracy in a picture

SEVERITY = {  # rows of glyphs.csv
    'one ResNet-32 for any budget, offset -1': ('any-r32', 'offset -1'),
    'one ResNet-32 for any budget, offset 1': ('any-r32', 'offset 1'),
    'cascade of static networks, 0.35 of the MACs': ('cascade, static nets', '0.35 of the MACs'),
    'cascade of static networks, 0.5 of the MACs': ('cascade, static nets', '0.5 of the MACs'),
}

SEGMENT = 'Pages of 2,000 characters, 2,496 test pages, one seed. The parent is ResNet-32.'
SEGMENT_CURVES = {'any-r32': CURVES['any-r32']}
SEGMENT_BASELINES = {
    'static-': BASELINES['static-'], 'distilled-': BASELINES['distilled-'],
    'cascade, distilled': BASELINES['cascade, static nets'],
}

Point = Tuple[str, float, float]


def read(name: str) -> List[Dict[str, str]]:
    with open(ROOT / 'results' / name, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def curves_of(rows: List[Dict[str, str]], names: Dict[str, str], x: str) -> List[Point]:
    """The points of some rows of a comparison, ascending in the column x, but for those far below the best."""
    found: List[Point] = []
    lowest = max(float(row['top1']) for row in rows) - SPAN
    for start, name in names.items():
        same = {(float(row[x]), float(row['top1'])) for row in rows
                if row['model'].startswith(start) and not row['setting'].startswith('as ')
                and float(row['top1']) > lowest}
        found += [(name, *point) for point in sorted(same)]
    return found


def draw_comparison(name: str, picture: str, title: str) -> None:
    rows = read(name)
    plot_accuracy_macs(
        curves_of(rows, CURVES, 'macs_over_resnet32'), curves_of(rows, BASELINES, 'macs_over_resnet32'),
        ROOT / picture, title, colours=COLOUR_OF)


def draw_times() -> None:
    for batch in ('1', '32'):
        rows = [row for row in read('glyphs_speed.csv') if row['batch_size'] == batch]
        plot_accuracy_macs(
            curves_of(rows, CURVES, 'ratio'), curves_of(rows, BASELINES, 'ratio'),
            ROOT / f'glyphs_accuracy_time_{batch}.png',
            f'{GLYPHS} Mean time of an image in ONNX Runtime, one thread, batch {batch}, one seed.', over='time',
            colours=COLOUR_OF)


def draw_severity() -> None:
    """MACs of the test images, from the least to the most damaged quarter."""
    from matplotlib.figure import Figure

    rows = {(row['model'], row['setting']): row for row in read('glyphs.csv')}
    figure = Figure(figsize=(8, 4.5), layout='constrained')  # inches
    axes = figure.add_subplot()
    for (name, key), style in zip(SEVERITY.items(), ('o-', '^-', 's--', 'D--')):
        shares = [float(share) for share in rows[key]['macs_by_severity'].split()]
        axes.plot(range(4), shares, style, label=f'{name}, {float(rows[key]["top1"]):.1f} %', markersize=5,
                  color=COLOUR_OF[name.partition(',')[0]])
    axes.set_xticks(range(4), ['least damaged quarter', 'second', 'third', 'most damaged quarter'], fontsize=8)
    axes.set(ylabel='MACs relative to ResNet-32', ylim=(0, 1.05))
    axes.grid(alpha=.3)
    axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f'MACs by the damage of the image\n{GLYPHS}', x=.012, ha='left', fontsize=10.5)
    figure.savefig(ROOT / 'glyphs_severity_macs.png', dpi=200)


def draw_segment() -> None:
    rows = [{**row, 'model': row['network'], 'top1': row['miou']} for row in read('segment.csv')]
    plot_accuracy_macs(
        curves_of(rows, SEGMENT_CURVES, 'macs_over_resnet32'), curves_of(rows, SEGMENT_BASELINES, 'macs_over_resnet32'),
        ROOT / 'segment_miou_macs.png', SEGMENT, accuracy='mean IoU, %', colours=COLOUR_OF)


def run(args: argparse.Namespace) -> None:
    draw_comparison('glyphs.csv', 'glyphs_accuracy_macs.png', GLYPHS)
    draw_comparison('fmnist_comparison.csv', 'fmnist_accuracy_macs.png', FMNIST)
    draw_times()
    draw_severity()
    draw_segment()


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
