#!/usr/bin/env python3
"""A page that shows which blocks of an adaptive model run for an image, at any budget, and what that saves.

Choose a model, drop an image, move the slider. On a Hugging Face Space, where scripts/push_space.py puts it, this file
is app.py. The page loads models from the Hub and nothing else from the network.
"""
import argparse
import os
import sys
from typing import List, Optional

DEFAULT_MODEL = 'cifar_resnet32_aig.fmnist_t06'  # trained on the data set of the samples
EXAMPLES = """examples:
  scripts/space/app.py
  scripts/space/app.py --model local-dir:output/finetune/t06 --port 8000

exit code: 0 stopped, 2 bad input"""


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--model', default=DEFAULT_MODEL,
        help='first model: a shipped one, hf-hub:user/name or local-dir:folder (default: %(default)s)')
    parser.add_argument('--port', type=int, help='port on 127.0.0.1 (default: the first free one from 7860)')
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f'--port must be from 1 to 65535, not {args.port}.')
    return args


if __name__ == '__main__':
    parse_args()  # --help and wrong flags end here, before the slow imports

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads that spin while they wait would disturb the timing
os.environ.setdefault('GRADIO_ANALYTICS_ENABLED', 'False')
if 'SPACE_ID' in os.environ:
    os.environ.setdefault('HF_HUB_DISABLE_IMPLICIT_TOKEN', '1')  # visitors load what is public, not what its owner may

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Dict, Tuple

try:
    import gradio as gr
except ImportError:
    print("error: the page needs gradio: pip install 'timm_aig[space]'", file=sys.stderr)
    sys.exit(2)
from drawing import draw_answers, draw_curve, draw_heatmap, draw_images, draw_network, draw_pair, draw_sample
from images import MAX_BYTES, UploadError, read_image
from loading import CASCADE, ON_A_SPACE, load_network, shipped_models
from network import ModelError, Network, Run
from PIL import Image

SAMPLES = sorted((Path(__file__).resolve().parent / 'examples').glob('*.png'))  # grey images of Fashion-MNIST
TITLE = 'Adaptive networks, block by block'
INTRO = f"""# {TITLE}
Before each block a small gate decides for each image whether the block runs:
[ConvNet-AIG](https://arxiv.org/abs/1711.11503)."""


@dataclass
class Session:
    """State of a tab."""
    model: str
    image: Optional[Image.Image] = None
    title: str = ''  # of the image
    sample: bool = False  # the image is one of the samples
    shown: Optional[Tuple[Network, Any, Run]] = None  # on the page now; time_it stops when another object replaces it

    def take_sample(self, path: Path) -> None:
        self.image, self.title, self.sample = read_image(path), f'sample: {title_of(path)}', True


def title_of(path: Path) -> str:
    return path.stem[2:].replace('_', ' ')


PAIR = [(title_of(path), read_image(path)) for path in SAMPLES if 'Pullover' in path.stem]  # an easy and a hard one


def controls(network: Network) -> Tuple[Any, str]:
    """The slider of a model, or its update, and the description of the model."""
    slider = network.slider
    if slider is None:
        control = gr.Slider(0, 1, 0, label='No gates', visible=False, elem_id='budget')
    else:
        label, info = 'Gate offset', 'No calibrated budgets: this moves the threshold of all gates. Below 0 fewer run.'
        if slider.table:
            label, info = 'Budget: % of the MACs', 'A mean over images. 100 is all blocks.'
        control = gr.Slider(slider.low, slider.high, slider.value, step=slider.step, label=label, info=info,
                            visible=True, elem_id='budget')
    names = network.classes
    classes = ', '.join(names if len(names) <= 20 else [*names[:5], '...'])
    stages = '. '.join(f'{stage.title.capitalize()}: {stage.name}, {len(stage.gated)} of {len(stage.blocks)} blocks '
                       'have a gate' for stage in network.stages)
    threshold = '' if network.own_cascade else (
        f' Below a confidence of {network.thresholds[0]:.0%} (not calibrated) an image goes through all blocks.')
    return control, f'{stages}.{threshold} Images: {network.image_kind}. {len(names)} classes: {classes}.'


def samples_suit(network: Network) -> bool:
    """Whether the network knows the samples' classes."""
    return network.input_size[0] == 1 and {'Pullover', 'Ankle boot'} <= {*network.classes}


def choose_model(name: str, session: Session) -> Tuple[Any, ...]:
    """Load a model, or say why not and keep the previous one."""
    try:
        network = load_network(name)
    except ModelError as e:
        gr.Warning(escape(f'Model: {e}'))
        return session.model, gr.skip(), gr.skip(), gr.skip()
    session.model = network.name
    if samples_suit(network) and session.image is None:
        session.take_sample(SAMPLES[0])
    elif session.sample and not samples_suit(network):
        session.image = None
    return network.name, *controls(network), gr.Dataset(visible=samples_suit(network))


def upload(file: Optional[Dict[str, Any]], session: Session) -> None:
    """Read an image that was uploaded, pasted or taken, or say why not and keep the previous one."""
    if not file or not file.get('path'):
        return
    title = str(file.get('orig_name') or 'your image')
    try:
        session.image = read_image(file['path'])
    except UploadError as e:
        gr.Warning(escape(f'{title[:30]}: {e}'))
        return
    session.title, session.sample = title, False


def pick(index: int, session: Session) -> None:
    session.take_sample(SAMPLES[index])


def show_image(session: Session) -> str:
    if session.image is None:
        return ''
    return draw_images(session.image, session.title, load_network(session.model))


def show(value: Any, session: Session) -> Tuple[str, ...]:
    """What the network does with the image at a value of the slider, except the time."""
    network = load_network(session.model)
    curve = draw_curve(network, value)
    if session.image is None:
        session.shown = None
        return '', 'Upload an image to see which blocks run.', curve, '', ''
    x = network.tensor(session.image)
    run = network.run(x, value)
    session.shown = network, x, run
    pair = [(title, image, network.run(network.tensor(image), value))
            for title, image in (PAIR if samples_suit(network) else [])]
    return (draw_answers(network, run), draw_network(network, run), curve, draw_pair(network, pair),
            draw_heatmap(network, run))


def time_it(session: Session) -> Any:
    """The answers with the time, or nothing if the tab shows something else by then."""
    shown = session.shown
    if shown is None:
        return gr.skip()
    network, x, run = shown
    milliseconds = network.measure(x, run, wanted=lambda: session.shown is shown)
    return gr.skip() if milliseconds is None else draw_answers(network, run, milliseconds)


def make_page(first: Network) -> gr.Blocks:
    """The page, with a first model, and a sample if the samples suit it."""
    places = 'hf-hub:user/name' if ON_A_SPACE else 'hf-hub:user/name or local-dir:folder'
    start = Session(first.name)
    if samples_suit(first):
        start.take_sample(SAMPLES[0])
    slider, description = controls(first)
    # Every 10 s, uploads older than 30 s are deleted: before that, the browser may still be fetching them.
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(10, 30), fill_width=True) as page:
        session = gr.State(start, time_to_live=3600)
        with gr.Row():
            with gr.Column(min_width=320):
                gr.Markdown(INTRO, elem_id='title')
            model = gr.Dropdown(
                list(dict.fromkeys([*shipped_models(), CASCADE, first.name])), value=first.name, show_label=False,
                label='Model', allow_custom_value=True, elem_id='model', container=False,
                min_width=320, info=f'Or type {places} and press Enter.')
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    images = gr.HTML(elem_id='images', min_width=195)
                    file = gr.Image(
                        label='Image', show_label=False, height=130, elem_id='upload', min_width=110, buttons=[],
                        placeholder='Drop, paste\nor click')
                samples = gr.Dataset(
                    components=[gr.HTML(visible=False)], samples=[[draw_sample(path)] for path in SAMPLES],
                    type='index', label='Samples of Fashion-MNIST: light clothes on black',
                    elem_id='samples', samples_per_page=len(SAMPLES), visible=samples_suit(first))
            with gr.Column(scale=5, min_width=320):
                answers = gr.HTML(elem_id='answers')
                network = gr.HTML(elem_id='network')
            with gr.Column(scale=3, min_width=320):
                slider.render()
                curve = gr.HTML(elem_id='curve')
        with gr.Row():
            with gr.Column(min_width=320):
                pair = gr.HTML(elem_id='pair')
            with gr.Column(min_width=320):
                heatmap = gr.HTML(elem_id='heatmap')
        about = gr.Markdown(description, elem_id='about')

        options: Dict[str, Any] = dict(
            show_progress='hidden', api_visibility='private', concurrency_limit=8,
            trigger_mode='always_last')  # by default a step is left out while the same step of an earlier event runs
        pictured: Dict[str, Any] = dict(options, fn=show_image, inputs=session, outputs=images)
        shown: Dict[str, Any] = dict(
            options, fn=show, inputs=[slider, session], outputs=[answers, network, curve, pair, heatmap],
            preprocess=False)  # the slider would raise an error for a typed number outside of its range
        timed: Dict[str, Any] = dict(options, fn=time_it, inputs=session, outputs=answers)
        asked: Dict[str, Any] = dict(options, show_progress='minimal')
        slider.input(**shown).then(**timed)
        for event in (
                page.load(**pictured),
                model.input(choose_model, [model, session], [model, slider, about, samples], **asked).then(**pictured),
                file.input(upload, [file, session], file, preprocess=False, **asked).then(**pictured),
                samples.click(pick, [samples, session], **asked).then(**pictured)):
            event.then(**shown).then(**timed)
    return page


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_args(argv)
    try:
        first = load_network(args.model)
    except ModelError as e:
        print(f'error: --model: {e}', file=sys.stderr)
        return 2
    # Gradio's own fonts would come from Google, and its lighter greys are hard to read.
    theme = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']).set(
        body_text_color_subdued='*neutral_600', block_info_text_color='*neutral_600',
        body_text_color_subdued_dark='*neutral_300', block_info_text_color_dark='*neutral_300')
    try:
        make_page(first).queue(max_size=64).launch(
            server_port=args.port, max_file_size=MAX_BYTES, theme=theme,
            css_paths=Path(__file__).with_name('page.css'), footer_links=['settings'],
            ssr_mode=False, show_error=False)
    except OSError as e:
        if 'empty port' not in str(e):
            raise
        # in use, or below 1024 and not allowed
        print(f'error: --port: {str(e).partition(". ")[0]}.', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
