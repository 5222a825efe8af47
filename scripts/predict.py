#!/usr/bin/env python3
"""What a model answers for each of your images, and how much of it ran.

    label        the class, by its number if the model does not name its classes
    probability  of that class, by the model
    MACs         MACs share: executed MACs over those of the static parent, of a cascade over those of its largest model
    blocks run   gated blocks that ran for the image; models without gates have none
    stages       models of a cascade that saw the image

A file of export.py does not hold MACs, so it has no such column. Images that cannot be read are named on stderr.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from _args import add_args, create_parser, number
from _common import check_file, open_device, print_table, require, run_script, sleep_when_idle, write_csv

EXAMPLES = """examples:
  scripts/predict.py shirt.png shoes --model cifar_resnet32_aig.fmnist_t06 --pretrained      # a file and a folder
  scripts/predict.py photos --model local-dir:r50 --budget 0.5 --csv photos.csv              # an output of calibrate.py
  scripts/predict.py photos --model r50.onnx --json                                          # a file of export.py
  scripts/predict.py photos --cascade resnet18 resnet50 --pretrained                         # images come first"""

HEADS = {'macs_share': 'MACs', 'blocks_run': 'blocks run'}  # of the table, where they are not the keys of the rows


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = create_parser(__doc__, EXAMPLES)
    arg = parser.add_argument
    arg('files', nargs='+', metavar='IMAGES', help='image files, or folders of them')
    model = parser.add_mutually_exclusive_group(required=True)
    add_args(model, 'model', help='timm model, local-dir:FOLDER, hf-hub:USER/NAME or an .onnx file of export.py')
    add_args(model, 'cascade')
    add_args(parser, 'pretrained')
    arg('--budget', type=number('(0, 1]'), metavar='X',
        help="MACs share; the model must be calibrated (default: the model's own gates)")
    add_args(parser, 'input_size', 'crop_pct')
    add_args(parser, 'batch_size', default=32, help='default: %(default)s')
    add_args(parser, 'workers', default=0)
    add_args(parser, 'device')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--csv', metavar='FILE', help='write a CSV file rather than print a table')
    add_args(form, 'json')
    args = parser.parse_args(argv)
    if args.cascade and args.budget:
        parser.error('--budget is for --model; the stages of a cascade have their own.')
    if (args.model or '').endswith('.onnx') and (args.input_size or args.device not in (None, 'cpu')):
        parser.error('--model with an .onnx file has its own --input-size, and runs on the CPU.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

sleep_when_idle()

import numpy as np
import torch
from _cascade import common_data_config, open_cascade
from _inputs import data_config, open_model, warn_of_random_weights
from PIL import Image
from timm.data import create_transform, get_img_extensions
from torch.utils.data import DataLoader, Dataset

import timm_aig
from timm_aig import InputError
from timm_aig.budget import BudgetPoint, budget_offset
from timm_aig.training.data import convert_images, label_names_of
from timm_aig.training.evaluate import check_output

WARNING = ': its answers mean nothing'


class Predictor(NamedTuple):
    """A model, cascade or file."""
    config: Dict[str, Any]  # timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode
    labels: Sequence[str]  # of the classes, empty if it has none
    run: Callable[[torch.Tensor], Dict[str, Any]]  # from images to their logits and further columns, each [B]


class Images(Dataset):
    """(File, image tensor) of each file, or (file, what is wrong with it)."""

    def __init__(self, files: Sequence[Path], config: Dict[str, Any]) -> None:
        self.files = files
        self.transform: Any = create_transform(**config)
        convert_images(self, config['input_size'][0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tuple[Path, Any]:
        try:
            with Image.open(self.files[index]) as image:
                return self.files[index], self.transform(image)
        except Exception as e:  # each decoder has its own
            return self.files[index], f'{type(e).__name__}: {e}'


def find_files(paths: Sequence[str]) -> List[Path]:
    """The files, and those in the folders that are named as images."""
    found: List[Path] = []
    for path in map(Path, paths):
        inside = [path] if path.is_file() else sorted(
            file for file in path.rglob('*') if file.suffix.lower() in get_img_extensions() and file.is_file())
        if not inside:
            what = 'has no images' if path.is_dir() else 'does not exist'
            raise InputError(f'must be image files or folders of them; {path} {what}.', 'files')
        found += inside
    return found


def offset_of(args: argparse.Namespace, table: Sequence[BudgetPoint]) -> float:
    """Gate offset for --budget, from the table of a model or file."""
    if not table:
        raise InputError(f'--budget: {args.model} has no calibrated budgets.')
    try:
        return budget_offset(table, args.budget)
    except InputError as e:
        raise InputError(f'--budget {e.problem}') from e


def open_predictor(args: argparse.Namespace) -> Predictor:
    if args.cascade:
        return open_stages(args)
    if args.model.endswith('.onnx'):
        return open_file(args)
    warn_of_random_weights(args, args.model, WARNING)
    device, model = open_device(args), open_model(args, args.model)
    if args.budget:
        timm_aig.set_gate_offset(model, offset_of(args, timm_aig.budget_table(model)))
    config = data_config(args, model)
    cost = timm_aig.compute_cost(model, config['input_size'])
    model = model.to(device)

    def run(images: torch.Tensor) -> Dict[str, Any]:
        logits, gates = timm_aig.forward_gates(model, images.to(device))
        blocks = {'blocks_run': gates.sum(1).int()} if gates.shape[1] else {}
        return dict(logits=logits, macs_share=cost.share(gates), **blocks)

    return Predictor(config, label_names_of(model), run)


def open_stages(args: argparse.Namespace) -> Predictor:
    for name in dict.fromkeys(args.cascade if len(args.cascade) > 1 else ()):  # one name is a saved cascade
        warn_of_random_weights(args, name, WARNING)
    device, cascade = open_device(args), open_cascade(args)
    config = common_data_config(args, cascade)
    largest = max(cost.static for cost in cascade.costs(config['input_size']))
    names = next(filter(None, map(label_names_of, cascade.models)), [])
    cascade = cascade.to(device)

    def run(images: torch.Tensor) -> Dict[str, Any]:
        rounds = cascade.rounds(images.to(device))
        return dict(logits=rounds.logits, macs_share=rounds.macs / largest, stages=rounds.stages)

    return Predictor(config, names, run)


def open_file(args: argparse.Namespace) -> Predictor:
    """A file of export_onnx, with what its metadata say."""
    require('export', 'onnx', 'onnxruntime')
    try:
        session = timm_aig.load_onnx(args.model, spinning=False)
    except InputError as e:
        raise InputError(e.problem, 'model') from e
    data = session.get_modelmeta().custom_metadata_map
    known = {key: json.loads(data[key]) for key in (
        'input_size', 'mean', 'std', 'crop_pct', 'labels', 'budgets', 'gates') if key in data}
    config = {**{key: known[key] for key in ('input_size', 'mean', 'std')},
              'crop_pct': args.crop_pct or known['crop_pct'], 'interpolation': data['interpolation'],
              'crop_mode': data.get('crop_mode', 'center')}
    feeds = {}
    if args.budget:
        shapes = [value.shape for value in session.get_overridable_initializers() if value.name == 'gate_offset']
        table = [BudgetPoint(budget, offset, budget, images=0) for budget, offset in known.get('budgets', ()) if shapes]
        offset = offset_of(args, table)
        feeds['gate_offset'] = np.full(shapes[0], offset, np.float32)

    def run(images: torch.Tensor) -> Dict[str, Any]:
        logits, *gates = map(torch.from_numpy, session.run(None, {'x': images.numpy(), **feeds}))
        if 'gates' in known:  # mode 'path': the same blocks for each image
            gates = [torch.tensor([known['gates']] * len(images))]
        return dict(logits=logits, **({'blocks_run': gates[0].sum(1).int()} if gates else {}))

    return Predictor(config, known.get('labels', ()), run)


def predict(args: argparse.Namespace, predictor: Predictor, files: Sequence[Path]) -> List[Dict[str, Any]]:
    """A row for each image that can be read."""
    rows = []
    images = Images(files, predictor.config)
    for batch in DataLoader(images, args.batch_size, num_workers=args.workers, collate_fn=list):
        read = [(file, image) for file, image in batch if not isinstance(image, str)]
        for file, problem in batch:
            if isinstance(problem, str):
                print(f'Left out {file}, {problem}', file=sys.stderr)
        if not read:
            continue
        found = predictor.run(torch.stack([image for _, image in read]))
        logits = found.pop('logits')
        check_output(logits, None)
        probabilities, classes = logits.float().softmax(1).max(1)
        columns = {'probability': probabilities, **found}
        for i, ((file, _), label) in enumerate(zip(read, classes.tolist())):
            rows.append({'file': str(file), 'label': predictor.labels[label] if predictor.labels else label,
                         **{key: values[i].item() for key, values in columns.items()}})
    return rows


def run(args: argparse.Namespace) -> None:
    files = find_files(args.files)
    if args.csv:
        check_file(args.csv, 'csv')
    with torch.inference_mode():
        rows = predict(args, open_predictor(args), files)
    if not rows:
        raise InputError('has none that can be read.', 'files')
    if args.json:
        print(json.dumps({'rows': rows, 'unreadable': len(files) - len(rows)}, indent=2))
    elif args.csv:
        write_csv(args.csv, rows[0], (row.values() for row in rows))
        print(f'Wrote {args.csv}: {len(rows)} images.')
    else:
        print_table([{
            HEADS.get(key, key): f'{value:.1%}' if isinstance(value, float) else value for key, value in row.items()
        } for row in rows], 'file', 'label')


def main(argv: Optional[List[str]] = None) -> int:
    return run_script(run, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
