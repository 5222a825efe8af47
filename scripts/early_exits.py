#!/usr/bin/env python3
"""Train a ResNet with early exits, a baseline of compare.py: an image leaves at the first exit that is confident.

The exits are those of earlyon, after the first two stages. Takes the arguments of finetune.py for a static network; all
exits have the same loss and the same teacher. Validates nothing, and writes the last epoch: the network as finetune.py
does, and the heads to exits.safetensors.
"""
import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

from _args import Parser
from _common import blame, create_model, require, run_script, sleep_when_idle, write_text
from _recipes import parse_training_args

EXITS = ('layer1', 'layer2')
EXAMPLES = """examples:
  scripts/early_exits.py --model cifar_resnet32 --data-dir glyphs --num-classes 2000 --input-size 1 20 20
  scripts/compare.py glyphs --data-dir glyphs --only exits     # with the arguments and the teacher of the others"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_training_args([*argv, '--static', '--keep', 'last'], __doc__, EXAMPLES)
    for name in ('calibrate', 'json', 'model_ema', 'tensorboard', 'torchcompile'):
        if getattr(args, name):
            Parser().error(f'--{name.replace("_", "-")} is not for networks with early exits.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import safetensors.torch
import torch
import torch.nn as nn
from finetune import create_trainer, recipe_of, set_up
from torch.utils.flop_counter import FlopCounterMode

import timm_aig
from timm_aig import InputError
from timm_aig.run import environment
from timm_aig.training.checkpoint import CheckpointError, write_atomically
from timm_aig.training.trainer import Stopped


class EarlyExits(nn.Module):
    """A static network with exits. Returns the logits of all exits, then those of the network, [exits * B, C]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        require('exits', 'earlyon')
        from earlyon.models import custom_ee

        size = timm_aig.cost.own_input_size(model)
        self.num_classes, self.in_chans, self.pretrained_cfg = model.num_classes, size[0], model.pretrained_cfg
        self.exits = custom_ee(model, EXITS, model.num_classes, input_shape=(1, *size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.exits(x, mode='training'))

    def macs(self) -> List[int]:
        """MACs of one image up to the first exit, from there to the second, and from there to the end."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self(torch.empty(1, *timm_aig.cost.own_input_size(self)))
        own = {name.partition('.')[2]: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
        stages = [own[f'exits.backbone.{name}'] + own[f'exits.exit_heads.e{i}'] for i, name in enumerate(EXITS)]
        stages[0] += own['exits.backbone.conv1']
        return [*stages, own[''] - sum(stages)]


class ForEachExit(nn.Module):
    """A teacher of networks with exits: its logits once for each of them."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher = teacher
        self.num_classes, self.pretrained_cfg = teacher.num_classes, teacher.pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.teacher(x).repeat(len(EXITS) + 1, 1)


def repeat_labels(collate: Callable[..., Any], samples: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    images, labels = collate(samples)
    return images, labels.repeat(len(EXITS) + 1)


def open_exits(folder: Path) -> Tuple[EarlyExits, List[Tuple[float, Callable[..., Any]]]]:
    """A trained network, and its exits, numbered, with functions from images to logits [B, C] and MACs [B].

    The MACs are those since the exit before.
    """
    model = EarlyExits(create_model(f'local-dir:{folder}')).eval()
    model.exits.exit_heads.load_state_dict(safetensors.torch.load_file(folder / 'exits.safetensors'))

    def run(index: int, macs: int, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return model(images).chunk(len(EXITS) + 1)[index], torch.full((len(images),), macs)

    return model, [(index + 1., partial(run, index, macs)) for index, macs in enumerate(model.macs())]


def run(args: argparse.Namespace) -> None:
    _, static, _, teacher, data, folder = set_up(args)
    if args.distributed:
        raise InputError('early_exits.py runs in one process, without torchrun.')
    loader = getattr(data.train, 'loader', data.train)  # of timm's PrefetchLoader
    loader.collate_fn = partial(repeat_labels, loader.collate_fn)
    model, cost = EarlyExits(copy.deepcopy(static)), timm_aig.compute_cost(static)
    trainer = create_trainer(args, model, None, teacher and ForEachExit(teacher), data, cost, folder)
    if args.resume:
        with blame('resume', args.resume, CheckpointError):
            trainer.resume()
    try:
        trainer.fit()
    except Stopped as e:
        raise Stopped(f'{e} To go on, run the same command with --resume auto.', e.signum) from e
    static.load_state_dict(model.exits.backbone.state_dict())
    timm_aig.save_pretrained(static, folder)
    heads = safetensors.torch.save(model.exits.exit_heads.state_dict())
    write_atomically(folder / 'exits.safetensors', lambda file: file.write(heads))
    results = json.dumps({'seed': args.seed, 'recipe': recipe_of(args), 'environment': environment()}, indent=2)
    write_text(folder / 'results.json', results + '\n')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
