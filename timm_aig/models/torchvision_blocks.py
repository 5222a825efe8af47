"""torchvision's ResNets: their gated blocks, for gate_. Without torchvision's registry, there are no entry points."""
from typing import Any, List

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from ..blocks import GatedBlock, gated_form_of

__all__ = ['GatedTorchvisionBasicBlock', 'GatedTorchvisionBottleneck']


class GatedTorchvisionBlock(GatedBlock):
    """Base of the gated blocks."""
    act_name = 'relu'
    adds_in_place = True
    model_classes = (ResNet,)
    stem = ('conv1', 'bn1', 'relu'), ('maxpool',)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x)


@gated_form_of(BasicBlock)
class GatedTorchvisionBasicBlock(GatedTorchvisionBlock, BasicBlock):
    """torchvision's BasicBlock with a gate."""

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    @staticmethod
    def layers(block: Any) -> List[Any]:
        return [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]


@gated_form_of(Bottleneck)
class GatedTorchvisionBottleneck(GatedTorchvisionBlock, Bottleneck):
    """torchvision's Bottleneck with a gate."""
    bottleneck = True

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    @staticmethod
    def layers(block: Any) -> List[Any]:
        return [block.conv1, block.bn1, block.relu, block.conv2, block.bn2, block.relu, block.conv3, block.bn3]
