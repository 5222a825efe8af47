"""optimize_for_inference: an eval-only copy of a model, in which a skipped block is saved time.

What it rests on, each measured with scripts/benchmark.py:
    * Batch norms are folded into convolutions, convolutions run with bias, ReLU and the sum with the shortcut in one
      oneDNN call (CPU, float32), in channels_last.
    * A stage works in place on its first block's output, so a closed block behind an identity shortcut costs nothing
      but its gate.
    * On a CPU a batch is run in micro-batches of about four 224 px images, through the whole network: enough to share
      the calls of a gate and the reading of weights, few enough for activations to stay in the cache.
    * Open samples that are large are run where they lie, neighbours together, and only small ones are gathered.
"""
import copy
import ctypes
import hashlib
import inspect
from functools import partial
from itertools import chain
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_map

from ..blocks import gated_blocks, run_open_rows
from ..gate import Gate, gate_pass
from ..passes import forward_gates

__all__ = ['optimize_for_inference']

MICRO_BATCH_PIXELS = 4 * 224 * 224
MAX_SHAPES = 1000  # input shapes a convolution remembers, against images of ever new sizes

_HAS_FUSED_OPS = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in (
        '_convolution_pointwise', '_convolution_pointwise_', '_reorder_convolution_weight', 'data_ptr', '_nbytes'))


class FusedConv(nn.Module):
    """Convolution with bias and, if asked for, ReLU. On a CPU in float32 one oneDNN call, with weights laid out for it.

    The oneDNN operators are those that torch.compile emits; elsewhere plain convolutions serve.
    """

    def __init__(self, conv: Any, relu: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach(), False)
        bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.bias = nn.Parameter(bias, False)
        padding, stride, dilation = list(conv.padding), list(conv.stride), list(conv.dilation)
        self.conv_args: Tuple[Any, ...] = (stride, padding, dilation, conv.groups)
        self.fused_args: Tuple[Any, ...] = (padding, stride, dilation, conv.groups)
        self.relu = relu
        self._packed: Dict[torch.Size, torch.Tensor] = {}  # by input shape, weights in the layout oneDNN wants for it
        self._layouts: Dict[bytes, torch.Tensor] = {}  # by the hash of their content: few layouts serve all shapes

    def __getstate__(self) -> Dict[str, Any]:
        return {**vars(self), '_packed': {}, '_layouts': {}}  # they can neither be copied nor pickled

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._packed, self._layouts = {}, {}
        return super()._apply(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._packed_weight(x)
        if weight is not None:
            act = 'relu' if self.relu else 'none'
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.fused_args, act, [], '')
        x = F.conv2d(x, self.weight, self.bias, *self.conv_args)
        return x.relu_() if self.relu else x

    def add_relu_(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """relu(conv(x) + shortcut), written into shortcut."""
        if torch.compiler.is_compiling():  # fuses by itself
            return torch.relu(self(x) + shortcut)
        weight = self._packed_weight(x)
        if weight is not None:
            return torch.ops.mkldnn._convolution_pointwise_(
                shortcut, x, weight, self.bias, *self.fused_args, 'add', 1., 'relu', [], '')
        return shortcut.add_(self(x)).relu_()

    def _packed_weight(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        if not _HAS_FUSED_OPS or torch.compiler.is_compiling():
            return None
        if x.device.type != 'cpu' or x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return None
        if torch.is_autocast_enabled('cpu'):  # casts plain convolutions only
            return None
        weight = self._packed.get(x.shape)
        if weight is None:
            # With another layout oneDNN would convert the weights in every call. Which one it wants depends on the
            # batch too.
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.fused_args, list(x.shape))
            weight = self._layouts.setdefault(_content_hash(weight), weight)  # atomic, threads may share the model
            if len(self._packed) >= MAX_SHAPES:
                self._packed.clear()
            self._packed[x.shape] = weight
        return weight


def _content_hash(weight: torch.Tensor) -> bytes:
    size: int = torch.ops.mkldnn._nbytes(weight)
    return hashlib.sha256((ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(weight))).digest()


def _fold(*modules: Optional[nn.Module]) -> List[nn.Module]:
    """The same function in fewer modules: batch norms and ReLUs move into the convolution before them."""
    folded: List[Any] = []
    for module in chain.from_iterable(m if isinstance(m, nn.Sequential) else [m] for m in modules):
        last = folded[-1] if folded else None
        if module is None or isinstance(module, (nn.Identity, DropBlock2d, DropPath)):
            continue
        if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm) and isinstance(last, nn.Conv2d):
            folded[-1] = fuse_conv_bn_eval(last, module)  # type: ignore[arg-type]
        elif type(module) is nn.ReLU and _is_plain_conv(last):
            folded[-1] = FusedConv(last, relu=True)
        else:
            folded.append(module)
    return [FusedConv(m, relu=False) if _is_plain_conv(m) else m for m in folded]


def _is_plain_conv(module: Optional[nn.Module]) -> bool:
    return type(module) is nn.Conv2d and module.padding_mode == 'zeros' and not isinstance(module.padding, str)


class InferenceGate(Gate):
    """A gate in as few calls as it takes: each is short, and between large convolutions costs 20 to 100 us.

    Modifications:
        * the batch norm moves into fc1
        * fc2 has one output, open minus closed logit
        * a single sample's hidden units are weighed in Python
    """

    def __init__(self, gate: Gate) -> None:
        nn.Module.__init__(self)
        fc1 = gate.fc1 if isinstance(gate.bn, nn.Identity) else fuse_linear_bn_eval(gate.fc1, gate.bn)
        self.weight1 = nn.Parameter(fc1.weight.detach(), False)
        self.bias1 = nn.Parameter(fc1.bias.detach(), False)
        self.weight2 = nn.Parameter((gate.fc2.weight[1:] - gate.fc2.weight[:1]).detach(), False)
        self.bias2 = nn.Parameter((gate.fc2.bias[1:] - gate.fc2.bias[:1]).detach(), False)
        self.units = list(zip(self.bias1.tolist(), self.weight2[0].tolist()))  # in and out of each hidden unit
        self.score = self.bias2.item()
        self.offset: Any = float(gate.offset)
        self.budgets = gate.budgets

    def set_offset(self, offset: float) -> None:
        self.offset = offset

    def open_rows(self, pooled: torch.Tensor, scale: float) -> List[int]:
        """Which samples run, from their block inputs pooled by _pool."""
        threshold = -self.score - self.offset
        scores = self._scores(pooled, scale)
        answers = [score > threshold for score in scores]
        if gate_pass.sample:
            answers = (torch.rand(len(scores)) < (torch.tensor(scores) + self.score).sigmoid()).tolist()
        if gate_pass.forced is not None:
            forced = gate_pass.forced_answers(self, len(answers))
            answers = answers if forced is None else forced.tolist()
        if gate_pass.record is not None:
            gate_pass.record.append((self, torch.tensor(answers, dtype=torch.float32, device=pooled.device)))
        return [row for row, answer in enumerate(answers) if answer]

    def _scores(self, pooled: torch.Tensor, scale: float) -> List[float]:
        if len(pooled) != 1:
            hidden = torch.addmm(self.bias1, pooled, self.weight1.t(), alpha=scale).relu_()
            return (hidden @ self.weight2[0]).tolist()
        score = 0.
        for unit, (bias, weight) in zip((self.weight1 * pooled).sum(1).tolist(), self.units):
            unit = unit * scale + bias
            if unit > 0:
                score += unit * weight
        return [score]


def _pool(x: torch.Tensor) -> Tuple[torch.Tensor, float]:
    """Global average pool of x as a tensor [B, C] and a factor, which saves a call. Only float32 does not overflow."""
    if x.dtype != torch.float32:
        return x.mean((2, 3)), 1.
    return x.sum((2, 3)), 1 / (x.shape[2] * x.shape[3])


class InferenceBlock(nn.Module):
    """A residual block, gated or not, that computes the open samples only."""

    def __init__(self, block: Any, rate: Optional[float] = None) -> None:
        """
        Args:
            block: timm block, gated or not.
            rate: Share of calibration images that run it: 0 removes the branch, 1 the gate.
        """
        super().__init__()
        bottleneck = isinstance(block, Bottleneck)
        branch = [block.conv1, block.bn1, block.act1, block.aa, block.conv2, block.bn2, block.se]
        if bottleneck:
            branch = [block.conv1, block.bn1, block.act1, block.conv2, block.bn2, block.act2, block.aa,
                      block.conv3, block.bn3, block.se]
        steps = _fold(*branch)
        self.last_act: nn.Module = block.act3 if bottleneck else block.act2
        fused = type(self.last_act) is nn.ReLU and isinstance(steps[-1], FusedConv)
        self.last_conv: Any = steps.pop() if fused else None  # adds the shortcut and applies the ReLU itself
        self.branch = nn.Sequential(*steps)
        self.downsample = None if block.downsample is None else nn.Sequential(*_fold(block.downsample))
        self.relu_input = getattr(block, 'relu_input', False)
        self.target_rate = getattr(block, 'target_rate', 1.)
        gated = hasattr(block, 'gate') and rate not in (0, 1)
        self.gate = InferenceGate(block.gate) if gated else None
        self.never = rate == 0
        if self.never:
            self.branch, self.last_conv = nn.Sequential(), None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_open_rows(self, x, self.open_rows(x, None)[0])

    def open_rows(self, x: torch.Tensor, pooled: Any) -> Tuple[Sequence[int], Any]:
        """Which samples run, and what _pool gives for x if that is known now or was before."""
        if self.gate is None:
            return () if self.never else range(len(x)), pooled
        pooled = _pool(x) if pooled is None else pooled
        return self.gate.open_rows(*pooled), pooled

    def add_residual(self, x: torch.Tensor, shortcut: torch.Tensor, overwrite: bool) -> torch.Tensor:
        """act(residual(x) + shortcut), see run_open_rows."""
        x = self.branch(x)
        if self.last_conv is not None:
            return self.last_conv.add_relu_(x, shortcut if overwrite else shortcut.clone())
        return self.last_act(x.add_(shortcut))


class InferenceStage(nn.Sequential):
    """Blocks in a row. The later ones overwrite what the first allocates, and unchanged inputs are pooled once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        owned = False
        pooled: Any = None
        block: Any
        for block in self:
            rows, pooled = block.open_rows(x, pooled)
            y = run_open_rows(block, x, rows, owned)
            if rows or block.downsample is not None or not block.relu_input:
                pooled = None
            owned = owned or y is not x
            x = y
        return x


class InferenceModel(nn.Module):
    """Runs an optimized model in micro-batches. Its other attributes and methods are the model's."""

    def __init__(self, model: nn.Module, micro_batch: Optional[int]) -> None:
        super().__init__()
        self.model = model
        self.micro_batch = micro_batch
        self.training = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'model':  # not there yet while unpickling
                raise
            return getattr(self.model, name)

    def train(self, mode: bool = True) -> 'InferenceModel':
        if mode:
            raise RuntimeError('a model optimized for inference cannot train, train the one it was made from.')
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('a model optimized for inference takes no weights, load them into the one it was made from.')

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> Any:
        x = x.contiguous(memory_format=torch.channels_last)
        size = self.micro_batch or self._micro_batch(x)
        if len(x) <= size:
            return self.model(x)
        outputs = []
        for start in range(0, len(x), size):
            gate_pass.rows, gate_pass.batch = slice(start, start + size), len(x)
            try:
                outputs.append(self.model(x[start:start + size]))
            finally:
                gate_pass.rows, gate_pass.batch = slice(None), None
        return tree_map(lambda *parts: torch.cat(parts), *outputs)

    def _micro_batch(self, x: torch.Tensor) -> int:
        if x.device.type != 'cpu':
            return len(x)
        return max(1, MICRO_BATCH_PIXELS // (x.shape[2] * x.shape[3]))


def optimize_for_inference(
        model: nn.Module,
        calibration: Optional[Iterable[torch.Tensor]] = None,
        compile: bool = False,
        micro_batch: Optional[int] = None,
) -> nn.Module:
    """Copy a model for fast inference. The model itself is untouched.

    Args:
        model: timm ResNet, adaptive or static, or any module that contains one, on the device it will run on.
        calibration: Batches of images [B, C, H, W]. Blocks that run for all of these images lose their gate, blocks
            that run for none of them are removed: at the model's budget, a later set_budget moves the gates left.
        compile: Compile the convolutions of each block with torch.compile, the branch outside. Needs a C++ compiler.
        micro_batch: Images to run through the network at a time. If None, on a CPU as many as have the pixels of four
            224 x 224 images, elsewhere the whole batch.

    Returns:
        An eval-only model that takes and returns what `model` does, but for NaNs, which oneDNN's ReLU takes for 0.

    Raises:
        ValueError: No ResNet blocks in the model, forward hooks on modules that are replaced, a micro_batch below 1, or
            calibration without images.
    """
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f'micro_batch must be at least 1, not {micro_batch!r}.')
    if isinstance(model, InferenceModel):
        raise ValueError('model is optimized already.')
    model = copy.deepcopy(model).eval().requires_grad_(False)
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, (BasicBlock, Bottleneck))}
    if not blocks:
        raise ValueError(f'model ({type(model).__name__}) has no timm ResNet blocks (BasicBlock, Bottleneck).')
    hooked = {m: name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
    rates = {} if calibration is None else _execution_rates(model, calibration)
    optimized = {block: InferenceBlock(block, rates.get(name)) for name, block in blocks.items()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in optimized:
                setattr(parent, name, optimized[child])
            elif isinstance(child, nn.Sequential) and len(child) and all(b in optimized for b in child):
                setattr(parent, name, InferenceStage(*(optimized[b] for b in child)))
        _fold_stem(parent)
    lost = hooked.keys() - set(model.modules())
    if lost:
        raise ValueError(f'model has forward hooks on {min(hooked[m] for m in lost)}, which is replaced: remove them.')
    if compile:
        _compile(model)
    return InferenceModel(model.to(memory_format=torch.channels_last), micro_batch)


def _fold_stem(module: nn.Module) -> None:
    children = module._modules
    if all(children.get(name) is not None for name in ('conv1', 'bn1', 'act1', 'maxpool')):
        children['conv1'] = nn.Sequential(*_fold(*(children[name] for name in ('conv1', 'bn1', 'act1'))))
        children['bn1'] = children['act1'] = nn.Identity()
        children['maxpool'] = nn.Sequential(*_fold(children['maxpool']))


def _compile(model: nn.Module) -> None:
    """Compile stem, residual branches and downsampling shortcuts one by one, so that branches stay Python's."""
    # Freezing lays out the weights for oneDNN. All blocks share the code of a method, and by default, or in a torch
    # before 2.14, its few compiled versions too.
    own = {'isolate_recompiles': True} if 'isolate_recompiles' in inspect.signature(torch.compile).parameters else {}
    compiled: Any = partial(torch.compile, options={'freezing': True}, **own)
    for module in list(model.modules()):
        if isinstance(module, InferenceBlock):
            vars(module)['add_residual'] = compiled(module.add_residual)
            if module.downsample is not None:
                module.downsample = compiled(module.downsample)
        elif isinstance(module._modules.get('conv1'), nn.Sequential):
            module.conv1 = compiled(module.conv1)


@torch.no_grad()
def _execution_rates(model: nn.Module, images: Iterable[torch.Tensor]) -> Dict[str, float]:
    names = list(gated_blocks(model))
    gates = [forward_gates(model, batch)[1] for batch in images]
    if not sum(len(g) for g in gates):
        raise ValueError('calibration must have at least one image.')
    return dict(zip(names, torch.cat(gates).double().mean(dim=0).tolist()))
