#!/usr/bin/env python3
"""See what the gates of a model do on a data set: which blocks run for which classes, groups of classes and images.

Tests the paper's claims about its gates (Veit and Belongie, 2018, section 4) and prints the findings, confirmed or not.
The output folder holds

    analysis.json        all figures and the claims
    rates.csv            execution rate by class and block
    blocks_run.csv       images of each class by the number of blocks that ran
    paths.csv            images of each class by path, the combination of blocks (1 ran, 0 did not)
    likeness.csv         mean probability that the model gives a class (column) for images of a class (row)
    execution_rates.png  rates.csv as a heatmap
    blocks_run.png       histogram of the executed blocks by group of classes
    contact_sheet_*.png  the images of each class that took the fewest and the most MACs

Groups of classes come from a file; the default groups hold classes that the model confuses with one another.
"""
import argparse
import json
import sys
import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from _args import add_args, add_evaluation_args, create_parser, integer
from _common import (
    blame,
    open_device,
    open_folder,
    read_json,
    require,
    run_script,
    sleep_when_idle,
    write_csv,
    write_text,
)

EXAMPLES = """examples:
  scripts/analyze.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --dataset torch/fashion_mnist --data-dir data \\
      --groups hub_configs/cifar_resnet32_aig.fmnist_t06/groups.json
  scripts/analyze.py --model local-dir:output/finetune/NAME --data-dir imagenet --output output/analysis/NAME
  scripts/analyze.py --model local-dir:output/demo --data-dir photos --gate-offset -0.5 --json
  scripts/analyze.py --model local-dir:output/NAME --data-dir photos --show robin jay    # pictures of these two only

groups file: {"birds": ["robin", "jay"], "cats": ["lynx"]}, each class in one group"""

PAGE = 20  # classes on a contact sheet


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_evaluation_args(parser)
    add_args(parser, 'amp', 'gate_offset')
    arg('--groups', metavar='FILE', help='JSON of groups of class names (default: clusters of confused classes)')
    arg('--extremes', type=integer(0, 10), default=5, metavar='N',
        help='images of each class with the fewest and with the most MACs to show (default: %(default)s)')
    arg('--show', nargs='+', metavar='CLASS', help='classes of the contact sheets (default: all)')
    arg('--permutations', type=integer(19, 2 ** 20), default=999, metavar='N',
        help='permutations of each test (default: %(default)s)')
    arg('--width', type=integer(400, 8000), default=1600, metavar='PX',
        help='width of the pictures (default: %(default)s)')
    add_args(parser, 'seed', 'json')
    add_args(parser, 'output', default='output/analysis')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import torch
from _inputs import create_evaluation_loader, data_config, open_evaluation_split, open_model
from torch.utils.data import IterableDataset
from tqdm import tqdm

import timm_aig
from timm_aig import InputError
from timm_aig.analysis import counts, figures
from timm_aig.analysis.claims import check_claims
from timm_aig.training.data import class_names, count_unreadable, label_names_of
from timm_aig.training.evaluate import Evaluation, evaluate


class Seen(NamedTuple):
    """What the gates did."""
    evaluation: Evaluation
    gates: counts.ClassGates
    cost: timm_aig.Cost
    blocks: List[str]  # names of the L gated blocks
    kinds: Dict[str, List[str]]  # blocks of each kind
    names: List[str]  # of the classes
    groups: Dict[str, List[int]]  # classes that have images


def names_of_classes(model: Any, dataset: Any) -> List[str]:
    """Class names of the data set, else of the model's config.json, else numbers."""
    count = model.num_classes
    for names in (class_names(dataset), label_names_of(model)):
        if len(names) == count:
            return names
    return [str(i) for i in range(count)]


def read_groups(path: str, names: Sequence[str]) -> Dict[str, List[int]]:
    """Classes of each group; each class is in one."""
    groups = read_json(path, 'groups')
    if not all(isinstance(group, list) and group for group in groups.values()):
        raise InputError(f'{path} must be an object of lists of class names, none of them empty.', 'groups')
    given = [str(name) for group in groups.values() for name in group]
    wrong = (Counter(given) - Counter(names)) + (Counter(names) - Counter(given))
    if wrong:
        raise InputError(f'{path} must have each class of the data set in one group; not so: '
                         f'{", ".join(sorted(wrong)[:5])}.', 'groups')
    if len(groups) > figures.MAX_GROUPS:
        raise InputError(f'{path} must have at most {figures.MAX_GROUPS} groups, not {len(groups)}.', 'groups')
    return {group: [names.index(str(name)) for name in members] for group, members in groups.items()}


def results_of(args: argparse.Namespace, seen: Seen, offset: float) -> Dict[str, Any]:
    """Content of analysis.json."""
    evaluation, metrics = seen.evaluation, seen.evaluation.metrics(seen.cost)
    intervals = torch.stack(counts.wilson_interval(evaluation.gates.sum(0), len(evaluation.labels)), 1)
    paths = counts.path_statistics(evaluation.labels, evaluation.gates, args.permutations, args.seed)
    claims = check_claims(
        seen.gates, {kind: [seen.blocks.index(name) for name in members] for kind, members in seen.kinds.items()},
        seen.groups, args.groups is not None, paths, args.permutations, args.seed)
    return {
        'model': args.model, 'dataset': args.dataset,
        'split': f'{args.split}, {args.holdout} held out' if args.holdout else args.split,
        'gate_offset': offset,
        'images': len(evaluation.labels),
        **{name: metrics[name] for name in ('top1', 'execution_rate', 'macs_share')},
        'blocks': {
            name: {'rate': rate, 'interval': interval, 'kinds': [k for k, some in seen.kinds.items() if name in some]}
            for name, rate, interval in zip(seen.blocks, evaluation.block_rates.tolist(), intervals.tolist())},
        'groups': {group: [seen.names[i] for i in members] for group, members in seen.groups.items()},
        'groups_from': 'file' if args.groups else 'clusters of the classes that the model confuses',
        'classes_without_images': [name for name, n in zip(seen.names, seen.gates.images.tolist()) if not n],
        'paths': asdict(paths),
        'permutations': args.permutations,
        'seed': args.seed,
        'claims': [asdict(claim) for claim in claims],
    }


def write_tables(folder: Path, seen: Seen) -> None:
    names, gates = seen.names, seen.gates
    group_of = {i: group for group, members in seen.groups.items() for i in members}
    rows = [(i, [names[i], group_of[i], int(gates.images[i])]) for i in sorted(group_of)]
    head = ['class', 'group', 'images']
    write_csv(folder / 'rates.csv', [*head, *seen.blocks], (
        [*row, *(f'{rate:.6f}' for rate in gates.rates[i].tolist())] for i, row in rows))
    write_csv(folder / 'blocks_run.csv', [*head, *range(len(seen.blocks) + 1)], (
        [*row, *gates.blocks_run[i].tolist()] for i, row in rows))
    write_csv(folder / 'likeness.csv', ['class', *names], (
        [names[i], *(f'{p:.3e}' for p in gates.likeness[i].tolist())] for i, _ in rows))
    write_csv(folder / 'paths.csv', ['class', 'path', 'images'], (
        [names[label], ''.join('01'[ran] for ran in path.tolist()), n]
        for label, path, n in zip(*(t if t.ndim > 1 else t.tolist() for t in gates.paths()))))


def draw(args: argparse.Namespace, folder: Path, dataset: Any, seen: Seen, results: Dict[str, Any]) -> None:
    data = Path(args.data_dir or '').name if args.dataset == 'folder' else args.dataset.rpartition('/')[2]
    title = (f'{args.model} on {data} {results["split"]} ({results["images"]:,} images), '
             f'{results["macs_share"]:.0%} of the MACs')
    figures.plot_execution_rates(
        seen.gates.rates, seen.blocks, seen.names, folder / 'execution_rates.png', seen.kinds['downsampling'],
        seen.groups, args.width, title, seen.cost.blocks, seen.gates.images)
    figures.plot_blocks_run(seen.gates.blocks_run, seen.groups, folder / 'blocks_run.png', args.width, title)
    if isinstance(dataset, IterableDataset):
        print(f'No contact sheets: {args.dataset} gives no access to single images.', file=sys.stderr)
    elif args.extremes:
        draw_contact_sheets(args, folder, dataset, seen, title)


def draw_contact_sheets(args: argparse.Namespace, folder: Path, dataset: Any, seen: Seen, title: str) -> None:
    """Read the images with the fewest and the most MACs of each class once more, page by page."""
    dataset.transform = None  # gives the images as they are
    shown = [i for members in seen.groups.values() for i in members if not args.show or seen.names[i] in args.show]
    pages = [shown[start:start + PAGE] for start in range(0, len(shown), PAGE)]
    evaluation = seen.evaluation
    macs, blocks_run = seen.cost.executed(evaluation.gates), evaluation.gates.sum(1).tolist()

    def read(label: int) -> Tuple[str, Any, Any]:
        fast, slow = ([(dataset[int(evaluation.positions[i])][0], blocks_run[i]) for i in images]
                      for images in counts.extreme_images(evaluation.labels, macs, label, args.extremes))
        return seen.names[label], fast, slow

    for old in folder.glob('contact_sheet_*.png'):
        old.unlink()
    for number, page in enumerate(tqdm(pages, desc='contact sheets', unit='page', disable=None), 1):
        path = folder / f'contact_sheet_{number:0{len(str(len(pages)))}}.png'
        figures.plot_contact_sheet([read(label) for label in page], path, args.width, title)


def print_results(results: Dict[str, Any]) -> None:
    print(f'{results["images"]:,} images of {results["dataset"]}, {results["split"]}: top-1 {results["top1"]:.2f} %, '
          f'blocks run {results["execution_rate"]:.1%}, MACs {results["macs_share"]:.1%}\n')
    for claim in results['claims']:
        p = '' if claim['p_value'] is None else f'; p = {claim["p_value"]:.3g}'
        print(textwrap.fill(
            f'{claim["verdict"] + ":":16}{claim["claim"]}: {claim["finding"]}{p}.', 110, subsequent_indent=' ' * 16))


def run(args: argparse.Namespace) -> None:
    device = open_device(args)
    if args.distributed:
        raise InputError('analyze.py runs in one process, without torchrun.')
    require('train', 'matplotlib')
    model = open_model(args, args.model)
    gated = timm_aig.gated_blocks(model)
    if not gated:
        raise InputError(f'must be adaptive, {args.model} has no gates.', 'model')
    if args.gate_offset is not None:
        timm_aig.set_gate_offset(model, args.gate_offset)
    config = data_config(args, model)
    dataset = open_evaluation_split(args, model)
    names = names_of_classes(model, dataset)
    groups = read_groups(args.groups, names) if args.groups else {}
    for name in args.show or ():
        if name not in names:
            raise InputError(f'must be classes of the data set, not {name}.', 'show')
    folder = open_folder(args.output)

    loader = create_evaluation_loader(args, dataset, config, device=device, use_prefetcher=False)
    cost = timm_aig.compute_cost(model, config['input_size'])
    model.to(device, memory_format=torch.channels_last)
    with blame('split', args.split):
        evaluation = evaluate(model, loader, device, torch.bfloat16 if args.amp else None, likeness=True)
    gates = counts.ClassGates(evaluation.labels, evaluation.gates, evaluation.likeness)
    groups = groups or counts.cluster_classes(gates.likeness, names, gates.images.nonzero().flatten().tolist())
    groups = {group: [i for i in members if gates.images[i]] for group, members in groups.items()}
    groups = {group: members for group, members in groups.items() if members}
    seen = Seen(evaluation, gates, cost, list(gated), counts.block_kinds(model), names, groups)

    results = results_of(args, seen, next(iter(gated.values())).gate.offset.item())
    results['unreadable'] = count_unreadable(dataset, torch.device('cpu'))
    text = json.dumps(results, indent=2, ensure_ascii=False)
    # print first: a file that cannot be written does not lose the figures
    if args.json:
        print(text)
    else:
        print_results(results)
    write_text(folder / 'analysis.json', f'{text}\n')
    write_tables(folder, seen)
    draw(args, folder, dataset, seen, results)
    if not args.json:
        print(f'\nWrote tables, pictures and analysis.json to {folder}.')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
