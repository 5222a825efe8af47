"""Models of the page: load one by name, run an image at a budget, time it against the static parent."""
import copy
import csv
import json
import math
import os
import re
import statistics
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Tuple

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from images import read_image
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from timm.models import load_model_config_from_hf

import timm_aig
from timm_aig.budget import budget_offset, budget_table
from timm_aig.convert import residual_blocks
from timm_aig.models.hub_configs import load_hub_configs
from timm_aig.training.data import MODES

__all__ = ['ModelError', 'Network', 'Run', 'Slider', 'Timing', 'load_network', 'shipped_models']

ON_A_SPACE = 'SPACE_ID' in os.environ
HERE = Path(__file__).resolve().parent
MAX_SIDE = 1024  # pixels of a model's input
MAX_PARAMETERS = 300_000_000  # 1.2 GB; any visitor may name a model
MAX_CSV = 10_000_000  # characters
REASONS = (
    (HFValidationError, 'is not a name of a model on the Hub: hf-hub:user/name.'),
    ((RepositoryNotFoundError, RevisionNotFoundError), 'is not on the Hub, or not public.'),
    (LocalEntryNotFoundError, 'cannot be loaded: the Hub does not answer.'),
    ((FileNotFoundError, EntryNotFoundError), 'has no config.json or no model.safetensors.'))
TIMED_SECONDS, MIN_TURNS, MAX_TURNS, WARM_UP_TURNS = .7, 5, 51, 2

# One computation at a time: all tabs share a model, and the budget is its state. Others would also disturb the timing.
_computing = threading.Lock()


class ModelError(ValueError):
    """A model that cannot be used. The message is for the visitor of the page."""


class Slider(NamedTuple):
    """Range of the slider of a model, and the value that it was saved with."""
    calibrated: bool  # it sets a budget in percent of the MACs, otherwise the gate offset
    low: float
    high: float
    step: float
    value: float

    @classmethod
    def of(cls, model: torch.nn.Module) -> 'Slider':
        own = float(next(iter(timm_aig.gated_blocks(model).values())).gate.offset)
        table = budget_table(model)
        low, high = (math.ceil(table[0].budget * 100), math.floor(table[-1].budget * 100)) if table else (0, 0)
        if low >= high:
            return cls(False, min(-5., own), max(5., own), .1, own)
        distance = {percent: abs(budget_offset(table, percent / 100) - own) for percent in range(low, high + 1)}
        return cls(True, low, high, 1, min(distance, key=lambda percent: distance[percent]))


class Run(NamedTuple):
    """One image at one budget."""
    probabilities: torch.Tensor  # of the classes, [num_classes]
    gates: torch.Tensor  # which of the L gated blocks ran, 0. or 1., [1, L]
    opens: List[float]  # probability of open that each gate gives, the softmax of its two logits
    threshold: float  # a block runs where its gate's probability is above this; 0.5 at offset 0


class Timing(NamedTuple):
    """Time of one image in the adaptive model and in its static parent, measured in turns."""
    adaptive: float  # median in ms
    parent: float  # median in ms
    ratios: Tuple[float, float, float]  # quartiles of adaptive over parent, one ratio a turn
    turns: int


class Network:
    """An adaptive model and what the page shows of it."""

    def __init__(self, name: str, model: Any) -> None:
        """
        Args:
            name: Name that it was loaded by.
            model: The model.

        Raises:
            ModelError: The model is static, or takes images that this page does not make.
        """
        if not timm_aig.gated_blocks(model):
            raise ModelError(f'{name} is a static model, none of its blocks has a gate.')
        self.name = name
        self.model = model.eval()
        config = resolve_data_config(model=model)
        self.input_size: Tuple[int, int, int] = config['input_size']
        if self.input_size[0] not in MODES or max(self.input_size) > MAX_SIDE:
            raise ModelError(f'{name} takes images of {" x ".join(map(str, self.input_size))}; '
                             f'this page makes 1 or 3 channels and at most {MAX_SIDE} pixels a side.')
        self.transform = create_transform(**config)
        self.blocks = list(residual_blocks(model))
        self.gated = list(timm_aig.gated_blocks(model))
        self.slider = Slider.of(model)
        self.cost = timm_aig.compute_cost(model, self.input_size)
        self.fast = timm_aig.optimize_for_inference(model)
        self.fast_parent = timm_aig.optimize_for_inference(timm_aig.ungate_(copy.deepcopy(model)))
        self.rates: Optional[List[List[float]]] = None  # execution rates by class and gated block
        self.picture: Optional[Image.Image] = None  # of the execution rates, if there is no table
        try:
            if table := _find_file(name, 'rates.csv'):
                self.rates = _read_rates(table, self.gated, model.num_classes)
            elif picture := _find_file(name, 'execution_rates.png'):
                self.picture, _ = read_image(picture)
        except ValueError as e:  # the page works without them
            print(f'app.py: {name}: execution rates: {e}', file=sys.stderr)

    @property
    def image_kind(self) -> str:
        channels, height, width = self.input_size
        return f'{width} x {height} pixels, {"grey" if channels == 1 else "RGB"}'

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of an image that the network sees, in its resolution."""
        image = image.convert(MODES[self.input_size[0]])
        for step in self.transform.transforms:
            if type(step).__name__ in ('Resize', 'CenterCrop'):
                image = step(image)
        return image

    def tensor(self, image: Image.Image) -> torch.Tensor:
        """An image as input of the network, [1, C, H, W]."""
        return self.transform(image.convert(MODES[self.input_size[0]]))[None]

    def run(self, x: torch.Tensor, value: Optional[float] = None) -> Run:
        """Run one image.

        Args:
            x: Input from tensor().
            value: Value of the slider, by default the one that the model was saved with.
        """
        value = self.slider.value if value is None else min(max(value, self.slider.low), self.slider.high)
        offset = budget_offset(budget_table(self.model), value / 100) if self.slider.calibrated else value
        logits: List[torch.Tensor] = []
        blocks = timm_aig.gated_blocks(self.model).values()
        with _computing, torch.inference_mode():
            hooks = [block.gate.fc2.register_forward_hook(lambda m, args, output: logits.append(output[0]))
                     for block in blocks]
            try:
                timm_aig.set_gate_offset(self.model, offset)
                output, gates = timm_aig.forward_gates(self.model, x)
            finally:
                for hook in hooks:
                    hook.remove()
        opens = [pair.softmax(0)[1].item() for pair in logits]
        threshold = torch.tensor(-offset).sigmoid().item()
        return Run(output[0].softmax(0), gates, opens, threshold)

    def measure(
            self, x: torch.Tensor, gates: torch.Tensor, wanted: Callable[[], bool] = lambda: True,
    ) -> Optional[Timing]:
        """Time one image in turns with the static parent, both optimized for inference.

        Args:
            x: Input from tensor().
            gates: Gates of its run(), which the optimized model is forced to give.
            wanted: Asked before each turn; False ends the measurement.

        Returns:
            The timing, None if it was ended.
        """
        times: List[Tuple[float, float]] = []
        end = time.perf_counter() + TIMED_SECONDS
        for turn in range(-WARM_UP_TURNS, MAX_TURNS):
            if turn >= MIN_TURNS and time.perf_counter() > end:
                break
            if not wanted():
                return None
            with _computing, torch.inference_mode(), timm_aig.force_gates(self.fast, gates):
                pair = _milliseconds(self.fast, x), _milliseconds(self.fast_parent, x)
            if turn >= 0:
                times.append(pair)
            time.sleep(.001)  # lets a waiting tab go first
        adaptive, parent = (statistics.median(column) for column in zip(*times))
        low, median, high = statistics.quantiles([a / p for a, p in times], n=4)
        return Timing(adaptive, parent, (low, median, high), len(times))

    def class_name(self, index: int) -> str:
        names = self.model.pretrained_cfg.get('label_names')
        if isinstance(names, dict):
            names = names.get(index, names.get(str(index)))
            return f'class {index}' if names is None else str(names)
        if names and index < len(names):
            return str(names[index])
        subset = infer_imagenet_subset(self.model)
        return ImageNetInfo(subset).index_to_description(index) if subset else f'class {index}'


def _milliseconds(model: Any, x: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(x)
    return (time.perf_counter() - begin) * 1e3


def shipped_models() -> List[str]:
    """Names of the trained models in the package."""
    return [name for name, config in load_hub_configs().items() if 'file' in config['pretrained_cfg']]


def load_network(name: str) -> Network:
    """Load a network by name: a shipped model, [hf-hub:]user/name[@revision], or local-dir:folder.

    Raises:
        ModelError: It cannot be loaded, or it is a folder and this is a Space.
    """
    name = name.strip()
    if re.fullmatch(r'[\w.-]+/[\w.-]+(@[\w./-]+)?', name):
        name = f'hf-hub:{name}'
    return _load(name)


@lru_cache(maxsize=4)
def _load(name: str) -> Network:
    try:
        if name not in shipped_models():
            _check_source(name)
        return Network(name, timm.create_model(name, pretrained=True))
    except ModelError:
        raise
    except Exception as e:  # a repository may contain anything
        for kinds, reason in REASONS:
            if isinstance(e, kinds):
                raise ModelError(f'{name[:80]} {reason}') from e
        print(f'app.py: {name}: {type(e).__name__}: {e}', file=sys.stderr)
        reason = str(e) if isinstance(e, (ValueError, RuntimeError)) else ''
        reason = re.sub(r'(?<![\w:])(/[^\s/:\'"]+){2,}', '...', ' '.join(reason.split()))  # paths of this machine
        raise ModelError(f'{name} cannot be loaded: {reason[:300] or type(e).__name__}') from e


def _check_source(name: str) -> None:
    """Check that the page may load a model of a folder or repository, before its weights are read."""
    source, _, place = name.partition(':')
    if source == 'hf-hub':
        architecture = str(load_model_config_from_hf(place)[1])
    elif source == 'local-dir' and not ON_A_SPACE:
        architecture = str(json.loads(Path(place, 'config.json').read_text(encoding='utf-8'))['architecture'])
    else:
        folder = '' if ON_A_SPACE else ' or local-dir:folder'
        raise ModelError(f'must be {", ".join(shipped_models())}, hf-hub:user/name{folder}, not {name[:80]!r}.')
    if not architecture.endswith('_aig'):
        raise ModelError(f'{name} has the architecture {architecture[:80]!r}; only adaptive models, <name>_aig, have '
                         'gates to show.')
    parameters = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
    if parameters > MAX_PARAMETERS:
        raise ModelError(f'{name} has {parameters:,} parameters; this page loads models of at most {MAX_PARAMETERS:,}.')


def _find_file(name: str, filename: str) -> Optional[Path]:
    """A file beside a model: in hub_configs for a shipped one, else in its folder or repository."""
    source, _, place = name.partition(':')
    if source == 'hf-hub':
        repo_id, _, revision = place.partition('@')
        try:
            return Path(hf_hub_download(repo_id, filename, revision=revision or None))
        except Exception:  # not there, or the Hub does not answer: the page works without it
            return None
    folders = [Path(place)] if source == 'local-dir' else [
        root / 'hub_configs' / name for root in (HERE, HERE.parent.parent)]  # a Space and a checkout
    return next((folder / filename for folder in folders if (folder / filename).is_file()), None)


def _read_rates(path: Path, blocks: List[str], classes: int) -> List[List[float]]:
    """Execution rates [classes, blocks] from a CSV with a row for each class and a column for each block.

    Raises:
        ValueError: The file has another form.
    """
    with open(path, newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file.read(MAX_CSV).splitlines()))
    try:
        rates = [[float(row[block] or 'nan') for block in blocks] for row in rows]
    except (KeyError, TypeError) as e:
        raise ValueError(f'{path} has no column for each block.') from e
    if len(rates) != classes or any(not 0 <= rate <= 1 for row in rates for rate in row if rate == rate):
        raise ValueError(f'{path} has no row of rates in [0, 1] for each class.')
    return rates
