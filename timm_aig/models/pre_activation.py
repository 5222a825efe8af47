"""GatedPreActBlock: what the gated pre-activation blocks of ResNetV2 and RegNet share."""
from typing import Tuple

import torch

from ..blocks import GatedBlock

__all__ = ['GatedPreActBlock']


class GatedPreActBlock(GatedBlock):
    """Base of gated pre-activation blocks, whose shortcut starts behind the first norm if it is a convolution."""

    def behind_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The residual branch from the output of norm1 on."""
        raise NotImplementedError

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind_norm(self.norm1(x))

    def shortcut_of(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.downsample is None else self.downsample(self.norm1(x))

    def branches(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        x_preact = self.norm1(x)
        return self.behind_norm(x_preact), x if self.downsample is None else self.downsample(x_preact)
