"""Sparse execution by rows, the form for accelerators: exact for any mix of gates, and one wait for the device a block.

Without a GPU the same code runs on the CPU. The tests marked `cuda` run it on a GPU and in half precision.
"""
import pytest
import timm
import torch
from _serving import spread_gates
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import timm_aig
from timm_aig import force_gates, forward_gates, gated_blocks, optimize_for_inference, set_execution
from timm_aig.inference.graphs import MAX_GRAPHS, GraphedForOne

SMALL = dict(layers=(1, 2, 1, 1), num_classes=5)
ARCHS = {
    'resnet18': SMALL, 'resnet50': SMALL, 'seresnet50': SMALL, 'ecaresnet26t': SMALL, 'resnetblur18': SMALL,
    'resnext50_32x4d': SMALL, 'resnet50_gn': SMALL, 'cifar_resnet20': {}, 'resnetv2_50x1_bit': {}, 'regnety_002': {},
    'convnext_atto': {}, 'vit_tiny_patch16_224': dict(img_size=64)}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest logit

needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
DEVICES = [pytest.param(('cpu', torch.float32), id='cpu')] + [
    pytest.param(('cuda', dtype), marks=needs_cuda, id=f'cuda-{dtype}'.replace('torch.', '')) for dtype in TOLERANCES]


@pytest.fixture(params=DEVICES)
def place(request, monkeypatch):
    """Device and dtype. The CPU is treated as an accelerator, on a GPU TF32 is off."""
    if request.param[0] == 'cpu':
        for module in ('blocks', 'inference.gate'):
            monkeypatch.setattr(f'timm_aig.{module}.is_on_cpu', lambda x: False)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    return request.param


def create(arch, device, dtype):
    """An adaptive model in eval whose gates differ from image to image."""
    torch.manual_seed(0)
    model = timm.create_model(f'{arch}_aig', **ARCHS[arch]).eval()
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.uniform_(p, 0.2, 0.6)
    return spread_gates(model, images(8, 'cpu', torch.float32), .5).to(device, dtype)


def images(batch, device, dtype):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@pytest.mark.parametrize('arch', ARCHS)
def test_rows_give_the_outputs_of_masked_execution(arch, place):
    device, dtype = place
    model = create(arch, device, dtype)
    optimized = optimize_for_inference(model)
    for batch in (1, 2, 7) if device == 'cpu' else (1, 2, 7, 32, 128):
        x = images(batch, device, dtype)
        mixed = torch.rand(batch, len(gated_blocks(model)), generator=torch.Generator().manual_seed(batch)) < .5
        for gates in (torch.ones_like(mixed), torch.zeros_like(mixed), mixed):
            with torch.no_grad(), force_gates(model, gates.to(device)):
                set_execution(model, 'masked')
                wanted = model(x)
                set_execution(model, 'sparse')
                found = {'sparse': model(x), 'channels_last': model(x.contiguous(memory_format=torch.channels_last))}
            with force_gates(optimized, gates.to(device)):
                found['optimized'] = optimized(x)
            for name, logits in found.items():
                difference = (logits - wanted).abs().max().item()
                assert difference <= TOLERANCES[dtype] * max(1, wanted.abs().max().item()), (name, batch)


@pytest.mark.parametrize('arch', ['cifar_resnet20', 'resnetblur18', 'regnety_002'])
def test_an_optimized_models_own_gates_answer_as_the_models(arch, place):
    device = place[0]
    model = create(arch, device, torch.float32)
    optimized = optimize_for_inference(model)
    x = images(8, device, torch.float32)
    with torch.no_grad():
        wanted = forward_gates(model, x)[1]
        assert len(wanted.unique(dim=0)) > 1
        assert torch.equal(forward_gates(optimized, x)[1], wanted)
        offset = torch.linspace(-1, 1, 8)
        with timm_aig.passes.use_gate_offset(offset):
            assert torch.equal(forward_gates(optimized, x)[1], forward_gates(model, x)[1])
        for moved in (.4, -5.):
            for m in (model, optimized):
                timm_aig.set_gate_offset(m, moved)
            assert torch.equal(forward_gates(optimized, x)[1], forward_gates(model, x)[1])
        for own in (offset, 0., 5.):  # in place of the model's
            with timm_aig.passes.use_gate_offset(own):
                found = forward_gates(optimized, x)[1]
                assert torch.equal(found, forward_gates(model, x)[1]) and found.any()


class Calls(TorchDispatchMode):
    """Names of the operators that ran, and rows of each convolution."""

    def __init__(self):
        super().__init__()
        self.names, self.rows = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] == 'convolution':
            self.rows.append(len(args[0]))
        return out


@pytest.mark.parametrize('optimized', [False, True])
def test_a_block_waits_for_the_device_once_and_computes_its_open_rows(optimized, place, monkeypatch):
    device, dtype = place
    monkeypatch.setattr('timm_aig.inference.fused.mkldnn_ops', None)
    model = create('resnet18', device, dtype)
    blocks = len(gated_blocks(model))
    run = optimize_for_inference(model) if optimized else model
    x = images(4, device, dtype)
    with torch.no_grad(), Calls() as calls:
        run(x)
    assert calls.names.count('nonzero') == blocks
    waits = {'_local_scalar_dense', 'lift_fresh', 'item', 'is_nonzero', 'equal'}
    assert not waits.intersection(calls.names), 'values went to the host, or lists to the device'
    gates = torch.zeros(4, blocks, device=device)
    gates[1:, 1] = 1  # three images open the second block, which is not the first of its stage
    with force_gates(run, gates), torch.no_grad(), Calls() as calls:
        run(x)
    convs = 1 + sum(block.downsample is not None for block in gated_blocks(model).values())  # stem and shortcuts
    assert sorted(calls.rows) == [3, 3] + [4] * convs


def record_operators(function, sample_args, pool):
    """torch.cuda.make_graphed_callables without a GPU: replays the same operators on the same memory."""
    program = make_fx(function)(*(x.clone() for x in sample_args))
    static_output = program(*sample_args)

    def replay(*args):
        for static, own in zip(sample_args, args):
            static.copy_(own)
        return static_output.copy_(program(*sample_args))

    return replay


@pytest.fixture
def graphs(place, monkeypatch):
    """On a CPU, CUDA graphs are imitated and nothing is compiled."""
    if place[0] == 'cpu':
        monkeypatch.setattr('timm_aig.inference.optimize.is_on_cpu', lambda x: False)
        monkeypatch.setattr('timm_aig.inference.optimize.GRAPH_DEVICE', 'cpu')
        monkeypatch.setattr('timm_aig.inference.fused.mkldnn_ops', None)
        monkeypatch.setattr(torch, 'compile', lambda function, **kwargs: function)
        monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, 'make_graphed_callables', record_operators)


@pytest.mark.parametrize('arch', ['resnet18', 'resnet50', 'cifar_resnet20', 'seresnet50', 'regnety_002'])
def test_cuda_graphs_give_the_outputs_of_masked_execution(arch, place, graphs):
    device, dtype = place
    model = create(arch, device, dtype)
    optimized = optimize_for_inference(model, compile=True)
    blocks = len(gated_blocks(model))
    found, wanted = [], []
    for batch in (1, 1, 1, 1, 3, 1):  # a graph runs more than once, and again after another batch size
        x = images(8, device, dtype)[len(found):][:batch]
        gates = torch.rand(batch, blocks, generator=torch.Generator().manual_seed(len(found))) < .5
        with torch.no_grad(), force_gates(model, gates.to(device)):
            set_execution(model, 'masked')
            wanted.append(model(x))
        with force_gates(optimized, gates.to(device)):
            found.append(optimized(x))
    for logits, expected in zip(found, wanted):  # none of them was overwritten by a later one
        assert (logits - expected).abs().max() <= TOLERANCES[dtype] * max(1, expected.abs().max())


def test_cuda_graphs_are_of_single_images_and_of_few_shapes(place, graphs):
    device, dtype = place
    model = create('cifar_resnet20', device, dtype)
    features = timm.create_model('cifar_resnet20_aig', features_only=True).eval().to(device, dtype)
    for net in (model, features):
        timm_aig.set_gate_offset(net, 1e4)
        optimized = optimize_for_inference(net, compile=True)
        kept = []
        for image, size in enumerate((32, 48, 64, 40, 56, 32)):
            x = images(8, device, dtype)[image:image + 1, :, :size, :size]
            kept.append((optimized(x), net(x)))
        graphs_of = [f.graphs for m in optimized.modules() for f in vars(m).values() if isinstance(f, GraphedForOne)]
        assert len(graphs_of) >= 9 + 9 + 2 + 1  # residual branches, gates, shortcuts, stem
        assert [len(found) for found in graphs_of] == [MAX_GRAPHS] * len(graphs_of)  # of 5 shapes
        before = [*map(dict, graphs_of)]
        optimized(images(2, device, dtype))
        assert graphs_of == before
        for own, wanted in kept:
            pairs = zip(own, wanted) if isinstance(own, list) else [(own, wanted)]
            for a, b in pairs:
                assert (a - b).abs().max() <= TOLERANCES[dtype] * max(1, b.abs().max())
