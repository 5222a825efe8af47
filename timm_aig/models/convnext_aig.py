"""ConvNeXt (V1, V2): the gated block, and <arch>_aig for every arch of timm.models.convnext."""

import torch
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, checkpoint_filter_fn

from ..blocks import GatedBlock, gated_form_of
from .entry_points import Family, register_family

__all__ = ['GatedConvNeXtBlock']  # register_family adds each entry point


@gated_form_of(ConvNeXtBlock)
class GatedConvNeXtBlock(GatedBlock, ConvNeXtBlock):
    """timm's ConvNeXtBlock with a gate."""
    shortcut_name = 'shortcut'
    gate_norm = 'ln'
    model_classes = (ConvNeXt,)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_dw(x)
        if self.use_conv_mlp:
            x = self.mlp(self.norm(x))
        else:
            x = x.permute(0, 2, 3, 1)
            x = self.mlp(self.norm(x))
            x = x.permute(0, 3, 1, 2)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x)

    def shortcut_of(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x)


register_family(__name__, Family(
    ('convnext',), checkpoint_filter_fn,
    feature_cfg=lambda parent: dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)))
