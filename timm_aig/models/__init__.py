"""Model zoo: <arch>_aig for every ResNet of timm, the paper's CIFAR ResNets, and the trained checkpoints."""
from . import cifar_resnet, resnet_aig  # noqa: F401, registers the entry points
