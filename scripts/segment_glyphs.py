#!/usr/bin/env python3
"""Segment pages of characters with static and adaptive backbones: mean IoU over MACs.

A page has 3 x 3 images of prepare_glyphs.py, of which a window of two characters' width is seen. The label of each
position, 4 px wide, is the character there. A page has no class probability that says whether the answer is sure: the
cascades here take the mean of its positions. Trainings that were stopped go on, those that are done are not repeated.
"""
import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from _args import add_args, create_parser, integer
from _common import ResultError, check_file, print_table, run_script, sleep_when_idle, write_csv, write_text

# Arguments of finetune.py for each network, each after its teacher.
COMMON = '--num-classes 2000 --input-size 1 40 40 --keep last'
TAUGHT = '--teacher static-r32'
NETWORKS = {
    'static-r32': '--static --model cifar_resnet32', 'static-r20': '--static --model cifar_resnet20',
    'static-r14': '--static --model cifar_resnet14', 'static-r8': '--static --model cifar_resnet8',
    'any-r32': f'--recipe any --model cifar_resnet32_aig {TAUGHT}',
    'distilled-r20': f'--static --model cifar_resnet20 --distill-weight 0.5 {TAUGHT}',
    'distilled-r14': f'--static --model cifar_resnet14 --distill-weight 0.5 {TAUGHT}',
}
CASCADES = (('static-r8', 'static-r32'), ('distilled-r14', 'distilled-r20'))
SHARES = (.1, .2, .3, .4, .5, .6, .7, .8, .9)  # of the pages, go on to the second network
STRIDE = 4  # of a ResNet's last features
TEST_BATCH = 32  # pages; other batches would be other pages
EXAMPLES = """examples:
  scripts/segment_glyphs.py --data-dir glyphs                              # train all, or go on with it
  scripts/segment_glyphs.py --data-dir glyphs --networks static-r32 any-r32
  scripts/segment_glyphs.py --data-dir glyphs --table segment.csv          # the table of what is trained so far"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    add_args(parser, 'data_dir', required=True)
    add_args(parser, 'output', default='output/segment')
    arg('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS), metavar='NAME',
        help=f'of {", ".join(NETWORKS)} (default: all)')
    arg('--epochs', type=integer(1), default=4, metavar='N', help='default: %(default)s')
    arg('--pages', type=integer(1), default=25_000, metavar='N', help='pages in an epoch (default: %(default)s)')
    arg('--table', metavar='FILE', help='train nothing, write a CSV file of what is trained')
    add_args(parser, 'batch_size', default=32)
    add_args(parser, 'device', 'seed', 'json')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import safetensors.torch
import timm
import torch
import torch.nn as nn
from _common import open_device, open_folder
from _comparison import OFFSETS
from _inputs import TrainingData
from _recipes import parse_training_args
from finetune import create_trainer
from timm.utils import random_seed
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import timm_aig
from timm_aig import InputError
from timm_aig.run import environment
from timm_aig.training.checkpoint import write_atomically
from timm_aig.training.trainer import Stopped


class Glyphs(NamedTuple):
    """Images [N, 20, 20] of a split, uint8, and their labels [N]."""
    images: torch.Tensor
    labels: torch.Tensor


def read_split(root: str, split: str) -> Glyphs:
    dataset = ImageFolder(str(Path(root, split)))
    images = [pil_to_tensor(image.convert('L'))[0] for image, _ in tqdm(dataset, f'read {split}', unit='image')]
    return Glyphs(torch.stack(images), torch.tensor(dataset.targets))


class Pages:
    """Batches of windows of pages [B, 1, 40, 40] and the labels of their positions [B * 100]."""

    def __init__(self, glyphs: Glyphs, batch_size: int, pages: int, seed: Optional[int] = None) -> None:
        """
        Args:
            glyphs: What pages are made of.
            batch_size: Pages in a batch.
            pages: Pages in all.
            seed: For the same pages in every pass. Default: new ones, from torch's random generator.
        """
        self.glyphs = glyphs
        self.batch_size = batch_size
        self.batches = pages // batch_size
        self.seed = seed

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.default_generator if self.seed is None else torch.Generator().manual_seed(self.seed)
        size = self.glyphs.images.shape[-1]
        for _ in range(self.batches):
            index = torch.randint(len(self.glyphs.images), (self.batch_size, 3, 3), generator=generator)
            pages = self.glyphs.images[index].permute(0, 1, 3, 2, 4).reshape(self.batch_size, 3 * size, 3 * size)
            labels = self.glyphs.labels[index].repeat_interleave(size, 1).repeat_interleave(size, 2)
            corners = torch.randint(size + 1, (self.batch_size, 2), generator=generator).tolist()
            windows = [(slice(top, top + 2 * size), slice(left, left + 2 * size)) for top, left in corners]
            x = torch.stack([page[window] for page, window in zip(pages, windows)]).unsqueeze(1)
            y = torch.stack([label[window] for label, window in zip(labels, windows)])
            middle = STRIDE // 2
            yield (x / 255 - .5) / .3, y[:, middle::STRIDE, middle::STRIDE].flatten()


class Segmenter(nn.Module):
    """A backbone, and one linear layer for the classes of each position. Returns logits [B * 100, num_classes]."""

    def __init__(self, model: str, num_classes: int) -> None:
        super().__init__()
        self.backbone = timm.create_model(model, features_only=True, out_indices=(3,), in_chans=1)
        self.head = nn.Conv2d(self.backbone.feature_info.channels()[0], num_classes, 1)
        self.num_classes, self.in_chans = num_classes, 1
        self.pretrained_cfg = {'architecture': model, 'input_size': (1, 40, 40), 'mean': (.5,), 'std': (.3,)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x)[0]).permute(0, 2, 3, 1).flatten(0, 2)


def create_network(name: str, num_classes: int, folder: Optional[Path] = None) -> Segmenter:
    """A network of NETWORKS, with the weights that its training left in a folder."""
    words = NETWORKS[name].split()
    model = Segmenter(words[words.index('--model') + 1], num_classes)
    if folder is not None:
        model.load_state_dict(safetensors.torch.load_file(folder / 'model.safetensors'))
    return model


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return Path(args.output, f'{name}-s{args.seed}')


def is_trained(args: argparse.Namespace, name: str) -> bool:
    """Whether a network is trained.

    Raises:
        InputError: It was trained for another time.
    """
    path = folder_of(args, name) / 'training.json'
    if not path.is_file():
        return False
    trained = json.loads(path.read_text(encoding='utf-8'))
    if trained != length_of(args):
        raise InputError(f'{path.parent} was trained with {trained}: pass the same, or another folder.', 'output')
    return True


def length_of(args: argparse.Namespace) -> Dict[str, int]:
    return {name: getattr(args, name) for name in ('epochs', 'pages', 'batch_size')}


def train(args: argparse.Namespace, name: str, glyphs: Glyphs, classes: int) -> None:
    """Train a network, or go on with it, and save its weights."""
    own = parse_training_args(
        [*COMMON.split(), *NETWORKS[name].split(), '--epochs', str(args.epochs), '--batch-size', str(args.batch_size),
         '--seed', str(args.seed), *(['--device', args.device] if args.device else [])])
    open_device(own)
    random_seed(args.seed, 0)
    model = create_network(name, classes)
    if own.teacher and not is_trained(args, own.teacher):
        raise InputError(f'{name} learns from {own.teacher}, which is not trained.', 'networks')
    teacher = create_network(own.teacher, classes, folder_of(args, own.teacher)) if own.teacher else None
    folder = open_folder(folder_of(args, name))
    open_folder(folder / 'checkpoints')
    data = TrainingData(Pages(glyphs, args.batch_size, args.pages), None, [], model.pretrained_cfg)
    cost = timm_aig.compute_cost(model)
    trainer = create_trainer(own, model, None, teacher, data, cost, folder)
    trainer.title = name
    trainer.resume()
    try:
        trainer.fit()
    except Stopped as e:
        raise Stopped(f'{e} To go on, run the same command.', e.signum) from e
    weights = safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()})
    write_atomically(folder / 'model.safetensors', lambda file: file.write(weights))
    write_text(folder / 'training.json', json.dumps(length_of(args)))


class Answers(NamedTuple):
    """What a network answers for N pages: class of each position [N, 100], mean of its largest probability and MACs."""
    classes: torch.Tensor
    confidence: torch.Tensor
    macs: torch.Tensor


@torch.inference_mode()
def answer(model: Segmenter, pages: Pages, cost: timm_aig.Cost, device: torch.device) -> Answers:
    found = []
    for x, _ in pages:
        logits, gates = timm_aig.forward_gates(model, x.to(device))
        probability, classes = logits.softmax(1).view(len(x), -1, model.num_classes).max(2)
        found.append(Answers(classes.short().cpu(), probability.mean(1).cpu(), cost.executed(gates).cpu()))
    return Answers(*map(torch.cat, zip(*found)))


def answer_all(args: argparse.Namespace, name: str, pages: Pages, classes: int) -> Dict[str, Answers]:
    """Answers of a trained network by its setting, one for each gate offset. They are kept beside its weights."""
    path = folder_of(args, name) / 'answers.pt'
    if not path.is_file():
        device = open_device(args)
        model = create_network(name, classes, path.parent).eval().to(device)
        cost = timm_aig.compute_cost(model)
        found = {}
        for offset in OFFSETS if timm_aig.gated_blocks(model) else (None,):
            if offset is not None:
                timm_aig.set_gate_offset(model, offset)
            found['' if offset is None else f'offset {offset:g}'] = tuple(answer(model, pages, cost, device))
        write_atomically(path, partial(torch.save, found))
    return {setting: Answers(*values) for setting, values in torch.load(path, weights_only=True).items()}


def join(first: Answers, second: Answers, share: float) -> Answers:
    """A cascade: the share of the pages of which the first network is least sure goes on to the second one."""
    goes_on = first.confidence < first.confidence.quantile(share)
    return Answers(torch.where(goes_on[:, None], second.classes, first.classes), first.confidence,
                   first.macs + goes_on * second.macs)


def score(found: Answers, labels: torch.Tensor, classes: int) -> Tuple[float, float]:
    """Mean IoU over the classes that occur, and share of right positions, in percent."""
    answers, labels = found.classes.flatten().long(), labels.flatten()
    right = labels[answers == labels]
    union = [part.bincount(minlength=classes).double() for part in (labels, answers, right)]
    iou = union[2] / (union[0] + union[1] - union[2])
    return 100 * iou.nanmean().item(), 100 * len(right) / len(labels)


def sum_up(args: argparse.Namespace, names: List[str]) -> List[Dict[str, Any]]:
    """Rows of the table, on pages of the test images."""
    test = read_split(args.data_dir, 'test')
    classes = int(test.labels.max()) + 1
    pages = Pages(test, TEST_BATCH, len(test.images) // 4, seed=0)
    if not len(pages):
        raise InputError(f'must have at least {4 * TEST_BATCH} test images, not {len(test.images)}.', 'data_dir')
    labels = torch.cat([y.view(TEST_BATCH, -1) for _, y in pages])
    found = {(name, setting): answers for name in names
             for setting, answers in answer_all(args, name, pages, classes).items()}
    for first, second in CASCADES:
        if first in names and second in names:
            for share in SHARES:
                found[f'cascade, {first} + {second}', f'{share:.0%} go on'] = join(
                    found[first, ''], found[second, ''], share)
    largest = timm_aig.compute_cost(create_network('static-r32', classes)).total
    table = []
    for (name, setting), answers in found.items():
        miou, accuracy = score(answers, labels, classes)
        macs = answers.macs.mean().item()
        table.append({
            'network': name, 'setting': setting, 'macs': round(macs / 1e6, 3),
            'macs_over_resnet32': round(macs / largest, 4), 'miou': f'{miou:.2f}', 'accuracy': f'{accuracy:.2f}'})
    return table


def run(args: argparse.Namespace) -> None:
    if not Path(args.data_dir, 'train').is_dir():
        raise InputError(f'must be a folder of prepare_glyphs.py, {args.data_dir!r} is not.', 'data_dir')
    if args.table:
        check_file(args.table, 'table')
    done = [name for name in args.networks if is_trained(args, name)]
    if not args.table:
        glyphs = read_split(args.data_dir, 'train')
        classes = int(glyphs.labels.max()) + 1
        for name in [name for name in args.networks if name not in done]:
            train(args, name, glyphs, classes)
        done = args.networks
    if not done:
        raise ResultError(f'no network is trained in {args.output}.')
    table = sum_up(args, done)
    if args.json:
        print(json.dumps(table, indent=2))
    else:
        print_table(table, 'network', 'setting')
    if args.table:
        source = {'seed': args.seed, 'pages': args.epochs * args.pages, 'machine': environment()['cpu'],
                  'source': ' '.join(sys.argv)}
        write_csv(args.table, [*table[0], *source], [[*row.values(), *source.values()] for row in table])


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
