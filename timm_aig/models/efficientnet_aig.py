"""EfficientNets and MobileNets: gated inverted residuals, <arch>_aig for timm.models.efficientnet and mobilenetv3."""
from typing import Any, Optional

import torch
from timm.models import EfficientNet, MobileNetV3

from ..blocks import GatedBlock, gated_form_of
from ..compat import efficientnet_blocks as blocks
from .entry_points import Family, register_family

__all__ = [  # register_family adds each entry point
    'GatedConvBnAct', 'GatedDepthwiseSeparableConv', 'GatedEdgeResidual', 'GatedInvertedResidual',
    'GatedMobileAttention', 'GatedUniversalInvertedResidual']


class GatedMobileBlock(GatedBlock):
    """Base of the gated blocks. Their shortcut is the input; a block without a shortcut has no gate."""
    model_classes = (EfficientNet, MobileNetV3)

    def shortcut_of(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def in_channels(block: Any) -> Optional[int]:
        return GatedBlock.in_channels(block) if block.has_skip else None


@gated_form_of(blocks.ConvBnAct)
class GatedConvBnAct(GatedMobileBlock, blocks.ConvBnAct):
    """timm's ConvBnAct with a gate."""

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.aa(self.bn1(self.conv(x)))
        return self.drop_path(x)


@gated_form_of(blocks.DepthwiseSeparableConv)
class GatedDepthwiseSeparableConv(GatedMobileBlock, blocks.DepthwiseSeparableConv):
    """timm's DepthwiseSeparableConv with a gate."""

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv_s2d is not None:
            x = self.bn_s2d(self.conv_s2d(x))
        x = self.aa(self.bn1(self.conv_dw(x)))
        x = self.bn2(self.conv_pw(self.se(x)))
        return self.drop_path(x)


@gated_form_of(blocks.InvertedResidual)
class GatedInvertedResidual(GatedMobileBlock, blocks.InvertedResidual):
    """timm's InvertedResidual (MBConv) with a gate. CondConvResidual, which derives from it, has none."""

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        if self.conv_s2d is not None:
            x = self.bn_s2d(self.conv_s2d(x))
        x = self.bn1(self.conv_pw(x))
        x = self.aa(self.bn2(self.conv_dw(x)))
        x = self.bn3(self.conv_pwl(self.se(x)))
        return self.drop_path(x)


@gated_form_of(blocks.EdgeResidual)
class GatedEdgeResidual(GatedMobileBlock, blocks.EdgeResidual):
    """timm's EdgeResidual (FusedMBConv) with a gate."""

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.aa(self.bn1(self.conv_exp(x)))
        x = self.bn2(self.conv_pwl(self.se(x)))
        return self.drop_path(x)


@gated_form_of(blocks.UniversalInvertedResidual)
class GatedUniversalInvertedResidual(GatedMobileBlock, blocks.UniversalInvertedResidual):
    """timm's UniversalInvertedResidual (MobileNetV4) with a gate."""

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dw_mid(self.pw_exp(self.dw_start(x)))
        x = self.dw_end(self.pw_proj(self.se(x)))
        return self.drop_path(self.layer_scale(x))


@gated_form_of(blocks.MobileAttention)
class GatedMobileAttention(GatedMobileBlock, blocks.MobileAttention):
    """timm's MobileAttention (MobileNetV4) with a gate. With a position encoding before its shortcut it has none."""

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer_scale(self.attn(self.norm(x)))
        return self.drop_path(x)

    @staticmethod
    def in_channels(block: Any) -> Optional[int]:
        return GatedMobileBlock.in_channels(block) if block.conv_cpe_dw is None else None


register_family(__name__, Family(
    ('efficientnet', 'mobilenetv3'), feature_cfg=lambda parent: dict(feature_cls='hook', no_rewrite=False),
    without=('lcnet_*', 'mobilenetv1_*', 'test_*')))
