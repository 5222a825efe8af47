"""Model zoo: the gated blocks of each family, <arch>_aig for its models in timm's registry, the trained checkpoints."""
from . import (  # noqa: F401, register
    convnext_aig,
    efficientnet_aig,
    regnet_aig,
    resnet_variants_aig,
    resnetv2_aig,
    torchvision_blocks,
    vision_transformer_aig,
)
from .entry_points import list_trained
from .resnet_aig import GatedBasicBlock, GatedBottleneck

__all__ = ['GatedBasicBlock', 'GatedBottleneck', 'list_trained']
