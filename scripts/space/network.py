"""A network of the page: stages that run an image, one after the other until one is sure, and their times."""
import copy
import math
import statistics
import threading
import time
from contextlib import nullcontext
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config

import timm_aig
from timm_aig import BudgetPoint, Cascade, InputError
from timm_aig.budget import budget_offset, budget_table
from timm_aig.convert import residual_blocks
from timm_aig.training.data import MODES, label_names_of

MAX_SIDE = 1024  # pixels of a model's input
THRESHOLD = .9  # of the second stage that an adaptive model is given
TURNS, WARM_UP_TURNS = 9, 2  # of a timing

# One computation at a time: others would disturb the timing.
_computing = threading.Lock()


class ModelError(ValueError):
    """A model that cannot be used. The message is for the visitor of the page."""


class Slider(NamedTuple):
    """Range of the slider of a model, and the value that it was saved with."""
    table: Tuple[BudgetPoint, ...]  # it sets a budget in percent of the MACs; without a table the gate offset
    low: float
    high: float
    step: float
    value: float

    @classmethod
    def of(cls, model: torch.nn.Module, offset: float) -> 'Slider':
        table = budget_table(model)
        low, high = (math.ceil(table[0].budget * 100), math.floor(table[-1].budget * 100)) if table else (0, 0)
        if low >= high:
            return cls((), min(-5., offset), max(5., offset), .1, offset)
        distance = {percent: abs(budget_offset(table, percent / 100) - offset) for percent in range(low, high + 1)}
        return cls(table, low, high, 1, min(distance, key=lambda percent: distance[percent]))

    def nearest(self, value: Any) -> float:
        """The value, or the end of the range that is nearest to it; the saved one for what is not a number."""
        return min(max(value, self.low), self.high) if isinstance(value, (int, float)) else self.value

    def offset(self, value: float) -> float:
        """Gate offset at a value in the range."""
        return budget_offset(self.table, value / 100) if self.table else value


class Pass(NamedTuple):
    """One image in one stage."""
    probabilities: torch.Tensor  # of the classes, [num_classes]
    gates: torch.Tensor  # which of the L gated blocks ran, 0. or 1., [1, L]
    opens: List[float]  # probability of open that each gate gives, the softmax of its two logits
    threshold: float  # a block runs where its gate's probability is above this; 0.5 at offset 0
    macs: float
    ran: str  # blocks that ran, with those without a gate: '9 of 15'

    @property
    def best(self) -> List[Tuple[int, float]]:
        """The two most probable classes and their probabilities."""
        values, classes = self.probabilities.topk(min(2, len(self.probabilities)))
        return list(zip(classes.tolist(), values.tolist()))


class Run(NamedTuple):
    """One image at one value of the slider."""
    value: Any  # None without a slider
    passes: List[Pass]  # of all stages, also of those that a cascade leaves out
    needed: int  # stages that a cascade runs

    @property
    def macs(self) -> float:
        """MACs of the stages that a cascade runs."""
        return sum(one.macs for one in self.passes[:self.needed])


class Stage:
    """A model, and the offset of its gates."""

    def __init__(self, title: str, model: Any, offset: Optional[float], input_size: Tuple[int, int, int]) -> None:
        self.title = title
        self.model = model.eval()
        self.name = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
        self.blocks = list(residual_blocks(model))
        self.layers: Dict[str, List[str]] = {}  # names of their blocks
        for name in self.blocks:
            self.layers.setdefault(name.rpartition('.')[0], []).append(name)
        self.gated = list(timm_aig.gated_blocks(model))
        self.offset = offset
        if self.gated and offset is None:
            self.offset = float(timm_aig.gated_blocks(model)[self.gated[0]].gate.offset)
        self.cost = timm_aig.compute_cost(model, input_size)
        try:
            self.fast = timm_aig.optimize_for_inference(model)
        except InputError:  # a static model of a family that it does not know
            self.fast = model

    def run(self, x: torch.Tensor, offset: Optional[float]) -> Pass:
        """Run one image [1, C, H, W] with an offset of the gates, None for a static model."""
        logits: List[torch.Tensor] = []
        hooks = [block.gate.fc2.register_forward_hook(lambda m, args, output: logits.append(output[0]))
                 for block in timm_aig.gated_blocks(self.model).values()]
        try:
            with nullcontext() if offset is None else timm_aig.use_gate_offset(offset):
                output, gates = timm_aig.forward_gates(self.model, x)
        finally:
            for hook in hooks:
                hook.remove()
        ran = len(self.blocks) - len(self.gated) + int(gates.sum())
        return Pass(
            output[0].softmax(0), gates, [pair.softmax(0)[1].item() for pair in logits],
            torch.tensor(-(offset or 0.)).sigmoid().item(), self.cost.executed(gates).item(),
            f'{ran} of {len(self.blocks)}' if self.blocks else 'all')

    def milliseconds(self, x: torch.Tensor, gates: torch.Tensor) -> float:
        """Time of one image in the optimized model, forced to the gates of a run."""
        with timm_aig.force_gates(self.fast, gates) if self.gated else nullcontext():
            begin = time.perf_counter()
            self.fast(x)
            return (time.perf_counter() - begin) * 1e3


class Network:
    """A cascade and what the page shows of it. An adaptive model gets itself with all blocks as second stage."""

    def __init__(self, name: str, model: Union[Cascade, Any]) -> None:
        """
        Args:
            name: Name that it was loaded by.
            model: Adaptive model or cascade.

        Raises:
            ModelError: The model is static, or takes images that this page does not make.
        """
        self.name = name
        self.own_cascade = isinstance(model, Cascade)
        titles = ['adaptive', 'all blocks']
        if self.own_cascade:
            titles = [f'stage {i + 1}' for i in range(len(model.order))]
        elif not timm_aig.gated_blocks(model):
            raise ModelError(f'{name} is a static model, none of its blocks has a gate.')
        else:
            model = Cascade([model, timm_aig.ungate_(copy.deepcopy(model))], THRESHOLD)
        models = [model.models[index] for index in model.order]
        self.thresholds = model.thresholds
        self.model = models[0]
        config = resolve_data_config(model=self.model)
        self.input_size: Tuple[int, int, int] = config['input_size']
        if self.input_size[0] not in MODES or max(self.input_size) > MAX_SIDE:
            raise ModelError(f'{name} takes images of {" x ".join(map(str, self.input_size))}; '
                             f'this page makes 1 or 3 channels and at most {MAX_SIDE} pixels a side.')
        self.classes = class_names(self.model)
        self.transform = create_transform(**config)
        self.stages = [Stage(*of_stage, self.input_size) for of_stage in zip(titles, models, model.offsets)]
        self.macs = self.stages[-1].cost.static  # of the last stage without gates, which shares are over
        offset = self.stages[0].offset
        self.slider = None if offset is None else Slider.of(self.model, offset)  # of the first stage
        self.rates: Union[List[List[float]], Image.Image, None] = None  # by class and gated block, or a picture

    @property
    def image_kind(self) -> str:
        channels, height, width = self.input_size
        return f'{width} x {height} pixels, {"grey" if channels == 1 else "RGB"}'

    def crop(self, image: Image.Image) -> Image.Image:
        """The part of an image that the network sees, in its resolution."""
        image = image.convert(MODES[self.input_size[0]])
        for step in self.transform.transforms:
            if 'Tensor' in type(step).__name__:
                break
            image = step(image)
        return image

    def tensor(self, image: Image.Image) -> torch.Tensor:
        """An image as input of the network, [1, C, H, W]."""
        return self.transform(image.convert(MODES[self.input_size[0]]))[None]

    def run(self, x: torch.Tensor, value: Any = None) -> Run:
        """Run one image.

        Args:
            x: Input from tensor().
            value: Value of the slider, brought into its range. None for the one that the model was saved with.
        """
        offsets = [stage.offset for stage in self.stages]
        if self.slider:
            value = self.slider.nearest(value)
            offsets[0] = self.slider.offset(value)
        with _computing, torch.inference_mode():
            passes = [stage.run(x, offset) for stage, offset in zip(self.stages, offsets)]
        sure = [one.best[0][1] >= threshold for one, threshold in zip(passes, self.thresholds)]
        return Run(value, passes, [*sure, True].index(True) + 1)

    def measure(self, x: torch.Tensor, run: Run, wanted: Callable[[], bool] = lambda: True) -> Optional[List[float]]:
        """Milliseconds of one image in each stage, optimized for inference: medians of TURNS turns.

        Args:
            x: Input from tensor().
            run: Its run(), whose gates the optimized models are forced to give.
            wanted: Asked before each turn; False ends the measurement, and the result is None.
        """
        turns: List[List[float]] = []
        for _ in range(WARM_UP_TURNS + TURNS):
            if not wanted():
                return None
            with _computing, torch.inference_mode():
                turns.append([stage.milliseconds(x, one.gates) for stage, one in zip(self.stages, run.passes)])
            time.sleep(.001)  # lets a waiting tab go first
        return [statistics.median(times) for times in zip(*turns[WARM_UP_TURNS:])]


def class_names(model: Any) -> List[str]:
    """Names of a model's classes: its own, else those of ImageNet if it has them, else numbers."""
    own = label_names_of(model)
    subset = None if own else infer_imagenet_subset(model)
    if subset:
        return ImageNetInfo(subset).label_descriptions()
    return [*own[:model.num_classes], *(f'class {i}' for i in range(len(own), model.num_classes))]
