"""optimize_for_inference: the outputs of the model, from the open samples only."""
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import timm_aig
from timm_aig import InputError
from timm_aig.compat import mkldnn_ops
from timm_aig.inference.fused import FusedConv

ARCHS = ['resnet18', 'resnet26d', 'ecaresnet26t', 'resnetblur18', 'seresnext26d_32x4d', 'resnet50_gn', 'cifar_resnet20',
         'regnety_002']


def create(arch, **kwargs):
    """A model in eval whose branches, shortcuts and gates all matter: random norms, gates that differ by image."""
    torch.manual_seed(0)
    model = timm.create_model(arch, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
            torch.nn.init.uniform_(module.weight, 0.5, 1.)
            torch.nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.5)
    for block in timm_aig.gated_blocks(model).values():
        torch.nn.init.normal_(block.gate.fc1.weight, std=4 * block.gate.fc1.in_features ** -0.5)
        torch.nn.init.normal_(block.gate.fc2.weight)
        torch.nn.init.zeros_(block.gate.fc2.bias)
    return model


def images(batch, arch='resnet18'):
    size = 32 if 'cifar' in arch else 64
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.fixture(scope='module')
def models():
    """(adaptive, optimized) by arch and micro-batch, made once."""
    made = {}

    def get(arch, micro_batch=None):
        if arch not in made:
            made[arch] = create(f'{arch}_aig')
        if (arch, micro_batch) not in made:
            made[arch, micro_batch] = timm_aig.optimize_for_inference(made[arch], micro_batch=micro_batch)
        return made[arch], made[arch, micro_batch]
    return get


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.usefixtures('slices')
def test_outputs_and_gates_equal_the_models_for_any_pattern_batch_layout_and_micro_batch(models, data):
    arch = data.draw(st.sampled_from(ARCHS))
    batch = data.draw(st.integers(1, 9))
    model, optimized = models(arch, data.draw(st.sampled_from([None, 1, 2, 4, 16])))
    rate = data.draw(st.sampled_from([0., 0.3, 0.7, 1.]))
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    open = torch.rand(batch, len(timm_aig.gated_blocks(model)), generator=generator) < rate
    x = images(batch, arch).contiguous(memory_format=layout)
    before = x.clone()
    timm_aig.set_execution(model, 'masked')
    with torch.no_grad(), timm_aig.force_gates(model, open):
        expected = model(x)
    timm_aig.set_execution(model, 'auto')
    with timm_aig.force_gates(optimized, open):
        actual, gates = timm_aig.forward_gates(optimized, x)
    assert_same(actual, expected)
    assert torch.equal(gates, open.float())
    assert torch.equal(x, before)


@pytest.mark.parametrize('arch', ARCHS)
def test_the_gates_answer_as_the_models_do(models, arch):
    model, optimized = models(arch)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in optimized.modules())
    x = images(6, arch)
    with torch.no_grad():
        expected, gates = timm_aig.forward_gates(model, x)
    actual, fast_gates = timm_aig.forward_gates(optimized, x)
    assert torch.equal(fast_gates, gates)
    assert 0 < gates.mean() < 1
    assert_same(actual, expected)


def test_synchronized_batch_norms_are_folded_too(models):
    arch = 'resnet18'
    adaptive, fast = models(arch)
    synchronized = timm_aig.optimize_for_inference(timm.layers.convert_sync_batchnorm(copy.deepcopy(adaptive)))
    with torch.no_grad():
        expected, gates = timm_aig.forward_gates(fast, images(9, arch))
        actual, own = timm_aig.forward_gates(synchronized, images(9, arch))
    assert torch.equal(own, gates) and 0 < gates.mean() < 1
    assert_same(actual, expected)


def test_an_empty_batch_gives_no_logits(models):
    adaptive, fast = models('cifar_resnet20')
    with torch.no_grad():
        assert fast(images(3, 'cifar')[:0]).shape == adaptive(images(3, 'cifar')[:0]).shape == (0, 10)


def test_gates_can_be_drawn(models):
    adaptive, fast = models('cifar_resnet20')
    x = images(2, 'cifar').repeat(200, 1, 1, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        first, expected = (timm_aig.forward_gates(m, x, sample=True)[1] for m in (fast, adaptive))
        probability = adaptive.layer1[0].gate.logits(adaptive.maxpool(adaptive.act1(adaptive.bn1(adaptive.conv1(x)))))
    for image in (0, 1):
        p = probability[image].softmax(0)[1].item()
        assert first[image::2, 0].mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 200) ** .5 + 1e-6)
    assert first.mean().item() == pytest.approx(expected.mean().item(), abs=.05) and 0 < first.mean() < 1


def test_autocast_casts_the_convolutions(models):
    adaptive, fast = models('resnetblur18')
    opened = torch.ones(2, 8)
    dtypes = set()
    handles = [m.register_forward_hook(lambda m, args, y: dtypes.add(y.dtype)) for m in fast.modules()
               if isinstance(m, FusedConv)]
    with torch.no_grad(), timm_aig.force_gates(fast, opened), timm_aig.force_gates(adaptive, opened):
        expected = adaptive(images(2))
        with torch.autocast('cpu', torch.bfloat16):
            actual = fast(images(2))
    for handle in handles:
        handle.remove()
    assert dtypes == {torch.bfloat16}
    assert 0 < (actual - expected).abs().max() < .1 * expected.abs().max()


def test_nested_outputs_of_micro_batches_are_joined():
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = create('cifar_resnet20_aig')

        def forward(self, x):
            return {'logits': self.body(x), 'more': (x.mean((1, 2, 3)), [x.amax((1, 2, 3))])}

    model = Named().eval()
    x = images(5, 'cifar')
    with torch.no_grad():
        actual, expected = timm_aig.optimize_for_inference(model, micro_batch=2)(x), model(x)
    assert_same(actual['logits'], expected['logits'])
    (mean, (largest,)) = actual['more']
    assert isinstance(actual['more'], tuple) and torch.allclose(mean, x.mean((1, 2, 3)))
    assert torch.equal(largest, x.amax((1, 2, 3)))


def test_an_optimized_model_takes_the_arguments_that_the_model_takes():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = create('cifar_resnet20_aig')

        def forward(self, x, scale=1., *, names=()):
            return self.body(x if isinstance(x, torch.Tensor) else torch.stack(x)) * scale, list(names)

    model, x = Scaled().eval(), images(5, 'cifar')
    fast = timm_aig.optimize_for_inference(model, micro_batch=2)
    for args, kwargs in [((x,), {}), ((x, 2.), {}), ((), dict(x=x)), ((x,), dict(names='ab')), ((list(x),), {})]:
        with torch.no_grad():
            (logits, names), (expected, expected_names) = fast(*args, **kwargs), model(*args, **kwargs)
        assert_same(logits, expected)
        assert names == expected_names
    for args, kwargs in [((), {}), ((x, 1., ()), {}), ((x,), dict(unknown=1))]:
        for call in (model, fast):
            with pytest.raises(TypeError):
                call(*args, **kwargs)


def test_a_model_that_mixes_the_images_of_a_batch_gets_the_whole_batch():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = create('cifar_resnet20_aig')

        def forward(self, x, labels=None):
            logits = self.body(x)
            return logits - logits.mean(0), logits.mean(), labels

    model, x = Mixed().eval(), images(3, 'cifar').repeat(80, 1, 1, 1)  # more than a micro-batch
    with torch.no_grad():
        (centred, mean, labels), expected = timm_aig.optimize_for_inference(model)(x), model(x)
    assert_same(centred, expected[0])
    assert_same(mean, expected[1])
    assert labels is None
    with pytest.raises(InputError, match='micro_batch must not be given: an output of the model, tensor'):
        timm_aig.optimize_for_inference(model, micro_batch=2)(x)


def test_hooks_on_replaced_modules_are_an_error_and_others_are_kept():
    backbone = timm.create_model('resnet18_aig', features_only=True, feature_cls='hook').eval()
    with pytest.raises(ValueError, match=r'forward hooks on .*, which is replaced'):
        timm_aig.optimize_for_inference(backbone)
    model, seen = create('cifar_resnet20_aig'), []
    model.fc.register_forward_hook(lambda *args: seen.append(args))
    timm_aig.optimize_for_inference(model)(images(2, 'cifar'))
    assert len(seen) == 1
    model.layer1[0].conv1.forward = lambda x: 0 * x  # as accelerate's hooks are
    with pytest.raises(InputError, match=r'forward hooks on layer1.0.conv1, which is replaced'):
        timm_aig.optimize_for_inference(model)


class Adapter(torch.nn.Module):
    """Adds a low-rank update, and has the layer's attributes, as a LoRA layer does."""

    def __init__(self, layer, channels):
        super().__init__()
        self.base_layer = layer
        self.update = torch.nn.Sequential(torch.nn.Linear(channels, 2), torch.nn.Linear(2, len(layer.weight)))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('base_layer'), name)

    def forward(self, x):
        return self.base_layer(x) + self.update(x if x.ndim == 2 else x.movedim(1, 3)).movedim(-1, 1)


class Standardized(torch.nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), True), self.bias)


class ScaledBlock(timm_aig.GatedBasicBlock):
    def residual(self, x):
        return 2 * super().residual(x)


class Negated(timm_aig.Gate):
    def logits(self, x):
        return -super().logits(x)


def change_class(module, cls):
    module.__class__ = cls


def change_gate(model):
    gate = model.layer4[0].gate
    gate.fc1, gate.fc2 = Adapter(gate.fc1, 256), Adapter(gate.fc2, 16)
    torch.nn.init.normal_(gate.fc2.update[1].weight, std=9.)


def change_conv(model):
    model.layer1[1].conv1 = Adapter(model.layer1[1].conv1, 64)


def compile_modules(model):
    model.layer1[1] = torch.compile(model.layer1[1], backend='eager')
    model.layer2[0].gate = torch.compile(model.layer2[0].gate, backend='eager')
    model.conv1 = torch.compile(model.conv1, backend='eager')


CHANGES = {
    'adapter on a gate': change_gate,
    'adapter on a convolution': change_conv,
    'hook on a gate': lambda m: m.layer1[0].gate.register_forward_hook(lambda gate, args, z: 1 - z),
    'weight_norm': lambda m: weight_norm(m.layer1[1].conv1),
    'spectral_norm': lambda m: [spectral_norm(layer) for layer in (m.layer1[1].conv2, m.layer4[0].gate.fc1)],
    'quantized': lambda m: torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}, torch.qint8, inplace=True),
    'other convolution': lambda m: change_class(m.layer1[1].conv2, Standardized),
    'other block': lambda m: change_class(m.layer1[1], ScaledBlock),
    'other gate': lambda m: change_class(m.layer2[1].gate, Negated),
    'compiled modules': compile_modules,
}


@pytest.mark.parametrize('change', CHANGES)
def test_what_a_layer_computes_counts_not_the_weight_it_has(change):
    torch.compiler.reset()
    model, x = create('resnet18_aig', gate_norm='none'), images(6)
    with torch.no_grad():
        before = model(x)
        CHANGES[change](model.eval())
        for module in model.modules():
            module.training = False  # of new modules
        expected, gates = timm_aig.forward_gates(model, x)
        logits, fast_gates = timm_aig.forward_gates(timm_aig.optimize_for_inference(model), x)
        assert_same(model(x), expected)  # the model is as it was
    assert torch.allclose(before, expected, rtol=1e-3) == (change in ('weight_norm', 'compiled modules'))
    assert torch.equal(fast_gates, gates)
    assert_same(logits, expected)


def test_pruned_layers_are_copied_and_counted():
    model, x = create('cifar_resnet20_aig'), images(4, 'cifar')
    expected = timm_aig.compute_cost(model)
    for layer in (model.layer1[1].gate.fc1, model.layer1[1].conv1):
        prune.l1_unstructured(layer, 'weight', .5)
    model(x)  # with grad: what the hooks compute is no leaf, which deepcopy refuses
    assert timm_aig.compute_cost(model) == expected
    with torch.no_grad():
        assert_same(timm_aig.optimize_for_inference(model)(x), model(x))


def test_forced_gates_for_another_batch_size_are_an_error_in_micro_batches_too(models):
    _, fast = models('cifar_resnet20', 2)
    with timm_aig.force_gates(fast, torch.ones(6, 9)):
        with pytest.raises(ValueError, match='for the 4 images of the input, not for 6'):
            fast(images(4, 'cifar'))


@pytest.mark.usefixtures('slices')
def test_an_activation_other_than_relu_is_applied_to_closed_samples():
    model = create('resnet18_aig', act_layer='silu')
    x = images(4)
    with torch.no_grad():
        expected, gates = timm_aig.forward_gates(model, x)
    assert 0 < gates.mean() < 1
    for micro_batch in (1, 4):
        actual, fast_gates = timm_aig.forward_gates(timm_aig.optimize_for_inference(model, micro_batch=micro_batch), x)
        assert torch.equal(fast_gates, gates)
        assert_same(actual, expected)


def test_the_model_itself_is_unchanged():
    model = create('resnet18_aig')
    state = copy.deepcopy(model.state_dict())
    modules = {name: type(m) for name, m in model.named_modules()}
    timm_aig.optimize_for_inference(model)(images(2))
    assert {name: type(m) for name, m in model.named_modules()} == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.usefixtures('slices')
def test_collected_features_are_not_overwritten_by_later_blocks():
    for arch in ('resnet18_aig', 'resnet26d_aig', 'cifar_resnet20_aig'):
        model = create(arch, features_only=True)
        optimized = timm_aig.optimize_for_inference(model, micro_batch=4)
        x = images(4, arch)
        open = torch.rand(4, len(timm_aig.gated_blocks(model)), generator=torch.Generator().manual_seed(1)) < 0.5
        with torch.no_grad(), timm_aig.force_gates(model, open):
            expected = model(x)
        with timm_aig.force_gates(optimized, open):
            actual = optimized(x)
        assert len(actual) == len(expected) == len(model.feature_info)
        for a, e in zip(actual, expected):
            assert_same(a, e)


def test_other_methods_of_the_model_run_optimized_too(models):
    model, optimized = models('resnet26d')
    x = images(3)
    with torch.no_grad():
        assert_same(optimized.forward_features(x), model.forward_features(x))
        for a, e in zip(optimized.forward_intermediates(x)[1], model.forward_intermediates(x)[1]):
            assert_same(a, e)
    assert optimized.num_classes == model.num_classes


def convolution_rows(optimized, x, open):
    """How many samples the branch of each block computed."""
    rows = {}
    handles = []
    for name, block in timm_aig.gated_blocks(optimized).items():
        rows[name] = 0

        def hook(module, args, name=name):
            rows[name] += len(args[0])
        handles.append(block.branch.register_forward_pre_hook(hook))
    with timm_aig.force_gates(optimized, open):
        optimized(x)
    for handle in handles:
        handle.remove()
    return list(rows.values())


@pytest.mark.parametrize('micro_batch', [1, 3, 8])
@pytest.mark.usefixtures('slices')
def test_a_branch_computes_only_the_open_samples(models, micro_batch):
    _, optimized = models('resnet18', micro_batch)
    count = len(timm_aig.gated_blocks(optimized))
    for rate in (0., 0.5, 1.):
        open = torch.rand(8, count, generator=torch.Generator().manual_seed(2)) < rate
        assert convolution_rows(optimized, images(8), open) == open.sum(0).tolist()


@pytest.mark.usefixtures('slices')
def test_the_rest_of_a_batch_does_not_change_the_output_of_a_sample(models):
    for micro_batch in (1, 3, 8):
        _, optimized = models('resnet18', micro_batch)
        x = images(8)
        expected = torch.cat([optimized(x[i:i + 1]) for i in range(8)])
        assert 0 < timm_aig.forward_gates(optimized, x)[1].mean() < 1
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        assert_same(optimized(x), expected)
        assert_same(optimized(x[order]), expected[order])


@pytest.mark.usefixtures('slices')
def test_nans_in_a_sample_do_not_reach_its_neighbours(models):
    for model in models('resnet18', 4):
        x = images(4)  # one micro-batch
        with torch.no_grad():
            expected = model(x)
            x[2] = float('nan')
            actual = model(x)
        keep = [0, 1, 3]
        assert_same(actual[keep], expected[keep])


def test_many_threads_can_share_a_model(models):
    for model in models('cifar_resnet20'):
        requests = [images(1 + i % 3, 'cifar_resnet20') + i / 100 for i in range(200)]
        with torch.no_grad():
            expected = [timm_aig.forward_gates(model, x) for x in requests]
        assert 0 < torch.cat([gates for _, gates in expected]).mean() < 1

        cold = copy.deepcopy(model)  # packs its weights while it serves

        def serve(x, model=cold):
            with torch.no_grad():
                return timm_aig.forward_gates(model, x)
        with ThreadPoolExecutor(8) as pool:
            actual = list(pool.map(serve, requests))
        for (y, gates), (y0, gates0) in zip(actual, expected):
            assert_same(y, y0)
            assert torch.equal(gates, gates0)


def test_an_optimized_model_can_be_copied_pickled_and_saved_after_use(models, tmp_path):
    _, optimized = models('cifar_resnet20')
    x = images(3, 'cifar')
    expected = optimized(x)
    torch.save(optimized, tmp_path / 'model.pt')  # another protocol than pickle's own
    assert torch.equal(torch.load(tmp_path / 'model.pt', weights_only=False)(x), expected)
    assert torch.equal(copy.deepcopy(optimized)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(optimized))(x), expected)


def test_another_image_size_and_dtype_give_the_models_outputs(models):
    model, optimized = models('resnet18')
    for size in (64, 96, 65, 64):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert_same(optimized(x), model(x))
    model, optimized = copy.deepcopy(model).bfloat16(), copy.deepcopy(optimized).bfloat16()
    x = images(3).bfloat16()
    open = torch.rand(3, len(timm_aig.gated_blocks(model)), generator=torch.Generator().manual_seed(3)) < 0.5
    with torch.no_grad(), timm_aig.force_gates(model, open):
        expected = model(x)
    with timm_aig.force_gates(optimized, open):
        actual = optimized(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.05 * expected.abs().max().item())


@pytest.mark.skipif(mkldnn_ops is None, reason='this torch has no fused convolutions')
def test_packed_weights_are_shared_between_shapes_and_the_number_of_shapes_is_limited(monkeypatch):
    monkeypatch.setattr('timm_aig.inference.fused.MAX_SHAPES', 5)
    optimized = timm_aig.optimize_for_inference(create('resnet26d'))
    for batch in (1, 2, 3, 4, 5, 6):
        x = images(batch)
        assert_same(optimized(x), torch.cat([optimized(x[i:i + 1]) for i in range(batch)]))
    for conv in (m for m in optimized.modules() if isinstance(m, FusedConv)):
        assert 0 < len(conv._packed) <= 5 and len(conv._layouts) <= 3  # one on most CPUs
        assert {id(weight) for weight in conv._packed.values()} <= {id(weight) for weight in conv._layouts.values()}


def test_weights_that_change_are_packed_again(models):
    optimized = copy.deepcopy(models('resnet18')[1])
    x = images(2)
    expected = optimized(x)
    for conv in (m for m in optimized.modules() if isinstance(m, FusedConv)):
        conv._apply(torch.zeros_like)
    assert not torch.allclose(optimized(x), expected)
    with pytest.raises(RuntimeError, match='takes no weights'):
        optimized.load_state_dict({})


def test_plain_convolutions_serve_where_there_are_no_fused_ones(models, monkeypatch):
    model, optimized = models('resnet18')
    x = images(3)
    monkeypatch.setattr('timm_aig.inference.fused.mkldnn_ops', None)
    with torch.no_grad():
        assert_same(optimized(x), model(x))


@pytest.mark.parametrize('whole, numel', [(True, 2 ** 17), (False, 2 ** 30), (False, 1)], ids=[
    'one graph', 'by blocks, gathered', 'by blocks, sliced'])
def test_a_compiled_model_keeps_the_outputs_over_batch_sizes(whole, numel, monkeypatch):
    monkeypatch.setattr('timm_aig.blocks.SLICE_NUMEL', numel)
    torch.compiler.reset()
    model = create('cifar_resnet20_aig')
    timm_aig.ungate_(model)
    timm_aig.gate_(model, timm_aig.AIGConfig(target_rates=[1, .5] + [1] * 7))
    model.layer1, model.layer3 = model.layer1[1:], torch.nn.Sequential()  # two stages are enough to compile
    model.reset_classifier(0)
    if not whole:
        model = torch.nn.Sequential(model)  # no forward of timm
    torch._dynamo.utils.counters.clear()
    optimized = timm_aig.optimize_for_inference(model, compile=True)
    for batch in (1, 3, 2, 5):
        x = images(batch, 'cifar')
        for open in (torch.ones(batch, 1), torch.zeros(batch, 1), torch.arange(batch)[:, None] % 2):
            with torch.no_grad(), timm_aig.force_gates(model, open.bool()):
                expected = model(x)
            with timm_aig.force_gates(optimized, open.bool()):
                assert_same(optimized(x), expected)
    assert not whole or not torch._dynamo.utils.counters['graph_break']
    if whole:  # offsets are data of the graph: another one compiles nothing
        graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
        for offset in (1., -50., 50.):
            timm_aig.set_gate_offset(model, offset)
            timm_aig.set_gate_offset(optimized, offset)
            with torch.no_grad():
                assert_same(optimized(x), model(x))
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] <= graphs + 1  # one without forced gates


def test_training_optimizing_twice_and_bad_arguments_are_errors(models):
    model, optimized = models('resnet18')
    assert optimized.eval() is optimized
    with pytest.raises(RuntimeError, match='cannot train'):
        optimized.train()
    with pytest.raises(InputError, match='optimized already'):
        timm_aig.optimize_for_inference(optimized)
    with pytest.raises(InputError, match='micro_batch must be at least 1, not 0'):
        timm_aig.optimize_for_inference(model, micro_batch=0)
    with pytest.raises(InputError, match=r'calibration is not taken any more: .* export_onnx'):
        timm_aig.optimize_for_inference(model, calibration=[images(2)])
    with pytest.raises(InputError, match='model has weights without values'):
        timm_aig.optimize_for_inference(timm.create_model('cifar_resnet20_aig', device='meta'))
    with pytest.raises(InputError, match='has no residual blocks that timm_aig knows'):
        timm_aig.optimize_for_inference(torch.nn.Linear(2, 2))


def test_the_gate_offset_of_an_optimized_model_can_be_moved_but_not_its_execution(models):
    optimized = copy.deepcopy(models('cifar_resnet20')[1])
    for offset, rate in ((100., 1.), (-100., 0.)):
        timm_aig.set_gate_offset(optimized, offset)
        for batch in (1, 3):
            assert timm_aig.forward_gates(optimized, images(batch, 'cifar'))[1].mean() == rate
    with pytest.raises(ValueError, match='always sparse'):
        timm_aig.set_execution(optimized, 'masked')


def test_a_compiled_model_is_not_copied():
    """The graphs of the copy would be the original's: another gate offset of the copy would have no effect."""
    optimized = timm_aig.optimize_for_inference(create('cifar_resnet20_aig'), compile=True)
    with pytest.raises(RuntimeError, match='copy that and optimize the copy'):
        copy.deepcopy(optimized)
