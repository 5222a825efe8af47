"""Which blocks run for which images: execution rates by class and their heatmap."""
import os
from pathlib import Path
from typing import Any, Collection, Iterable, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn

from .blocks import _require_gated_blocks, forward_gates

__all__ = ['execution_rates', 'plot_accuracy_macs', 'plot_budgets', 'plot_execution_rates', 'plot_rates_over_epochs']


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
    if tuple(rates.shape) != (len(class_names), len(block_names)):
        raise ValueError(
            f'rates must be [{len(class_names)} class_names, {len(block_names)} block_names], '
            f'not {list(rates.shape)}.')
    num_classes, num_blocks = rates.shape
    every = -(-num_classes // 50)  # at most 50 class names stay readable
    figure = _figure(3 + .5 * num_blocks, 2 + .3 * min(num_classes, 50))
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
    return _save(figure, path)


def plot_rates_over_epochs(
        rates: torch.Tensor,
        block_names: Sequence[str],
        path: Union[str, os.PathLike],
) -> Path:
    """Draw how the execution rate of each block moves while the gates are trained.

    Args:
        rates: Execution rates [epochs, L] in [0, 1].
        block_names: Names of the L blocks.
        path: PNG to write, whole or not at all.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(3 + .35 * len(rates), 1.5 + .28 * len(block_names))
    axes = figure.add_subplot()
    image = axes.imshow(
        rates.t().double().cpu().numpy(), cmap='viridis', vmin=0, vmax=1, aspect='auto',
        extent=(.5, len(rates) + .5, len(block_names) - .5, -.5))
    axes.set_yticks(range(len(block_names)), block_names, parse_math=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel='epoch', ylabel='block')
    figure.colorbar(image, label='execution rate in training')
    return _save(figure, path)


def plot_accuracy_macs(
        points: Sequence[Tuple[str, float, float]],
        parent: Optional[Tuple[str, float, float]],
        path: Union[str, os.PathLike],
) -> Path:
    """Draw accuracy against MACs: a training's way to its last point, and its static parent.

    Args:
        points: Name, MACs share in [0, 1] and accuracy in percent, in the order they were reached.
        parent: The same of the static parent, None if it is not known.
        path: PNG to write, whole or not at all.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    _, shares, accuracies = zip(*points)
    axes.plot(shares, accuracies, color='#9a9a9a', marker='.', linewidth=1, label='after each epoch')
    axes.plot(shares[-1], accuracies[-1], 'o', color='#0072b2', markersize=9, label=points[-1][0])
    if parent is not None:
        axes.plot(parent[1], parent[2], 's', color='#d55e00', markersize=9, label=parent[0])
    axes.set(xlabel="MACs over the static parent's", ylabel='top-1 accuracy, %', xlim=(min(shares) - .05, 1.05))
    axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=.3)
    figure.legend(loc='outside upper center', ncols=3, frameon=False)
    return _save(figure, path)


def plot_budgets(
        points: Sequence[Tuple[str, float, float]],
        others: Sequence[Tuple[str, float, float]],
        path: Union[str, os.PathLike],
) -> Path:
    """Draw accuracy against MACs of one checkpoint at many budgets, and of other models beside it.

    Args:
        points: Name, MACs over those of the static parent and accuracy in percent, in the order of a curve.
        others: The same of each other model, MACs over those of the same parent.
        path: PNG to write, whole or not at all.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    names, shares, accuracies = zip(*points)
    axes.plot(shares, accuracies, 'o-', color='#0072b2', label=f'{names[0]}, one checkpoint')
    for (name, share, accuracy), marker in zip(others, 's^Dvp*hX' * len(others)):
        axes.plot(share, accuracy, marker, color='#d55e00', markersize=8, label=name)
    axes.set(xlabel="MACs over the static parent's", ylabel='top-1 accuracy, %')
    axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=.3)
    for text in figure.legend(loc='outside upper center', ncols=1, frameon=False).get_texts():
        text.set_parse_math(False)  # a name may hold a $
    return _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # rather than pyplot, which keeps figures and may want a display
    except ImportError as e:
        raise ImportError("a plot needs matplotlib: pip install 'timm_aig[train]'") from e
    return Figure(figsize=(width, height), layout='constrained')


def _save(figure: Any, path: Union[str, os.PathLike]) -> Path:
    path = Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        figure.savefig(partial, format='png', dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
