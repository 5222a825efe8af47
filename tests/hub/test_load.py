"""Loading folders of unknown origin: bad configs, damaged weights and pickles give errors and execute nothing."""
import json
import logging
import os
import pickle
import random
import struct
import traceback

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint

from timm_aig import gated_blocks, save_pretrained
from timm_aig.convert import checkpoint_filter_fn


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A saved model, the smallest there is."""
    torch.manual_seed(0)
    model = timm.create_model('cifar_resnet20_aig', layers=(1, 1, 1), target_rates=(0.5, 0.5, 1))
    return save_pretrained(model, tmp_path_factory.mktemp('saved'))


@pytest.fixture
def executed(tmp_path):
    """A file that exists once Evil(executed) was unpickled."""
    return tmp_path / 'executed'


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def load(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs)


def changed(folder, new, change):
    """A copy of a folder with another config.json."""
    new.mkdir(exist_ok=True)
    config = json.loads((folder / 'config.json').read_text())
    change(config)
    (new / 'config.json').write_text(json.dumps(config))
    if not (new / 'model.safetensors').exists():
        os.link(folder / 'model.safetensors', new / 'model.safetensors')
    return new


@pytest.mark.parametrize('name,value', [('input_size', '3x32x32'), ('num_classes', '10')])
def test_a_size_of_another_type_is_an_error_that_names_the_file(folder, tmp_path, name, value):
    new = changed(folder, tmp_path / 'new', lambda config: config['pretrained_cfg'].update({name: value}))
    if name == 'num_classes':  # the one beside pretrained_cfg wins
        changed(folder, new, lambda config: config.update(num_classes=value))
    with pytest.raises(ValueError, match=r'new/config\.json describes no cifar_resnet20_aig'):
        load(new)


@pytest.mark.parametrize('args,message', [
    (dict(block='os.system'), 'config.json .* AttributeError'),
    (dict(pretrained_filter_fn='eval'), 'config.json .*pretrained_filter_fn'),
    (dict(base_width=64), 'config.json .*base_width'), (dict(layers=3), 'config.json .*TypeError'),
    (dict(gate_channels=0), 'gate_channels'), (dict(target_rates=[2, 1, 1]), r'target_rates\[0\] must be'),
    (dict(target_rates=[0.5] * 4), 'target_rates has 4'), (dict(schedule='x'), 'schedule must be'),
    (dict(target_rates=[0.5, 1, 1]), 'gates on 2 blocks'), (dict(gate_channels=8), 'gate_channels'),
    (dict(layers=[1, 1, 2]), 'target_rates has 3'), (dict(gate_offset='x'), 'could not convert'),
    (dict(gate_budgets=7), 'gate_budgets must be'),
    (dict(channels=[]), 'config.json .* IndexError'),
])
def test_a_wrong_model_argument_is_named(folder, tmp_path, args, message):
    new = changed(folder, tmp_path / 'new', lambda config: config['model_args'].update(args))
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(new)


def test_an_unknown_field_or_architecture_is_named(folder, tmp_path):
    new = changed(folder, tmp_path / 'new', lambda config: config['pretrained_cfg'].update(evil=1))
    with pytest.raises(ValueError, match=r'config\.json .*evil'):
        load(new)
    changed(folder, new, lambda config: config.update(architecture='../../evil'))
    with pytest.raises(RuntimeError, match=r'Unknown model \(\.\./\.\./evil\)'):
        load(new)
    changed(folder, new, lambda config: config.pop('architecture'))
    with pytest.raises(KeyError, match='architecture'):
        load(new)
    (new / 'config.json').write_text('{"architecture": ')
    with pytest.raises(json.JSONDecodeError):
        load(new)
    (new / 'config.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'Config file not found: .*config\.json'):
        load(new)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda inner:
    st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=6)
FIELDS = (
    'architecture', 'num_classes', 'num_features', 'global_pool', 'model_args', 'pretrained_cfg', 'label_names',
    'model_args.target_rate', 'model_args.target_rates', 'model_args.gate_channels', 'model_args.gate_norm',
    'model_args.gate_offset', 'model_args.gate_budgets', 'model_args.schedule', 'model_args.layers',
    'model_args.in_chans', 'model_args.global_pool', 'model_args.block', 'model_args.norm_layer',
    'model_args.act_layer', 'model_args.channels', 'model_args.features_only', 'model_args.pretrained',
    'model_args.cache_dir',
    'pretrained_cfg.input_size', 'pretrained_cfg.num_classes', 'pretrained_cfg.first_conv', 'pretrained_cfg.classifier',
    'pretrained_cfg.url', 'pretrained_cfg.file', 'pretrained_cfg.source', 'pretrained_cfg.hf_hub_id',
    'pretrained_cfg.hf_hub_filename', 'pretrained_cfg.custom_load', 'pretrained_cfg.state_dict',
    'pretrained_cfg.label_offset', 'pretrained_cfg.mean', 'pretrained_cfg.architecture', 'pretrained_cfg.evil',
)


def test_generated_configs_are_refused_or_give_the_weights_of_the_folder(folder, tmp_path):
    weights = load_file(folder / 'model.safetensors')
    new = changed(folder, tmp_path / 'new', lambda config: None)
    counts = dict(refused=0, loaded=0)

    @settings(max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3), st.sets(st.sampled_from(FIELDS[:6])))
    def check(changes, removed):
        def change(config):
            for field, value in changes.items():
                *parents, name = field.split('.')
                target = config[parents[0]] if parents else config
                if isinstance(target, dict):
                    target[name] = value
            for name in removed:
                config.pop(name, None)

        changed(folder, new, change)
        try:
            model = load(new)
        except (ValueError, RuntimeError) as e:  # torch's own where a shape does not fit
            assert str(e)
            counts['refused'] += 1
            return
        except (AttributeError, KeyError, TypeError) as e:  # timm's own, before it calls the entry point
            assert e.__traceback__ and 'entry_points.py' not in str(traceback.extract_tb(e.__traceback__)[1:])
            counts['refused'] += 1
            return
        counts['loaded'] += 1  # the changed field is unused or fits the weights
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in weights.items()
                   if name in state and not name.startswith('fc.'))

    check()
    assert counts['refused'] >= 100 and sum(counts.values()) >= 200


def header(data):
    (length,) = struct.unpack('<Q', data[:8])
    return length, json.loads(data[8:8 + length])


def with_header(data, change):
    """The same weights with a changed header."""
    length, content = header(data)
    change(content)
    text = json.dumps(content).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + length:]


def damage_header(change):
    """A damage to the entry of a weight in the header: change(entries, name of the weight, rng)."""
    def _damage(data, length, rng):
        names = [n for n in header(data)[1] if n != '__metadata__' and not n.endswith('num_batches_tracked')]
        return with_header(data, lambda entries: change(entries, rng.choice(names), rng))
    return _damage


NAMES = ['../../etc/passwd', 'layer1.0.gate.__class__', 'a' * 10000, '\x00', 'layer9.9.gate.fc1.weight']
LENGTHS = [0, 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1]
DAMAGES = {  # of a safetensors file with a header of `length`
    'cut': lambda data, length, rng: data[:rng.randrange(len(data))],
    'longer': lambda data, length, rng: data + rng.randbytes(rng.randrange(1, 100)),
    'length': lambda data, length, rng: struct.pack('<Q', rng.choice([*LENGTHS, length - 1, length + 1])) + data[8:],
    'header': lambda data, length, rng: data[:(at := rng.randrange(8, 8 + length))] + rng.randbytes(1) + data[at + 1:],
    'noise': lambda data, length, rng: rng.randbytes(rng.randrange(300)),
    'name': damage_header(lambda entries, name, rng: entries.update({rng.choice(NAMES): entries.pop(name)})),
    'missing': damage_header(lambda entries, name, rng: entries.pop(name)),
    'shape': damage_header(lambda entries, name, rng: entries[name]['shape'].append(rng.choice([0, 2, 2 ** 62, -1]))),
    'offsets': damage_header(lambda entries, name, rng: entries[name].update(
        data_offsets=[rng.randrange(-5, 2 ** 40), 2 ** 41])),
    'dtype': damage_header(lambda entries, name, rng: entries[name].update(
        dtype=rng.choice(['F64', 'I8', 'os.system', '', 'F32x']))),
}


@pytest.mark.parametrize('kind', DAMAGES)
def test_damaged_weights_are_refused_with_an_error_or_are_the_same_weights(kind, folder, tmp_path):
    data = (folder / 'model.safetensors').read_bytes()
    weights = load_file(folder / 'model.safetensors')
    new = changed(folder, tmp_path / 'new', lambda config: None)
    (new / 'model.safetensors').unlink()
    rng = random.Random(0)
    refused = 0
    for i in range(25):
        (new / 'model.safetensors').write_bytes(DAMAGES[kind](data, header(data)[0], rng))
        try:
            model = load(new, **({} if i % 2 else dict(num_classes=3)))  # other heads load without strict=True
        except (RuntimeError, ValueError) as e:
            assert str(e)
            refused += 1
            continue
        state = model.state_dict()
        assert kind in ('header', 'length', 'longer', 'name', 'missing')
        assert all(torch.equal(value, state[name]) for name, value in weights.items()
                   if not name.startswith('fc.') and not name.endswith('num_batches_tracked'))
    assert refused >= 15


def test_a_header_that_is_too_long_is_an_error(folder, tmp_path):
    new = changed(folder, tmp_path / 'new', lambda config: None)
    (new / 'model.safetensors').unlink()
    (new / 'model.safetensors').write_bytes(struct.pack('<Q', 2 ** 40) + b'{}')
    with pytest.raises(RuntimeError, match=r'weights of cifar_resnet20_aig .* safetensors'):
        load(new)


def test_a_weight_of_another_shape_or_without_values_is_named(folder, tmp_path):
    new = changed(folder, tmp_path / 'new', lambda config: None)
    state = load_file(folder / 'model.safetensors')
    (new / 'model.safetensors').unlink()
    save_file({**state, 'layer2.0.conv1.weight': torch.zeros(1, 2, 3, 3)}, new / 'model.safetensors')
    with pytest.raises(RuntimeError, match=r'size mismatch for layer2\.0.conv1.weight'):
        load(new)
    state.pop('layer2.0.conv1.weight')
    save_file(state, new / 'model.safetensors')
    for kwargs in ({}, dict(num_classes=3), dict(features_only=True)):
        with pytest.raises(RuntimeError, match=r'layer2\.0.conv1.weight'):
            load(new, **kwargs)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pth', 'other.pth.tar'])
def test_a_folder_with_a_malicious_pickle_executes_nothing(folder, tmp_path, name, executed):
    new = changed(folder, tmp_path / 'new', lambda config: None)
    torch.save(dict(state_dict=Evil(executed)), new / name)
    load(new)  # safetensors come first
    (new / 'model.safetensors').unlink()
    for evil in (None, pickle.dumps(Evil(executed))):  # torch.save's format, and a plain pickle
        if evil:
            (new / name).write_bytes(evil)
        with pytest.raises(RuntimeError, match='weights_only'):
            load(new)
    assert not executed.exists()


def test_an_adaptive_checkpoint_loads_into_the_plain_parent_without_its_gates(tmp_path, caplog, train_norms):
    model = train_norms(timm.create_model('resnet18_aig', schedule='paper')).eval()
    file = str(save_pretrained(model, tmp_path) / 'model.safetensors')
    x = torch.randn(2, 3, 32, 32)
    with caplog.at_level(logging.WARNING):
        static = timm.create_model('resnet18').eval()
        load_checkpoint(static, file, filter_fn=checkpoint_filter_fn)
    assert '2 gates' in caplog.text
    assert torch.equal(static(x), model(x))  # the gates were open
    created = timm.create_model(
        'resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=file), pretrained_filter_fn=checkpoint_filter_fn)
    assert torch.equal(created.eval()(x), static(x))


def test_the_cifar_parents_take_an_adaptive_checkpoint_by_themselves(tmp_path, caplog, train_norms):
    model = train_norms(timm.create_model('cifar_resnet20_aig')).eval()
    overlay = dict(file=str(save_pretrained(model, tmp_path) / 'model.safetensors'))
    with caplog.at_level(logging.WARNING):
        static = timm.create_model('cifar_resnet20', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert '9 gates' in caplog.text and not gated_blocks(static)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(static(x), model(x))
