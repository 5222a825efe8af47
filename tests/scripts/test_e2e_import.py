"""scripts/import_convnet_aig.py, against a model of the layout of the authors' code, written for this test."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_aig

SCRIPT = 'import_convnet_aig.py'


class Block(nn.Module):
    """A block with its gate in it. Returns its output and the gate's logits."""

    def __init__(self, inputs, channels, stride, bottleneck):
        super().__init__()
        outputs = channels * (4 if bottleneck else 1)
        widths = [(channels, 1, 1), (channels, 3, stride), (outputs, 1, 1)] if bottleneck else \
            [(channels, 3, stride), (outputs, 3, 1)]
        self.depth = len(widths)
        ins = inputs
        for i, (width, kernel, s) in enumerate(widths, start=1):
            setattr(self, f'conv{i}', nn.Conv2d(ins, width, kernel, s, kernel // 2, bias=False))
            setattr(self, f'bn{i}', nn.BatchNorm2d(width))
            ins = width
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.fc1 = nn.Conv2d(inputs, 16, 1)
        self.fc1bn = nn.BatchNorm2d(16)  # BatchNorm1d in theirs, which took 4 dimensions at the time
        self.fc2 = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        logits = self.fc2(F.relu(self.fc1bn(self.fc1(F.avg_pool2d(x, x.size(2))))))
        z = (logits[:, 1:] > logits[:, :1]).float()
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(y))
            y = F.relu(y) if i < self.depth else y
        return F.relu(self.shortcut(x) + y * z), logits.flatten(1)


class Original(nn.Module):
    """A network of the authors' layout. Returns its logits and those of its gates [B, L, 2]."""

    def __init__(self, stages, bottleneck, classes):
        super().__init__()
        self.cifar = len(stages) == 3
        width = inputs = 16 if self.cifar else 64
        self.conv1 = nn.Conv2d(3, width, 3 if self.cifar else 7, 1 if self.cifar else 2, 1 if self.cifar else 3,
                               bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layers = len(stages)
        for stage, depth in enumerate(stages):
            blocks = nn.ModuleList()
            for i in range(depth):
                channels = width * 2 ** stage
                blocks.append(Block(inputs, channels, 2 if stage and not i else 1, bottleneck))
                inputs = channels * (4 if bottleneck else 1)
            setattr(self, f'layer{stage + 1}', blocks)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.cifar else F.max_pool2d(x, 3, 2, 1)
        logits = []
        for stage in range(1, self.layers + 1):
            for block in getattr(self, f'layer{stage}'):
                x, a = block(x)
                logits.append(a)
        return self.linear(x.mean((2, 3))), torch.stack(logits, 1)


def original(stages, bottleneck, classes):
    """With weights as after a training, so that gates differ between images and blocks."""
    model = Original(stages, bottleneck, classes)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.2, 0.6)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif name.endswith('.fc1'):
                module.weight.normal_(std=4.)
            elif name.endswith('.fc2'):
                module.weight.normal_()
                module.bias.zero_()
    return model.eval()


def save(model, path, prefix='module.', counts=False):
    """As their save_checkpoint does, from inside DataParallel and by an old torch."""
    state = {prefix + k: v for k, v in model.state_dict().items() if counts or 'num_batches' not in k}
    torch.save(dict(epoch=3, state_dict=state, best_prec1=torch.tensor([71.5])), path)
    return path


@pytest.mark.parametrize('stages,bottleneck,classes,arch', [
    ((18, 18, 18), False, 10, 'cifar_resnet110_aig'), ((5, 5, 5), False, 100, 'cifar_resnet32_aig'),
    ((1, 2, 4), False, 10, 'cifar_resnet20_aig'), ((2, 2, 2, 2), False, 7, 'resnet18_aig'),
    ((3, 4, 6, 3), True, 1000, 'resnet50_aig'), ((3, 4, 23, 3), True, 5, 'resnet101_aig'),
    ((1, 2, 1, 1), True, 5, 'resnet50_aig'),
])
def test_an_imported_checkpoint_gives_the_originals_logits_and_gates(
        stages, bottleneck, classes, arch, tmp_path, run_script,
):
    model = original(stages, bottleneck, classes)
    path = save(model, tmp_path / 'model_best.pth.tar')
    assert run_script(SCRIPT, path, tmp_path / 'out', '--target-rate', '0.5') == 0
    loaded = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()
    assert loaded.pretrained_cfg['architecture'] == arch and loaded.num_classes == classes
    x = torch.randn(6, 3, 32, 32) * torch.linspace(0.2, 4, 6).view(-1, 1, 1, 1)
    gate_logits = []
    for block in timm_aig.gated_blocks(loaded).values():
        block.gate.fc2.register_forward_hook(lambda module, inputs, output: gate_logits.append(output))
    with torch.no_grad():
        logits, gates = timm_aig.forward_gates(loaded, x)
        expected, expected_gate_logits = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(gate_logits, 1), expected_gate_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(gates, (expected_gate_logits[..., 1] > expected_gate_logits[..., 0]).float())
    assert gates.shape[1] == sum(stages) and 0 < gates.mean() < 1
    assert {b.target_rate for b in timm_aig.gated_blocks(loaded).values()} == {0.5}


@pytest.mark.parametrize('prefix,counts', [('', True), ('module.', True)])
def test_checkpoints_of_newer_torch_and_without_a_wrapper_load_too(prefix, counts, tmp_path, run_script):
    model = original((3, 3, 3), False, 10)
    assert run_script(SCRIPT, save(model, tmp_path / 'c.pth.tar', prefix, counts), tmp_path / 'out') == 0
    loaded = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x)[0], rtol=1e-4, atol=1e-4)
    assert list(loaded.pretrained_cfg['mean']) == [0.4914, 0.4822, 0.4465]


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_what_is_not_a_checkpoint_of_theirs_is_refused_without_executing_it(tmp_path, capsys, run_script):
    evil, other, empty, shape, junk = (
        tmp_path / f'{name}.pth.tar' for name in ('evil', 'other', 'empty', 'shape', 'junk'))
    torch.save(dict(state_dict=Evil(str(tmp_path / 'executed'))), evil)
    torch.save(timm.create_model('resnet18').state_dict(), other)
    torch.save({}, empty)
    junk.write_bytes(b'junk' * 30)
    model = original((3, 3, 3), False, 10)
    model.layer2[1].fc1 = nn.Conv2d(7, 16, 1)
    save(model, shape)
    for path, message in (
            (evil, 'weights_only=True blocked'), (other, "none of the networks of the authors' code"),
            (empty, 'holds no state dict'), (shape, 'size mismatch for layer2.1.gate.fc1.weight'),
            (tmp_path / 'missing', f'CHECKPOINT {tmp_path / "missing"}: FileNotFoundError'),
            (junk, 'KeyError: ')):
        assert run_script(SCRIPT, path, tmp_path / 'out') == 2
        err = capsys.readouterr().err
        assert message in err and 'weights_only=False' not in err
    assert not (tmp_path / 'executed').exists() and not (tmp_path / 'out').exists()


def test_a_wrong_rate_is_named(capsys, run_script):
    assert run_script(SCRIPT, 'a', 'b', '--target-rate', '1.5') == 2
    assert '--target-rate must be a number in (0, 1)' in capsys.readouterr().err
