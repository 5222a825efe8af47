"""Model zoo: the gated blocks of each family, <arch>_aig for its models in timm's registry, the trained checkpoints."""
from ..compat import efficientnet_blocks
from . import (  # noqa: F401, register
    convnext_aig,
    regnet_aig,
    resnet_variants_aig,
    resnetv2_aig,
    torchvision_blocks,
    vision_transformer_aig,
)
from .entry_points import list_trained
from .resnet_aig import GatedBasicBlock, GatedBottleneck

if efficientnet_blocks is not None:
    from . import efficientnet_aig  # noqa: F401

__all__ = ['GatedBasicBlock', 'GatedBottleneck', 'list_trained']
