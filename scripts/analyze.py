#!/usr/bin/env python3
"""See what the gates of a model do on a data set: which blocks run for which classes, groups of classes and images.

Tests what the paper says of its gates (Veit and Belongie, 2018, section 4) and prints the figures, whichever way they
fall. The output folder holds

    analysis.json        all of this and the claims
    rates.csv            execution rate by class and block
    blocks_run.csv       images of each class by the number of blocks that ran
    paths.csv            images of each class by path, that is by combination of blocks (1 ran, 0 did not)
    likeness.csv         mean probability that the model gives a class (column) for images of a class (row)
    execution_rates.png  rates.csv as a heatmap
    blocks_run.png       histogram of the executed blocks by group of classes
    contact_sheet_*.png  the images of each class that took the fewest and the most MACs

The groups come from a file, or are classes that the model takes for one another.
"""
import argparse
import csv
import io
import json
import os
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

# Before torch is imported: threads that spin while they wait make small models ten times slower on a busy machine.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

try:
    import matplotlib  # noqa: F401, better to hear that it is missing before the images are run
except ImportError as e:
    print(f"error: {e}. The analysis needs the extra 'train': pip install 'timm_aig[train]'", file=sys.stderr)
    sys.exit(2)

import torch
import torch.nn as nn
from _common import error_text, open_device, open_folder
from torch.utils.data import IterableDataset
from tqdm import tqdm
from validate import (
    add_evaluation_args,
    check_evaluation_args,
    create_model,
    create_test_loader,
    data_config,
    open_split,
)

import timm_aig
from timm_aig import InputError
from timm_aig.analysis.claims import check_claims
from timm_aig.analysis.counts import (
    ClassGates,
    block_kinds,
    cluster_classes,
    extreme_images,
    path_statistics,
    wilson_interval,
)
from timm_aig.analysis.figures import (
    MAX_GROUPS,
    plot_blocks_run,
    plot_contact_sheet,
    plot_execution_rates,
)
from timm_aig.training.checkpoint import write_atomically
from timm_aig.training.data import class_names, count_unreadable
from timm_aig.training.evaluate import Evaluation, evaluate

EXAMPLES = """examples:
  scripts/analyze.py --model cifar_resnet32_aig.fmnist_t06 --pretrained --dataset torch/fashion_mnist --data-dir data \\
      --groups hub_configs/cifar_resnet32_aig.fmnist_t06/groups.json
  scripts/analyze.py --model local-dir:output/finetune/NAME --data-dir imagenet --output output/analysis/NAME
  scripts/analyze.py --model local-dir:output/demo --data-dir photos --gate-offset -0.5 --json

groups file: {"birds": ["robin", "jay"], "cats": ["lynx"]}, each class in one group

exit code: 0 done, 2 bad input"""

PAGE = 20  # classes on a contact sheet


def parse_args(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = parser.add_argument
    add_evaluation_args(arg)
    arg('--amp', action='store_true', help='bfloat16 autocast')
    arg('--gate-offset', type=float, metavar='X', help="default: the model's own")
    arg('--groups', metavar='FILE', help='JSON, names of the classes of each group; default: clusters of confused ones')
    arg('--extremes', type=int, default=5, metavar='N', help='fastest and slowest images of a class, default: 5')
    arg('--permutations', type=int, default=999, metavar='N', help='of each test, default: %(default)s')
    arg('--seed', type=int, default=0, help='of the permutations, default: %(default)s')
    arg('--width', type=int, default=1600, metavar='PX', help='of the pictures, default: %(default)s')
    arg('--output', default='output/analysis', metavar='DIR', help='folder to write, default: %(default)s')
    arg('--json', action='store_true', help='print analysis.json rather than the claims')
    args = parser.parse_args(argv)
    for name, low, high in (
            ('extremes', 0, 10), ('permutations', 19, 1 << 20), ('seed', 0, 2 ** 31 - 1), ('width', 400, 8000)):
        if not low <= getattr(args, name) <= high:
            raise InputError(f'--{name.replace("_", "-")} must be from {low} to {high}, not {getattr(args, name)}.')
    check_evaluation_args(args)
    return args


def create_adaptive_model(args: argparse.Namespace) -> Any:
    model = create_model(args, args.model)
    if not timm_aig.gated_blocks(model):
        raise InputError(f'--model must be adaptive, {args.model} has no gates.')
    if args.gate_offset is not None:
        try:
            timm_aig.set_gate_offset(model, args.gate_offset)
        except ValueError as e:
            raise InputError(f'--gate-offset: {e}') from e
    return model


def names_of_classes(model: Any, dataset: Any) -> List[str]:
    """The data set's names, else those in the model's config.json, else numbers."""
    count = model.num_classes
    for names in (class_names(dataset), model.pretrained_cfg.get('label_names') or ()):
        if len(names) == count:
            return list(map(str, names))
    return [str(i) for i in range(count)]


def read_groups(path: str, names: Sequence[str]) -> Dict[str, List[int]]:
    """Classes of each group; each class is in one."""
    try:
        groups = json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        raise InputError(f'--groups: cannot read {path}: {e}') from e
    if not isinstance(groups, dict) or not all(isinstance(group, list) and group for group in groups.values()):
        raise InputError(f'--groups: {path} must be an object of lists of class names, none of them empty.')
    given = [str(name) for group in groups.values() for name in group]
    wrong = {
        'not classes of the data set': set(given) - set(names), 'in no group': set(names) - set(given),
        'named twice': {name for name in given if given.count(name) > 1}}
    for what, which in wrong.items():
        if which:
            raise InputError(f'--groups: {what}: {", ".join(sorted(which)[:5])}.')
    if len(groups) > MAX_GROUPS:
        raise InputError(f'--groups: at most {MAX_GROUPS} groups, not {len(groups)}.')
    index = {name: i for i, name in enumerate(names)}
    return {str(group): [index[str(name)] for name in members] for group, members in groups.items()}


def results_of(
        evaluation: Evaluation,
        gates: ClassGates,
        model: nn.Module,
        groups: Dict[str, List[int]],
        names: Sequence[str],
        cost: timm_aig.Cost,
        args: argparse.Namespace,
) -> Dict[str, Any]:
    """Content of analysis.json."""
    blocks = list(timm_aig.gated_blocks(model))
    kinds = block_kinds(model)
    n = len(evaluation.labels)
    metrics = evaluation.metrics(cost)
    low, high = wilson_interval(evaluation.gates.sum(0), n)
    paths = path_statistics(evaluation.labels, evaluation.gates, args.permutations, args.seed)
    claims = check_claims(
        gates, {kind: [blocks.index(name) for name in members] for kind, members in kinds.items()}, groups,
        args.groups is not None, paths, args.permutations, args.seed)
    return {
        'model': args.model, 'dataset': args.dataset,
        'split': args.split if args.holdout is None else f'{args.split}, {args.holdout} held out',
        'gate_offset': timm_aig.gated_blocks(model)[blocks[0]].gate.offset.item(),
        'images': n,
        **{name: metrics[name] for name in ('top1', 'execution_rate', 'macs_share')},
        'blocks': {
            name: {'rate': rate, 'interval': interval, 'kinds': [kind for kind in kinds if name in kinds[kind]]}
            for name, rate, interval in zip(
                blocks, evaluation.block_rates.tolist(), torch.stack([low, high], 1).tolist())},
        'groups': {group: [names[i] for i in members] for group, members in groups.items()},
        'groups_from': 'file' if args.groups else 'clusters of the classes that the model confuses',
        'classes_without_images': [name for name, images in zip(names, gates.images.tolist()) if not images],
        'paths': asdict(paths),
        'permutations': args.permutations,
        'seed': args.seed,
        'claims': [asdict(claim) for claim in claims],
    }


def write_tables(
        folder: Path,
        gates: ClassGates,
        blocks: Sequence[str],
        groups: Dict[str, List[int]],
        names: Sequence[str],
) -> None:
    group_of = {i: group for group, members in groups.items() for i in members}
    classes = [(i, [names[i], group_of[i], int(gates.images[i])]) for i in sorted(group_of)]
    head = ['class', 'group', 'images']
    write_csv(folder / 'rates.csv', [*head, *blocks], (
        [*row, *(f'{rate:.6f}' for rate in gates.rates[i].tolist())] for i, row in classes))
    write_csv(folder / 'blocks_run.csv', [*head, *range(len(blocks) + 1)], (
        [*row, *gates.blocks_run[i].tolist()] for i, row in classes))
    write_csv(folder / 'likeness.csv', ['class', *names], (
        [names[i], *(f'{p:.3e}' for p in gates.likeness[i].tolist())] for i, _ in classes))
    write_csv(folder / 'paths.csv', ['class', 'path', 'images'], (
        [names[label], ''.join('01'[ran] for ran in path.tolist()), n]
        for label, path, n in zip(*(t if t.ndim > 1 else t.tolist() for t in gates.paths()))))


def write_csv(path: Path, head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    def write(file: Any) -> None:
        text = io.TextIOWrapper(file, encoding='utf-8', newline='', write_through=True)
        writer = csv.writer(text, lineterminator='\n')
        writer.writerow(head)
        writer.writerows(rows)
        text.detach()  # leaves the file open

    write_atomically(path, write)


def draw(
        folder: Path,
        gates: ClassGates,
        model: nn.Module,
        groups: Dict[str, List[int]],
        names: Sequence[str],
        cost: timm_aig.Cost,
        title: str,
        pixels: int,
) -> None:
    blocks, marked = list(timm_aig.gated_blocks(model)), block_kinds(model)['downsampling']
    plot_execution_rates(
        gates.rates, blocks, names, folder / 'execution_rates.png', marked, groups, pixels, title, cost.blocks,
        gates.images)
    plot_blocks_run(gates.blocks_run, groups, folder / 'blocks_run.png', pixels, title)


def draw_contact_sheets(
        folder: Path,
        evaluation: Evaluation,
        cost: timm_aig.Cost,
        count: int,
        dataset: Any,
        groups: Dict[str, List[int]],
        names: Sequence[str],
        title: str,
        pixels: int,
) -> None:
    """Read the extreme images once more, `count` fast and slow ones of each class, page by page."""
    dataset.transform = None  # gives the images as they are
    classes = [i for members in groups.values() for i in members]
    pages = [classes[start:start + PAGE] for start in range(0, len(classes), PAGE)]
    written = [folder / f'contact_sheet_{n:0{len(str(len(pages)))}}.png' for n in range(1, len(pages) + 1)]

    macs, run = cost.executed(evaluation.gates), evaluation.gates.sum(1).tolist()

    def read(label: int) -> Tuple[str, Any, Any]:
        fast, slow = ([(dataset[int(evaluation.positions[i])][0], run[i]) for i in images]
                      for images in extreme_images(evaluation.labels, macs, label, count))
        return names[label], fast, slow

    for path, page in zip(written, tqdm(pages, desc='contact sheets', unit='page', disable=None)):
        plot_contact_sheet([read(label) for label in page], path, pixels, title)
    for old in set(folder.glob('contact_sheet_*.png')) - set(written):
        old.unlink()


def title_of(results: Dict[str, Any], args: argparse.Namespace) -> str:
    """Model, data and budget, for the pictures."""
    data = Path(args.data_dir or '').name if args.dataset == 'folder' else args.dataset.rpartition('/')[2]
    return (f'{args.model} on {data} {results["split"]} ({results["images"]:,} images), '
            f'{results["macs_share"]:.0%} of the MACs')


def format_results(results: Dict[str, Any]) -> str:
    """What is printed, and stands in the README for the shipped weights."""
    lines = [
        f'{results["images"]:,} images of {results["dataset"]}, {results["split"]}: top-1 {results["top1"]:.2f} %, '
        f'blocks run {results["execution_rate"]:.1%}, MACs {results["macs_share"]:.1%}', '']
    for claim in results['claims']:
        p = '' if claim['p_value'] is None else f'; p = {claim["p_value"]:.3g}'
        lines += textwrap.wrap(
            f'{claim["verdict"] + ":":16}{claim["claim"]}: {claim["finding"]}{p}.', 110, subsequent_indent=' ' * 16)
    return '\n'.join(lines)


def run(args: argparse.Namespace) -> None:
    device = open_device(args)
    if args.distributed:
        raise InputError('analyze.py runs in one process, without torchrun.')
    model = create_adaptive_model(args)
    config = data_config(args, model)
    dataset = open_split(args)
    names = names_of_classes(model, dataset)
    groups = read_groups(args.groups, names) if args.groups else {}
    folder = open_folder(args.output)
    loader = create_test_loader(args, dataset, config, device=device, use_prefetcher=False)
    cost = timm_aig.compute_cost(model, config['input_size'])
    model.to(device, memory_format=torch.channels_last)
    try:
        evaluation = evaluate(model, loader, device, torch.bfloat16 if args.amp else None, likeness=True)
    except ValueError as e:
        raise InputError(f'--split {args.split}: {e}') from e
    assert evaluation.likeness is not None
    gates = ClassGates(evaluation.labels, evaluation.gates, evaluation.likeness)
    present = gates.images.nonzero().flatten().tolist()
    groups = groups or cluster_classes(gates.likeness, names, present)
    groups = {group: [i for i in members if gates.images[i]] for group, members in groups.items()}
    groups = {group: members for group, members in groups.items() if members}
    results = results_of(evaluation, gates, model, groups, names, cost, args)
    results['unreadable'] = count_unreadable(dataset, torch.device('cpu'))
    text = json.dumps(results, indent=2, ensure_ascii=False) + '\n'
    # printed first: nothing that cannot be written loses it
    print(text if args.json else f'{format_results(results)}\n', end='')
    write_atomically(folder / 'analysis.json', lambda file: file.write(text.encode()))
    write_tables(folder, gates, list(results['blocks']), groups, names)
    title = title_of(results, args)
    draw(folder, gates, model, groups, names, cost, title, args.width)
    if isinstance(dataset, IterableDataset):
        print(f'No contact sheets: images of {args.dataset} cannot be read again by their number.', file=sys.stderr)
    elif args.extremes:
        draw_contact_sheets(folder, evaluation, cost, args.extremes, dataset, groups, names, title, args.width)
    if not args.json:
        print(f'\nWrote tables, pictures and analysis.json to {folder}.')


def main(argv: Optional[List[str]] = None) -> int:
    try:
        run(parse_args(argv))
    except (InputError, OSError) as e:
        print(f'error: {error_text(e)}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
