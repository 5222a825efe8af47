"""A model in the form that exporters take: one graph in which a gated block is a branch, a product or a choice made."""
import threading
from typing import Any, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..inference import InferenceBlock, InferenceStage, optimize_for_inference

__all__ = ['MODES', 'ExportModel']

MODES = ('branch', 'masked', 'path')


class _Trace(threading.local):
    """What the gates of the model that is being traced add to their score, and what they answer."""

    def __init__(self) -> None:  # in every thread
        self.thresholds: Sequence[torch.Tensor] = ()
        self.answers: List[torch.Tensor] = []


_trace = _Trace()


class ExportBlock(nn.Module):
    """An InferenceBlock in the form that exporters take.

    Modifications:
        * branch: an open block and a closed one are the two sides of torch.cond
        * masked: the branch is computed for every image and multiplied by the answer
        * path: an open or a closed block, no gate
    """

    def __init__(self, block: InferenceBlock, mode: str, index: int, open: bool, pools: bool) -> None:
        """
        Args:
            block: Block to take over.
            mode: One of MODES.
            index: Of its gate among the gates.
            open: Whether it runs, in mode 'path'.
            pools: The next block has a gate that asks for the pooled output.
        """
        super().__init__()
        self.block = block
        self.gate: Any = block.gate if mode != 'path' else None
        self.runs = block.gate is None or open
        self.masked = mode == 'masked'
        self.index = index
        self.pools = pools

    def open(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.add_residual(x, self.shortcut(x), True)

    def closed(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.shortcut(x)
        return shortcut if self._unchanged() else self.block.last_act(shortcut)

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.block.downsample is None else self.block.downsample(x)

    def _unchanged(self) -> bool:
        return self.block.downsample is None and self.block.relu_input

    def forward(self, x: torch.Tensor, pooled: Optional[torch.Tensor]) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Output, and its pooled form [B, C, 1, 1] if the next block asks for it."""
        if self.gate is None:
            y = self.open(x) if self.runs else self.closed(x)
            return y, _pool(y) if self.pools else None
        pooled = _pool(x) if pooled is None else pooled
        # a convolution, whose code is warm between convolutions
        hidden = F.relu(F.conv2d(pooled, self.gate.weight1[:, :, None, None], self.gate.bias1))
        score = F.linear(hidden.flatten(1), self.gate.weight2, _trace.thresholds[self.index])
        answer = F.relu(score).bool()  # one call less than a comparison, which is many between short calls
        _trace.answers.append(answer)
        if self.masked:
            y = self.block.branch(x)
            y = y if self.block.last_conv is None else self.block.last_conv(y)
            y = self.block.last_act(y * answer.to(y.dtype).view(-1, 1, 1, 1) + self.shortcut(x))
            return y, _pool(y) if self.pools else None

        def then(x: torch.Tensor, pooled: torch.Tensor) -> Tuple[torch.Tensor, ...]:
            y = self.open(x)
            return (y, _pool(y)) if self.pools else (y,)

        def otherwise(x: torch.Tensor, pooled: torch.Tensor) -> Tuple[torch.Tensor, ...]:
            if self._unchanged():  # copied, since a branch must not return what it was given
                return (x.clone(), pooled.clone()) if self.pools else (x.clone(),)
            y = self.closed(x)
            return (y, _pool(y)) if self.pools else (y,)

        outputs = torch.cond(answer.reshape(1), then, otherwise, (x, pooled))
        return outputs[0], outputs[1] if self.pools else None


class ExportStage(nn.Module):
    """Blocks in a row, each of which hands its pooled output to the next one's gate."""

    def __init__(self, blocks: Iterable[ExportBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = None
        for block in self.blocks:
            x, pooled = block(x, pooled)
        return x


class ExportModel(nn.Module):
    """A model with `x` and `gate_offset` for inputs, and `logits` and `gates` for outputs."""
    bias: torch.Tensor
    pattern: torch.Tensor

    def __init__(self, model: nn.Module, mode: str, open: Sequence[bool] = ()) -> None:
        """
        Args:
            model: Adaptive or static timm ResNet.
            mode: One of MODES.
            open: Which of its L gated blocks run, in mode 'path'.
        """
        super().__init__()
        # contiguous, since both sides of a branch must have one layout
        optimized: Any = optimize_for_inference(model).model.to(memory_format=torch.contiguous_format)
        blocks = [m for m in optimized.modules() if isinstance(m, InferenceBlock)]
        for module in optimized.modules():
            if hasattr(module, 'inplace'):
                module.inplace = False  # a branch must not change what it is given
        gated: List[Any] = [block for block in blocks if block.gate is not None]
        index = {block: i for i, block in enumerate(gated)}

        def convert(row: Sequence[Any]) -> ExportStage:
            pools = [mode != 'path' and block.gate is not None for block in [*row[1:]]] + [False]
            return ExportStage(
                ExportBlock(block, mode, index.get(block, 0), block not in index or not open or open[index[block]], p)
                for block, p in zip(row, pools))

        for parent in list(optimized.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, InferenceStage):
                    setattr(parent, name, convert(list(child)))
                elif isinstance(child, InferenceBlock) and not isinstance(parent, InferenceStage):
                    setattr(parent, name, convert([child]))
        self.model = optimized
        self.mode = mode
        self.takes_offset = bool(gated) and mode != 'path'
        self.register_buffer('bias', torch.cat([torch.zeros(0), *(block.gate.bias2 for block in gated)]))
        self.register_buffer('pattern', torch.tensor([bool(o) for o in open]).float())

    def forward(self, x: torch.Tensor, gate_offset: Optional[torch.Tensor] = None) -> Any:
        if self.mode == 'path':
            return self.model(x), self.pattern.expand(x.shape[0], -1)
        if gate_offset is None:
            return self.model(x)
        _trace.thresholds, _trace.answers = torch.split(self.bias + gate_offset, 1), []
        try:
            logits = self.model(x)
            return logits, torch.cat(_trace.answers, 1).float()
        finally:
            _trace.thresholds, _trace.answers = (), []


def _pool(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3), keepdim=True)
