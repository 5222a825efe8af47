"""Pictures of the gates, of a training, and of accuracy against MACs, readable at a width of 800 pixels.

Each function writes a PNG to `path`, completely or not at all, `pixels` wide, and returns the path. `title` is a second
line below the heading: model, data and budget. All raise ImportError if matplotlib is not installed.
"""
import io
import os
import textwrap
from itertools import cycle, groupby
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image, ImageOps

from ..training.checkpoint import write_atomically

__all__ = ['plot_accuracy_macs', 'plot_blocks_run', 'plot_contact_sheet', 'plot_execution_rates',
           'plot_rates_over_epochs']

BLUE, RED, GREY = '#0072b2', '#d55e00', '#9a9a9a'
# Okabe and Ito's palette, safe for colour-blind readers, without its yellow; then brown, grey and purple
COLOURS = (BLUE, RED, '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000', '#8c564b', GREY, '#6a3d9a')
WIDTH = 8  # inches: 9-point text is 12 pixels high where the picture is 800 pixels wide
PIXELS = 1600
MAX_GROUPS = 30  # more names do not fit beside a heatmap
MAX_ROWS = 50  # classes that are named one by one
MAX_NUMBERS = 20  # rows and columns up to which each cell shows its number

PathLike = Union[str, os.PathLike]
Points = Sequence[Tuple[str, float, float]]  # name, MACs over those of the static parent, top-1 accuracy in percent


def plot_execution_rates(
        rates: torch.Tensor,
        block_names: Sequence[str],
        class_names: Sequence[str],
        path: PathLike,
        downsampling: Collection[str] = (),
        groups: Optional[Mapping[str, Sequence[int]]] = None,
        pixels: int = PIXELS,
        title: str = '',
        macs: Sequence[float] = (),
        images: Optional[torch.Tensor] = None,
) -> Path:
    """Draw execution rates as a heatmap: a row for each class, their mean below, a column for each block.

    With more than 50 classes only every nth is named, or only the groups if there are any.

    Args:
        rates: Execution rates [num_classes, L] in [0, 1]; nan is left blank.
        block_names: Names of the L blocks, such as 'layer1.0'.
        class_names: Names of the classes.
        downsampling: Names among block_names to mark as downsampling blocks.
        groups: Classes of each group, at most MAX_GROUPS groups. Rows are ordered by group; without groups, by class.
        macs: MACs of each block [L], drawn as bars below the heatmap if given.
        images: Images of each class [num_classes], the weights of the mean row. Equal weights by default.

    Raises:
        ValueError: The names do not fit the rates.
    """
    if tuple(rates.shape) != (len(class_names), len(block_names)):
        raise ValueError(
            f'rates must be [{len(class_names)} class_names, {len(block_names)} block_names], '
            f'not {list(rates.shape)}.')
    order = [i for group in groups.values() for i in group] if groups else list(range(len(class_names)))
    rows = len(order)
    height = max(.25 * rows if rows <= MAX_ROWS else 7, .26 * len(groups or ()))
    heights = [height, .25, .5] if len(macs) else [height, .25]
    figure = _figure(sum(heights) + 2.3, 'How often each block runs for the images of each class', title)
    colours = _colours()
    heatmap, mean, *bars = parts = figure.subplots(
        len(heights), sharex=True, gridspec_kw=dict(height_ratios=heights))
    _draw_rates(heatmap, rates[order], colours)
    if rows > MAX_ROWS and groups:
        heatmap.set(yticks=[], ylabel=f'{rows} classes')
    else:
        every = -(-rows // MAX_ROWS)
        names = [_short(class_names[i]) for i in order[::every]]
        heatmap.set_yticks(range(0, rows, every), names, parse_math=False)  # a name may hold a $
    if groups:
        _mark_groups(heatmap, groups, rows, height)
    seen = ~rates.isnan().any(1)
    weights = torch.ones(len(rates)) if images is None else images
    overall = (rates[seen] * weights[seen, None]).sum(0) / weights[seen].sum()
    _draw_rates(mean, overall[None], colours)
    mean.set_yticks([0], ['mean'])
    for axes in bars:
        drawn = axes.bar(range(len(macs)), [value / 1e6 for value in macs], color=GREY)
        axes.set_ylabel('MACs, millions', rotation=0, ha='right', va='center')
        axes.spines[['top', 'right']].set_visible(False)
        if len(macs) <= MAX_NUMBERS:
            axes.bar_label(drawn, fmt='%.3g', fontsize=8)
            axes.set_yticks([])
    _name_blocks(parts, block_names, downsampling)
    _add_colour_bar(figure, list(parts), colours)
    return _save(figure, path, pixels)


def plot_blocks_run(
        blocks_run: torch.Tensor,
        groups: Mapping[str, Sequence[int]],
        path: PathLike,
        pixels: int = PIXELS,
        title: str = '',
) -> Path:
    """Draw a histogram of the number of executed blocks for each group of classes.

    Args:
        blocks_run: Images of each class that ran 0, 1, ..., L blocks [num_classes, L + 1].
        groups: Classes of each group, at most MAX_GROUPS groups.
    """
    table = torch.stack([blocks_run[list(group)].sum(0) for group in groups.values()]).double()
    columns = min(len(groups), 2 if len(groups) <= 6 else 3)
    rows = -(-len(groups) // columns)
    figure = _figure(1.4 + 1.4 * rows, f'How many of the {table.shape[1] - 1} gated blocks run', title)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).reshape(-1)
    at, edges = torch.arange(table.shape[1]).double(), np.arange(table.shape[1] + 1) - .5
    low, high = (int(end) for end in table.sum(0).nonzero().flatten()[[0, -1]])
    every = -(-(high - low + 1) // (24 // columns))  # numbers that fit below a panel
    for axes, name, images in zip(panels, groups, table):
        mean = float(images @ at / images.sum())
        axes.stairs(100 * images / images.sum(), edges, fill=True, color=BLUE)
        axes.axvline(mean, color=RED, linewidth=1.5)
        axes.set_title(f'{_short(name, 20)}, mean {mean:.1f}', fontsize=9, loc='left', parse_math=False)
        axes.grid(axis='y', alpha=.3)
        axes.tick_params(labelbottom=True)
    panels[0].set(xlim=(low - .7, high + .7), xticks=range(low, high + 1, every))
    for axes in panels[len(groups):]:
        axes.set_axis_off()
    figure.supxlabel('blocks run (red line: mean)', fontsize=10)
    figure.supylabel('images of the group, %', fontsize=10)
    return _save(figure, path, pixels)


def plot_contact_sheet(
        rows: Sequence[Tuple[str, Sequence[Tuple[Any, int]], Sequence[Tuple[Any, int]]]],
        path: PathLike,
        pixels: int = PIXELS,
        title: str = '',
) -> Path:
    """Draw the images of some classes that take the fewest and the most MACs, a row for each class.

    Args:
        rows: Name of the class, its images with the fewest and with the most MACs, each a PIL image and the number of
            blocks that it ran, which is written below it.
    """
    most = max(max(len(fast), len(slow)) for _, fast, slow in rows)
    size = max(max(image.size) for _, *both in rows for images in both for image, _ in images)
    tile = min(size, 160)  # pixels in the sheet, which matplotlib scales
    step, gap, height = 1.05 * tile, .4 * tile, 1.34 * tile
    sheet = np.full((round(len(rows) * height), round(2 * most * step + gap), 3), 255, dtype=np.uint8)
    figure = _figure(
        1 + (WIDTH - 1.2) * sheet.shape[0] / sheet.shape[1],
        'Images with the fewest and with the most MACs in each class, and the number of blocks that they run', title)
    axes = figure.add_subplot()
    for row, (_, fast, slow) in enumerate(rows):
        top = round(row * height)
        for start, images in ((0, fast), (most * step + gap, slow)):
            for column, (image, run) in enumerate(images):
                left = round(start + column * step)
                square = ImageOps.pad(image.convert('RGB'), (tile, tile), color='white')
                sheet[top:top + tile, left:left + tile] = np.asarray(square)
                axes.text(left + tile / 2, top + 1.03 * tile, str(run), ha='center', va='top', fontsize=8)
    axes.imshow(sheet, interpolation='nearest' if tile < 96 else 'antialiased')
    middles = [row * height + tile / 2 for row in range(len(rows))]
    axes.set_yticks(middles, [_short(name, 16) for name, _, _ in rows], parse_math=False)
    axes.set_xticks([most * step / 2, most * step * 1.5 + gap], ['fewest MACs', 'most MACs'])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _save(figure, path, pixels)


def plot_rates_over_epochs(rates: torch.Tensor, block_names: Sequence[str], path: PathLike, title: str = '') -> Path:
    """Draw how the execution rate of each block changes while the gates are trained.

    Args:
        rates: Execution rates [epochs, L] in [0, 1].
        block_names: Names of the L blocks.
    """
    figure = _figure(2.4 + .2 * len(block_names), 'How often each block runs in training', title)
    axes, colours = figure.add_subplot(), _colours()
    _draw_rates(axes, rates.t(), colours)
    every = -(-len(rates) // 20)
    axes.set_xticks(range(0, len(rates), every), range(1, len(rates) + 1, every))
    axes.set_yticks(range(len(block_names)), block_names, fontsize=8, parse_math=False)
    axes.set_xlabel('epoch')
    _add_colour_bar(figure, axes, colours)
    return _save(figure, path)


def plot_accuracy_macs(
        points: Points, others: Points, path: PathLike, title: str = '', over: str = 'MACs',
        accuracy: str = 'top-1 accuracy, %', colours: Optional[Mapping[str, str]] = None,
) -> Path:
    """Draw accuracy against MACs, or `over` time, of one checkpoint at many budgets, with other models beside it.

    Args:
        points: Name, MACs over those of the static parent and top-1 accuracy in percent of the adaptive models. A line
            joins points of one name that follow one another.
        others: The same for the models to compare with, in dashed lines.
        accuracy: Label of the vertical axis.
        colours: Colour of each name. By default they are chosen in order.
    """
    names = list(dict.fromkeys(name for name, *_ in [*points, *others]))
    figure = _figure(4.5 + .1 * len(names), f'Accuracy against {over}', title)
    axes = figure.add_subplot()
    colours = colours or dict(zip(names, cycle(COLOURS)))
    for some, style in ((points, dict(marker='o')), (others, dict(marker='s', linestyle='--'))):
        for name, same in groupby(some, lambda point: point[0]):
            _, shares, accuracies = zip(*same)
            axes.plot(shares, accuracies, label=name, markersize=5, linewidth=1.5, color=colours[name], **style)
    axes.set(xlabel=f'{over} relative to the static parent', ylabel=accuracy)
    axes.margins(.08, .1)
    axes.ticklabel_format(useOffset=False)
    axes.grid(alpha=.3)
    legend = figure.legend(loc='outside lower left', ncols=2, columnspacing=1, fontsize=7.5, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a $
    return _save(figure, path)


def _draw_rates(axes: Any, rates: torch.Tensor, colours: Any) -> None:
    """Draw rates [rows, L] in [0, 1] as coloured cells, with their percentages where there is room."""
    percent = 100 * rates.double().cpu().numpy()
    image = colours.to_rgba(percent, bytes=True)  # with cmap=, imshow would take 100 MB for 1000 classes
    axes.imshow(image, aspect='auto', interpolation='nearest')
    if max(percent.shape) <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(percent):
            if value == value:  # not nan
                axes.text(
                    column, row, f'{value:.0f}', color='white' if value < 50 else 'black', ha='center', va='center',
                    fontsize=8)


def _name_blocks(parts: Sequence[Any], names: Sequence[str], downsampling: Collection[str]) -> None:
    """Label the blocks below the last of some axes, the stages below them, and mark downsampling blocks at the top.

    The label of a block is its number in its stage; where labels would touch, every nth block has one.
    """
    stages: Dict[str, List[int]] = {}
    for i, name in enumerate(names):
        stages.setdefault(name.rpartition('.')[0], []).append(i)
    every = -(-len(names) // 36)
    labels: Dict[int, str] = {}
    end = 0.
    for stage, blocks in stages.items():
        shown = blocks[:max(1, len(blocks) - every + 1):every]
        labels.update({i: _short(names[i].rpartition('.')[2], 8) for i in shown})
        middle, half = shown[len(shown) // 2], .006 * len(names) * len(stage)  # half of its width, in blocks
        if middle - half >= end - 1:
            labels[middle] += f'\n{stage}'
            end = middle + half + 1
        for axes in parts if blocks[0] else ():
            axes.axvline(blocks[0] - .5, color='white', linewidth=1.5)
    for axes in parts[:-1]:
        axes.tick_params(bottom=False)
    parts[-1].set_xticks(list(labels), list(labels.values()), fontsize=8, parse_math=False)
    marked = [i for i, name in enumerate(names) if name in downsampling]
    for i in marked:
        parts[0].text(i, 1.01, '▼', color=RED, fontsize=8, ha='center', transform=parts[0].get_xaxis_transform())
    parts[-1].set_xlabel('block (▼ downsampling)' if marked else 'block')


def _mark_groups(axes: Any, groups: Mapping[str, Sequence[int]], rows: int, height: float) -> None:
    """Name groups of rows on the right, with lines to their rows: the names of small groups need more room."""
    ends = torch.tensor([len(group) for group in groups.values()]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends)]
    labels = _spread(middles, .21 * rows / height, -.5, rows - .5)
    transform = axes.get_yaxis_transform()
    for name, start, end, middle, label in zip(groups, starts, ends, middles, labels):
        if start:
            axes.axhline(start - .5, color='white', linewidth=2 if rows <= MAX_ROWS else 1)
        line = dict(color='black', linewidth=.8, transform=transform, clip_on=False)
        axes.plot([1.012, 1.012], [start - .4, end - .6], **line)
        axes.plot([1.012, 1.04], [middle, label], **line)
        axes.text(1.045, label, _short(name), va='center', fontsize=9, transform=transform, parse_math=False)


def _spread(positions: Sequence[float], gap: float, low: float, high: float) -> List[float]:
    """Move ascending positions as little as needed to be a gap apart within [low, high]."""
    steps = gap * np.arange(len(positions))
    up = np.maximum.accumulate(np.maximum(positions, low + gap / 2) - steps)
    last = high - gap / 2 - steps[-1]
    return (np.minimum(up, last) + steps).tolist()


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f'{name[:length - 1]}…'


def _colours() -> Any:
    """The colours of rates in percent."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    return ScalarMappable(Normalize(0, 100), 'viridis')


def _add_colour_bar(figure: Any, axes: Any, colours: Any) -> None:
    figure.colorbar(
        colours, ax=axes, label='images that run the block, %', location='bottom', shrink=.5, aspect=30, pad=.02)


def _figure(height: float, heading: str, title: str) -> Any:
    """A figure with a line that says what it shows, and the title below."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps figures and may need a display
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as e:
        raise ImportError("a plot needs matplotlib: pip install 'timm_aig[train]'") from e
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=.08, h_pad=.06))  # inches
    lines = [heading, *textwrap.wrap(title, 96)]
    figure.suptitle('\n'.join(lines), x=.012, ha='left', fontsize=10.5, linespacing=1.3, parse_math=False)
    return figure


def _save(figure: Any, path: PathLike, pixels: int = PIXELS) -> Path:
    path, drawn = Path(path), io.BytesIO()
    figure.savefig(drawn, format='png', dpi=pixels / figure.get_figwidth())
    picture = Image.open(drawn).convert('RGB')
    write_atomically(path, lambda file: picture.save(file, 'PNG', optimize=True))  # a tenth smaller
    return path
