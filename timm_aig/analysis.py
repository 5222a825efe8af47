"""Which blocks run for which images: execution rates by class and their heatmap."""
import os
from pathlib import Path
from typing import Collection, Iterable, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .blocks import _require_gated_blocks, forward_gates

__all__ = ['execution_rates', 'plot_execution_rates']


def execution_rates(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        num_classes: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """How often each gated block runs for the images of each class, in eval, as the paper's heatmaps show.

    Only sums are kept, so the data may be of any length. The mode of the model is restored.

    Args:
        model: Model with L gated blocks.
        loader: Batches of images [B, C, H, W] and labels [B] in [0, num_classes).
        num_classes: Number of classes.

    Returns:
        Rates [num_classes, L] in [0, 1], nan for a class without images, and the images seen of each class
        [num_classes].

    Raises:
        ValueError: The model is static, or a label is outside [0, num_classes).
    """
    blocks = _require_gated_blocks(model)
    device = next(iter(blocks.values())).gate.fc1.weight.device
    sums = torch.zeros(num_classes, len(blocks), dtype=torch.float64)
    counts = torch.zeros(num_classes, dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for images, labels in loader:
                labels = labels.cpu()
                if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
                    raise ValueError(
                        f'num_classes is {num_classes}, the loader has labels from {labels.min()} to {labels.max()}.')
                _, gates = forward_gates(model, images.to(device))
                sums.index_add_(0, labels, gates.double().cpu())
                counts += labels.bincount(minlength=num_classes)
    finally:
        model.train(training)
    return sums / counts[:, None], counts


def plot_execution_rates(
        rates: torch.Tensor,
        block_names: Sequence[str],
        class_names: Sequence[str],
        path: Union[str, os.PathLike],
        downsampling: Collection[str] = (),
) -> Path:
    """Draw execution rates as a heatmap, a row for each class and a column for each block.

    Args:
        rates: Execution rates [num_classes, L] in [0, 1]; nan is left blank.
        block_names: Names of the L blocks.
        class_names: Names of the classes.
        path: PNG to write, whole or not at all.
        downsampling: Names among block_names to mark as downsampling blocks.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The names do not fit the rates.
    """
    try:
        from matplotlib.figure import Figure  # rather than pyplot, which keeps figures and may want a display
    except ImportError as e:
        raise ImportError("plot_execution_rates needs matplotlib: pip install 'timm_aig[demo]'") from e
    if tuple(rates.shape) != (len(class_names), len(block_names)):
        raise ValueError(
            f'rates must be [{len(class_names)} class_names, {len(block_names)} block_names], '
            f'not {list(rates.shape)}.')
    num_classes, num_blocks = rates.shape
    every = -(-num_classes // 50)  # at most 50 class names stay readable
    figure = Figure(figsize=(3 + .5 * num_blocks, 2 + .3 * min(num_classes, 50)), layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(rates.double().cpu().numpy(), cmap='viridis', vmin=0, vmax=1, aspect='auto')
    axes.set_xticks(
        range(num_blocks), [f'{n} ↓' if n in downsampling else n for n in block_names], rotation=45, ha='right',
        parse_math=False)
    axes.set_yticks(range(0, num_classes, every), class_names[::every], parse_math=False)  # a name may hold a $
    axes.set(xlabel='block (↓ downsampling)' if downsampling else 'block', ylabel='class')
    if num_classes <= 20 and num_blocks <= 20:
        for row, values in enumerate(rates.tolist()):
            for column, rate in enumerate(values):
                if rate == rate:  # not nan
                    axes.text(
                        column, row, f'{rate:.2f}', color='white' if rate < .5 else 'black', ha='center', va='center',
                        fontsize=8)
    figure.colorbar(image, label='execution rate')
    path = Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        figure.savefig(partial, format='png', dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
