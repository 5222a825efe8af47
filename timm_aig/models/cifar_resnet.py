"""CIFAR ResNets: static ResNet-8/14/20/32/44/56/110, three stages of BasicBlocks for 32 x 32 images.

Papers:
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385, section 4.2
* `Convolutional Networks with Adaptive Inference Graphs` - https://arxiv.org/abs/1711.11503, section 4.1

Downsampling shortcuts are 1x1 convolutions as in the code of the second paper, not zero padding as in the first.
"""
from typing import Any, Dict, List, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import LayerType, create_classifier, get_act_layer, get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, make_blocks

from ..convert import checkpoint_filter_fn
from ..hub.config_json import pin_weights
from .hub_configs import pretrained_cfgs

__all__ = ['CifarResNet']


class CifarResNet(ResNet):
    """ResNet for small images.

    Modifications:
        * 3x3 stem of stride 1 and no max pool
        * three stages of 16, 32 and 64 channels, strides 1, 2, 4
    """

    def __init__(
            self,
            layers: Tuple[int, int, int],
            block: Type[Union[BasicBlock, Bottleneck]] = BasicBlock,
            channels: Tuple[int, int, int] = (16, 32, 64),
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            drop_rate: float = 0.0,
            drop_path_rate: float = 0.,
            zero_init_last: bool = True,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            layers: Number of blocks in each stage.
            block: Class of the residual blocks.
            channels: Width of each stage.
            num_classes: Number of classes, 0 for none.
            in_chans: Number of input channels.
            global_pool: Global pooling type, one of 'avg', 'max', 'avgmax', 'catavgmax', '' for none.
            act_layer: Activation layer.
            norm_layer: Norm layer.
            drop_rate: Dropout probability before the classifier.
            drop_path_rate: Stochastic depth rate of the last block; it grows linearly over the blocks.
            zero_init_last: Zero-initialize the last norm weight of each residual branch.
        """
        nn.Module.__init__(self)
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        act_layer = get_act_layer(act_layer)
        norm_layer = get_norm_layer(norm_layer)

        self.conv1 = nn.Conv2d(in_chans, channels[0], kernel_size=3, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(channels[0], **dd)
        self.act1 = act_layer(inplace=True)
        self.maxpool = nn.Identity()
        self.feature_info = [dict(num_chs=channels[0], reduction=1, module='act1')]
        stages, feature_info = make_blocks(
            (block,) * len(channels),
            channels,
            layers,
            channels[0],
            act_layer=act_layer,
            norm_layer=norm_layer,
            aa_layer=None,
            drop_path_rate=drop_path_rate,
            **dd,
        )
        for stage in stages:
            self.add_module(*stage)
        self.layer4 = nn.Sequential()  # for ResNet's forward
        # make_blocks starts at stride 4, that of an ImageNet stem
        self.feature_info.extend(dict(info, reduction=info['reduction'] // 4) for info in feature_info)

        self.num_features = channels[-1] * block.expansion
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights(zero_init_last=zero_init_last)

    def forward_intermediates(self, x: torch.Tensor, indices: Union[int, List[int], None] = None, *args, **kwargs):
        """Forward features and return intermediates: 0 is the stem, 1 to 3 are the stages. Arguments as in ResNet."""
        return super().forward_intermediates(x, _take_features(indices), *args, **kwargs)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune stages not required for the given intermediates. Arguments as in ResNet."""
        take_indices = _take_features(indices)
        max_index = max(take_indices)
        for name in ('layer1', 'layer2', 'layer3')[max_index:]:
            setattr(self, name, nn.Sequential())
        if max_index < 3:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or max_index < 3:  # ResNet would look for a fourth stage
            self.reset_classifier(0, '')
        return take_indices


def _take_features(indices: Union[int, List[int], None]) -> List[int]:
    """Indices of the features to take. ResNet would take the last ones from five, with that of the empty layer4."""
    features = range(4)
    if indices is None or isinstance(indices, int):
        return list(features[-(indices or 4):])
    return [features[index] for index in indices]


def _create_cifar_resnet(variant: str, pretrained: bool = False, **kwargs) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # weights of the adaptive counterpart load, too
        feature_cfg=dict(out_indices=(0, 1, 2, 3)),
        **pin_weights(kwargs),
    )


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5),
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    **{f'{arch}.{tag}': cfg for arch, cfgs in pretrained_cfgs().items() if not arch.endswith('_aig')
       for tag, cfg in cfgs.items()},
    # * is the default, also where weights of hub_configs come first
    **{f'cifar_resnet{depth}.untrained*': _cfg() for depth in (8, 14, 20, 32, 44, 56, 110)},
})


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Constructs a CIFAR ResNet-8."""
    model_args = dict(layers=(1, 1, 1))
    return _create_cifar_resnet('cifar_resnet8', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Constructs a CIFAR ResNet-14."""
    model_args = dict(layers=(2, 2, 2))
    return _create_cifar_resnet('cifar_resnet14', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Constructs a CIFAR ResNet-20, 0.04 GMACs at 32 x 32."""
    model_args = dict(layers=(3, 3, 3))
    return _create_cifar_resnet('cifar_resnet20', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Constructs a CIFAR ResNet-32."""
    model_args = dict(layers=(5, 5, 5))
    return _create_cifar_resnet('cifar_resnet32', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Constructs a CIFAR ResNet-44."""
    model_args = dict(layers=(7, 7, 7))
    return _create_cifar_resnet('cifar_resnet44', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Constructs a CIFAR ResNet-56."""
    model_args = dict(layers=(9, 9, 9))
    return _create_cifar_resnet('cifar_resnet56', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Constructs a CIFAR ResNet-110, the network of the paper's CIFAR-10 results."""
    model_args = dict(layers=(18, 18, 18))
    return _create_cifar_resnet('cifar_resnet110', pretrained, **dict(model_args, **kwargs))
