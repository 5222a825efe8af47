"""The parts of the page: uploads, networks at a budget, timing, drawings."""
import copy
import csv
import io
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import loading
import network as space_network
import numpy as np
import pytest
import timm
import torch
from drawing import draw_answers, draw_curve, draw_heatmap, draw_images, draw_network, draw_pair
from hypothesis import given, settings, strategies as st
from images import KEPT_SIDE, MAX_BYTES, UploadError, read_image
from loading import CASCADE, load_network, shipped_models
from network import ModelError, Network
from PIL import Image

import timm_aig
from timm_aig.budget import BudgetPoint, set_budget_table

SHIPPED = 'cifar_resnet32_aig.fmnist_t06'
APP = Path(__file__).parents[2] / 'scripts' / 'space' / 'app.py'
RED = Image.new('RGB', (8, 6), (255, 0, 0))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def png(width, height, depth=8, colour=0, pixels=b''):
    """A PNG file as its specification says, whatever Pillow would write."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')


def saved(image, kind, **kwargs):
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


@pytest.fixture
def read(tmp_path):
    """Reads bytes as an upload."""
    def _read(content):
        path = tmp_path / 'secret' / 'x.png'
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return read_image(path)
    return _read


BAD = {
    'zero bytes': (b'', 'empty'),
    'not an image': (b'<html>no image</html>', 'not an image'),
    'PostScript, which Pillow would run': (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'not an image'),
    '100 megapixels': (saved(Image.new('1', (10_000, 10_000)), 'PNG'), '100 megapixels (10000 x 10000), the limit'),
    '4,000 megapixels': (png(63_000, 63_000), 'too many pixels, the limit is 64 megapixels'),
    'a stripe': (saved(Image.new('L', (2100, 100)), 'PNG'), 'at most 20 times'),
    'cut off': (saved(PHOTO, 'JPEG')[:1500], 'damaged'),
    'a header alone': (png(28, 28), 'damaged'),
}


@pytest.mark.parametrize('content,message', BAD.values(), ids=BAD)
def test_a_bad_upload_gets_a_sentence_without_paths(read, content, message):
    with pytest.raises(UploadError, match=re.escape(message)) as error:
        read(content)
    assert 'secret' not in str(error.value) and str(error.value).endswith('.')


def test_a_file_that_is_too_large_is_not_opened(tmp_path):
    with open(tmp_path / 'x', 'wb') as file:
        file.truncate(MAX_BYTES + 10_000_000)  # sparse
    with pytest.raises(UploadError, match='60 MB, the limit is 50'):
        read_image(tmp_path / 'x')


def test_16_bits_are_scaled_and_not_clipped(read):
    grey = np.array([[0, 257, 32768, 65535]], dtype='>u2')
    image = read(png(4, 1, 16, 0, b'\0' + grey.tobytes()))
    assert image.mode == 'L' and np.asarray(image).tolist() == [[0, 1, 128, 255]]
    colour = np.array([[[65535, 32768, 0]]], dtype='>u2')
    image = read(png(1, 1, 16, 2, b'\0' + colour.tobytes()))
    assert image.mode == 'RGB' and image.getpixel((0, 0)) == (255, 128, 0)


@pytest.mark.parametrize('values', [[[-1., 0., 3.]], [[0., .25, 1.]]])
def test_floats_are_scaled_from_their_range(read, values):
    image = read(saved(Image.fromarray(np.array(values, dtype=np.float32)), 'TIFF'))
    assert np.asarray(image)[0].tolist() == [0, 64, 255]


@pytest.mark.parametrize('kind,image,pixel', [
    ('JPEG', RED.convert('CMYK'), (255, 0, 0)), ('PNG', RED.convert('P'), (255, 0, 0)), ('WEBP', RED, (255, 0, 0)),
    ('PNG', RED.convert('1'), None), ('PNG', Image.new('RGBA', (8, 6), (0, 0, 0, 0)), (255, 255, 255)),
    ('PNG', Image.new('RGBA', (8, 6), (9, 8, 7, 255)), (9, 8, 7)), ('PNG', Image.new('LA', (8, 6), (0, 0)), 255),
    ('BMP', Image.new('L', (8, 6), 7), 7),
])
def test_every_kind_of_pixel_becomes_grey_or_rgb(read, kind, image, pixel):
    read_back = read(saved(image, kind))
    assert read_back.size == (8, 6) and read_back.mode in ('L', 'RGB')
    if pixel is not None:
        assert np.abs(np.subtract(read_back.getpixel((3, 3)), pixel)).max() <= 3


def test_a_photo_is_turned_as_its_exif_says(read):
    image = RED.copy()
    image.paste((0, 0, 255), (0, 0, 4, 6))  # its left half is blue
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise: what was left is on top
    result = read(saved(image, 'JPEG', exif=exif, quality=100, subsampling=0))
    assert result.size == (6, 8)
    assert result.getpixel((3, 0))[2] > 200 and result.getpixel((3, 7))[0] > 200


@pytest.mark.parametrize('kind', ['GIF', 'PNG', 'TIFF'])
def test_of_several_frames_the_first_is_taken(read, kind):
    frames = [Image.new('RGB', (8, 6), colour) for colour in ('red', 'lime', 'blue')]
    image = read(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert image.getpixel((2, 2))[0] > 250 and image.getpixel((2, 2))[1] < 5


def test_a_large_image_is_kept_small(read):
    image = read(saved(Image.new('L', (4100, 3000), 77), 'PNG'))
    assert KEPT_SIDE <= min(image.size) <= 2 * KEPT_SIDE and image.getpixel((5, 5)) == 77


@settings(deadline=None, max_examples=100)
@given(data=st.data(), start=st.sampled_from(
    [saved(PHOTO, kind) for kind in ('PNG', 'JPEG', 'GIF', 'TIFF', 'WEBP', 'BMP', 'PPM')]))
def test_damage_of_any_kind_gives_an_image_or_a_sentence(tmp_path_factory, data, start):
    content = bytearray(start)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 300) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / 'damaged'
    path.write_bytes(content[:data.draw(st.integers(0, len(content)))])
    try:
        assert read_image(path).mode in ('L', 'RGB')
    except UploadError as e:
        assert str(path) not in str(e)


@pytest.fixture(scope='module')
def shipped():
    return load_network(SHIPPED)


@pytest.fixture(scope='module')
def images(shipped):
    """Inputs whose gates answer differently."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, *shipped.input_size, generator=generator) * scale for scale in (.3, 1., 3.)]


@pytest.fixture
def partly_gated(train_gates):
    """A network in which some blocks have no gate."""
    torch.manual_seed(3)
    return Network('partly gated', train_gates(
        timm.create_model('cifar_resnet20_aig', target_rate=.5, schedule='paper')))


def make_model(*points):
    """The shipped model with the budgets {budget: offset} given."""
    model = timm.create_model(SHIPPED, pretrained=True).eval()
    set_budget_table(model, [BudgetPoint(budget, offset, budget, 100) for budget, offset in points])
    return model


BUDGETS = (.3, -6.), (.5, -2.), (.62, 0.), (.8, 4.)


def test_a_run_gives_what_the_model_gives_and_the_gates_probabilities(images):
    model = make_model()
    network, logits = Network('x', copy.deepcopy(model)), []
    for block in timm_aig.gated_blocks(model).values():
        block.gate.fc2.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    for x in images:
        logits.clear()
        with torch.inference_mode():
            output, gates = timm_aig.forward_gates(model, x)
        run = network.run(x).passes[0]
        assert torch.equal(run.probabilities, output[0].softmax(0)) and torch.equal(run.gates, gates)
        assert run.macs == network.stages[0].cost.executed(gates).item()
        assert run.opens == [pair.softmax(0)[1].item() for pair in logits] and run.threshold == 0.5
        assert [p > run.threshold for p in run.opens] == (run.gates[0] > 0).tolist()


def test_the_other_answer_is_that_of_all_blocks(images):
    model = make_model()
    network = Network('x', copy.deepcopy(model))
    for x in images:
        with torch.inference_mode(), timm_aig.force_gates(model, torch.ones(1, 15)):
            expected = model(x)[0].softmax(0)
        other = network.run(x).passes[1]
        torch.testing.assert_close(other.probabilities, expected)
        assert other.macs == network.stages[0].cost.static


@pytest.mark.parametrize('threshold', [0., .6, 1.])
def test_a_cascade_needs_the_stages_that_it_runs(images, threshold):
    torch.manual_seed(0)
    small = timm.create_model(
        'cifar_resnet8', in_chans=1, pretrained_cfg_overlay=dict(input_size=(1, 28, 28)), num_classes=10).eval()
    cascade = timm_aig.Cascade([small, (make_model(*BUDGETS), .5), make_model()], threshold).eval()
    network = Network('x', cascade)
    assert network.slider is None and 'no budget' in draw_curve(network, None)
    assert not draw_heatmap(network, network.run(images[0])).strip()
    for x in images:
        with torch.inference_mode():
            rounds = cascade.rounds(x)
        run = network.run(x)
        assert run.needed == rounds.stages.item()
        assert sum(one.macs for one in run.passes[:run.needed]) == rounds.macs.item()
        torch.testing.assert_close(run.passes[run.needed - 1].probabilities, rounds.logits[0].softmax(0))
        needed = 'Second stage: not needed.' if run.needed == 1 else 'Second stage: needed.'
        assert needed in draw_answers(network, run) and needed[:-1].replace(':', '') in draw_pair(
            network, [('x', RED, run)])
        assert draw_network(network, run).count('<h3>') == run.needed


def test_the_cascade_of_the_shipped_models_is_the_calibrated_one():
    network = load_network(CASCADE)
    with open(APP.parents[2] / 'hub_configs' / 'results' / 'fmnist_cascades.csv', newline='') as file:
        row = next(csv.DictReader(file))
    assert CASCADE == f"cascade of {row['first']} and {row['second']}"
    assert network.thresholds == (float(row['threshold']),)
    for stage, name in zip(network.stages, (row['first'], row['second'])):
        weights = timm.create_model(name, pretrained=True).state_dict()
        assert all(torch.equal(v, weights[key]) for key, v in stage.model.state_dict().items())


def test_without_budgets_the_slider_moves_the_offset():
    network = Network('x', make_model())
    assert not network.slider.table and network.slider.low <= network.slider.value == 0 <= network.slider.high
    assert 'No accuracies' in draw_curve(network, 0)
    x = torch.zeros(1, 1, 28, 28)
    runs = [network.run(x, offset).passes[0] for offset in (-5, 0, 5)]
    assert runs[0].gates.sum() < runs[1].gates.sum() < runs[2].gates.sum()
    assert [run.threshold for run in runs] == pytest.approx([0.9933071, 0.5, 0.0066929], abs=1e-6)


def test_the_slider_sets_calibrated_budgets_as_set_budget_does(images):
    network, model = Network('x', make_model(*BUDGETS)), make_model(*BUDGETS)
    assert network.slider[1:] == (30, 80, 1, 62)
    for percent in (30, 43, 62, 80):
        timm_aig.set_budget(model, percent / 100)
        for x in images:
            with torch.inference_mode():
                output, gates = timm_aig.forward_gates(model, x)
            run = network.run(x, percent).passes[0]
            assert torch.equal(run.gates, gates) and torch.equal(run.probabilities, output[0].softmax(0))


@pytest.mark.parametrize('typed,shown,said', [
    (5, 30, ', not 5'), (-1e9, 30, ', not -1e+09'), (80.5, 80, ', not 80.5'), (None, 62, ''), ('<b>', 62, '')])
def test_a_typed_value_out_of_the_range_gets_a_sentence(images, typed, shown, said):
    network = Network('x', make_model(*BUDGETS))
    assert network.run(images[0], typed).value == shown
    curve = draw_curve(network, typed)
    assert f'Type a number from 30 to 80{said}. Shown: {shown}.' in curve and '<b>' not in curve
    assert 'Type a number' not in draw_curve(network, shown)


def test_the_curve_goes_through_what_was_calibrated_and_marks_the_budget():
    model = make_model()
    set_budget_table(model, [BudgetPoint(b, o, b, 200, top1) for b, o, top1 in ((.4, -2., 90.), (.6, 0., 94.))])
    network = Network('x', model)
    drawn = draw_curve(network, 45)
    assert 'points="30.0,100.0 315.0,10.0"' in drawn and 'cx="101.2" cy="77.5"' in drawn
    assert 'budget 45%: 91.0% of 200 calibration images right' in drawn
    assert 'budget 60%: 94.0%' in draw_curve(network, 60)


def test_tabs_with_different_budgets_do_not_disturb_each_other(images):
    network = Network('x', make_model(*BUDGETS))
    jobs = [(x, percent) for x in images for percent in (30, 50, 80)]
    expected = [network.run(*job).passes[0].gates.tolist() for job in jobs]
    assert len({str(gates) for gates in expected}) > 3
    differ, timings = [], []

    def tab(number):
        for i in range(20):
            index = (number * 2 + i) % len(jobs)
            if network.run(*jobs[index]).passes[0].gates.tolist() != expected[index]:
                differ.append(index)

    def timer():
        timings.append(network.measure(images[0], network.run(images[0], 50)))

    threads = [threading.Thread(target=tab, args=(number,)) for number in range(4)] + [threading.Thread(target=timer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not differ and all(ms > 0 for ms in timings[0])


def test_the_timing_is_of_the_run_and_ends_when_it_is_not_wanted(shipped, images):
    run = shipped.run(images[0], shipped.slider.low)
    timing = shipped.measure(images[0], run)
    assert len(timing) == 2 and all(0 < ms < 1e4 for ms in timing)
    asked = []
    assert shipped.measure(images[0], run, lambda: len(asked) < 3 and not asked.append(0)) is None
    assert len(asked) == 3
    stage, one = shipped.stages[0], run.passes[0]
    with torch.inference_mode(), timm_aig.force_gates(stage.fast, one.gates):  # what is timed is what is shown
        output, gates = timm_aig.forward_gates(stage.fast, images[0])
    assert torch.equal(gates, one.gates)
    torch.testing.assert_close(output[0].softmax(0), one.probabilities, rtol=1e-4, atol=1e-5)


def test_an_answer_without_confidence_is_an_answer():
    model = timm.create_model('cifar_resnet20_aig', num_classes=1000)
    model.fc.bias.data[7] = 1.
    network = Network('x', model)
    assert f'<td>{network.classes[7]} 0%</td>' in draw_answers(network, network.run(torch.zeros(1, 3, 32, 32)))


def test_the_times_are_the_medians_of_the_turns(shipped, images, monkeypatch):
    times = iter([9, 9, 9, 9, *[1, 4, 2, 1, 3, 6, 9, 3, 5, 5]])  # two turns warm up
    monkeypatch.setattr(space_network.Stage, 'milliseconds', lambda stage, x, gates: next(times))
    monkeypatch.setattr(space_network, 'TURNS', 5)
    assert shipped.measure(images[0], shipped.run(images[0])) == [3, 4]


def test_colour_images_become_grey_and_grey_ones_colour_for_the_network(shipped, partly_gated):
    for image in (RED, RED.convert('L')):
        assert shipped.tensor(image).shape == (1, 1, 28, 28) and shipped.crop(image).size == (28, 28)
        assert partly_gated.tensor(image).shape == (1, 3, 32, 32) and partly_gated.crop(image).mode == 'RGB'


@pytest.mark.parametrize('crop_mode', ['center', 'border', 'squash'])
def test_the_crop_that_is_shown_is_what_the_network_gets(crop_mode):
    model = timm.create_model('cifar_resnet20_aig', pretrained_cfg_overlay=dict(
        input_size=(3, 32, 32), crop_pct=.9, crop_mode=crop_mode, mean=(0., 0., 0.), std=(1., 1., 1.)))
    network, photo = Network('x', model), PHOTO.resize((90, 50))
    shown = np.asarray(network.crop(photo)).transpose(2, 0, 1)[None] / 255
    torch.testing.assert_close(torch.from_numpy(shown).float(), network.tensor(photo))


@pytest.mark.parametrize('name,message', [
    ('nonsense', 'must be cifar_resnet32_aig.fmnist, '),
    ('resnet50', 'must be cifar_resnet32_aig.fmnist, '),
    ('file:///etc/passwd', 'must be cifar_resnet32_aig.fmnist, '),
    ('hf-hub:../../etc', 'is not a name of a model on the Hub'),
    ('local-dir:/no/such/folder', 'no config.json'),
])
def test_a_model_that_cannot_be_loaded_gets_a_sentence(name, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        load_network(name)


@pytest.mark.parametrize('config,message', [
    ('{', 'cannot be loaded'),
    ('{"architecture": "cifar_resnet20", "num_classes": 2}', 'this page shows adaptive models'),
    ('{"architecture": "resnet18_aig", "pretrained_cfg": {"input_size": [3, 60000, 60000]}}', 'cannot be loaded'),
    ('{"architecture": "no_such_aig", "pretrained_cfg": {}}', 'cannot be loaded'),
    ('{"architecture": "resnet50_aig", "pretrained_cfg": {}, "model_args": {"base_width": 5000}}',
     'at most 300,000,000'),
    ('{"architecture": "resnet50_aig", "pretrained_cfg": {}, "model_args": {"layers": [3, 4, 99999, 3]}}',
     'has model_args in its config.json that are too large'),
    ('{"cascade": 3}', 'cannot be loaded'),
    ('{"cascade": {"stages": [{"model": "../x", "budget": null, "threshold": 1}]}}', 'a stage names no model_<number>'),
    ('{"cascade": {"stages": [{"model": "model_1", "budget": null, "threshold": 1}]}}', 'no config.json'),
    (json.dumps({'cascade': {'stages': [{'model': 'model_1'}] * 99}}), 'has 99 stages; this page runs at most 4'),
])
def test_a_folder_of_any_content_is_refused_in_a_sentence(tmp_path, config, message):
    (tmp_path / 'config.json').write_text(config)
    with pytest.raises(ModelError, match=message) as error:
        load_network(f'local-dir:{tmp_path}')
    assert 'site-packages' not in str(error.value)


def test_a_saved_cascade_is_loaded_unless_its_models_are_too_large(tmp_path, monkeypatch):
    models = [timm.create_model(name, num_classes=3).eval() for name in ('cifar_resnet8', 'cifar_resnet14_aig')]
    timm_aig.Cascade(models, .7).save_pretrained(tmp_path)
    network = load_network(f'local-dir:{tmp_path}')
    assert network.thresholds == (.7,) and [len(stage.gated) for stage in network.stages] == [0, 6]
    loading._load.cache_clear()
    monkeypatch.setattr(loading, 'MAX_PARAMETERS', 100_000)  # less than both, more than one
    with pytest.raises(ModelError, match='parameters'):
        load_network(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('name', [
    'config.json', 'model_1/config.json', 'rates.csv', 'execution_rates.png', 'model.safetensors'])
def test_files_that_are_too_large_are_refused_before_they_are_downloaded(monkeypatch, name):
    class Hub:
        def model_info(self, repo_id, revision, files_metadata):
            assert (repo_id, revision, files_metadata) == ('alice/large', 'v1', True)
            files = [(name, 2 * loading.MAX_BYTES), ('model.bin', 10 ** 12), ('README.md', None)]
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files])

    monkeypatch.setattr(loading, 'hf_hub_download', None)
    monkeypatch.setattr(loading, 'HfApi', Hub)
    with pytest.raises(ModelError, match='has 3,000,000,000 bytes to load; this page loads at most 1,500,000,000'):
        load_network('alice/large@v1')


def test_models_that_are_static_or_do_not_take_pictures_are_refused():
    with pytest.raises(ModelError, match='static'):
        Network('x', timm.create_model('cifar_resnet20'))
    for size, kwargs in (((3, 4096, 4096), {}), ((4, 32, 32), dict(in_chans=4))):
        model = timm.create_model('cifar_resnet20_aig', **kwargs)
        model.pretrained_cfg = dict(model.pretrained_cfg, input_size=size)
        with pytest.raises(ModelError, match='this page makes 1 or 3 channels and at most 1024'):
            Network('x', model)


def test_a_space_does_not_read_folders_of_its_server(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, 'ON_A_SPACE', True)
    with pytest.raises(ModelError, match='must be') as error:
        load_network(f' local-dir:{tmp_path} ')
    assert 'local-dir:folder' not in str(error.value)


def test_the_drawing_says_of_every_block_in_order_whether_it_ran(shipped, partly_gated, images):
    for network, x in ((shipped, images[0]), (partly_gated, torch.randn(1, 3, 32, 32))):
        run, stage = network.run(x), network.stages[0]
        drawn, one = draw_network(network, run), run.passes[0]
        states = re.findall(r'<li class="(\w+)".*?<b>(\w+)</b>', drawn)
        assert [a for a, _ in states] == [b for _, b in states]  # a word for each colour
        assert [state != 'always' for state, _ in states] == [name in stage.gated for name in stage.blocks]
        assert [state == 'run' for state, _ in states if state != 'always'] == (one.gates[0] > 0).tolist()
        assert re.findall(r'<br>([\d.]+)</li>', drawn) == [f'{p:.3f}' for p in one.opens]
        ran = sum(state != 'skipped' for state, _ in states)
        assert f'Adaptive: {ran} of {len(stage.blocks)} blocks run' in drawn


def test_the_answers_have_class_blocks_macs_and_time_of_both(shipped, images):
    run = shipped.run(images[0])
    share = run.passes[0].macs / shipped.stages[0].cost.static
    assert 'being measured' in draw_answers(shipped, run)
    drawn = draw_answers(shipped, run, [3., 2.])
    assert f'medians of {space_network.TURNS} turns' in drawn and '<td>3.0</td>' in drawn and '<td>2.0</td>' in drawn
    assert f'({share:.0%})' in drawn and '52.7 (100%)' in drawn and '<td>15 of 15</td>' in drawn
    assert shipped.classes[run.passes[0].probabilities.argmax()] in drawn


def make_folder(folder, rates=None, picture=None, **config):
    timm_aig.save_pretrained(timm.create_model('cifar_resnet20_aig', num_classes=3), folder, model_config=config)
    if rates is not None:
        (folder / 'rates.csv').write_text(rates)
    if picture is not None:
        (folder / 'execution_rates.png').write_bytes(picture)
    return load_network(f'local-dir:{folder}')


def drawn_heatmap(network):
    return draw_heatmap(network, network.run(torch.randn(1, 3, 32, 32)))


RATES = '\n'.join([
    ','.join(['class', 'group', 'images', *[f'layer{stage}.{block}' for stage in (1, 2, 3) for block in range(3)]]),
    ','.join(['ape', 'x', '5', *['0.25'] * 9]), ','.join(['bee', 'x', '0', *['nan'] * 9]),
    ','.join(['cat', 'x', '5', *['1'] * 9])])


def test_the_heatmap_is_a_table_with_the_predicted_class_marked(tmp_path):
    network = make_folder(tmp_path, RATES, label_names=['ape', '<b>', 'cat'])
    run = network.run(torch.randn(1, 3, 32, 32))
    table = draw_heatmap(network, run)
    assert table.count('>25</td>') == 9 and table.count('<td>-</td>') == 9 and table.count('>100</td>') == 9
    assert table.count('<tr class=this>') == 1 and '&lt;b&gt;</th>' in table and '<b>' not in table
    marked = re.search(r'▸ (.*?)</th>', table)[1]
    assert marked == ['ape', '&lt;b&gt;', 'cat'][run.passes[0].probabilities.argmax()]


@pytest.mark.parametrize('rates', ['a,b\n1,2', '\n'.join(RATES.splitlines()[:2]), RATES.replace('0.25', '2.5')])
def test_a_foreign_or_wrong_table_is_not_shown(tmp_path, rates):
    assert 'No execution rates come with this model' in drawn_heatmap(make_folder(tmp_path, rates))


def test_without_a_table_the_published_picture_is_shown(tmp_path):
    drawn = drawn_heatmap(make_folder(tmp_path / 'a', picture=saved(RED, 'PNG')))
    assert '<img src="data:image/png' in drawn and 'alt="Heatmap' in drawn and '<td' not in drawn
    assert 'No execution rates' in drawn_heatmap(make_folder(tmp_path / 'b', picture=b'<script>'))


@pytest.mark.parametrize('name', [name for name in shipped_models() if '.fmnist_' in name])
def test_the_heatmap_of_a_shipped_model_is_beside_its_weights(name):
    network = load_network(name)
    assert len(network.rates) == 10
    assert {len(row) for row in network.rates} == {len(network.stages[0].gated)}


def test_text_from_outside_is_escaped(shipped, images):
    assert '<script>' not in draw_images(RED, '<script>"', shipped)
    assert '<script>' not in draw_pair(shipped, [('<script>"', RED, shipped.run(images[0]))])


def test_help_comes_without_torch_and_gradio_and_a_wrong_model_is_one_line(run_script, capsys):
    code = f'import runpy, sys\nsys.argv = ["app.py", "--help"]\ntry:\n    runpy.run_path({str(APP)!r}, run_name=' \
           '"__main__")\nexcept SystemExit:\n    print({"torch", "gradio"} & set(sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, check=True)
    assert '--port' in done.stdout and done.stdout.endswith('set()\n')
    assert run_script('space/app.py', '--model', 'nonsense') == 2
    error = capsys.readouterr().err
    assert error.startswith('error: --model: must be ') and error.count('\n') == 1


@pytest.mark.parametrize('port, problem', [
    (None, '--port: Cannot find empty port'), (99999999, '--port must be from 1 to 65535, not 99999999'),
    (0, '--port must be from 1 to 65535'),
])
def test_a_port_that_cannot_be_used_is_named(run_script, capsys, port, problem):
    with socket.create_server(('127.0.0.1', 0)) as server:
        code = run_script('space/app.py', '--port', server.getsockname()[1] if port is None else port)
    assert code == 2 and problem in capsys.readouterr().err
