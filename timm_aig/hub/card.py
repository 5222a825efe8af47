"""Model card: front matter by huggingface_hub, and a generated part that leaves a person's own text alone."""
import html
import re
from math import isfinite
from typing import Any, Dict, List, Optional, Sequence, Tuple
from urllib.parse import quote

import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg, is_model

from ..blocks import gated_blocks
from ..budget import budget_table
from ..cost import compute_cost

__all__ = ['checked_results', 'make_card']

BEGIN = '<!-- timm_aig: generated, the next push replaces it up to the end mark; your own text goes above or below. -->'
END = '<!-- timm_aig: end of the generated part -->'
GENERATED = re.compile(f'{re.escape(BEGIN)}.*?{re.escape(END)}', re.DOTALL)

TAGS = ['image-classification', 'timm', 'transformers', 'timm_aig', 'convnet-aig', 'adaptive-inference']

# results['metrics']: type in model-index, title, largest value.
METRICS: Dict[str, Tuple[str, str, float]] = {
    'top1': ('accuracy', 'Top-1 accuracy (%)', 100.),
    'top5': ('accuracy', 'Top-5 accuracy (%)', 100.),
    'execution_rate': ('execution_rate', 'Execution rate of the gated blocks', 1.),
    'macs_share': ('macs_share', "Executed MACs over the static parent's", 2.),
    'paths': ('paths', 'Different combinations of blocks', float('inf')),
}
_KINDS: Dict[str, type] = {
    'architecture': str, 'parent': str, 'dataset': str, 'split': str, 'command': str, 'description': str, 'card': str,
    'images': int, 'seed': int, 'metrics': dict, 'parent_metrics': dict, 'recipe': dict, 'environment': dict,
    'reported': dict, 'aig': dict,
}
_NAMES = {str: 'a text', int: 'a whole number', dict: 'an object'}


def checked_results(results: Any, architecture: Optional[str] = None) -> Dict[str, Any]:
    """Check what a results.json or a hub_config says of a model; every field is optional.

    Args:
        results: Its content.
        architecture: Of the model that the results should be of.

    Returns:
        The same.

    Raises:
        ValueError: A field has a value that is not allowed, or the results are of another model.
    """
    if not isinstance(results, dict):
        raise ValueError(f'results must be an object, not {results!r}.')
    for name, kind in _KINDS.items():
        value = results.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f'results: {name} must be {_NAMES[kind]}, not {value!r}.')
    if architecture and results.get('architecture', architecture) != architecture:
        raise ValueError(f"results are of {results['architecture']!r}, the model is {architecture!r}.")
    if results.get('images', 1) < 1:
        raise ValueError(f"results: images must be above 0, not {results['images']}.")
    for field in ('metrics', 'parent_metrics'):
        for name, value in (results.get(field) or {}).items():
            _, _, largest = METRICS.get(name, ('', '', float('inf')))
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
                raise ValueError(f'results: {field}.{name} must be a number, not {value!r}.')
            if name in METRICS and not 0 <= value <= largest:
                raise ValueError(f'results: {field}.{name} must be from 0 to {largest:g}, not {value!r}.')
    if results.get('metrics') and not (results.get('dataset') and results.get('split')):
        raise ValueError('results: metrics need the dataset and the split they were measured on.')
    return results


def make_card(
        model: nn.Module,
        repo_id: str,
        config: Dict[str, Any],
        results: Dict[str, Any],
        pictures: Sequence[str] = (),
        existing: Optional[str] = None,
        revision: Optional[str] = None,
) -> str:
    """Write the README.md of a model repository, or update it.

    Args:
        model: The model.
        repo_id: 'user/name'.
        config: Content of its config.json.
        results: What is known of it, see checked_results.
        pictures: Names of picture files in the repository to show.
        existing: The README.md that is there. Its text outside of the generated part and front matter that is not
            generated are kept.
        revision: Branch of the repository, None for main.

    Raises:
        ValueError: The existing card's front matter cannot be read, so that it cannot be kept.
    """
    generated = f'{BEGIN}\n{_body(model, repo_id, config, results, pictures, revision)}\n{END}'
    try:
        card = ModelCard(existing or '---\n{}\n---\n', ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as e:
        raise ValueError(f'README.md of {repo_id} has front matter that cannot be read, mend it there: {e}') from e
    _update(card.data, _card_data(repo_id.partition('/')[2], config, results))
    if GENERATED.search(card.text):
        card.text = GENERATED.sub(lambda _: generated, card.text, count=1)
    else:
        card.text = f'\n{generated}\n{card.text}'
    return str(card)


def _card_data(name: str, config: Dict[str, Any], results: Dict[str, Any]) -> ModelCardData:
    cfg = config['pretrained_cfg']
    dataset = results.get('dataset') or ''
    metrics = results.get('metrics') or {}
    return ModelCardData(
        license=cfg.get('license'),
        library_name='timm',
        pipeline_tag='image-classification',
        tags=TAGS,
        base_model=_base_model(results),
        datasets=[dataset.split('/', 1)[1]] if dataset.startswith(('hfds/', 'hfids/')) else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=results.get('split'),
                metric_type=METRICS.get(metric, (metric,))[0],
                metric_name=METRICS.get(metric, (metric, metric))[1],
                metric_value=value,
            )
            for metric, value in metrics.items()
        ],
    )


def _update(data: Any, new: ModelCardData) -> None:
    """Put what is generated into the front matter of a card, keep the rest of it."""
    old_results = data.get('eval_results') or []
    new_results = new.eval_results or []
    measured = {(r.unique_identifier, r.metric_name) for r in new_results}
    new.eval_results = [r for r in old_results if (r.unique_identifier, r.metric_name) not in measured] + new_results
    for name in ('tags', 'datasets'):
        old = data.get(name) or []
        old = [old] if isinstance(old, str) else list(old)
        new[name] = list(dict.fromkeys([*old, *(new.get(name) or [])])) or None
    for name, value in vars(new).items():
        if value is not None:
            data[name] = value
    if not data.eval_results:
        data.eval_results = None


def _base_model(results: Dict[str, Any]) -> Optional[str]:
    """Hub id of the model whose weights this one started from, None if that is not certain."""
    source, _, name = (results.get('parent') or '').rpartition(':')
    if source == 'hf-hub':
        return name.partition('@')[0]
    arch, _, tag = name.partition('.')
    if source or not tag or not is_model(arch) or (results.get('recipe') or {}).get('pretrained') is False:
        return None
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    return cfg.hf_hub_id if cfg else None


def _body(
        model: nn.Module,
        repo_id: str,
        config: Dict[str, Any],
        results: Dict[str, Any],
        pictures: Sequence[str],
        revision: Optional[str],
) -> str:
    parts = [
        f'# {_text(repo_id.partition("/")[2])}',
        _block(results.get('description') or ''),
        _about(model, config, results),
        *_results(results),
        _block(results.get('card') or ''),
        *_budgets(model),
        *(f'![{_text(name.partition(".")[0].replace("_", " "))}]({quote(name)})' for name in pictures),
        _usage(repo_id if revision in (None, 'main') else f'{repo_id}@{revision}', bool(gated_blocks(model)),
               config['pretrained_cfg']['input_size'][0]),
        CITATION,
    ]
    return '\n\n'.join(part for part in parts if part)


def _about(model: nn.Module, config: Dict[str, Any], results: Dict[str, Any]) -> str:
    arch, cfg = config['architecture'], config['pretrained_cfg']
    size = cfg['input_size']
    cost = compute_cost(model, tuple(size))
    parent = results.get('parent') or ''
    if not parent or parent.startswith('local-dir:'):  # a folder of somebody's machine says nothing here
        parent = arch.removesuffix('_aig')
    facts = {
        'Architecture': f'`{_code(arch)}`',
        'Static parent': f'`{_code(parent)}`',
        'Blocks with a gate': len(cost.blocks),
        'Target rates': ', '.join(sorted({f'{b.target_rate:g}' for b in gated_blocks(model).values()})),
        'Parameters (millions)': f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}',
        'GMACs, all blocks run': f'{cost.total / 1e9:.3g}',
        'GMACs that always run': f'{cost.fixed / 1e9:.3g}',
        'Image size': ' x '.join(map(str, size)),
        'Classes': config['num_classes'],
        'Origin': _text(cfg.get('origin_url') or ''),
    }
    if not cost.blocks:
        return f'A static ResNet of timm.\n\n{_table(facts)}'
    intro = (
        'An adaptive ResNet: before each gated block a small gate looks at the features of the image and decides '
        'whether the block runs ([ConvNet-AIG](https://arxiv.org/abs/1711.11503)). Blocks that do not run are not '
        'computed. It needs [timm](https://github.com/huggingface/pytorch-image-models) and the plugin `timm_aig`.')
    return f'{intro}\n\n{_table(facts)}'


def _results(results: Dict[str, Any]) -> List[str]:
    parts = []
    metrics = results.get('metrics') or {}
    if metrics:
        of_parent = {name: f' (static parent: {value:.4g})' for name, value in
                     (results.get('parent_metrics') or {}).items() if name in ('top1', 'top5')}
        rows = {METRICS.get(name, ('', _text(name)))[1]: f'{value:.4g}{of_parent.get(name, "")}'
                for name, value in metrics.items()}
        images = f"{results['images']} images of " if results.get('images') else ''
        provenance = f"Measured on {images}`{_code(results['dataset'])}`, split `{_code(results['split'])}`"
        if results.get('seed') is not None:
            provenance += f", seed {results['seed']}"
        if results.get('command'):
            provenance += f", by `{_code(results['command'])}`"
        if results.get('environment'):
            provenance += f" ({', '.join(f'{_text(k)} {_text(v)}' for k, v in results['environment'].items())})"
        parts += ['## Results', _table(rows), f'{provenance}.']
    if results.get('reported'):
        parts += ['## Reported by others, not measured here',
                  _table({_text(k): _text(v) for k, v in results['reported'].items()})]
    if results.get('recipe'):
        parts += ['## Training', _table({_text(k): _text(v) for k, v in results['recipe'].items()})]
    return parts


def _budgets(model: nn.Module) -> List[str]:
    table = budget_table(model)
    if not table:
        return []
    rows = [
        f'| {p.budget:.3g} | {p.macs_share:.4f} | {"" if p.top1 is None else f"{p.top1:.2f} %"} | {p.gate_offset:g} |'
        for p in table]
    about = (
        f'`timm_aig.set_budget(model, {table[0].budget:g})` makes this checkpoint spend that share of the MACs of its '
        f'static parent, in the mean over images; any from {table[0].budget:g} to {table[-1].budget:g} will do. The '
        f'rows were measured on {table[0].images} calibration images, others give somewhat other figures.')
    lines = ['| Budget | MACs share | Top-1 accuracy | Gate offset |', '|---|---|---|---|', *rows]
    return ['## Budgets', about, '\n'.join(lines)]


def _usage(name: str, adaptive: bool, channels: int) -> str:
    run = 'logits, gates = timm_aig.forward_gates(model, images)  # gates: 1. where a block ran' if adaptive else \
        'logits = model(images)'
    static = '\n\ntimm_aig.ungate_(model)  # the static ResNet: every block runs for every image' if adaptive else ''
    repo_id, _, revision = name.partition('@')
    pinned = f', revision={revision!r}' if revision else ''
    transformers = '' if channels != 3 else f'''

With transformers:

```python
import timm_aig
from transformers import pipeline

classify = pipeline('image-classification', model='{repo_id}'{pinned})
classify('image.jpg')
```'''  # whose pipelines make RGB images only
    return f'''## Use

```python
import timm_aig  # registers the architecture with timm
import timm
import torch
from PIL import Image

model = timm.create_model('hf-hub:{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
images = transform(Image.open('image.jpg').convert('{"L" if channels == 1 else "RGB"}')).unsqueeze(0)
with torch.inference_mode():
    {run}{static}
```{transformers}'''


CITATION = '''## Citation

```bibtex
@inproceedings{veit2018convolutional,
  title     = {Convolutional Networks with Adaptive Inference Graphs},
  author    = {Veit, Andreas and Belongie, Serge},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2018}
}
```'''


def _table(rows: Dict[str, Any]) -> str:
    lines = [f'| {name} | {value} |' for name, value in rows.items() if value != '']
    return '\n'.join(['| | |', '|---|---|', *lines])


def _text(value: Any) -> str:
    """A value as inline text: no line breaks, table bars or HTML, so no marks of the generated part either."""
    return html.escape(' '.join(str(value).split()), quote=False).replace('|', '&#124;')


def _code(value: Any) -> str:
    """A value inside `code`."""
    return ' '.join(str(value).split()).replace('`', "'").replace('|', '/').replace('<!--', '<! --')


def _block(markdown: str) -> str:
    """A person's own Markdown, which must not end the generated part."""
    return markdown.strip().replace('<!--', '&lt;!--')
