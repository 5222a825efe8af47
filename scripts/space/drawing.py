"""HTML and Markdown of the page: the image, the network block by block, the cost, the heatmap by class.

A word or a shape stands beside every colour, and other colours are those of Gradio's theme. Pictures are in the HTML
itself: Gradio's components would write a visitor's images to disk.
"""
import base64
import io
from html import escape
from pathlib import Path
from typing import Dict, List, Optional, Sequence

from network import Network, Run, Timing
from PIL import Image

__all__ = ['CSS', 'draw_cost', 'draw_heatmap', 'draw_images', 'draw_network', 'draw_sample']

CSS = """
:focus-visible { outline: 3px solid #0072b2 !important; outline-offset: 2px }
.dark :focus-visible { outline-color: #56b4e9 !important }
.html-container { padding: 0 !important }
#cost th, #cost td { padding: .3em .6em; overflow-wrap: normal; word-break: normal; font-size: .95em }
#cost :is(th, td):not(:first-child) { text-align: right }
.aig { color: var(--body-text-color); overflow-wrap: break-word }
.aig h3 { margin: 0 0 .4em; font-size: 1.05em }
.aig p { margin: .3em 0; color: var(--body-text-color-subdued); font-size: .9em }
.aig img { max-width: 100% }
.aig img.pixels { image-rendering: pixelated }
.aig.images { display: flex; gap: 1em; flex-wrap: wrap }
.aig figure { margin: 0; max-width: 150px; font-size: .85em }
.aig figure img { height: 112px; object-fit: contain }
.aig ol { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: .2em 0 .6em; padding: 0 }
.aig li { width: 84px; margin: 0; padding: 2px 0; border: 2px solid; border-radius: 5px; text-align: center;
  font-size: .8em; line-height: 1.35 }
.aig li b { color: inherit }
.aig li.run { background: #0072b2; border-color: #0072b2; color: #fff }
.aig li.skipped { border-style: dashed; border-color: var(--body-text-color-subdued) }
.aig li.always { border-color: var(--body-text-color-subdued) }
.aig meter { display: block; width: 64px; height: 9px; margin: 2px auto }
.aig meter::-webkit-meter-optimum-value { background: #56b4e9 }
.aig meter::-moz-meter-bar { background: #56b4e9 }
.aig .scroll { overflow-x: auto }
.aig table, .aig tr { border: 0 !important }
.aig table { font-size: .8em; border-collapse: separate; border-spacing: 1px }
.aig td { padding: .2em .3em; text-align: center; min-width: 2.3em; border: 0 }
.aig th { padding: .2em .4em; font-weight: 400; border: 0; white-space: nowrap }
.aig th:first-child { position: sticky; left: 0; text-align: left; background: var(--body-background-fill) }
.aig tr.this th:first-child { font-weight: 700 }
.aig tr.this td { outline: 2px solid var(--body-text-color); outline-offset: -1px }
@media (max-width: 480px) { #cost th, #cost td { padding: .2em .3em; font-size: .85em } }
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
        f'<figcaption>what the network sees: {network.image_kind}</figcaption></figure></div>')


def draw_sample(path: Path) -> str:
    """A sample, for a button."""
    with Image.open(path) as image:
        return f'<img width="56" height="56" src="{_png(image)}" alt="{escape(path.stem[2:])}">'


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format='PNG')
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def draw_network(network: Network, run: Run) -> str:
    """All blocks in order: run, skipped or without a gate, with the probability of each gate."""
    stages: Dict[str, List[str]] = {}
    gates = dict(zip(network.gated, zip(run.opens, run.gates[0].tolist(), network.cost.blocks)))
    for name in network.blocks:
        stage, _, block = name.rpartition('.')
        state, text, hint = 'always', 'no gate', 'has no gate, runs for every image'
        if name in gates:
            probability, ran, macs = gates[name]
            state = 'run' if ran else 'skipped'
            text = f'{probability:.3f}<meter value="{probability:.3f}" aria-hidden="true"></meter>'
            hint = f'{macs / 1e6:.3g} million MACs {"run" if ran else "saved"}'
        stages.setdefault(stage, []).append(
            f'<li class="{state}" title="block {escape(name)}: {hint}">{escape(block)} <b>{state}</b><br>{text}</li>')
    drawn = ''.join(
        f'<b>{escape(stage)}</b><ol aria-label="Blocks of {escape(stage)}, in order">{"".join(blocks)}</ol>'
        for stage, blocks in stages.items())
    return (
        f'<section class="aig" aria-label="The network block by block"><h3>{int(run.gates.sum())} of '
        f'{len(network.gated)} gated blocks run for this image</h3><p>In each block: the probability that its gate '
        f'gives. The block runs where it is above {run.threshold:.3f}, which the slider sets; else the image takes '
        f'the shortcut past it.</p>{drawn}</section>')


def draw_cost(network: Network, run: Run, timing: Optional[Timing] = None) -> str:
    """Markdown table of the MACs and the time of this image, beside those of the static parent."""
    macs = network.cost.executed(run.gates).item()
    share = macs / network.cost.static
    time, note = 'measuring | |', 'Both models are being timed on this image.'
    if timing is not None:
        low, ratio, high = timing.ratios
        time = f'{timing.adaptive:.2f} | {timing.parent:.2f} | {ratio:.0%}'
        note = (f'Time and its ratio: medians of {timing.turns} turns with this image alone, both models optimized for '
                f'inference, on this computer, which may have other work to do. Half of the turns gave a ratio from '
                f'{low:.0%} to {high:.0%}. ')
        if high > 1.3 * low:
            note += 'This is a wide range, so the timing says little.'
        elif low > 1:
            note += 'Here the gates take more time than the skipped blocks save.'
        elif low > share:
            note += 'Less time is saved than MACs: the gates take some of it.'
    return (
        '### Cost of this image\n\n| | adaptive | static parent | ratio |\n|:--|--:|--:|--:|\n'
        f'| gated blocks run | {int(run.gates.sum())} | {len(network.gated)} | |\n'
        f'| MACs, millions | {macs / 1e6:.1f} | {network.cost.static / 1e6:.1f} | {share:.0%} |\n'
        f'| milliseconds | {time} |\n\n{note}')


def draw_heatmap(network: Network, run: Run) -> str:
    """Execution rates by class: a table with the predicted class marked, else a picture, else why there is none."""
    if network.rates is not None:
        content = _heat_table(network, network.rates, run.probabilities.argsort(descending=True).tolist())
    elif network.picture is not None:
        content = f'<img src="{_png(network.picture)}" alt="Heatmap of execution rates by class and block">' \
                  '<p>The picture that was published with this model.</p>'
    else:
        content = '<p>No execution rates come with this model. scripts/analyze.py measures them over a data set; put ' \
                  'its rates.csv or execution_rates.png beside the model.</p>'
    return (f'<section class="aig" aria-label="Heatmap by class"><h3>How often each block runs for images of each class'
            f'</h3>{content}</section>')


def _heat_table(network: Network, rates: Sequence[Sequence[float]], order: Sequence[int]) -> str:
    shown = range(len(rates)) if len(rates) <= MANY_CLASSES else order[:10]
    head = ''.join(f'<th scope="col">{escape(name.removeprefix("layer"))}</th>' for name in network.gated)
    rows = ''.join(
        f'<tr{" class=this" if i == order[0] else ""}><th scope="row">{"▸ " if i == order[0] else ""}'
        f'{escape(network.class_name(i))}</th>{"".join(map(_cell, rates[i]))}</tr>' for i in shown)
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
