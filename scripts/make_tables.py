#!/usr/bin/env python3
"""Write the tables of the READMEs from hub_configs/results/*.csv, between `<!-- table: NAME -->` and `<!-- end -->`.

A table shows some rows and columns of a CSV file; TABLES in this script says which. To add a result, add a row to the
CSV file and run this script.
"""
import argparse
import csv
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Union

from _args import create_parser

EXAMPLES = """examples:
  scripts/make_tables.py              # write the tables of all READMEs
  scripts/make_tables.py --check      # exit with 1 if a table differs from its CSV file"""

ROOT = Path(__file__).resolve().parent.parent
READMES = ('README.md', 'hub_configs/README.md', 'hub_configs/results/README.md', 'hub_configs/results/speed.md',
           'scripts/README.md')
RESULTS = 'hub_configs/results'
MARKED = re.compile(r'(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)', re.DOTALL)


class Table(NamedTuple):
    """A table of a README.

    file: CSV file in hub_configs/results.
    columns: Heading -> format string over the CSV's columns. A part in [] is left out if a value in it is empty. A
        cell is empty if a value outside of [] is.
    where: Column -> value, or values, of the rows to show.
    """
    file: str
    columns: Dict[str, str]
    where: Dict[str, Union[str, Sequence[str]]]


_ACCURACY = {
    'model': '`{model}`', 'training': '{training}', 'epochs': '{epochs}', 'top-1, %': '{top1}[ ± {top1_std}]',
    'MACs / ResNet-32': '{macs_over_resnet32}', 'blocks run': '{blocks_run} of {blocks}', 'paths': '{paths}',
}
_TIME = {
    'batch': '{batch_size}', 'network': '{run}', 'ms / image': '{ms}', 'time': '{ratio}[ ({ratio_low}-{ratio_high})]',
    'MACs share': '{macs_share}',
}
_SPEED = {**_TIME, 'efficiency': '{efficiency}', 'peak MiB': '{peak_mib}'}
_MODEL_TIME = {'model': '`{model}`', **_TIME}
_CHANGE = {'top-1, %': '{top1}', 'right only by it / only by the default': '{only_change} / {only_default}', 'p': '{p}'}

_PRECISION = {
    'model': '`{model}`', 'runtime': '{runtime}', 'network': '{network}', 'precision': '{precision}',
    'top-1, %': '{top1}', 'batch 1: ms / image': '{ms_1}', 'over the float32 parent': '{ratio_1}',
    'batch 8 or 32: ms / image': '{ms_n}', 'over the float32 parent ': '{ratio_n}',
}

_GLYPHS = {'MACs / ResNet-32': '{macs_over_resnet32}', 'top-1, %': '{top1}[ ± {top1_std}]', 'seeds': '{seeds}'}
_FMNIST = {'MACs / ResNet-32': '{macs_over_resnet32}', 'top-1, %': '{top1}'}
_SEVERITY = {'MACs / ResNet-32, from the least to the most damaged quarter': '{macs_by_severity}'}

_TRAINED = {'setting': ('', 'offset 0'), 'model': (
    'static-r8', 'static-r14', 'static-r20', 'static-r32', 'distilled-r8', 'distilled-r14', 'distilled-r20',
    'distilled-r32', 'small-r32', 'distill-r32', 'paper-r32')}
_CASCADES = {
    'model': ('cascade, static nets', 'cascade, static or adaptive nets', 'exits-r32'),
    'setting': ('0.3 of the MACs', '0.35 of the MACs', '0.4 of the MACs', '0.45 of the MACs', '0.5 of the MACs',
                '0.6 of the MACs', 'as static-r20', 'as static-r32')}

TABLES = {
    'glyphs-static': Table('glyphs.csv', {'network': '`{model}`', **_GLYPHS}, _TRAINED),
    'glyphs-any': Table('glyphs.csv', {'network': '`{model}`', 'setting': '{setting}', **_GLYPHS, **_SEVERITY}, {
        'model': ('any-r20', 'any-r32')}),
    'glyphs-speed': Table('glyphs_speed.csv', {
        'network': '{model}', 'setting': '{setting}', 'batch': '{batch_size}', 'top-1, %': '{top1}',
        'ms / image': '{ms_per_image}', 'time / ResNet-32': '{ratio} ({ratio_min}-{ratio_max})',
        'slowest 1 %, ms': '{p99_ms}',
    }, {'setting': (
        '', 'offset -3', 'offset -1', 'offset 3', '0.35 of the MACs', '0.4 of the MACs', '0.5 of the MACs')}),
    'glyphs-cascades': Table('glyphs.csv', {
        'nets': '{model}', 'chosen for': '{setting}', 'chosen': '{used}', **_GLYPHS, **_SEVERITY}, _CASCADES),
    'glyphs-pairs': Table('glyphs_pairs.csv', {
        'model': '{model}[, {setting}]', 'MACs / ResNet-32': '{macs_over_resnet32}',
        'against': '{against}[, {against_setting}]', 'its MACs': '{against_macs_over_resnet32}', 'seed': '{seed}',
        'right only by the model / only by the other': '{only_model} / {only_against}', 'points': '{points}',
        'p': '{p}'}, {}),
    'glyphs-weight': Table('glyphs_weight.csv', {
        'MACs / ResNet-32': '{macs_over_resnet32}', 'top-1 with weight 10, %': '{top1_10}',
        'top-1 with weight 30, %': '{top1_30}', 'difference': '{change}'}, {}),
    'glyphs-options': Table('glyphs_options.csv', {
        'network': '{network}', 'change': '{change}', 'least': '{least_macs}',
        **{f'{share / 100:g} of the MACs': f'{{top1_{share}}}' for share in (45, 50, 55, 60, 70, 80, 100)}}, {}),
    'glyphs-rules': Table('glyphs_rules.csv', {
        'rule': '{rule}', 'nets': '{nets}', **{f'0.{share} of the MACs': f'{{top1_{share}}}[ ({{change_{share}}})]'
                                               for share in (30, 35, 40, 45, 50)}}, {}),
    'segment': Table('segment.csv', {
        'network': '`{network}`', 'setting': '{setting}', 'MACs / ResNet-32': '{macs_over_resnet32}',
        'mean IoU, %': '{miou}', 'positions right, %': '{accuracy}'}, {}),
    'models': Table('models.csv', {
        'model': '`{model}`', 'data': '{dataset}', 'top-1, %': '{top1}', 'static parent': '{parent_top1}',
        'MACs share': '{macs_share}', 'MACs, M': '{macs}', 'params, M': '{params}',
        'blocks run': '{blocks_run} of {blocks}', 'paths': '{paths}', 'ms, batch 1 / 32': '{ms_1} / {ms_32}',
        'over the static network': '{ratio_1} / {ratio_32}',
    }, {}),
    'shipped': Table('models.csv', {
        'model': '`{model}`', 'data': '{dataset}', 'top-1, %': '{top1}', 'MACs': '{macs_share}',
        'time at batch 1 / 32': '{ratio_1} / {ratio_32}',
    }, {'model': ('cifar_resnet32_aig.fmnist', 'cifar_resnet32_aig.fmnist_t06', 'cifar_resnet32_aig.glyphs')}),
    'fmnist-trained': Table('fmnist_comparison.csv', {'network': '`{model}`', **_FMNIST}, _TRAINED),
    'fmnist-any': Table('fmnist_comparison.csv', {'network': '`{model}`', 'setting': '{setting}', **_FMNIST}, {
        'model': ('any-r20', 'any-r32')}),
    'fmnist-chosen': Table('fmnist_comparison.csv', {
        'nets': '{model}', 'chosen for': '{setting}', 'chosen': '{used}', **_FMNIST}, {
            'model': _CASCADES['model'],
            'setting': ('0.3 of the MACs', '0.35 of the MACs', '0.4 of the MACs', '0.5 of the MACs', 'as static-r32')}),
    'fmnist': Table('fmnist.csv', {
        **_ACCURACY, 'minutes': '{minutes}', 'top-1 of seeds 0, 1, 2': '{top1_seeds}',
    }, {'study': 'short'}),
    'fmnist-long': Table('fmnist.csv', _ACCURACY, {'study': 'long'}),
    'fmnist-families': Table('fmnist_families.csv', {
        'model': '`{model}`', 'training': '{training}', 'epochs': '{epochs}', 'top-1, %': '{top1}',
        'MACs share': '{macs_share}', 'branches run': '{blocks_run} of {blocks}', 'paths': '{paths}',
    }, {}),
    'fmnist-pairs': Table('fmnist_pairs.csv', {
        'model': '{model}', 'against': '{against}', 'seed': '{seed}',
        'right only by the model / only by the other': '{only_model} / {only_against}', 'points': '{points}',
        'p': '{p}',
    }, {}),
    'fmnist-budgets': Table('fmnist_budgets.csv', {
        'model': '`{model}`', 'budget': '{budget}', 'MACs share': '{macs_share}', 'top-1, %': '{top1}',
    }, {}),
    'fmnist-cascades': Table('fmnist_cascades.csv', {
        'first model': '`{first}`', 'second model': '`{second}`',
        'threshold': '{threshold}', 'images of the second, %': '{second_share}', 'MACs share': '{macs_share}',
        'top-1, %': '{top1}',
    }, {}),
    'fmnist-cascade-speed': Table('fmnist_cascade_speed.csv', {
        'runtime': '{runtime}', 'batch': '{batch_size}', 'ms / image': '{ms}', 'parent': '{parent_ms}',
        'time': '{ratio} ({ratio_low}-{ratio_high})', 'slowest 1 %, ms': '{p99_ms}', 'parent ': '{parent_p99_ms}',
    }, {}),
    'fmnist-speed': Table('fmnist_speed.csv', {
        'model': '`{model}`', 'batch': '{batch_size}', 'parent, ms / image': '{parent_ms}',
        'MACs share': '{macs_share}', 'time': '{ratio} ({ratio_low}-{ratio_high})',
        "time of timm's default parent": '{ratio_timm_default}',
    }, {}),
    'recipe-optimizer': Table('recipe.csv', {
        'training': '{change}', 'paths': '{paths}', **_CHANGE,
    }, {'study': 'optimizer'}),
    'recipe-parts': Table('recipe.csv', {'change': '{change}', **_CHANGE}, {'study': 'parts'}),
    'speed-resnet50': Table('speed.csv', _SPEED, {'study': 'forced', 'parent': 'resnet50'}),
    'speed-resnet101': Table('speed.csv', _SPEED, {'study': 'forced', 'parent': 'resnet101'}),
    'speed-runtimes': Table('speed.csv', _MODEL_TIME, {'study': 'runtimes', 'batch_size': ('1', '8')}),
    'speed-families': Table('speed.csv', _MODEL_TIME, {'study': 'families', 'rate': '0.5'}),
    'speed-compiled': Table('speed.csv', _MODEL_TIME, {'study': 'compiled'}),
    'serving': Table('serving.csv', {
        'model': '`{model}`', 'clients': '{clients}', 'network': '{run}', 'images / s': '{images_per_s}',
        'over the parent': '{throughput_ratio}[ ({throughput_low}-{throughput_high})]', 'p50, ms': '{p50_ms}',
        'over the parent ': '{p50_ratio}', 'p99, ms': '{p99_ms}', 'over the parent  ': '{p99_ratio}',
        'mean batch': '{mean_batch}', 'MACs share': '{macs_share}',
    }, {}),
    'int8': Table('int8.csv', _PRECISION, {'machine': [f'{cores} of an AMD EPYC (AVX2, shared virtual machine)'
                                                       for cores in ('1 core', '2 cores')]}),
    'int8-vnni': Table('int8.csv', _PRECISION, {'machine': [
        f'{cores} of an AMD EPYC (Zen 4, AVX-512 with VNNI and bfloat16, virtual machine)'
        for cores in ('1 core', '2 cores')]}),
    'training-step': Table('training_step.csv', {
        'model': '`{model}`', 'px': '{img_size}', 'batch': '{batch_size}', 'threads': '{threads}',
        'time': '{ratio}', 'with `--torchcompile`': '{ratio_compiled}',
    }, {}),
    'glibc': Table('glibc.csv', {
        'network': '{run}', 'default': '{as_it_is}', 'with both variables': '{both_variables}',
    }, {}),
}


def cell(template: str, row: Dict[str, str]) -> str:
    """Fill in a template, see Table.columns."""
    def fill(text: str) -> str:
        values = [row[name] for name in re.findall(r'{(\w+)}', text)]
        return text.format(**row) if all(values) else ''

    parts = re.split(r'\[(.*?)\]', template)  # texts and, at odd places, what stood in []
    return fill(parts[0]) and ''.join(map(fill, parts))


def is_shown(row: Dict[str, str], where: Dict[str, Union[str, Sequence[str]]]) -> bool:
    return all(row[name] in ([value] if isinstance(value, str) else value) for name, value in where.items())


def make_table(table: Table, results: Path) -> str:
    """The Markdown of a table."""
    with open(results / table.file, newline='', encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if is_shown(row, table.where)]
    lines: List[List[str]] = [list(table.columns), ['---'] * len(table.columns)]
    lines += [[cell(template, row) for template in table.columns.values()] for row in rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    parser.add_argument('--check', action='store_true', help='write nothing, only compare')
    parser.add_argument('--root', type=Path, default=ROOT, metavar='DIR', help='checkout (default: this one)')
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    results, differing = args.root / RESULTS, []
    try:
        for path in (args.root / name for name in READMES):
            text = path.read_text(encoding='utf-8')
            new = MARKED.sub(lambda match: match[1] + make_table(TABLES[match[2]], results) + match[4], text)
            if new != text:
                differing.append(path)
                if not args.check:
                    path.write_text(new, encoding='utf-8')
    except (KeyError, OSError) as e:
        print(f'error: no table or column {e}.' if isinstance(e, KeyError) else f'error: {e}', file=sys.stderr)
        return 2
    for path in differing:
        print(f'{path} differs from {RESULTS}' if args.check else f'wrote {path}')
    return int(args.check and bool(differing))


if __name__ == '__main__':
    sys.exit(main())
