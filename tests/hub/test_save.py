"""save_pretrained: timm and transformers load the same model from the folder."""
import copy
import json
import logging

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

import timm_aig
from timm_aig import (
    AIGConfig,
    InputError,
    forward_gates,
    gate_,
    gated_blocks,
    save_pretrained,
    set_gate_offset,
    ungate_,
)


def reload(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


create = timm.create_model


@pytest.mark.parametrize('make,arch', [
    (lambda: create('resnet18_aig', schedule='paper', target_rate=0.3, num_classes=7), 'resnet18_aig'),
    (lambda: create('resnet50d_aig', target_rates=[1, 0.5] * 8, gate_channels=4), 'resnet50d_aig'),
    (lambda: create('ecaresnet50d_pruned_aig', gate_norm='none', in_chans=1), 'ecaresnet50d_pruned_aig'),
    (lambda: create('cifar_resnet20_aig', global_pool='catavgmax'), 'cifar_resnet20_aig'),
    (lambda: create('resnet50_aig.t06_paper'), 'resnet50_aig'),
    (lambda: gate_(create('resnet18', num_classes=5), AIGConfig()), 'resnet18_aig'),
    (lambda: gate_(create('resnet18'), AIGConfig(.25, schedule='paper', gate_channels=8, gate_norm='none')),
     'resnet18_aig'),
    (lambda: ungate_(create('cifar_resnet20_aig', num_classes=5)), 'cifar_resnet20'),
    (lambda: create('cifar_resnet20_aig', target_rate=1), 'cifar_resnet20_aig'),  # no block has a gate
    (lambda: create('vit_tiny_patch16_224', num_classes=3, depth=2), 'vit_tiny_patch16_224'),  # of one input size
])
def test_what_is_saved_loads_with_the_same_outputs_gates_and_config(make, arch, tmp_path, train_norms, train_gates):
    model = train_gates(train_norms(make())).eval()
    assert save_pretrained(model, tmp_path / 'new' / 'folder') == tmp_path / 'new' / 'folder'
    other = reload(tmp_path / 'new' / 'folder')
    size = 224 if arch.startswith('vit') else 32
    x = torch.randn(4, timm.models.get_model_args(model).get('in_chans', 3), size, size)
    with torch.no_grad():
        expected, result = forward_gates(model, x), forward_gates(other, x)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
    assert not gated_blocks(model) or 0 < expected[1].mean() < 1
    assert list(other.state_dict()) == list(model.state_dict())
    assert {n: b.target_rate for n, b in gated_blocks(other).items()} == {
        n: b.target_rate for n, b in gated_blocks(model).items()}
    assert other.pretrained_cfg['architecture'] == arch


def test_the_log_names_no_temporary_folder(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        save_pretrained(timm.create_model('cifar_resnet8_aig'), tmp_path)
    assert 'saving-' not in caplog.text
    assert logging.getLogger('timm').level == logging.NOTSET


def test_the_folder_holds_safetensors_of_the_pt_format_and_json_and_no_pickle(tmp_path):
    model = timm.create_model('resnet18_aig', num_classes=2).to(memory_format=torch.channels_last)
    save_pretrained(model, tmp_path, model_config={'label_names': ['a', 'b']})
    assert {'model.safetensors', 'config.json'} <= {file.name for file in tmp_path.iterdir()}
    assert not [f for f in tmp_path.iterdir() if f.suffix in ('.bin', '.pt', '.pth', '.pkl') or f.is_dir()]
    with safe_open(tmp_path / 'model.safetensors', 'pt') as file:
        assert file.metadata() == {'format': 'pt'}
        assert set(file.keys()) == set(model.state_dict())
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'resnet18_aig'
    assert config['model_args']['target_rate'] == 0.6
    assert config['label_names'] == ['a', 'b']


def test_loading_as_timms_scripts_do_gives_the_same_model(tmp_path, train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig', target_rate=0.3)).eval()
    save_pretrained(model, tmp_path)
    arguments = timm.models.resolve_model_input_args(f'local-dir:{tmp_path}', dict(input_size=[3, 64, 64]))
    other = timm.create_model(**arguments, pretrained=True).eval()
    x = torch.randn(4, 3, 64, 64)
    assert torch.equal(other(x), model(x)) and {b.target_rate for b in gated_blocks(other).values()} == {0.3}


def test_a_reset_head_and_pool_are_saved(tmp_path):
    model = timm.create_model('resnet18_aig', num_classes=7).eval()
    model.reset_classifier(3, global_pool='catavgmax')
    save_pretrained(model, tmp_path)
    other = reload(tmp_path)
    assert other.num_classes == 3 and other.global_pool.pool_type == 'catavgmax'
    assert torch.equal(other.fc.weight, model.fc.weight)


def test_a_full_disk_is_an_oserror_and_old_files_stay(tmp_path, monkeypatch):
    timm_aig.save_pretrained(timm.create_model('cifar_resnet20_aig'), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def save_file(*args, **kwargs):
        raise SafetensorError('I/O error: No space left on device')
    monkeypatch.setattr('timm_aig.hub.save.save_file', save_file)
    with pytest.raises(OSError, match='No space left'):
        timm_aig.save_pretrained(timm.create_model('cifar_resnet20_aig'), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_training_regularization_is_not_saved(tmp_path):
    rates = dict(drop_rate=0.2, drop_path_rate=0.1, drop_block_rate=0.1)
    model = timm.create_model('resnet18_aig', **rates)
    assert not rates.keys() & timm.models.get_model_args(model).keys()
    save_pretrained(model, tmp_path)
    assert not rates.keys() & json.loads((tmp_path / 'config.json').read_text())['model_args'].keys()
    assert reload(tmp_path).drop_rate == 0


def test_a_saved_model_takes_other_classes_and_channels_and_gives_features(tmp_path, train_norms):
    model = train_norms(timm.create_model('resnet18_aig')).eval()
    save_pretrained(model, tmp_path)
    assert reload(tmp_path, num_classes=3)(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert reload(tmp_path, in_chans=1)(torch.randn(1, 1, 32, 32)).shape == (1, 1000)
    x = torch.randn(1, 3, 64, 64)
    features = reload(tmp_path, features_only=True)(x)
    assert torch.equal(features[-1], model.forward_features(x))


def infinite_logits():
    model = create('cifar_resnet20', num_classes=3)
    torch.nn.init.constant_(model.fc.weight, 3e38)
    torch.nn.init.constant_(model.bn1.weight, 1e3)
    return model


@pytest.mark.parametrize('make,config,message', [
    (lambda: torch.nn.Linear(3, 3), None, "cannot be rebuilt from timm's registry"),
    (lambda: gate_(torch.nn.Sequential(create('resnet18').layer1)), None, "cannot be rebuilt from timm's registry"),
    (lambda: create('cifar_resnet20_aig', features_only=True), None, 'is a backbone without a head'),
    (lambda: create('cifar_resnet20_aig', num_classes=3), {'label_names': ['a', 'b']},
     'label_names has 2 names, the model 3 classes'),
    (infinite_logits, None, 'logits of this model are not finite'),
])
def test_a_model_that_cannot_be_loaded_again_is_refused_and_nothing_is_written(make, config, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save_pretrained(make(), tmp_path / 'folder', model_config=config)
    assert not (tmp_path / 'folder' / 'config.json').exists()


def test_an_unserializable_argument_leaves_the_old_folder_whole(tmp_path):
    model = timm.create_model('cifar_resnet20_aig').eval()
    save_pretrained(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    odd = timm.create_model('cifar_resnet20_aig', act_layer=torch.nn.SiLU)
    with pytest.raises(ValueError, match="'act_layer' is not serializable"):
        save_pretrained(odd, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert timm_aig.gated_blocks(reload(tmp_path))


def test_any_memory_layout_wrapper_average_and_device_type_saves_the_same_bytes(tmp_path, train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    expected = (save_pretrained(model, tmp_path / 'plain') / 'model.safetensors').read_bytes()
    views = copy.deepcopy(model)
    flat = torch.cat([p.detach().flatten() for p in views.parameters()])  # as flattened optimizers and FSDP keep them
    start = 0
    for p in views.parameters():
        p.data = flat[start:start + p.numel()].view_as(p)
        start += p.numel()
    for i, other in enumerate((
            copy.deepcopy(model).to(memory_format=torch.channels_last),
            ModelEmaV3(model),
            torch.nn.DataParallel(torch.compile(model, backend='eager')),
            torch.compile(torch.nn.DataParallel(model), backend='eager'),
            copy.deepcopy(model).train().requires_grad_(False),
            views,
    )):
        assert (save_pretrained(other, tmp_path / str(i)) / 'model.safetensors').read_bytes() == expected


def test_a_model_inside_distributed_data_parallel_is_saved(tmp_path):
    model = timm.create_model('cifar_resnet20_aig')
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        save_pretrained(torch.nn.parallel.DistributedDataParallel(model), tmp_path)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(reload(tmp_path).fc.weight, model.fc.weight)


def test_half_precision_is_saved_as_it_is(tmp_path, train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).bfloat16()
    save_pretrained(model, tmp_path)
    assert load_file(tmp_path / 'model.safetensors')['fc.weight'].dtype == torch.bfloat16
    assert torch.equal(reload(tmp_path).fc.weight, model.fc.weight.float())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_default_dtype_and_device_do_not_matter(dtype, tmp_path, train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig'))
    torch.set_default_dtype(dtype)
    try:
        with torch.device('meta'):
            save_pretrained(model, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(reload(tmp_path).fc.weight, model.fc.weight)


def test_parametrized_and_compiled_layers_are_saved_by_what_they_compute(tmp_path, train_norms, train_gates):
    torch.compiler.reset()
    model, x = train_gates(train_norms(timm.create_model('cifar_resnet20_aig'))).eval(), torch.randn(2, 3, 32, 32)
    spectral_norm(model.layer1[0].conv1)
    model.layer1[1] = torch.compile(model.layer1[1], backend='eager')
    save_pretrained(model, tmp_path)
    with torch.no_grad():
        assert torch.allclose(reload(tmp_path)(x), model(x), atol=1e-5)
    assert is_parametrized(model.layer1[0].conv1)


def test_saving_leaves_the_model_its_mode_and_the_random_numbers_alone(tmp_path):
    model = timm.create_model('cifar_resnet20_aig').train()
    timm_aig.set_execution(model, 'masked')
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    save_pretrained(model, tmp_path)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert {block.execution for block in gated_blocks(model).values()} == {'masked'}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('change,message', [
    (lambda m: [m.layer1[0].conv1.weight.data[0].fill_(float('inf'))],
     'layer1.0.conv1.weight has no values or values that are not finite'),
    (lambda m: m.to('meta'), 'conv1.weight has no values'),
    (lambda m: setattr(m, 'act1', torch.nn.Tanh()), 'timm rebuilds a model with other logits'),
    (lambda m: [m.layer3.append(copy.deepcopy(m.layer3[-1]))],
     'timm cannot rebuild this model .CifarResNet.: .*it has gates on 10 blocks'),
    (timm_aig.optimize_for_inference, 'cannot be rebuilt|cannot rebuild'),
    (lambda m: torch.ao.quantization.quantize_dynamic(m, {torch.nn.Linear}), 'save the model before it is'),
    (lambda m: setattr(m.layer1, 'forward', lambda x: x), 'forward of layer1 was replaced: unwrap the model first'),
    (lambda m: setattr(m, 'fc', torch.nn.Sequential(m.fc)),
     'Unexpected key.*If they are of adapters or pruning, merge these first'),
    (lambda m: [prune.l1_unstructured(m.layer1[0].gate.fc1, 'weight', 0.5)],
     'gate.fc1.weight is missing in the .*If they are of adapters or pruning, merge these first'),
])
def test_a_model_that_would_be_rebuilt_differently_is_refused_and_nothing_is_written(change, message, tmp_path):
    save_pretrained(create('cifar_resnet20_aig'), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    torch.manual_seed(1)
    model = create('cifar_resnet20_aig')
    other = change(model)
    with pytest.raises(InputError, match=message):
        save_pretrained(other if isinstance(other, torch.nn.Module) else model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize('arch,kwargs', [
    ('cifar_resnet20_aig', dict(num_classes=3, target_rate=0.3)), ('resnet18_aig', dict(in_chans=1, num_classes=3)),
])
def test_transformers_loads_it_with_its_label_names(arch, kwargs, tmp_path, train_norms, train_gates):
    model = train_gates(train_norms(timm.create_model(arch, **kwargs))).eval()
    save_pretrained(model, tmp_path, model_config={'label_names': ['cat', 'dog', 'owl']})
    other = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = torch.randn(8, model.in_chans, 32, 32)
    with torch.no_grad():
        (expected, expected_gates), (result, gates) = forward_gates(model, x), forward_gates(other, x)
    assert torch.equal(result.logits, expected) and torch.equal(gates, expected_gates)
    assert 0 < gates.mean() < 1 and other.config.id2label == {0: 'cat', 1: 'dog', 2: 'owl'}
    assert reload(tmp_path).pretrained_cfg['label_names'] == ['cat', 'dog', 'owl']
    again = save_pretrained(reload(tmp_path), tmp_path / 'again')
    assert json.loads((again / 'config.json').read_text()) == json.loads((tmp_path / 'config.json').read_text())


@pytest.mark.parametrize('missing', ['all', '.gate.', '.gate.offset', 'nothing'])
def test_transformers_leaves_gates_that_it_has_no_weights_for_open(missing, tmp_path, train_norms, train_gates):
    model = train_gates(train_norms(timm.create_model('cifar_resnet20_aig'))).eval()
    set_gate_offset(model, 0. if missing == '.gate.offset' else 1.)
    save_pretrained(model, tmp_path)
    if missing == 'all':
        loaded = transformers.AutoModelForImageClassification.from_config(
            transformers.AutoConfig.from_pretrained(tmp_path))
    else:
        weights = {k: v for k, v in load_file(tmp_path / 'model.safetensors').items() if missing not in k}
        save_file(weights, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        output, gates = forward_gates(loaded.eval(), x)
        expected, expected_gates = forward_gates(ungate_(model) if missing == '.gate.' else model, x)
    if missing in ('all', '.gate.'):
        assert gates.all()
        gate = loaded.timm_model.layer1[0].gate
        assert gate.fc2.bias.softmax(0)[1] > .86 and gate.offset == 0
    else:
        assert torch.equal(gates, expected_gates)
    assert missing == 'all' or torch.equal(output.logits, expected)


def test_label_names_of_a_head_that_was_replaced_are_not_saved(tmp_path):
    model = timm.create_model('cifar_resnet32_aig.fmnist_t06', pretrained=True, num_classes=3)
    assert len(model.pretrained_cfg['label_names']) == 10
    assert 'label_names' not in (save_pretrained(model, tmp_path) / 'config.json').read_text()


def test_the_pipeline_of_transformers_classifies_an_image_as_timm_does(tmp_path, train_norms):
    model = train_norms(timm.create_model('cifar_resnet20_aig', num_classes=3)).eval()
    save_pretrained(model, tmp_path, model_config={'label_names': ['cat', 'dog', 'owl']})
    image = Image.effect_noise((40, 50), 90).convert('RGB')
    answers = transformers.pipeline('image-classification', model=str(tmp_path))(image)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=reload(tmp_path)))
    with torch.no_grad():
        expected = model(transform(image)[None]).softmax(1)[0]
    scores = {answer['label']: answer['score'] for answer in answers}
    assert scores == pytest.approx(dict(zip(['cat', 'dog', 'owl'], expected.tolist())), abs=1e-3)


def test_gate_offsets_are_saved_with_the_weights_also_infinite_ones(tmp_path, train_gates):
    model = train_gates(timm.create_model('cifar_resnet20_aig')).eval()
    set_gate_offset(model, -0.75)
    save_pretrained(model, tmp_path)
    loaded = reload(tmp_path).eval()
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(forward_gates(loaded, x)[1], forward_gates(model, x)[1])
    assert {float(block.gate.offset) for block in gated_blocks(loaded).values()} == {-0.75}
    set_gate_offset(loaded, 0)
    config = json.loads((save_pretrained(loaded, tmp_path) / 'config.json').read_text())
    assert 'gate_offset' not in config['model_args']
    next(iter(gated_blocks(model).values())).gate.set_offset(1.)
    save_pretrained(model, tmp_path)
    assert torch.equal(forward_gates(reload(tmp_path).eval(), x)[1], forward_gates(model, x)[1])
    set_gate_offset(model, float('inf'))
    save_pretrained(model, tmp_path)
    assert forward_gates(reload(tmp_path).eval(), x)[1].min() == 1
