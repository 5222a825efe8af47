"""HTML of the page: fills in the macros of parts.html.

Pictures are in the HTML itself: Gradio's components would write a visitor's images to disk.
"""
import base64
import io
import math
from pathlib import Path
from typing import Any, Optional, Sequence, Tuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from network import TURNS, Network, Run
from PIL import Image

# viridis at 0, 0.1, ..., 1 (matplotlib, CC0): its lightness rises evenly, for every kind of colour vision
VIRIDIS = ('#440154', '#482475', '#414487', '#355f8d', '#2a788e', '#21918c', '#22a884', '#44bf70', '#7ad151', '#bddf26',
           '#fde725')
MANY_CLASSES = 50


def png(image: Image.Image) -> str:
    """An image as the address of itself."""
    file = io.BytesIO()
    image.save(file, format='PNG')
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
templates.filters.update(png=png, percent=lambda value, digits=0: f'{value:.{digits}%}')
templates.globals.update(zip=zip)
parts: Any = templates.get_template('parts.html').module


def draw_images(image: Image.Image, title: str, network: Network) -> str:
    """The image, and what the network sees of it."""
    shown = image.copy()
    shown.thumbnail((448, 224))
    return parts.images(network, image, shown, title)


def draw_sample(path: Path) -> str:
    """A sample, for a button."""
    with Image.open(path) as image:
        return parts.sample(image, path.stem[2:])


def draw_answers(network: Network, run: Run, milliseconds: Optional[Sequence[float]] = None) -> str:
    """What each stage answers and what it costs, and whether a second stage was needed."""
    return parts.answers(network, run, milliseconds, TURNS)


def draw_network(network: Network, run: Run) -> str:
    """The blocks of the stages that ran, in order: run, skipped or without a gate, with each gate's probability."""
    return parts.network(network, run)


def draw_curve(network: Network, value: Any) -> str:
    """Accuracy against budget, as calibrated, with the present point; what is wrong with a value that was typed."""
    slider = network.slider
    if slider is None:
        return parts.curve(None, '', None)
    now, problem = slider.nearest(value), ''
    if now != value:
        typed = f', not {value:.6g}' if isinstance(value, (int, float)) else ''
        problem = f'Type a number from {slider.low:g} to {slider.high:g}{typed}. Shown: {now:g}.'
    points = [(point.budget * 100, point.top1) for point in slider.table if point.top1 is not None]
    if len(points) < 2:
        return parts.curve(slider, problem, None)
    (first, last), top1s = (points[0][0], points[-1][0]), [top1 for _, top1 in points]
    low, high = math.floor(min(top1s)), math.ceil(max(top1s))

    def at(budget: float, top1: float) -> Tuple[str, str]:
        """Coordinates in the drawing."""
        x, y = (budget - first) / (last - first), (top1 - low) / max(high - low, 1)
        return f'{30 + 285 * x:.1f}', f'{100 - 90 * y:.1f}'

    top1 = np.interp(now, *zip(*points))
    x, y = at(now, top1)
    return parts.curve(slider, problem, dict(
        now=f'{now:g}', top1=top1, low=low, high=high, first=f'{first:g}', last=f'{last:g}', x=x, y=y,
        line=' '.join(','.join(at(*point)) for point in points), images=slider.table[0].images))


def draw_pair(network: Network, pair: Sequence[Tuple[str, Image.Image, Run]]) -> str:
    """Images side by side, with their blocks and whether a second stage was needed."""
    return parts.pair(network, pair) if pair else ''


def draw_heatmap(network: Network, run: Run) -> str:
    """Execution rates by class: a table with the predicted class marked, else a picture, else why there is none."""
    classes = []
    if isinstance(network.rates, list):
        order = run.passes[0].probabilities.argsort(descending=True).tolist()
        shown = range(len(order)) if len(order) <= MANY_CLASSES else order[:10]
        classes = [(i, i == order[0]) for i in shown]
    return parts.heatmap(network, classes, VIRIDIS)
