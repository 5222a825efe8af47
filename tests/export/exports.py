"""What the tests of exports share: a trained model's norms and gates, sessions, and what the model itself answers."""
from dataclasses import replace

import numpy as np
import onnxruntime
import timm
import torch
from timm.layers import GroupNormAct, StdConv2d
from timm.models import regnet
from torchvision.models import ResNet, resnet

import timm_aig
from timm_aig.export.check import FORCED

GATES = 5  # of the fixture `model`
MIXED = [1, 0, 0, 1, 0]
PATTERNS = {'own': None, 'open': [1] * GATES, 'closed': [0] * GATES, 'mixed': MIXED}

FAMILIES = {  # archs whose blocks differ, made small
    'resnet18': dict(layers=(1, 2, 1, 1)), 'resnet50': dict(layers=(1, 2, 1, 1)),
    'seresnet50': dict(layers=(1, 2, 1, 1)), 'ecaresnet26t': dict(layers=(1, 2, 1, 1)),
    'resnetblur18': dict(layers=(1, 2, 1, 1)), 'resnext50_32x4d': dict(layers=(1, 2, 1, 1)),
    'resnet50_gn': dict(layers=(1, 2, 1, 1)),
    'resnetv2_18': dict(layers=(1, 2, 1, 1)),
    'resnetv2_50': dict(layers=(1, 2, 1, 1), conv_layer=StdConv2d, norm_layer=GroupNormAct, stem_type='fixed'),  # BiT
    'regnetx_002': dict(depth=5, wa=60., wm=2.4), 'regnety_002': dict(depth=5, wa=60., wm=2.4),
    'regnetz_005': dict(depth=6, wa=40.),
    'convnext_atto': dict(depths=(1, 1, 2, 1)), 'convnextv2_atto': dict(depths=(1, 1, 2, 1)),
    'vit_tiny_patch16_224': dict(img_size=32, depth=3), 'deit_tiny_distilled_patch16_224': dict(img_size=32, depth=3),
    'torchvision BasicBlock': dict(layers=(1, 2, 1, 1)), 'torchvision Bottleneck': dict(layers=(1, 2, 1, 1)),
}


def small(arch, x):
    """A trained adaptive model of FAMILIES for images x."""
    torch.manual_seed(0)
    library, _, name = arch.rpartition(' ')
    if library:
        model = ResNet(getattr(resnet, name), num_classes=5, **FAMILIES[arch])
    elif name in regnet.model_cfgs:
        model = regnet.RegNet(replace(regnet.model_cfgs[name], **FAMILIES[arch]), num_classes=5)
    else:
        model = timm.create_model(name, num_classes=5, **FAMILIES[arch])
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.2, 0.6)  # or layer scales would hide the branches
    return trained(timm_aig.gate_(model.eval(), target_rate=0.5), x)


def trained(model, x):
    """The model with norms and gates as after training; each gate is open for half of the images x."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, module in model.eval().named_modules():
            if '.gate' not in name and isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
                module.weight.uniform_(0.2, 0.6, generator=generator)
                module.bias.uniform_(-0.2, 0.2, generator=generator)
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.1, 0.1, generator=generator)
                    module.running_var.uniform_(0.5, 1.5, generator=generator)
        for block in timm_aig.gated_blocks(model).values():
            gate = block.gate
            gate.fc1.weight.normal_(std=4., generator=generator)
            gate.fc2.weight.normal_(std=1., generator=generator)
            inputs = []
            hook = gate.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.extend(args))
            model(x)
            hook.remove()
            closed, opened = gate.logits(inputs[0]).unbind(1)
            scores = (opened - closed).sort().values[len(x) // 2 - 1:len(x) // 2 + 1 + len(x) % 2]
            gap = scores.diff().argmax()  # the wider: rounding, which depends on the CPU, must not change an answer
            gate.fc2.bias[0] += scores[gap:gap + 2].mean()
    return model


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def offsets(pattern):
    return np.where(np.array(pattern) > 0, FORCED, -FORCED).astype(np.float32)


def expected(model, x, pattern=None):
    """Logits and gates in PyTorch, with all gates as in the pattern [L] if given, in masked execution."""
    timm_aig.set_execution(model, 'masked')
    with torch.no_grad():
        if pattern is None:
            return timm_aig.forward_gates(model, x)
        with timm_aig.force_gates(model, torch.tensor(pattern).expand(len(x), -1)):
            return timm_aig.forward_gates(model, x)


def assert_agree(found, wanted, atol=1e-4):
    """Logits agree to atol of the largest one, and gates exactly."""
    logits, gates = wanted
    assert found[0].shape == logits.shape
    if len(logits):
        assert np.abs(found[0] - logits.numpy()).max() <= atol * max(1, logits.abs().max())
    assert np.array_equal(found[1], gates.numpy())
