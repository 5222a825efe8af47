"""Fixtures of all tests."""
import importlib
import logging
import os
import runpy
import socket
import sys
import threading
import traceback
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

import timm_aig

pytest_plugins = ['loopback']

torch.set_num_threads(1)  # the nets are small: threads cost more than they bring, ten times more on a busy machine

# Archs whose blocks differ. The others run with the marker all_archs.
DEFAULT_ARCHS = (
    'resnet18', 'resnet50d', 'ecaresnet26t', 'resnext50_32x4d', 'resnetblur18', 'cifar_resnet20', 'seresnet18',
    'resnet50_gn')
SUITE_ARCHS = (
    'ecaresnet26t', 'cifar_resnet20', 'resnetv2_18', 'resnetv2_18d', 'regnetx_002', 'regnety_002', 'convnext_atto',
    'convnextv2_atto', 'vit_tiny_patch16_224', 'deit_tiny_patch16_224', 'res2net50_26w_4s', 'skresnet18',
    'mobilenetv3_small_050', 'mobilenetv4_conv_small_050')

# Files that take long come first, or the last one would run alone on one of the cores.
LONG = ('test_timm_suite.py', 'test_shipped.py', 'test_e2e_finetune.py', 'test_notebook.py', 'test_onnx.py')


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_generate_tests(metafunc):
    """A test with the argument `parent` runs for each static ResNet, with `suite_parent` for each static arch."""
    for argument, archs in (('parent', DEFAULT_ARCHS), ('suite_parent', SUITE_ARCHS)):
        if argument in metafunc.fixturenames:
            every = timm.list_models(module=('resnet', 'cifar_resnet')) if argument == 'parent' else [
                name.removesuffix('_aig') for name in timm.list_models('*_aig')]
            others = sorted(set(every) - set(archs))
            metafunc.parametrize(
                argument, [*archs, *(pytest.param(arch, marks=pytest.mark.all_archs) for arch in others)])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def kept(request, tmp_path_factory):
    """Makes a folder by its name for what is downloaded, in pytest's cache unless that is switched off."""
    cache = getattr(request.config, 'cache', None)
    return cache.mkdir if cache else tmp_path_factory.mktemp


@pytest.fixture
def train_norms():
    """Gives the norms of a model what training gives them, in place.

    A new model would hide errors: the last norm of each residual branch has weight 0, so every branch is 0.
    """
    def _train_norms(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, module in model.named_modules():
                if '.gate' in name or not isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                    continue
                module.weight.uniform_(0.2, 0.6)
                module.bias.uniform_(-0.2, 0.2)
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.1, 0.1)
                    module.running_var.uniform_(0.5, 1.5)
        return model

    return _train_norms


def open_some(model: nn.Module) -> nn.Module:
    """Gives the gates of a model answers that differ between samples and blocks, in place."""
    with torch.no_grad():
        for block in timm_aig.gated_blocks(model).values():
            block.gate.fc1.weight.normal_(std=4.)
            block.gate.fc2.weight.normal_(std=1.)
            block.gate.fc2.bias.zero_()
    return model


@pytest.fixture
def train_gates():
    """Gives the gates of a model answers as after training, see open_some."""
    return open_some


@pytest.fixture(scope='session')
def finetune():
    """scripts/finetune.py as a module: starting Python takes seconds."""
    return importlib.import_module('finetune')


@pytest.fixture(scope='session')
def make_images():
    """Writes a folder of images, brighter from class to class, for each split; returns it."""
    def _make_images(root: Path, splits=(('train', 16), ('validation', 7)), classes=('ape', 'bee', 'cat')) -> Path:
        generator = torch.Generator().manual_seed(0)
        for split, count in splits:
            for label, name in enumerate(classes):
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(count):
                    pixels = torch.randint(0, 160, (18, 16, 3), generator=generator) + 45 * label
                    Image.fromarray(pixels.byte().numpy()).save(folder / f'{i}.png')
        return root

    return _make_images


@pytest.fixture(scope='session')
def images(make_images, tmp_path_factory):
    """48 training and 21 validation images of 3 classes."""
    return make_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='session')
def finetune_args(images):
    """A short training on them; without where it writes."""
    return [
        '--data-dir', str(images), '--input-size', '3', '8', '8', '--num-classes', '3', '--batch-size', '8',
        '--workers', '0', '--epochs', '2', '--device', 'cpu']


@pytest.fixture(scope='session')
def static_model(finetune, finetune_args, tmp_path_factory):
    """local-dir: name of a static cifar_resnet20 trained on them."""
    output = tmp_path_factory.mktemp('static')
    args = [*finetune_args, '--static', '--model', 'cifar_resnet20', '--keep', 'last', '--output', str(output),
            '--experiment', 'x']
    assert finetune.main(args) == 0
    return f'local-dir:{output}/x'


@pytest.fixture(scope='session')
def adaptive_model(static_model, tmp_path_factory):
    """local-dir: name of that model with gates that open for some images."""
    torch.manual_seed(0)
    model = open_some(timm_aig.gate_(timm.create_model(static_model, pretrained=True)))
    return f'local-dir:{timm_aig.save_pretrained(model, tmp_path_factory.mktemp("adaptive"))}'


@pytest.fixture(scope='session')
def calibrated_model(adaptive_model, tmp_path_factory):
    """The same with a table of budgets: not measured, but with offsets that differ."""
    rows = [dict(budget=b, gate_offset=o, macs_share=b, images=9) for b, o in ((.4, -4.), (.8, 4.))]
    model = timm.create_model(adaptive_model, pretrained=True, gate_budgets=rows)
    return f'local-dir:{timm_aig.save_pretrained(model, tmp_path_factory.mktemp("calibrated"))}'


@pytest.fixture(scope='session')
def plain_loop(images):
    """Gives logits, gates and labels of the validation images by a model's name, image by image, and the model."""
    def _plain_loop(name: str):
        model = timm.create_model(name, pretrained=True).eval()
        config = timm.data.resolve_data_config(model=model)
        dataset = timm.data.ImageDataset(str(images / 'validation'), transform=timm.data.create_transform(**config))
        with torch.no_grad():
            outputs = [timm_aig.forward_gates(model, image[None]) for image, _ in dataset]
        labels = torch.tensor([label for _, label in dataset])
        return torch.cat([o for o, _ in outputs]), torch.cat([g for _, g in outputs]), labels, model

    return _plain_loop


@pytest.fixture
def fork_main(finetune, tmp_path):
    """Starts main(args) in a forked process that leads its own group, by default the main of finetune.py.

    prepare() is called there first. Returns the process id; wait(id) returns its exit code, below 0 for a signal.
    Output goes to tmp_path/stderr.
    """
    def _fork_main(args, prepare=lambda: None, main=finetune.main) -> int:
        process = os.fork()
        if process:
            return process
        code = 99
        try:
            os.setpgid(0, 0)
            log = os.open(tmp_path / 'stderr', os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(fd, 'w', buffering=1, closefd=False) for fd in (1, 2))
            logging.root.handlers.clear()  # pytest's
            tqdm.set_lock(threading.RLock())  # forked processes share its own: one killed with it blocks all
            prepare()
            code = main([*map(str, args)])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    return _fork_main


@pytest.fixture
def fork_ranks(fork_main, finetune, wait, tmp_path):
    """Runs main(args) in two processes as torchrun does; the output of each rank goes to tmp_path/stdout RANK."""
    def _fork_ranks(args, main=finetune.main) -> None:
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]

        def prepare(rank):
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
            os.dup2(os.open(tmp_path / f'stdout {rank}', os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)

        processes = [fork_main(args, partial(prepare, rank), main) for rank in range(2)]
        assert [wait(process) for process in processes] == [0, 0], (tmp_path / 'stderr').read_text()

    return _fork_ranks


@pytest.fixture
def wait():
    return lambda process: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture
def run_script(monkeypatch):
    """Runs a script of scripts/ in this process; gives its exit code."""
    def _run_script(name: str, *args) -> int:
        script = Path(__file__).parent.parent / 'scripts' / name
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
        try:
            runpy.run_path(str(script), run_name='__main__')
        except SystemExit as e:
            return e.code or 0
        return 0

    return _run_script


@pytest.fixture(params=['gathered', 'sliced'])
def slices(request, monkeypatch):
    """Run open samples gathered, which is for small ones, and as slices of the batch, which is for large ones."""
    monkeypatch.setattr('timm_aig.blocks.SLICE_NUMEL', 2 ** 30 if request.param == 'gathered' else 1)
