#!/usr/bin/env python3
"""Turn a checkpoint of the ConvNet-AIG authors' code into a folder that timm and transformers load.

The architecture is read off the checkpoint: ResNet-50, 101, 152 and other depths for ImageNet, ResNet-110 and other
depths for CIFAR. Every block in their code has a gate. Their code samples the gates in evaluation too, as
timm_aig.forward_gates(model, images, sample=True) does; the imported model itself takes the likelier answer.

The recorded preprocessing is that of their training scripts. Nothing in the checkpoint is executed.
"""
import argparse
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from _args import create_parser, number
from _common import blame, run_script

EXAMPLES = """examples:
  scripts/import_convnet_aig.py runs/cifar/model_best.pth.tar output/cifar110
  scripts/import_convnet_aig.py model_best.pth.tar output/r50_t05 --target-rate 0.5

Then scripts/push_to_hub.py publishes the folder, and timm.create_model('local-dir:output/r50_t05', pretrained=True)
loads it."""

# By (bottleneck, number of stages): the architecture for any depth, and the architectures for known depths.
FAMILIES: Dict[Tuple[bool, int], Tuple[str, Dict[Tuple[int, ...], str]]] = {
    (False, 3): ('cifar_resnet20_aig', {(n,) * 3: f'cifar_resnet{6 * n + 2}_aig' for n in (3, 5, 7, 9, 18)}),
    (False, 4): ('resnet18_aig', {(2, 2, 2, 2): 'resnet18_aig', (3, 4, 6, 3): 'resnet34_aig'}),
    (True, 4): ('resnet50_aig', {
        (3, 4, 6, 3): 'resnet50_aig', (3, 4, 23, 3): 'resnet101_aig', (3, 8, 36, 3): 'resnet152_aig'}),
}
RENAMED = {
    r'\.shortcut\.': '.downsample.', r'\.fc1bn\.': '.gate.bn.', r'\.(fc1|fc2)\.': r'.gate.\1.', r'^linear\.': 'fc.'}
ORIGIN: Dict[str, Any] = dict(
    origin_url='https://github.com/andreasveit/convnet-aig', paper_ids='arXiv:1711.11503', first_conv='conv1',
    classifier='fc')
IMAGENET: Dict[str, Any] = dict(
    ORIGIN, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875, interpolation='bilinear',
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR: Dict[str, Any] = dict(
    ORIGIN, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, interpolation='bilinear',
    mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='.pth.tar of their train.py or train_img.py')
    parser.add_argument('output', metavar='FOLDER', help='folder to write')
    parser.add_argument(
        '--target-rate', type=number('(0, 1)'), default=0.6, metavar='T',
        help='target rate of its training, for further training only; the checkpoint does not hold it '
        '(default: %(default)s)')
    return parser.parse_args(argv)


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

import timm
import torch
from timm.models import load_state_dict

import timm_aig


def convert(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Their state dict as a timm_aig one."""
    converted = {}
    for key, value in state_dict.items():
        for theirs, ours in RENAMED.items():
            key = re.sub(theirs, ours, key)
        # the layers of a gate are 1x1 convolutions there
        converted[key] = value.flatten(1) if key.endswith(('gate.fc1.weight', 'gate.fc2.weight')) else value
    return converted


def architecture(state_dict: Dict[str, torch.Tensor]) -> Tuple[str, Dict[str, Any]]:
    """Architecture and model arguments of one of their checkpoints."""
    gates = [key.split('.')[0] for key in state_dict if key.endswith('.fc1bn.weight')]
    stages = tuple(gates.count(layer) for layer in dict.fromkeys(gates))
    family = FAMILIES.get(('layer1.0.conv3.weight' in state_dict, len(stages)))
    if family is None or 'linear.weight' not in state_dict:
        raise ValueError("holds none of the networks of the authors' code (layerN.i.fc1bn, linear, 3 or 4 stages).")
    known = family[1].get(stages)
    return (known, {}) if known else (family[0], dict(layers=stages))


def run(args: argparse.Namespace) -> None:
    with blame('checkpoint', args.checkpoint, Exception):  # a file that is no checkpoint raises all kinds
        state_dict = load_state_dict(args.checkpoint)  # timm's: weights only, without the prefixes of wrappers
        if not state_dict or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
            raise ValueError('holds no state dict.')
        arch, model_args = architecture(state_dict)
        num_classes = len(state_dict['linear.weight'])
        cfg = CIFAR if arch.startswith('cifar') else IMAGENET
        model = timm.create_model(
            arch, pretrained_cfg=dict(cfg, architecture=arch, num_classes=num_classes), target_rate=args.target_rate,
            **model_args)
        model.load_state_dict(convert(state_dict))
    timm_aig.save_pretrained(model, args.output)
    print(f'{Path(args.output)}: {arch}, {num_classes} classes, {len(timm_aig.gated_blocks(model))} gates')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
