"""Res2Net, ResNeSt and SKNet, ResNets with other blocks: the gated blocks, and <arch>_aig for every arch of theirs."""
from typing import Any, Optional

import torch
from timm.models.res2net import Bottle2neck
from timm.models.resnest import ResNestBottleneck
from timm.models.sknet import SelectiveKernelBasic, SelectiveKernelBottleneck

from ..blocks import gated_form_of
from .entry_points import Family, register_family
from .resnet_aig import GatedResNetBlock

__all__ = [  # register_family adds each entry point
    'GatedBottle2neck', 'GatedResNestBottleneck', 'GatedSelectiveKernelBasic', 'GatedSelectiveKernelBottleneck']


@gated_form_of(Bottle2neck)
class GatedBottle2neck(GatedResNetBlock, Bottle2neck):
    """timm's Bottle2neck of Res2Net with a gate."""
    act_name = 'relu'
    bottleneck = True

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        parts = torch.split(x, self.width, 1)
        out = []
        part = parts[0]  # redundant, for TorchScript
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):
            part = parts[i] if i == 0 or self.is_first else part + parts[i]
            part = self.relu(bn(conv(part)))
            out.append(part)
        if self.scale > 1:
            out.append(parts[-1] if self.pool is None else self.pool(parts[-1]))
        x = self.drop_block(torch.cat(out, 1))
        x = self.bn3(self.conv3(x))
        return self.se_and_drop_path(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x)


@gated_form_of(ResNestBottleneck)
class GatedResNestBottleneck(GatedResNetBlock, ResNestBottleneck):
    """timm's Bottleneck of ResNeSt with a gate. As in timm, drop path acts on the input of the shortcut."""
    act_name = 'act3'
    bottleneck = True

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        if self.avd_first is not None:
            x = self.avd_first(x)
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        if self.avd_last is not None:
            x = self.avd_last(x)
        return self.bn3(self.conv3(x))

    def shortcut_of(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample is None:
            return x
        return self.downsample(x if self.drop_path is None else self.drop_path(x))

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(x)


class GatedSelectiveKernelBlock(GatedResNetBlock):
    """Base of the gated blocks of SKNet."""
    act_name = 'act'

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x)


@gated_form_of(SelectiveKernelBasic)
class GatedSelectiveKernelBasic(GatedSelectiveKernelBlock, SelectiveKernelBasic):
    """timm's SelectiveKernelBasic with a gate."""

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(x))
        return self.se_and_drop_path(x)

    @staticmethod
    def in_channels(block: Any) -> Optional[int]:
        return block.conv1.in_channels  # each convolution in it has a part of them


@gated_form_of(SelectiveKernelBottleneck)
class GatedSelectiveKernelBottleneck(GatedSelectiveKernelBlock, SelectiveKernelBottleneck):
    """timm's SelectiveKernelBottleneck with a gate."""
    bottleneck = True

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.conv2(self.conv1(x)))
        return self.se_and_drop_path(x)


register_family(__name__, Family(('res2net', 'resnest', 'sknet')))
