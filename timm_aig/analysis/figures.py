"""Pictures of what the gates do, and of how a training went. Legible at 800 pixels, colours for all eyes."""
import os
from pathlib import Path
from typing import Any, Collection, List, Mapping, Optional, Sequence, Tuple, Union

import torch

from .counts import wilson_interval

__all__ = [
    'plot_accuracy_macs', 'plot_block_rates', 'plot_blocks_run', 'plot_budgets', 'plot_contact_sheet',
    'plot_execution_rates', 'plot_rates_over_epochs',
]

BLUE, RED, GREY = '#0072b2', '#d55e00', '#9a9a9a'  # Okabe and Ito's, told apart by all kinds of colour vision
WIDTH = 8  # inches of the pictures, so that their 9-point letters are 12 pixels high where they are 800 wide
PIXELS = 1600
MAX_GROUPS = 30
MAX_ROWS = 50  # classes with a name of their own


def plot_execution_rates(
        rates: torch.Tensor,
        block_names: Sequence[str],
        class_names: Sequence[str],
        path: Union[str, os.PathLike],
        downsampling: Collection[str] = (),
        groups: Optional[Mapping[str, Sequence[int]]] = None,
        pixels: int = PIXELS,
) -> Path:
    """Draw execution rates as a heatmap, a row for each class and a column for each block.

    With more than 50 classes only some of them are named, or the groups alone if there are any.

    Args:
        rates: Execution rates [num_classes, L] in [0, 1]; nan is left blank.
        block_names: Names of the L blocks.
        class_names: Names of the classes.
        path: PNG to write, whole or not at all.
        downsampling: Names among block_names to mark as downsampling blocks.
        groups: Classes of each group, at most 30 groups; the rows are in their order. All classes, in theirs, if None.
        pixels: Width of the picture.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The names do not fit the rates, or there are too many groups.
    """
    if tuple(rates.shape) != (len(class_names), len(block_names)):
        raise ValueError(
            f'rates must be [{len(class_names)} class_names, {len(block_names)} block_names], '
            f'not {list(rates.shape)}.')
    _check_groups(groups or {})
    order = [i for group in groups.values() for i in group] if groups else list(range(len(class_names)))
    names = [_short(class_names[i]) for i in order]
    rows, columns = len(order), len(block_names)
    height = 2.6 + .25 * min(rows, MAX_ROWS) if rows <= MAX_ROWS else 9
    figure = _figure(WIDTH, max(height, 1.8 + .3 * len(groups or ())))
    axes = figure.add_subplot()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    colours = ScalarMappable(Normalize(0, 1), 'viridis')  # imshow with cmap would need 100 MB for the pixels as floats
    axes.imshow(colours.to_rgba(rates[order].cpu().numpy(), bytes=True), aspect='auto', interpolation='nearest')
    _name_blocks(axes, block_names, downsampling)
    if rows > MAX_ROWS and groups:
        axes.set(yticks=[], ylabel=f'{rows} classes')
    else:
        every = -(-rows // MAX_ROWS)
        axes.set_yticks(range(0, rows, every), names[::every], parse_math=False)  # a name may hold a $
    if rows <= 20 and columns <= 20:
        for row, values in enumerate(rates[order].tolist()):
            for column, rate in enumerate(values):
                if rate == rate:  # not nan
                    axes.text(
                        column, row, f'{rate:.2f}', color='white' if rate < .5 else 'black', ha='center', va='center',
                        fontsize=7)
    if groups:
        _mark_groups(axes, groups, rows, figure.get_figheight())
    figure.colorbar(
        colours, ax=axes, label='execution rate', location='bottom', shrink=.5, aspect=30, pad=.02)
    return _save(figure, path, pixels)


def plot_block_rates(
        rates: torch.Tensor,
        images: torch.Tensor,
        block_names: Sequence[str],
        path: Union[str, os.PathLike],
        downsampling: Collection[str] = (),
        pixels: int = PIXELS,
) -> Path:
    """Draw the execution rate of each block over all images, with 95 % Wilson intervals, and its range over classes.

    Args:
        rates: Execution rates by class [num_classes, L] in [0, 1].
        images: Images of each class [num_classes].
        block_names: Names of the L blocks.
        path: PNG to write, whole or not at all.
        downsampling: Names among block_names to mark as downsampling blocks.
        pixels: Width of the picture.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    seen = images > 0
    n = int(images.sum())
    runs = (rates[seen] * images[seen, None]).sum(0)
    rate = runs / n
    low, high = wilson_interval(runs, n)
    figure = _figure(WIDTH, 4)
    axes = figure.add_subplot()
    at = torch.arange(len(block_names))
    axes.vlines(
        at, rates[seen].min(0).values, rates[seen].max(0).values, color=GREY, alpha=.5,
        linewidth=min(8., 250 / len(at)), label='lowest to highest class')
    axes.errorbar(
        at, rate, yerr=torch.stack([rate - low, high - rate]).clamp(min=0), fmt='o', color=BLUE, markersize=4,
        capsize=3 if len(at) <= 50 else 0, label=f'all {n:,} images, 95 % interval')
    _name_blocks(axes, block_names, downsampling)
    axes.set(ylabel='execution rate', ylim=(-.03, 1.03), xlim=(-.7, len(at) - .3))
    axes.grid(axis='y', alpha=.3)
    figure.legend(loc='outside upper center', ncols=2, frameon=False)
    return _save(figure, path, pixels)


def plot_blocks_run(
        blocks_run: torch.Tensor,
        groups: Mapping[str, Sequence[int]],
        path: Union[str, os.PathLike],
        pixels: int = PIXELS,
) -> Path:
    """Draw a histogram of the executed blocks for each group of classes.

    Args:
        blocks_run: Images of each class that ran 0, 1, ..., L blocks [num_classes, L + 1].
        groups: Classes of each group, at most 30 groups.
        path: PNG to write, whole or not at all.
        pixels: Width of the picture.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: Too many groups.
    """
    _check_groups(groups)
    table = torch.stack([blocks_run[list(group)].sum(0) for group in groups.values()]).double()
    columns = min(len(groups), 2 if len(groups) <= 6 else 3)
    rows = -(-len(groups) // columns)
    figure = _figure(WIDTH, 1 + 1.4 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
    at = torch.arange(table.shape[1])
    used = table.sum(0).nonzero()
    for axes, name, images in zip(panels, groups, table):
        mean = float(images @ at.double() / images.sum())
        axes.bar(at, images / images.sum(), width=.9, color=BLUE)
        axes.axvline(mean, color=RED, linewidth=1.5)
        axes.set_title(f'{_short(name, 20)}, mean {mean:.1f}', fontsize=9, loc='left', parse_math=False)
        axes.grid(axis='y', alpha=.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_xlim(int(used.min()) - 1, int(used.max()) + 1)
    for axes in panels[len(groups):]:
        axes.set_axis_off()
    figure.supxlabel(f'gated blocks that ran, of {table.shape[1] - 1}', fontsize=10)
    figure.supylabel('share of the images', fontsize=10)
    return _save(figure, path, pixels)


def plot_contact_sheet(
        rows: Sequence[Tuple[str, Sequence[Tuple[Any, int]], Sequence[Tuple[Any, int]]]],
        path: Union[str, os.PathLike],
        pixels: int = PIXELS,
) -> Path:
    """Draw the fastest and the slowest images of some classes, a row for each, under each the blocks that it ran.

    Args:
        rows: Name of the class, its fastest and its slowest images, each a PIL image and the number of blocks.
        path: PNG to write, whole or not at all.
        pixels: Width of the picture.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import numpy as np
    from PIL import ImageOps

    most = max(max(len(fast), len(slow)) for _, fast, slow in rows)
    size = max(max(image.size) for _, *both in rows for images in both for image, _ in images)
    tile = min(size, 160)  # pixels of the sheet, which matplotlib scales
    step, gap, height = 1.05 * tile, .4 * tile, 1.32 * tile
    sheet = np.full((round(len(rows) * height), round(2 * most * step + gap), 3), 255, dtype=np.uint8)
    figure = _figure(WIDTH, .5 + (WIDTH - 1.2) * sheet.shape[0] / sheet.shape[1])
    axes = figure.add_subplot()
    for row, (_, fast, slow) in enumerate(rows):
        top = round(row * height)
        for start, images in ((0, fast), (most * step + gap, slow)):
            for column, (image, run) in enumerate(images):
                left = round(start + column * step)
                square = ImageOps.pad(image.convert('RGB'), (tile, tile), color='white')
                sheet[top:top + tile, left:left + tile] = np.asarray(square)
                axes.text(left + tile / 2, top + 1.03 * tile, str(run), ha='center', va='top', fontsize=7)
    axes.imshow(sheet, interpolation='nearest' if tile < 96 else 'antialiased')
    axes.set_yticks(
        [row * height + tile / 2 for row in range(len(rows))], [_short(name, 16) for name, _, _ in rows],
        parse_math=False)
    axes.set_xticks(
        [most * step / 2, most * step * 1.5 + gap], [f'{end} MACs (below: blocks run)' for end in ('fewest', 'most')])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _save(figure, path, pixels)


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
    figure, axes = _accuracy_axes()
    _, shares, accuracies = zip(*points)
    axes.plot(shares, accuracies, color='#9a9a9a', marker='.', linewidth=1, label='after each epoch')
    axes.plot(shares[-1], accuracies[-1], 'o', color='#0072b2', markersize=9, label=points[-1][0])
    if parent is not None:
        axes.plot(parent[1], parent[2], 's', color='#d55e00', markersize=9, label=parent[0])
    axes.set_xlim(min(shares) - .05, 1.05)
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
    figure, axes = _accuracy_axes()
    names, shares, accuracies = zip(*points)
    axes.plot(shares, accuracies, 'o-', color='#0072b2', label=f'{names[0]}, one checkpoint')
    for (name, share, accuracy), marker in zip(others, 's^Dvp*hX' * len(others)):
        axes.plot(share, accuracy, marker, color='#d55e00', markersize=8, label=name)
    for text in figure.legend(loc='outside upper center', ncols=1, frameon=False).get_texts():
        text.set_parse_math(False)  # a name may hold a $
    return _save(figure, path)


def _accuracy_axes() -> Tuple[Any, Any]:
    """Figure and axes of accuracy against MACs."""
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    axes.set(xlabel="MACs over the static parent's", ylabel='top-1 accuracy, %')
    axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=.3)
    return figure, axes


def _check_groups(groups: Mapping[str, Sequence[int]]) -> None:
    if len(groups) > MAX_GROUPS:
        raise ValueError(f'groups must be at most {MAX_GROUPS}, not {len(groups)}.')


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f'{name[:length - 1]}…'


def _name_blocks(axes: Any, names: Sequence[str], downsampling: Collection[str]) -> None:
    """Name every block on the x axis, or every nth where they would touch; mark those that downsample."""
    every = -(-len(names) // 36)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=90, fontsize=8, parse_math=False)
    at = [i for i, name in enumerate(names) if name in downsampling]
    for i in at:
        axes.text(i, 1.01, '▼', color=RED, fontsize=8, ha='center', transform=axes.get_xaxis_transform())
    axes.set_xlabel('block (▼ downsampling)' if at else 'block')


def _mark_groups(axes: Any, groups: Mapping[str, Sequence[int]], rows: int, height: float) -> None:
    """Name groups of rows at the right, with a line from each to its rows, since small ones lie close together."""
    ends = torch.tensor([len(group) for group in groups.values()]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends)]
    labels = _spread(middles, .2 * rows / (height - 2.2), -.5, rows - .5)
    transform = axes.get_yaxis_transform()
    for name, start, end, middle, label in zip(groups, starts, ends, middles, labels):
        if start:
            axes.axhline(start - .5, color='white', linewidth=2 if rows <= MAX_ROWS else 1)
        line = dict(color='black', linewidth=.8, transform=transform, clip_on=False)
        axes.plot([1.012, 1.012], [start - .4, end - .6], **line)
        axes.plot([1.012, 1.04], [middle, label], **line)
        axes.text(1.045, label, _short(name), va='center', fontsize=9, transform=transform, parse_math=False)


def _spread(positions: Sequence[float], gap: float, low: float, high: float) -> List[float]:
    """Move ascending positions as little as it takes to be a gap apart within [low, high]."""
    moved: List[float] = []
    for position in positions:
        moved.append(max(position, moved[-1] + gap if moved else low + gap / 2))
    bound = high - gap / 2
    for i in reversed(range(len(moved))):
        moved[i] = bound = min(moved[i], bound)
        bound -= gap
    return moved


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure  # rather than pyplot, which keeps figures and may want a display
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise ImportError("a plot needs matplotlib: pip install 'timm_aig[train]'") from e
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=.08, h_pad=.08))  # inches to the edge


def _save(figure: Any, path: Union[str, os.PathLike], pixels: Optional[int] = None) -> Path:
    path = Path(path)
    partial = path.with_name(f'.{path.name}.partial')
    try:
        figure.savefig(partial, format='png', dpi=pixels / figure.get_figwidth() if pixels else 150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
