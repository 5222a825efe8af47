#!/usr/bin/env python3
"""A page that shows which blocks of an adaptive model run for an image, at any budget, and what that saves.

Choose a model, drop an image, move the slider. On a Hugging Face Space, where scripts/push_space.py puts it, this file
is app.py. Models from the Hub are all that it fetches from elsewhere.
"""
import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

# Before torch, huggingface_hub and gradio are imported.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads that spin while they wait would disturb the timing
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
if 'SPACE_ID' in os.environ:
    os.environ.setdefault('HF_HUB_DISABLE_IMPLICIT_TOKEN', '1')  # visitors load what is public, not what its owner may

try:
    import gradio as gr
except ImportError:
    sys.exit("app.py: the page needs gradio: pip install 'timm_aig[space]'")
from drawing import CSS, draw_cost, draw_heatmap, draw_images, draw_message, draw_network, draw_sample
from images import MAX_BYTES, UploadError, read_image
from network import DEFAULT_MODEL, ON_A_SPACE, ModelError, Network, Run, load_network, shipped_models
from PIL import Image

EXAMPLES = """examples:
  scripts/space/app.py
  scripts/space/app.py --model local-dir:output/finetune/t06 --port 8000

exit code: 0 stopped, 2 bad input"""

SAMPLES = sorted((Path(__file__).resolve().parent / 'examples').glob('*.png'))
TITLE = 'Adaptive ResNets, block by block'
INTRO = f"""# {TITLE}
Before each block of the network a small gate looks at the image and decides whether the block runs
([ConvNet-AIG](https://arxiv.org/abs/1711.11503) for [timm](https://github.com/huggingface/pytorch-image-models)).
Choose a model, drop an image, move the budget."""


@dataclass
class Session:
    """What one tab shows.

    Args:
        model: Name of its model.
        image: Its image, mode L or RGB.
        title: What the image is called.
        shown: Network, input and answers on the page now. A new object for each: time_it stops when it is replaced.
        pictured: The title and the model that the pictures on the page are of.
    """
    model: str
    image: Image.Image
    title: str
    shown: Optional[Tuple[Network, Any, Run]] = None
    pictured: Tuple[Any, ...] = ()


def describe(network: Network) -> str:
    """What a person should know of a model before they show it an image."""
    channels, height, width = network.input_size
    names = [network.class_name(i) for i in range(network.model.num_classes)]
    classes = ', '.join(names if len(names) <= 20 else [*names[:5], '...'])
    hint = ' It was trained on light clothes on a black ground.' if '.fmnist_' in network.name else ''
    return (f'{len(network.gated)} of its {len(network.blocks)} blocks have a gate. Images: {width} x {height} pixels, '
            f'{"grey" if channels == 1 else "RGB"}. {len(names)} classes: {classes}.{hint}')


def budget_slider(network: Network) -> Any:
    """The slider for a model, or its update."""
    setting = network.slider
    label, info = 'Gate offset', (
        'This model has no calibrated budgets: this moves the threshold of all its gates; below 0 fewer blocks run.')
    if setting.calibrated:
        label, info = 'Budget: percent of the static parent\'s MACs', (
            'In the mean over images like those it was calibrated on; a single image takes more or less.')
    return gr.Slider(setting.low, setting.high, setting.value, step=setting.step, label=label, info=info)


def choose_model(name: str, session: Session) -> Tuple[Any, ...]:
    """Load the model that was asked for, or say why not and keep the one before."""
    try:
        network = load_network(name)
    except ModelError as e:
        return session.model, gr.skip(), gr.skip(), draw_message(f'Model: {e}')
    session.model = network.name
    return network.name, budget_slider(network), describe(network), ''


def upload(path: str, session: Session) -> Tuple[Any, ...]:
    """Read an uploaded file, or say why not and keep the image before. The file itself is not kept."""
    title = Path(path).name
    try:
        session.image, notes = read_image(path)
    except UploadError as e:
        return None, draw_message(f'{title}: {e}')
    finally:
        Path(path).unlink(missing_ok=True)
    session.title = title
    return None, draw_message(' '.join(notes), problem=False)


def pick(index: int, session: Session) -> str:
    """Take one of the samples."""
    session.image, session.title = read_image(SAMPLES[index])[0], sample_title(SAMPLES[index])
    return ''


def sample_title(path: Path) -> str:
    return f'sample: {path.stem[2:].replace("_", " ")}'


def show(budget: float, session: Session) -> Tuple[Any, ...]:
    """Everything about the image at a budget but the time."""
    network = load_network(session.model)
    x = network.tensor(session.image)
    run = network.run(x, budget)
    session.shown = network, x, run
    values, classes = run.probabilities.topk(min(5, len(run.probabilities)))
    labels: Dict[str, float] = {}
    for value, index in zip(values.tolist(), classes.tolist()):
        labels.setdefault(network.class_name(index), value)
    images, pictured = gr.skip(), (session.title, session.image, network)
    if session.pictured != pictured:  # a moved slider does not send them again
        images, session.pictured = draw_images(session.image, session.title, network), pictured
    return images, labels, draw_network(network, run), draw_cost(network, run), draw_heatmap(network, run)


def time_it(session: Session) -> Any:
    """The cost with the time, or nothing if the page has moved on meanwhile."""
    shown = session.shown
    if shown is None:
        return gr.skip()
    network, x, run = shown
    timing = network.measure(x, run.gates, wanted=lambda: session.shown is shown)
    return gr.skip() if timing is None else draw_cost(network, run, timing)


def make_page(first: Network) -> gr.Blocks:
    """The page, with a model and a sample to begin with."""
    places = 'hf-hub:user/name' if ON_A_SPACE else 'hf-hub:user/name or local-dir:folder'
    names = list(dict.fromkeys([first.name, *shipped_models()]))
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        session = gr.State(Session(first.name, read_image(SAMPLES[0])[0], sample_title(SAMPLES[0])), time_to_live=3600)
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                model = gr.Dropdown(
                    names, value=first.name, label='Model', allow_custom_value=True, elem_id='model',
                    info=f'Pick one, or type {places} and press Enter.')
                about = gr.Markdown(describe(first), elem_id='about')
                file = gr.File(label='Image', height=140, elem_id='upload')
                samples = gr.Dataset(
                    components=[gr.HTML(visible=False)], samples=[[draw_sample(path)] for path in SAMPLES],
                    type='index', label='Or a sample, from the test set of Fashion-MNIST', elem_id='samples')
                message = gr.HTML(elem_id='message')
                images = gr.HTML(elem_id='images')
                classes = gr.Label(label='Classes', elem_id='classes')
            with gr.Column(scale=3, min_width=280):
                budget = budget_slider(first)
                network = gr.HTML(elem_id='network')
                cost = gr.HTML(elem_id='cost')
        heatmap = gr.HTML(elem_id='heatmap')

        options: Dict[str, Any] = dict(show_progress='hidden', api_visibility='private', concurrency_limit=8)
        shown: Dict[str, Any] = dict(
            options, fn=show, inputs=[budget, session], outputs=[images, classes, network, cost, heatmap])
        timed: Dict[str, Any] = dict(options, fn=time_it, inputs=session, outputs=cost)
        asked: Dict[str, Any] = dict(options, show_progress='minimal')
        page.load(**shown).then(**timed)
        budget.input(**shown, trigger_mode='always_last').then(**timed)
        for event in (
                model.input(choose_model, [model, session], [model, budget, about, message], **asked),
                file.upload(upload, [file, session], [file, message], **asked),
                samples.click(pick, [samples, session], message, **asked)):
            event.then(**shown).then(**timed)
    return page


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--model', default=DEFAULT_MODEL, help='to begin with: a shipped one, hf-hub:user/name or '
        'local-dir:folder (default: %(default)s)')
    parser.add_argument('--port', type=int, help='of http://127.0.0.1 (default: from 7860 the first that is free)')
    args = parser.parse_args(argv)
    try:
        first = load_network(args.model)
    except ModelError as e:
        print(f'error: --model: {e}', file=sys.stderr)
        return 2
    # Gradio's own fonts would come from Google, and its lighter greys are hard to read.
    theme = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']).set(
        body_text_color_subdued='*neutral_600', block_info_text_color='*neutral_600',
        body_text_color_subdued_dark='*neutral_300', block_info_text_color_dark='*neutral_300')
    make_page(first).queue(max_size=64).launch(
        server_port=args.port, max_file_size=MAX_BYTES, theme=theme, css=CSS, footer_links=['settings'],
        ssr_mode=False, show_error=False)
    return 0


if __name__ == '__main__':
    sys.exit(main())
