"""RegNets (X, Y, Z, V): the gated block, and <arch>_aig for every arch of timm.models.regnet."""
from typing import Any, List, Optional

import torch
from timm.models.regnet import Bottleneck, PreBottleneck, RegNet, RegStage

from ..blocks import GatedBlock, gated_form_of
from ..compat import regnet_filter_fn
from .entry_points import Family, register_family
from .pre_activation import GatedPreActBlock

__all__ = ['GatedRegNetBlock', 'GatedRegNetPreBlock']  # register_family adds each entry point


@gated_form_of(Bottleneck)
class GatedRegNetBlock(GatedBlock, Bottleneck):
    """timm's RegNet Bottleneck with a gate. Without a shortcut it has none."""
    act_name = 'act3'
    bottleneck = True
    stage_cls = RegStage
    model_classes = (RegNet,)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.conv2(x)
        x = self.se(x)
        x = self.conv3(x)
        return self.drop_path(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(x)

    @staticmethod
    def layers(block: Any) -> Optional[List[Any]]:
        return None if block.downsample is None else [block.conv1, block.conv2, block.se, block.conv3]

    @staticmethod
    def in_channels(block: Any) -> Optional[int]:
        return None if block.downsample is None else block.conv1.conv.in_channels


@gated_form_of(PreBottleneck)
class GatedRegNetPreBlock(GatedPreActBlock, PreBottleneck):
    """timm's pre-activation RegNet block with a gate. Without a shortcut it has none."""
    bottleneck = True
    stage_cls = RegStage
    model_classes = (RegNet,)

    def behind_norm(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.norm2(x)
        x = self.conv2(x)
        x = self.se(x)
        x = self.norm3(x)
        x = self.conv3(x)
        return self.drop_path(x)

    @staticmethod
    def in_channels(block: Any) -> Optional[int]:
        return None if block.downsample is None else block.conv1.in_channels


register_family(__name__, Family(('regnet',), regnet_filter_fn))
