"""Cascades on the command line: --cascade of calibrate.py, validate.py and predict.py."""
import argparse
import time
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch
from _common import blame, print_table
from _inputs import create_evaluation_loader, data_config, open_evaluation_split, open_model

import timm_aig
from timm_aig import Cascade, InputError
from timm_aig.training.data import label_names_of
from timm_aig.training.evaluate import check_output


def open_cascade(args: argparse.Namespace) -> Cascade:
    """The cascade of the models that --cascade names, or the saved one if it names one, in eval."""
    if len(args.cascade) == 1:
        with blame('cascade', args.cascade[0], Exception):  # timm, the Hub and the file formats raise all kinds
            return Cascade.from_pretrained(args.cascade[0])
    models = {name: open_model(args, name, 'cascade') for name in dict.fromkeys(args.cascade)}
    with blame('cascade', ' '.join(args.cascade)):
        return Cascade([models[name] for name in args.cascade]).eval()


def at_offset(model: Any, offset: Optional[float]) -> Callable[[torch.Tensor], Any]:
    """The model, at a gate offset wherever it is set; None leaves its own."""
    def run(x: torch.Tensor) -> Any:
        with timm_aig.use_gate_offset(offset):
            return model(x)

    return model if offset is None else run


def common_data_config(args: argparse.Namespace, cascade: Any) -> Dict[str, Any]:
    """timm's data config of the images that all stages take.

    Raises:
        InputError: The models want different images.
    """
    configs = [data_config(args, model) for model in cascade.models]
    for name in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode'):
        values = [config[name] for config in configs]
        if any(value != values[0] for value in values):
            raise InputError(f'must take the same images, but {name} is {" and ".join(map(str, values))}.', 'cascade')
    return configs[0]


def create_cascade_loader(args: argparse.Namespace, cascade: Any, device: torch.device) -> Any:
    """Loader of the images that all stages take. Raises as common_data_config does."""
    config = common_data_config(args, cascade)
    named = next(filter(label_names_of, cascade.models), cascade.models[0])
    dataset = open_evaluation_split(args, named)
    return create_evaluation_loader(args, dataset, config, device=device, use_prefetcher=device.type == 'cuda')


@torch.no_grad()
def cascade_rows(args: argparse.Namespace, cascade: Cascade, device: torch.device) -> List[Dict[str, Any]]:
    """A row for each of --thresholds, or for the cascade's own."""
    loader = create_cascade_loader(args, cascade, device)
    cascade = cascade.to(device, memory_format=torch.channels_last)
    rows = []
    for thresholds in args.thresholds or [cascade.thresholds]:
        cascade.set_thresholds(thresholds)
        rows.append({
            'cascade': args.cascade, 'thresholds': cascade.thresholds, 'budgets': cascade.budgets,
            **evaluate_cascade(cascade, loader, device, args.amp)})
    return rows


@torch.no_grad()
def evaluate_cascade(
        cascade: Cascade, loader: Iterable[Any], device: torch.device, amp: bool = False,
) -> Dict[str, Any]:
    """Accuracy, MACs, share of the images in each stage and throughput of a cascade on batches of images and labels.

    Images without a label (-1), as those that cannot be read, are left out.

    Raises:
        InputError: No labelled images, labels that are no class of the models, or logits that are nan.
    """
    right, stages, macs, seconds = [], [], [], 0.
    for images, labels in loader:
        images = images[labels >= 0].to(device, memory_format=torch.channels_last)
        labels = labels[labels >= 0].to(device)
        if not len(labels):
            continue
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            rounds = cascade.rounds(images)
        right.append((rounds.logits.argmax(1) == labels).cpu())  # waits for the device
        seconds += time.perf_counter() - start
        check_output(rounds.logits, labels)
        stages.append(rounds.stages.cpu())
        macs.append(rounds.macs.cpu())
    if not right:
        raise InputError('the data set has no labelled images.')
    reached, executed = torch.cat(stages), torch.cat(macs)
    largest = max(cost.static for cost in cascade.costs(tuple(images.shape[1:])))
    return {
        'images': len(reached), 'top1': 100 * torch.cat(right).double().mean().item(),
        'macs': executed.mean().item(), 'macs_share': executed.mean().item() / largest, 'all_macs': largest,
        'stage_shares': [(reached > stage).double().mean().item() for stage in range(len(cascade.order))],
        'images_per_second': len(reached) / seconds,
    }


def print_cascade_rows(rows: List[Dict[str, Any]]) -> None:
    print_table([{
        'thresholds': ', '.join(f'{threshold:.4f}' for threshold in row['thresholds']), 'top1': f'{row["top1"]:.2f}%',
        'MACs': f'{row["macs_share"]:.1%}', 'images of each stage': ' '.join(f'{s:.1%}' for s in row['stage_shares']),
        'images/s': f'{row["images_per_second"]:.0f}'} for row in rows])
    print(f'{rows[0]["images"]} images. MACs are over those of the largest model, static.')
