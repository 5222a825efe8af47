"""Model cards: README.md files of which the generated part is updated and the user's own text is kept."""
import re
from math import isfinite
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence
from urllib.parse import quote

import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg, is_model, model_entrypoint

from ..blocks import gated_blocks
from ..budget import budget_table
from ..config import InputError
from ..cost import compute_cost

__all__ = ['INSTALL', 'PROJECT_URL', 'checked_results', 'make_card', 'merge_card', 'name_on_hub']

PROJECT_URL = 'https://github.com/timm-aig/timm_aig'
BEGIN = '<!-- timm_aig: generated, the next push replaces it up to the end mark; your own text goes above or below. -->'
END = '<!-- timm_aig: end of the generated part -->'
GENERATED = re.compile(f'{re.escape(BEGIN)}.*?{re.escape(END)}', re.DOTALL)
TAGS = ['image-classification', 'timm', 'transformers']

# Known metrics: type in the model-index and title.
METRICS = {
    'top1': ('accuracy', 'Top-1 accuracy (%)'),
    'top5': ('accuracy', 'Top-5 accuracy (%)'),
    'execution_rate': ('execution_rate', 'Execution rate of the gated blocks'),
    'macs_share': ('macs_share', "Executed MACs over the static parent's"),
    'paths': ('paths', 'Different combinations of blocks'),
}

ABOUT = """An adaptive network: a small gate in front of each gated block looks at the block's input and decides for
each image whether the block runs ([ConvNet-AIG](https://arxiv.org/abs/1711.11503)). Blocks that do not run are not
computed."""

INSTALL = f"""It needs [timm](https://github.com/huggingface/pytorch-image-models) and the plugin
[timm_aig]({PROJECT_URL}):

```bash
pip install git+{PROJECT_URL}
```"""

CITATION = """## Citation

```bibtex
@inproceedings{veit2018convolutional,
  title     = {Convolutional Networks with Adaptive Inference Graphs},
  author    = {Veit, Andreas and Belongie, Serge},
  booktitle = {European Conference on Computer Vision (ECCV)},
  year      = {2018}
}
```"""


def checked_results(results: Dict[str, Any], architecture: Optional[str] = None) -> Dict[str, Any]:
    """Check the content of a results.json or a hub_config. Every field is optional.

    Args:
        results: The content.
        architecture: Architecture of the model that is published.

    Returns:
        The same results.

    Raises:
        InputError: A metric is not a number, the data set is not named, or the model is another one.
    """
    for field in ('metrics', 'parent_metrics'):
        for name, value in (results.get(field) or {}).items():
            if not isinstance(value, (int, float)) or not isfinite(value):
                raise InputError(f'results: {field}.{name} must be a finite number, not {value!r}.')
    if architecture and results.get('architecture', architecture) != architecture:
        raise InputError(f"results are for {results['architecture']!r}, the model is {architecture!r}.")
    if results.get('metrics') and not (results.get('dataset') and results.get('split')):
        raise InputError('results: metrics need the dataset and the split they were measured on.')
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
        config: Content of config.json.
        results: Content of results.json, see checked_results.
        pictures: Names of picture files in the repository to show.
        existing: The present README.md. Text outside of the generated part and other front matter are kept.
        revision: Branch of the repository, None for main.

    Raises:
        InputError: The front matter of the present README.md cannot be read, so it cannot be kept.
    """
    adaptive = bool(gated_blocks(model))
    plugin = not model_entrypoint(config['architecture']).__module__.startswith('timm.')
    tags = TAGS + ['timm_aig'] * plugin + ['convnet-aig', 'adaptive-inference'] * adaptive
    sections = [
        f'# {repo_id.partition("/")[2]}',
        results.get('description') or '',
        ABOUT if adaptive else 'A static network.',
        INSTALL if plugin else '',
        _facts(model, config, results),
        *_results(results),
        results.get('card') or '',
        _budgets(model),
        *(f'![{Path(picture).stem.replace("_", " ")}]({quote(picture)})' for picture in pictures),
        _usage(name_on_hub(repo_id, revision), adaptive, plugin, config['pretrained_cfg']['input_size'][0]),
        CITATION if adaptive else '',
    ]
    return merge_card(repo_id, sections, _card_data(repo_id.partition('/')[2], config, results, tags), existing)


def name_on_hub(repo_id: str, revision: Optional[str]) -> str:
    """What follows 'hf-hub:' in the name of a model or cascade."""
    return repo_id if revision in (None, 'main') else f'{repo_id}@{revision}'


def merge_card(repo_id: str, sections: Sequence[str], data: ModelCardData, existing: Optional[str]) -> str:
    """A README.md of generated sections and front matter; own text and front matter of the present one are kept.

    Raises:
        InputError: The front matter of the present README.md cannot be read, so it cannot be kept.
    """
    generated = '\n\n'.join([BEGIN, *filter(None, sections), END])
    try:
        card = ModelCard(existing or '---\n{}\n---\n', ignore_metadata_errors=False)
    except (ValueError, yaml.YAMLError) as e:
        raise InputError(f'README.md of {repo_id} has front matter that cannot be read, correct it there: {e}') from e
    _update(card.data, data)
    if GENERATED.search(card.text):
        card.text = GENERATED.sub(lambda _: generated, card.text, count=1)
    else:
        card.text = f'\n{generated}\n{card.text}'
    return str(card)


def _card_data(name: str, config: Dict[str, Any], results: Dict[str, Any], tags: List[str]) -> ModelCardData:
    dataset = results.get('dataset') or ''
    eval_results = []
    for metric, value in (results.get('metrics') or {}).items():
        kind, title = METRICS.get(metric, (metric, metric))
        eval_results.append(EvalResult(
            task_type='image-classification', dataset_type=dataset, dataset_name=dataset,
            dataset_split=results.get('split'), metric_type=kind, metric_name=title, metric_value=value))
    return ModelCardData(
        license=config['pretrained_cfg'].get('license'),
        library_name='timm',
        pipeline_tag='image-classification',
        tags=tags,
        base_model=_base_model(results),
        datasets=[dataset.split('/', 1)[1]] if dataset.startswith(('hfds/', 'hfids/')) else None,
        model_name=name,
        eval_results=eval_results,
    )


def _base_model(results: Dict[str, Any]) -> Optional[str]:
    """Hub id of the model whose weights the training started from, None if unknown."""
    source, _, name = (results.get('parent') or '').rpartition(':')
    if source == 'hf-hub':
        return name.partition('@')[0]
    arch, _, tag = name.partition('.')
    if source or not tag or not is_model(arch) or (results.get('recipe') or {}).get('pretrained') is False:
        return None
    cfg = get_pretrained_cfg(name, allow_unregistered=True)
    return cfg.hf_hub_id if cfg else None


def _update(data: Any, new: ModelCardData) -> None:
    """Update the front matter of a card: the user's own fields, tags, datasets and results are kept."""
    new_results = new.eval_results or []
    measured = {(r.unique_identifier, r.metric_name) for r in new_results}
    own_results = [r for r in data.get('eval_results') or [] if (r.unique_identifier, r.metric_name) not in measured]
    new.eval_results = own_results + new_results or None
    for name in ('tags', 'datasets'):
        own = data.get(name) or []
        own = [own] if isinstance(own, str) else own
        new[name] = list(dict.fromkeys([*own, *(new.get(name) or [])])) or None
    for name, value in vars(new).items():
        if value is not None:
            data[name] = value


def _facts(model: nn.Module, config: Dict[str, Any], results: Dict[str, Any]) -> str:
    arch, cfg = config['architecture'], config['pretrained_cfg']
    cost = compute_cost(model, tuple(cfg['input_size']))
    parent = results.get('parent') or ''
    if not parent or parent.startswith('local-dir:'):  # a path on the user's machine
        parent = arch.removesuffix('_aig')
    rates = {f'{block.target_rate:g}' for block in gated_blocks(model).values()}
    any_budget = (results.get('recipe') or {}).get('gate_loss') == 'budgets'
    gates = {
        'Static parent': f'`{parent}`',
        'Blocks with a gate': len(cost.blocks),
        'Target rates': '' if any_budget else ', '.join(sorted(rates)),
        'MACs that always run (millions)': f'{cost.fixed / 1e6:,.1f}',
    }
    return _table({
        'Architecture': f'`{arch}`',
        **(gates if cost.blocks else {}),
        'Parameters (millions)': f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f}',
        f'MACs{" with every block run" if cost.blocks else ""} (millions)': f'{cost.total / 1e6:,.1f}',
        'Image size': ' x '.join(map(str, cfg['input_size'])),
        'Classes': config['num_classes'],
        'Origin': cfg.get('origin_url') or '',
    })


def _results(results: Dict[str, Any]) -> List[str]:
    parts = []
    if results.get('metrics'):
        parent = results.get('parent_metrics') or {}
        rows = {}
        for name, value in results['metrics'].items():
            beside = f' (static parent: {parent[name]:.4g})' if name in ('top1', 'top5') and name in parent else ''
            rows[METRICS[name][1] if name in METRICS else name] = f'{value:.4g}{beside}'
        images = f"{results['images']} images of " if results.get('images') else ''
        source = f"Measured on {images}`{results['dataset']}`, split `{results['split']}`"
        if results.get('seed') is not None:
            source += f", seed {results['seed']}"
        if results.get('command'):
            source += f", with `{results['command']}`"
        if results.get('environment'):
            source += f" ({', '.join(f'{k} {v}' for k, v in results['environment'].items())})"
        parts += ['## Results', _table(rows), f'{source}.']
    if results.get('reported'):
        parts += ['## Reported by others, not measured here', _table(results['reported'])]
    if results.get('recipe'):
        used = {name: value for name, value in results['recipe'].items() if value is not None}
        parts += ['## Training', f'<details><summary>All arguments</summary>\n\n{_table(used)}\n\n</details>']
    return parts


def _budgets(model: nn.Module) -> str:
    table = budget_table(model)
    if not table:
        return ''
    low, high = table[0].budget, table[-1].budget
    about = (
        f"`timm_aig.set_budget(model, {low:g})` sets the mean share of the static parent's MACs that the model runs, "
        f'from {low:g} to {high:g}. Measured on {table[0].images} calibration images, which may be training images.')
    rows = [
        f'| {p.budget:.3g} | {p.macs_share:.4f} | {"" if p.top1 is None else f"{p.top1:.2f} %"} | {p.gate_offset:g} |'
        for p in table]
    header = ['| Budget | MACs share | Top-1 accuracy | Gate offset |', '|---|---|---|---|']
    return '\n'.join(['## Budgets', '', about, '', *header, *rows])


def _usage(name: str, adaptive: bool, plugin: bool, channels: int) -> str:
    run = 'logits = model(images)'
    register = 'import timm_aig  # registers the architecture with timm\n' if plugin else ''
    if adaptive:
        run = """logits, gates = timm_aig.forward_gates(model, images)  # gates: 1 where a block ran, else 0

timm_aig.ungate_(model)  # back to the static network, which runs every block"""
    code = f"""## Use

```python
import timm
{register}import torch
from PIL import Image

model = timm.create_model('hf-hub:{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
images = transform(Image.open('image.jpg').convert('{"L" if channels == 1 else "RGB"}')).unsqueeze(0)
with torch.inference_mode():
    {run}
```"""
    if channels != 3:  # pipelines of transformers make RGB images
        return code
    repo_id, _, revision = name.partition('@')
    return f"""{code}

With transformers:

```python
{register}from transformers import pipeline

classify = pipeline('image-classification', model='{repo_id}'{f', revision={revision!r}' if revision else ''})
classify('image.jpg')
```"""


def _table(rows: Dict[str, Any]) -> str:
    lines = [f'| {_cell(name)} | {_cell(value)} |' for name, value in rows.items() if value != '']
    return '\n'.join(['| | |', '|---|---|', *lines])


def _cell(value: Any) -> str:
    """Text on one line, with the bars escaped that would end a cell of a table."""
    return ' '.join(str(value).split()).replace('|', '\\|')
