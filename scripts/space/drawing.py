"""HTML of the page: the image, the answers and what they cost, the network block by block, the curve, the heatmap.

A word or a shape stands beside every colour, and other colours are those of Gradio's theme. Pictures are in the HTML
itself: Gradio's components would write a visitor's images to disk.
"""
import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from network import TURNS, Network, Pass, Run, Stage
from PIL import Image

CSS = """
:focus-visible { outline: 3px solid #0072b2 !important; outline-offset: 2px }
.dark :focus-visible { outline-color: #56b4e9 !important }
.html-container { padding: 0 !important }
.column, .row { gap: .6em !important }
#title h1 { margin: 0; font-size: 1.25em }
#title p { margin: 0; font-size: .85em }
#model .info, #about p { font-size: .85em }
#upload .wrap { font-size: .85em; white-space: pre-line }
#samples div.gallery { gap: 5px }
#samples .gallery-item div { padding: 2px }
#samples img { width: 44px; height: 44px; margin: 0 }
.aig { color: var(--body-text-color); overflow-wrap: break-word }
.aig h3 { margin: 0 0 .3em; font-size: 1em }
.aig p { margin: .2em 0; color: var(--body-text-color-subdued); font-size: .85em }
.aig p.said { color: var(--body-text-color) }
.aig p.problem { color: var(--body-text-color); border-left: 4px solid #d55e00; padding-left: .5em }
.aig img { max-width: 100% }
.aig img.pixels { image-rendering: pixelated }
.aig.images { display: flex; gap: .5em }
.aig figure { margin: 0; width: 92px; min-width: 0; font-size: .75em; line-height: 1.2 }
.aig figure img { width: 92px; height: 92px; object-fit: contain }
.aig dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px .6em; margin: .2em 0; align-items: center }
.aig dt { font-size: .8em }
.aig dd { margin: 0 }
.aig ol { display: flex; flex-wrap: wrap; gap: 3px; list-style: none; margin: 0; padding: 0 }
.aig li { width: 44px; margin: 0; border: 2px solid; border-radius: 4px; text-align: center; font-size: .75em;
  line-height: 1.2 }
.aig li b { position: absolute; clip-path: inset(50%); color: inherit }
.aig li.run { background: #0072b2; border-color: #0072b2; color: #fff }
.aig li.skipped { border-style: dashed; border-color: var(--body-text-color-subdued) }
.aig li.always { border-color: var(--body-text-color-subdued) }
.aig .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
.aig .pair > div > div { display: flex; flex-wrap: wrap; gap: .6em }
.aig .pair img { width: 70px; height: 70px }
.aig .pair dl { grid-template-columns: 1fr; align-content: start }
.aig .pair dt { display: none }
.aig .pair li { width: 14px; height: 14px }
.aig svg { display: block; width: 100%; max-width: 420px; margin: auto; font-size: 11px; fill: currentColor }
.aig polyline { fill: none; stroke: #0072b2; stroke-width: 2 }
.dark .aig polyline { stroke: #56b4e9 }
.aig svg path { stroke: var(--body-text-color-subdued) }
.aig circle { fill: #d55e00 }
.aig .scroll { overflow-x: auto }
.aig table, .aig tr { border: 0 !important }
.aig table { font-size: .75em; border-collapse: separate; border-spacing: 1px }
.aig td { padding: .1em .3em; text-align: center; min-width: 2.3em; border: 0 }
.aig th { padding: .1em .4em; font-weight: 400; border: 0; white-space: nowrap }
.aig th:first-child { position: sticky; left: 0; text-align: left; background: var(--body-background-fill) }
.aig tr.this th:first-child { font-weight: 700 }
.aig tr.this td { outline: 2px solid var(--body-text-color); outline-offset: -1px }
#answers table { font-size: .9em; width: 100%; margin: 0; padding: 0 }
#answers :is(th, td) { padding: .15em .4em; text-align: right; white-space: normal;
  border-bottom: 1px solid var(--border-color-primary) }
#answers :is(th:first-child, td:nth-child(2), th:nth-child(2)) { text-align: left }
@media (max-width: 480px) {
  #title h1 { font-size: 1.1em }
  #title p { display: none }
  #model .info { font-size: .7em }
  #answers table { font-size: .8em }
  #answers :is(th, td) { padding: .1em .2em }
}
"""

# viridis at 0, 0.1, ..., 1 (matplotlib, CC0): its lightness rises evenly, for every kind of colour vision
VIRIDIS = ('#440154', '#482475', '#414487', '#355f8d', '#2a788e', '#21918c', '#22a884', '#44bf70', '#7ad151', '#bddf26',
           '#fde725')
MANY_CLASSES = 50


def draw_images(image: Image.Image, name: str, network: Network) -> str:
    """The image, and what the network sees of it."""
    shown = image.copy()
    shown.thumbnail((448, 224))
    return (
        '<div class="aig images">'
        f'<figure><img src="{_png(shown)}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        f'<figure><img class="pixels" src="{_png(network.crop(image))}" alt="The part that the network sees">'
        f'<figcaption>what it sees: {network.image_kind}</figcaption></figure></div>')


def draw_sample(path: Path) -> str:
    """A sample, for a button."""
    with Image.open(path) as image:
        return f'<img width="56" height="56" src="{_png(image)}" alt="{escape(path.stem[2:])}">'


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format='PNG')
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def draw_answers(network: Network, run: Run, milliseconds: Optional[Sequence[float]] = None) -> str:
    """What each stage answers and what it costs, and whether a second stage was needed."""
    rows = []
    for i, (stage, one) in enumerate(zip(network.stages, run.passes)):
        best = ',<br>'.join(f'{escape(name)} {value:.0%}' for value, name in _two_best(network, one) if value >= .005)
        time = f'{milliseconds[i]:.1f}' if milliseconds else '...'
        cells = best, _count_blocks(stage, one), f'{one.macs / 1e6:.1f} ({_share(network, one.macs):.0%})', time
        rows.append(f'<tr><th scope="row">{stage.title}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    note = f'medians of {TURNS} turns with this image on this computer' if milliseconds else 'being measured'
    return (
        '<section class="aig" aria-label="Answers"><table><thead><tr><th></th><th>answer</th>'
        f'<th>blocks</th><th>MACs, millions</th><th>ms</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'{_second_stage(network, run)}<p>ms: {note}.</p></section>')


def _two_best(network: Network, one: Pass) -> List[Tuple[float, str]]:
    values, classes = one.probabilities.topk(min(2, len(one.probabilities)))
    return [(value, network.classes[index]) for value, index in zip(values.tolist(), classes.tolist())]


def _count_blocks(stage: Stage, one: Pass) -> str:
    ran = len(stage.blocks) - len(stage.gated) + int(one.gates.sum())
    return f'{ran} of {len(stage.blocks)}' if stage.blocks else 'all'


def _share(network: Network, macs: float) -> float:
    """MACs over those of the last stage without its gates."""
    return macs / network.stages[-1].cost.static


def _second_stage(network: Network, run: Run) -> str:
    first, threshold = run.passes[0].sure, network.thresholds[0]
    if run.needed == 1:
        return (f'<p class="said"><b>Second stage: not needed.</b> The first is {first:.1%} sure; the threshold is '
                f'{threshold:.1%}.</p>')
    value, name = _two_best(network, run.passes[run.needed - 1])[0]
    return (f'<p class="said"><b>Second stage: needed.</b> The first is {first:.1%} sure, below the threshold of '
            f'{threshold:.1%}. {run.needed} stages answer {escape(name)}, {value:.0%}, with {_cost(network, run)}.</p>')


def _cost(network: Network, run: Run) -> str:
    """MACs of the stages that a cascade runs."""
    macs = sum(one.macs for one in run.passes[:run.needed])
    return f'{macs / 1e6:.1f} million MACs ({_share(network, macs):.0%})'


def draw_network(network: Network, run: Run) -> str:
    """The blocks of the stages that ran, in order: run, skipped or without a gate, with each gate's probability."""
    drawn = []
    for number, (stage, one) in enumerate(zip(network.stages[:run.needed], run.passes)):
        if stage.gated or number == 0:
            drawn.append(
                f'<h3>{stage.title.capitalize()}: {_count_blocks(stage, one)} blocks run</h3><dl>'
                f'{_draw_blocks(stage, one, labels=True)}</dl>')
        else:
            drawn.append(f'<h3>then {stage.title}: {_count_blocks(stage, one)}</h3>')
    note = ''
    if network.slider:
        note = (f"<p>Number: the gate's probability. A block runs above {run.passes[0].threshold:.3f}, which the "
                'slider sets. Dashed: skipped.</p>')
    return f'<section class="aig" aria-label="The network block by block">{"".join(drawn)}{note}</section>'


def _draw_blocks(stage: Stage, one: Pass, labels: bool) -> str:
    layers: Dict[str, List[str]] = {}
    gates = dict(zip(stage.gated, zip(one.opens, one.gates[0].tolist(), stage.cost.blocks)))
    for name in stage.blocks:
        layer, _, block = name.rpartition('.')
        state, text, hint = 'always', 'no gate', 'has no gate, runs for every image'
        if name in gates:
            probability, ran, macs = gates[name]
            state, text = 'run' if ran else 'skipped', f'{probability:.3f}'
            hint = f'{macs / 1e6:.3g} million MACs {"run" if ran else "saved"}'
        text = f'{escape(block)}<br>{text}' if labels else ''
        layers.setdefault(layer, []).append(
            f'<li class="{state}" title="block {escape(name)}: {hint}"><b>{state}</b>{text}</li>')
    return ''.join(
        f'<dt>{escape(layer)}</dt><dd><ol aria-label="Blocks of {escape(layer)}, in order">{"".join(blocks)}</ol></dd>'
        for layer, blocks in layers.items())


def draw_curve(network: Network, value: Any) -> str:
    """Accuracy against budget, as calibrated, with the present point; what is wrong with a value that was typed."""
    slider = network.slider
    if slider is None:
        return '<section class="aig"><p>The first stage has no gates, so it has no budget.</p></section>'
    now, problem = slider.nearest(value), ''
    if now != value:
        typed = f', not {value:.6g}' if isinstance(value, (int, float)) else ''
        problem = (f'<p class="problem" role="alert">Type a number from {slider.low:g} to {slider.high:g}{typed}. '
                   f'Shown: {now:g}.</p>')
    points = [(point.budget * 100, point.top1) for point in slider.table if point.top1 is not None]
    if len(points) < 2:
        return f'<section class="aig">{problem}<p>No accuracies are stored with this model. scripts/calibrate.py ' \
               'measures them.</p></section>'
    top1 = np.interp(now, *zip(*points))
    images = slider.table[0].images
    low, high = math.floor(min(y for _, y in points)), math.ceil(max(y for _, y in points))

    def at(x: float, y: float) -> Tuple[float, float]:
        return (30 + 285 * (x - points[0][0]) / (points[-1][0] - points[0][0]),
                100 - 90 * (y - low) / max(high - low, 1))

    line = ' '.join(f'{x:.1f},{y:.1f}' for x, y in (at(*point) for point in points))
    x, y = at(now, top1)
    return (
        f'<section class="aig" aria-label="Accuracy against budget">{problem}<svg viewBox="0 0 320 130" role="img" '
        f'aria-label="At a budget of {now:g} % the accuracy is {top1:.1f} %"><path d="M30 8V100H317" fill="none"/>'
        f'<text x="0" y="104">{low}%</text><text x="0" y="14">{high}%</text><text x="30" y="114">{points[0][0]:g}%'
        f'</text><text x="317" y="114" text-anchor="end">{points[-1][0]:g}%</text><polyline points="{line}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/><text x="174" y="127" text-anchor="middle">budget {now:g}%: '
        f'{top1:.1f}% of {images} held-out images right</text></svg></section>')


def draw_pair(network: Network, pair: Sequence[Tuple[str, Image.Image, Run]]) -> str:
    """Images side by side, with their blocks and whether a second stage was needed."""
    if not pair:
        return ''
    drawn = []
    for title, image, run in pair:
        answers = []
        for stage, one in zip(network.stages[:run.needed], run.passes):
            value, name = _two_best(network, one)[0]
            answers.append(f'{stage.title}: {escape(name)}, {value:.0%} sure')
        word = 'needed' if run.needed > 1 else 'not needed'
        maps = [f'<dl>{_draw_blocks(stage, one, labels=False)}</dl>'
                for stage, one in zip(network.stages[:run.needed], run.passes)]
        drawn.append(
            f'<div><div><img class="pixels" src="{_png(image)}" alt="{escape(title)}">{"".join(maps)}</div>'
            f'<p class="said">{". ".join(answers)}. <b>Second stage {word}.</b> {_cost(network, run)}.</p></div>')
    return (f'<section class="aig" aria-label="An easy and a hard image"><h3>An easy and a hard image</h3>'
            f'<div class="pair">{"".join(drawn)}</div></section>')


def draw_heatmap(network: Network, run: Run) -> str:
    """Execution rates by class: a table with the predicted class marked, else a picture, else why there is none."""
    if isinstance(network.rates, list):
        order = run.passes[0].probabilities.argsort(descending=True).tolist()
        content = _heat_table(network, network.rates, order)
    elif network.rates:
        content = f'<img src="{_png(network.rates)}" alt="Heatmap of execution rates by class and block">' \
                  '<p>The picture that was published with this model.</p>'
    else:
        content = '<p>No execution rates come with this model. scripts/analyze.py measures them over a data set; put ' \
                  'its rates.csv or execution_rates.png beside the model.</p>'
    return (f'<section class="aig" aria-label="Heatmap by class"><h3>How often each block runs for images of each class'
            f'</h3>{content}</section>')


def _heat_table(network: Network, rates: Sequence[Sequence[float]], order: Sequence[int]) -> str:
    shown = range(len(rates)) if len(rates) <= MANY_CLASSES else order[:10]
    head = ''.join(f'<th scope="col">{escape(name.removeprefix("layer"))}</th>' for name in network.stages[0].gated)
    rows = ''.join(
        f'<tr{" class=this" if i == order[0] else ""}><th scope="row">{"▸ " if i == order[0] else ""}'
        f'{escape(network.classes[i])}</th>{"".join(map(_cell, rates[i]))}</tr>' for i in shown)
    which = '' if len(rates) <= MANY_CLASSES else f' Of {len(rates)} classes, the 10 most probable are shown.'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table of execution rates"><table>'
        f'<thead><tr><th scope="col">class</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p>Columns: blocks, as stage.block. Numbers: percent of the test images that run the block, measured with the '
        f'gates as they were saved; the slider does not change them. ▸ marks the predicted class.{which}</p>')


def _cell(rate: float) -> str:
    if rate != rate:
        return '<td>-</td>'
    step = round(rate * (len(VIRIDIS) - 1))
    text = '#fff' if step < len(VIRIDIS) // 2 else '#000'
    return f'<td style="background:{VIRIDIS[step]};color:{text}">{rate * 100:.0f}</td>'
