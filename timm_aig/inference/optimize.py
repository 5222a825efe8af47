"""optimize_for_inference: an eval-only copy of a model, in which a skipped block is saved time.

How it gets fast, each measured with scripts/benchmark.py:
    * Batch norms are folded into convolutions. Convolutions run with bias, ReLU and the sum with the shortcut in one
      oneDNN call (CPU, float32), in channels_last.
    * A stage works in place on the output of its first block, so a closed block with an identity shortcut costs only
      its gate.
    * On a CPU a batch runs through the whole network in micro-batches of about eight 224 px images: enough to share the
      calls of a gate and the reading of weights, few enough to reuse memory that is in the cache.
    * Large open samples run where they lie in the batch, neighbours together. Only small ones are gathered.
"""
import copy
import inspect
from collections import OrderedDict
from functools import partial
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import ConvNormAct
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet

from ..blocks import family_of, gated_blocks
from ..compat import has_forward_hooks, one_graph
from ..config import InputError
from ..convert import plain_copy, residual_blocks
from ..gate import is_on_cpu
from ..passes import set_pass
from .blocks import InferenceBlock, InferenceStage
from .fused import Folded
from .gate import InferenceGate
from .graphs import GraphedForOne

__all__ = ['InferenceModel', 'optimize_for_inference']

MICRO_BATCH_PIXELS = 8 * 224 * 224
GRAPH_DEVICE = 'cuda'  # with graphs that replay kernels
FEATURE_NETS = (FeatureListNet, FeatureDictNet, FeatureHookNet)  # timm's features_only


class InferenceModel(nn.Module):
    """An optimized model. Takes what the model takes; if that is just a batch of images, it may run in micro-batches.

    Other attributes and methods are those of the model.
    """

    def __init__(
            self,
            model: nn.Module,
            micro_batch: Optional[int],
            per_image: bool,
            memory_format: torch.memory_format,
            compiled: bool = False,
    ) -> None:
        super().__init__()
        self.compiled = compiled
        self.model = model
        self.micro_batch = micro_batch
        self.per_image = per_image  # the forward does not mix the images of a batch
        self.channels_last = memory_format == torch.channels_last  # torch.save cannot save a memory format
        self.training = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'model':  # not there yet while unpickling
                raise
            return getattr(self.model, name)

    def __deepcopy__(self, memo: Dict[int, Any]) -> 'InferenceModel':
        if self.compiled:
            raise RuntimeError('a compiled model would go on to run the original: copy that and optimize the copy.')
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def train(self, mode: bool = True) -> 'InferenceModel':
        if mode:
            raise RuntimeError('a model optimized for inference cannot train, train the original.')
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('a model optimized for inference takes no weights, load them into the original.')

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].ndim != 4:
            return self.model(*args, **kwargs)
        x = args[0].contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        size = self.micro_batch or self._micro_batch(x)
        if len(x) <= size:
            return self.model(x)
        parts, outputs = x.split(size), []
        for i, part in enumerate(parts):
            with set_pass(rows=slice(i * size, (i + 1) * size), batch=len(x)):
                outputs.append(self.model(part))
        return _join(outputs, [len(part) for part in parts])

    def _micro_batch(self, x: torch.Tensor) -> int:
        if x.device.type != 'cpu' or not self.per_image:
            return len(x)
        return max(1, MICRO_BATCH_PIXELS // (x.shape[2] * x.shape[3]))


def _join(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Concatenate the outputs of micro-batches: tensors, or dicts, lists and tuples of them, or the same value."""
    first: Any = outputs[0]
    if isinstance(first, dict):
        return type(first)((key, _join([output[key] for output in outputs], sizes)) for key in first)
    if isinstance(first, (list, tuple)):
        joined = (_join(output, sizes) for output in zip(*outputs))
        return type(first)(*joined) if hasattr(first, '_fields') else type(first)(joined)  # namedtuple
    if isinstance(first, torch.Tensor):
        if [len(output) if output.ndim else None for output in outputs] == sizes:
            return torch.cat(outputs)  # type: ignore[arg-type]
    elif all(output == first for output in outputs):
        return first
    raise InputError(f'must not be given: an output of the model, {first!r:.80}, is not one value for each image.',
                     'micro_batch')


def optimize_for_inference(
        model: nn.Module,
        *,
        compile: bool = False,
        micro_batch: Optional[int] = None,
        calibration: Any = None,
) -> nn.Module:
    """Copy a model for fast inference. The model itself is unchanged.

    Args:
        model: Network of residual blocks, adaptive or static, or any module that contains one, on the device it will
            run on.
        compile: Compile with torch.compile: on a CPU the whole network as one graph that skips closed samples, which
            takes a C++ compiler and a minute; on an accelerator block by block, on a GPU with CUDA graphs for single
            images.
        micro_batch: Number of images to run through the network at a time, for a model whose outputs are one for each
            image. Default: on a CPU, of a network whose family gains from it, as many as have the pixels of eight
            224 x 224 images, else the whole batch.
        calibration: Removed in 0.2, an error that says what to do instead.

    Returns:
        An eval-only model that takes the same arguments and returns the same to rounding, except that oneDNN's ReLU
        turns nan into 0.

    Raises:
        InputError: No residual blocks in the model, forward hooks on modules that are replaced, an optimized model, a
            micro_batch below 1, or compile for a family whose blocks are not fused.
    """
    if calibration is not None:
        raise InputError("is not taken any more: convolutions run in int8 in a file of export_onnx(precision='int8').",
                         'calibration')
    if micro_batch is not None and micro_batch < 1:
        raise InputError(f'must be at least 1, not {micro_batch!r}.', 'micro_batch')
    if isinstance(model, InferenceModel):
        raise InputError('is optimized already.', 'model')
    model = plain_copy(model).requires_grad_(False)
    if any(p.is_meta for p in model.parameters()):
        raise InputError('has weights without values, on the meta device: load them first.', 'model')
    found = residual_blocks(model).values()
    if not found:
        raise InputError(f'({type(model).__name__}) has no residual blocks that timm_aig knows, see gate_.', 'model')
    families = {block: cls for block in found if (cls := family_of(block))}  # none of a branch without a gate
    blocks = {block: InferenceBlock(block) for block, cls in families.items() if cls.layers(block)}
    if compile and not blocks:
        raise InputError('is not for the blocks of this family, which are not fused.', 'compile')
    for block in gated_blocks(model).values():
        block.execution = 'sparse'  # of those that stay as they are
    hooked = {name: m for name, m in model.named_modules() if has_forward_hooks(m)}  # or a forward of their own
    stems = {cls.stem for cls in families.values() if cls.stem}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in blocks:
                setattr(parent, name, blocks[child])
            elif (stage := child._modules) and all(
                    block in blocks and type(child) is families[block].stage_cls for block in stage.values()):
                setattr(parent, name, InferenceStage(OrderedDict((key, blocks[stage[key]]) for key in stage)))
            elif type(child) is ConvNormAct:
                setattr(parent, name, Folded(child))
        for stem in stems:
            _fold_stem(parent, stem)
    kept = set(model.modules())
    lost = [name for name, m in hooked.items() if m not in kept]
    if lost:
        raise InputError(f'has forward hooks on {lost[0]}, which is replaced: remove them.', 'model')
    networks = FEATURE_NETS + sum((cls.model_classes for cls in set(families.values())), ())
    per_image = type(model).forward in [cls.forward for cls in networks]
    memory_format = torch.channels_last
    if compile:
        memory_format = _compile(model, whole=per_image and len(blocks) == len(found))
    return InferenceModel(model.to(memory_format=memory_format), micro_batch, per_image, memory_format, compile)


def _fold_stem(module: Any, stem: Tuple[Tuple[str, ...], ...]) -> None:
    """Fold the layers of each part of a network's stem into the first, if the module has them all."""
    if all(isinstance(getattr(module, name, None), nn.Module) for part in stem for name in part):
        for part in stem:
            setattr(module, part[0], Folded(*(getattr(module, name) for name in part)))
            for name in part[1:]:
                setattr(module, name, nn.Identity())


def _compile(model: Any, whole: bool) -> torch.memory_format:
    """Compile a model, and return the memory format that it takes.

    On a CPU it becomes one graph, in which a closed sample is a row left out of the batch. An accelerator wants
    channels_last, which inductor does not take for a number of rows that depends on values: there, and if the model is
    not `whole`, its network with fused blocks only, the stem, residual branches and shortcuts are compiled one by one.
    On a GPU CUDA graphs replay these and the gates for a single image.
    """
    weight = next(model.parameters())
    if is_on_cpu(weight) and whole:
        whole_graph = torch.compile(model.forward, options={'layout_optimization': False})

        def forward(x: torch.Tensor) -> Any:
            with one_graph(x):
                return whole_graph(x)

        model.forward = forward
        return torch.contiguous_format
    # Freezing packs the weights for oneDNN. All blocks share the code of a method, and by default, or in a torch
    # before 2.14, its few compiled versions too.
    own = {'isolate_recompiles': True} if 'isolate_recompiles' in inspect.signature(torch.compile).parameters else {}
    compiled: Any = partial(torch.compile, options={'freezing': True}, **own)
    pool = torch.cuda.graph_pool_handle() if weight.device.type == GRAPH_DEVICE else None
    for module in model.modules():
        name = 'add_residual' if isinstance(module, InferenceBlock) else 'forward' if type(module) is Folded else ''
        if name:
            function = compiled(getattr(module, name))
            vars(module)[name] = function if pool is None else GraphedForOne(function, pool)
        elif pool is not None and isinstance(module, InferenceGate):
            vars(module)['scores'] = GraphedForOne(module.scores, pool)
    return torch.channels_last
