"""ResNetV2 (pre-activation, BiT): the gated blocks, and <arch>_aig for every arch of timm.models.resnetv2."""

import torch
from timm.models.resnetv2 import Bottleneck, PreActBasic, PreActBottleneck, ResNetV2

from ..blocks import GatedBlock, gated_form_of
from .entry_points import Family, register_family
from .pre_activation import GatedPreActBlock

__all__ = ['GatedPreActBasic', 'GatedPreActBottleneck', 'GatedResNetV2Bottleneck']  # and each entry point


@gated_form_of(PreActBasic)
class GatedPreActBasic(GatedPreActBlock, PreActBasic):
    """timm's PreActBasic with a gate."""
    model_classes = (ResNetV2,)

    def behind_norm(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.conv2(self.norm2(x))
        return self.drop_path(x)


@gated_form_of(PreActBottleneck)
class GatedPreActBottleneck(GatedPreActBlock, PreActBottleneck):
    """timm's PreActBottleneck with a gate."""
    bottleneck = True
    model_classes = (ResNetV2,)

    def behind_norm(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        x = self.conv2(self.norm2(x))
        x = self.conv3(self.norm3(x))
        return self.drop_path(x)


@gated_form_of(Bottleneck)
class GatedResNetV2Bottleneck(GatedBlock, Bottleneck):
    """timm's Bottleneck of ResNetV2, with its activation after the sum, with a gate."""
    act_name = 'act3'
    bottleneck = True
    model_classes = (ResNetV2,)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        x = self.norm3(self.conv3(x))
        return self.drop_path(x)

    def last_act(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(x)


register_family(__name__, Family(
    ('resnetv2',), feature_cfg=lambda parent: dict(flatten_sequential=True)))
