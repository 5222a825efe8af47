"""ResNets: gated BasicBlock and Bottleneck, and <arch>_aig for every arch of timm.models.resnet and cifar_resnet.

Paper: `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503
"""
from typing import Any, List

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..blocks import GatedBlock, gated_form_of
from . import cifar_resnet  # noqa: F401, registers the CIFAR parents
from .entry_points import Family, register_family

__all__ = ['GatedBasicBlock', 'GatedBottleneck', 'GatedResNetBlock']  # register_family adds each entry point


class GatedResNetBlock(GatedBlock):
    """Base of the gated blocks of timm's ResNets, whose residual branch ends in optional attention and drop path."""
    adds_in_place = True
    model_classes = (ResNet,)
    stem = ('conv1', 'bn1', 'act1'), ('maxpool',)

    def se_and_drop_path(self, x: torch.Tensor) -> torch.Tensor:
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        return x


@gated_form_of(BasicBlock)
class GatedBasicBlock(GatedResNetBlock, BasicBlock):
    """timm's BasicBlock with a gate."""
    act_name = 'act2'

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)
        x = self.conv2(x)
        x = self.bn2(x)
        return self.se_and_drop_path(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act2(x)

    @staticmethod
    def layers(block: Any) -> List[Any]:
        return [block.conv1, block.bn1, block.act1, block.aa, block.conv2, block.bn2, block.se]


@gated_form_of(Bottleneck)
class GatedBottleneck(GatedResNetBlock, Bottleneck):
    """timm's Bottleneck with a gate."""
    act_name = 'act3'
    bottleneck = True

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)
        x = self.conv3(x)
        x = self.bn3(x)
        return self.se_and_drop_path(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(x)

    @staticmethod
    def layers(block: Any) -> List[Any]:
        return [block.conv1, block.bn1, block.act1, block.conv2, block.bn2, block.act2, block.aa,
                block.conv3, block.bn3, block.se]


register_family(__name__, Family(('resnet', 'cifar_resnet'), feature_cfg=lambda parent: dict(
    out_indices=(0, 1, 2, 3) if parent.startswith('cifar') else (0, 1, 2, 3, 4))))
