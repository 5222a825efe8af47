"""HTML of scripts/space/app.py: the network block by block, its cost, the class heatmap. No scripts, nothing loaded.

Every colour has a word or a shape beside it; the rest of the page's colours are variables of Gradio's theme.
"""
import base64
import io
from html import escape
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from network import Network, Run, Timing
from PIL import Image

__all__ = ['CSS', 'draw_cost', 'draw_heatmap', 'draw_images', 'draw_message', 'draw_network', 'draw_sample']

CSS = """
:focus-visible { outline: 3px solid #0072b2 !important; outline-offset: 2px }
.dark :focus-visible { outline-color: #56b4e9 !important }
.html-container { padding: 0 !important }
#message:not(:has(.aig)) { display: none }
.aig { color: var(--body-text-color); overflow-wrap: break-word }
.aig h3 { margin: 0 0 .4em; font-size: 1.05em }
.aig p { margin: .3em 0 }
.aig .note { color: var(--body-text-color-subdued); font-size: .9em }
.aig table, .aig tr { border: 0 !important }
.aig table { border-collapse: collapse; margin: 0 }
.aig th, .aig td { padding: .25em .6em; text-align: right; border: 0 !important; white-space: nowrap }
.aig th:first-child { text-align: left; font-weight: 600; padding-left: 0;
  white-space: normal }
.aig tbody tr { border-top: 1px solid var(--border-color-primary) !important }
.aig-message { border-left: 4px solid #d55e00; padding: .5em .8em; background: var(--block-background-fill);
  border-radius: 4px }
.aig-message.note { border-color: #0072b2 }
section.aig img { max-width: 100% }
.aig-images { display: flex; gap: 1em; flex-wrap: wrap }
.aig-images figure { margin: 0; max-width: 150px }
.aig-images img { height: 112px; max-width: 100%; border: 1px solid var(--border-color-primary); object-fit: contain }
.aig-images img.pixels { image-rendering: pixelated }
.aig-images figcaption { font-size: .85em; color: var(--body-text-color-subdued) }
.aig-stage { margin: .5em 0 0 }
.aig-stage > b { font-size: .9em }
.aig-stage ol { display: flex; flex-wrap: wrap; gap: 6px 0; list-style: none; margin: .2em 0 0; padding: 0 }
.aig-stage li { width: 88px; margin: 0; text-align: center; font-size: .8em; line-height: 1.35 }
.aig-stage svg { display: block; width: 88px; height: 38px }
.aig-stage .wire { stroke: var(--body-text-color-subdued); stroke-width: 2; fill: none }
.aig-stage .run rect { fill: #0072b2; stroke: #0072b2 }
.aig-stage .always rect { fill: var(--body-text-color-subdued); stroke: var(--body-text-color-subdued) }
.aig-stage .skipped rect { fill: none; stroke: var(--body-text-color-subdued); stroke-dasharray: 4 3 }
.aig-stage text { font: 600 11px system-ui, sans-serif; text-anchor: middle; fill: #fff }
.aig-stage .always text { fill: var(--background-fill-primary) }
.aig-stage .skipped text { fill: var(--body-text-color) }
.aig-stage .meter { display: block; position: relative; height: 5px; margin: 2px 10px 0; border-radius: 3px;
  background: var(--border-color-primary) }
.aig-stage .meter i { position: absolute; inset: 0 auto 0 0; border-radius: 3px; background: #56b4e9 }
.aig-stage .skipped .meter i { background: var(--body-text-color-subdued) }
.aig-stage .meter s { position: absolute; top: -3px; height: 11px; width: 2px; background: var(--body-text-color) }
.aig-scroll { overflow-x: auto; max-width: 100% }
.aig table.heat { font-size: .8em; border-collapse: separate; border-spacing: 1px }
.aig table.heat td { padding: .2em .3em; text-align: center; min-width: 2.3em }
.aig table.heat th { padding: .2em .4em; font-weight: 400 }
.aig table.heat thead th { vertical-align: bottom; text-align: center }
.aig table.heat th:first-child { position: sticky; left: 0; background: var(--body-background-fill) }
.aig table.heat tr.this th:first-child { font-weight: 700 }
.aig table.heat tr.this td { outline: 2px solid var(--body-text-color); outline-offset: -1px }
@media (max-width: 480px) { .aig th, .aig td { padding: .25em .35em; font-size: .9em } }
"""

# viridis at 0, 0.1, ..., 1 (matplotlib, CC0): its lightness rises evenly, for every kind of colour vision
VIRIDIS = ('#440154', '#482475', '#414487', '#355f8d', '#2a788e', '#21918c', '#22a884', '#44bf70', '#7ad151', '#bddf26',
           '#fde725')
MANY_CLASSES = 50


def draw_message(text: str, problem: bool = True) -> str:
    """A sentence about what the person just did; read out by screen readers. Nothing for an empty one."""
    if not text:
        return ''
    role, kind = ('alert', '') if problem else ('status', ' note')
    return f'<div class="aig aig-message{kind}" role="{role}">{escape(text)}</div>'


def draw_images(image: Image.Image, name: str, network: Network) -> str:
    """The image, and what the network sees of it."""
    shown = image.copy()
    shown.thumbnail((448, 224))
    seen = network.crop(image)
    channels, height, width = network.input_size
    what = f'{width} x {height} pixels, {"grey" if channels == 1 else "RGB"}'
    return (
        '<div class="aig aig-images">'
        f'<figure><img src="{_png(shown)}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        f'<figure><img class="pixels" src="{_png(seen)}" alt="The part of it that the network sees, {what}">'
        f'<figcaption>what the network sees: {what}</figcaption></figure></div>')


def draw_sample(path: Path) -> str:
    """A sample's picture, for a button."""
    with Image.open(path) as image:
        return f'<img class="pixels" width="56" height="56" src="{_png(image)}" alt="{escape(path.stem[2:])}">'


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format='PNG')
    return f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'


def draw_network(network: Network, run: Run) -> str:
    """All blocks in order: run, skipped or without a gate, and each gate's probability."""
    stages: Dict[str, List[str]] = {}
    open_by_name = dict(zip(network.gated, zip(run.opens, run.gates[0].tolist(), network.cost.blocks)))
    for name in network.blocks:
        stage, _, block = name.rpartition('.')
        stages.setdefault(stage, []).append(_block(block, open_by_name.get(name), run.threshold))
    drawn = ''.join(
        f'<div class="aig-stage"><b>{escape(stage)}</b><ol aria-label="Blocks of {escape(stage)}, in order">'
        f'{"".join(blocks)}</ol></div>' for stage, blocks in stages.items())
    return (
        f'<section class="aig" aria-label="The network block by block"><h3>{int(run.gates.sum())} of '
        f'{len(network.gated)} gated blocks run for this image</h3>'
        f'<p class="note">Below each block: its gate\'s probability of open. The block runs where that is above '
        f'{_probability(run.threshold)}, which the budget sets (the mark on the bar); else the image takes the '
        f'shortcut past it.</p>{drawn}</section>')


def _block(name: str, gate: Optional[Tuple[float, float, int]], threshold: float) -> str:
    if gate is None:
        state, text, meter, hint = 'always', 'no gate', '', 'has no gate, runs for every image'
    else:
        probability, ran, macs = gate
        state, sign = ('run', '&gt;') if ran else ('skipped', '&le;')
        text = f'{_probability(probability)} {sign} {_probability(threshold)}'
        meter = (f'<span class="meter" aria-hidden="true"><i style="width:{probability:.1%}"></i>'
                 f'<s style="left:calc({threshold:.1%} - 1px)"></s></span>')
        hint = f'{macs / 1e6:.3g} million MACs {"run" if ran else "saved"}'
    wire = 'M0 24 H12 Q16 24 16 18 T22 6 H70 Q76 6 76 16 T80 24 H92' if state == 'skipped' else 'M0 24 H22 M70 24 H92'
    return (
        f'<li class="{state}" title="block {escape(name)}: {hint}"><svg viewBox="0 0 92 40" aria-hidden="true">'
        f'<path class="wire" d="{wire}"/><rect x="22" y="11" width="48" height="26" rx="4"/>'
        f'<text x="46" y="28">{escape(name)}</text></svg>'
        f'<b>{state}</b><br>{text}{meter}</li>')


def _probability(value: float) -> str:
    return f'{value:.3f}'


def draw_cost(network: Network, run: Run, timing: Optional[Timing] = None) -> str:
    """MACs and time of this image, and those of the static parent."""
    macs = network.cost.executed(run.gates).item()
    share = macs / network.cost.static
    rows = [('gated blocks run', f'{int(run.gates.sum())}', f'{len(network.gated)}', ''),
            ('MACs, millions', f'{macs / 1e6:.1f}', f'{network.cost.static / 1e6:.1f}', f'{share:.0%}')]
    if timing is None:
        rows.append(('milliseconds', 'measuring', '', ''))
        note = 'Both are being timed on this image.'
    else:
        ratio = f'{timing.adaptive / timing.parent:.0%}'
        rows.append(('milliseconds', f'{timing.adaptive:.2f}', f'{timing.parent:.2f}', ratio))
        note = (f'Time: medians of {timing.passes} passes of this image alone, both models optimised the same way and '
                f'timed in turns on this computer, which may have other work to do; half of the turns gave a ratio '
                f'between {timing.quartiles[0]:.0%} and {timing.quartiles[1]:.0%}. ')
        if timing.quartiles[1] > 1.3 * timing.quartiles[0]:
            note += 'That is a wide range, so this timing says little.'
        elif timing.quartiles[0] > 1:
            note += 'Here the gates take more time than the skipped blocks save.'
        elif timing.quartiles[0] > share:
            note += 'Less time is saved than MACs: the gates take some of it.'
    body = ''.join(
        f'<tr><th scope="row">{name}</th><td>{a}</td><td>{b}</td><td>{c}</td></tr>' for name, a, b, c in rows)
    return (
        '<section class="aig" aria-label="Cost of this image"><h3>Cost of this image in the network and in its static '
        'parent</h3><div class="aig-scroll"><table><thead>'
        '<tr><th></th><th scope="col">adaptive</th><th scope="col">parent</th><th scope="col">ratio</th>'
        f'</tr></thead><tbody>{body}</tbody></table></div><p class="note">{note}</p></section>')


def draw_heatmap(network: Network, run: Run) -> str:
    """Execution rates by class: a table with the predicted class marked, else a picture, else why there is none."""
    if network.rates is not None:
        content = _heat_table(network, network.rates, run.probabilities.argsort(descending=True).tolist())
    elif network.picture is not None:
        content = f'<img src="{_png(network.picture)}" alt="Heatmap of execution rates by class and block">' \
                  '<p class="note">The picture that was published with this model.</p>'
    else:
        content = '<p class="note">No execution rates come with this model: they are measured over a data set, which ' \
                  'this page does not have. A model\'s folder or repository gives them as rates.csv ' \
                  '(scripts/analyze.py) or execution_rates.png.</p>'
    return (f'<section class="aig" aria-label="Class heatmap"><h3>How often each block runs for images of each class'
            f'</h3>{content}</section>')


def _heat_table(network: Network, rates: Sequence[Sequence[float]], order: Sequence[int]) -> str:
    shown = range(len(rates)) if len(rates) <= MANY_CLASSES else order[:10]
    head = ''.join(f'<th scope="col">{escape(name.removeprefix("layer"))}</th>' for name in network.gated)
    rows = ''.join(
        f'<tr{" class=this" if i == order[0] else ""}><th scope="row">{"▸ " if i == order[0] else ""}'
        f'{escape(network.class_name(i))}</th>{"".join(map(_cell, rates[i]))}</tr>' for i in shown)
    which = '' if len(rates) <= MANY_CLASSES else f' Of {len(rates)} classes, the 10 this image is most taken for.'
    return (
        '<div class="aig-scroll" tabindex="0" role="region" aria-label="Table of execution rates"><table class="heat">'
        f'<thead><tr><th scope="col">class</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="note">Columns: blocks, as stage.block. Numbers: percent of the images that run it, over a data set, '
        'measured beforehand with the gates as they were saved; the slider does not change them.'
        f' ▸ marks what this image is taken for.{which}</p>')


def _cell(rate: float) -> str:
    if rate != rate:
        return '<td>-</td>'
    step = round(rate * (len(VIRIDIS) - 1))
    text = '#fff' if step < len(VIRIDIS) // 2 else '#000'
    return f'<td style="background:{VIRIDIS[step]};color:{text}">{rate * 100:.0f}</td>'
