"""Data sets: bad input, unreadable images, held-out images, loader workers."""
import os
import shutil
import signal
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from _common import error_text
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from timm_aig import InputError
from timm_aig.training.data import (
    class_names,
    convert_images,
    hold_out,
    label_names_of,
    match_classes,
    open_dataset,
    read_images,
    readable_images,
    start_worker,
)


def to_tensor(image):
    return torch.tensor(list(image.getdata())).double().mean()


def opened(root, split='train', **kwargs):
    dataset = open_dataset('folder', str(root), split, **kwargs)
    dataset.transform = to_tensor
    return dataset


@pytest.fixture
def broken(make_images, tmp_path):
    """3 classes with 4 images in each split; the second image of class bee is unreadable."""
    root = make_images(tmp_path / 'broken', splits=(('train', 4), ('validation', 4)))
    for split in ('train', 'validation'):
        (root / split / 'bee' / '1.png').write_bytes(b'no image')
    return root


def test_a_folder_gives_its_images_labels_and_class_names(images):
    train, val = opened(images, is_training=True), opened(images, 'validation')
    assert (len(train), len(val)) == (48, 21)
    assert [label for _, label in val] == [0] * 7 + [1] * 7 + [2] * 7
    assert class_names(train) == class_names(val) == ['ape', 'bee', 'cat']
    means = torch.tensor([float(image) for image, _ in val]).view(3, 7).mean(1)
    assert means[0] < means[1] < means[2]


def test_an_unreadable_training_image_is_replaced_by_the_next_one_and_counted_once(broken):
    dataset = opened(broken, is_training=True)
    assert dataset[5] == dataset[6] and dataset[5] == dataset[5]
    assert readable_images(dataset).failed.nonzero().tolist() == [[5]]
    assert dataset[4] != dataset[5]


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (3, 'RGB')])
def test_images_of_16_bits_are_scaled_and_those_of_32_bits_are_unreadable(images, tmp_path, channels, mode):
    root, ramp = shutil.copytree(images, tmp_path / 'images'), np.arange(0, 65536, 256).reshape(16, 16)
    folder = root / 'validation' / 'ape'
    Image.fromarray(ramp.astype(np.uint16)).save(folder / '0.png')
    Image.fromarray(ramp.astype(np.float32)).save(folder / '1.tiff')
    (folder / '1.tiff').rename(folder / '1.png')
    dataset = open_dataset('folder', str(root), 'validation')
    dataset.transform = np.asarray
    convert_images(dataset, channels)
    image = Image.fromarray((ramp // 257).astype(np.uint8)).convert(mode)
    assert np.array_equal(dataset[0][0], np.asarray(image)) and dataset[0][1] == 0 and dataset[1][1] == -1


def test_images_to_calibrate_an_export_on_are_scaled_too(tmp_path):
    ramp = np.arange(0, 65536, 256).reshape(16, 16)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / '0.png')
    config = dict(input_size=(1, 16, 16), mean=(0.,), std=(1.,), crop_pct=1.)
    image, = read_images(str(tmp_path), config, 1)
    assert torch.allclose(image[0], torch.from_numpy(ramp // 257 / 255).float(), atol=1e-6)


def test_an_unreadable_evaluation_image_is_black_and_has_no_label(broken):
    dataset = opened(broken, 'validation')
    assert dataset[5] == (0., -1)
    assert [label for _, label in dataset] == [0, 0, 0, 0, 1, -1, 1, 1, 2, 2, 2, 2]


def test_unreadable_images_of_loader_workers_are_counted_in_the_main_process(broken):
    dataset = opened(broken, 'validation')
    labels = torch.cat([labels for _, labels in DataLoader(dataset, 4, num_workers=2)])
    assert (labels == -1).sum() == 1
    assert readable_images(dataset).failed.sum() == 1


@pytest.mark.parametrize('is_training', [True, False])
def test_an_unreadable_image_can_be_an_error_that_names_the_file(broken, is_training):
    dataset = opened(broken, is_training=is_training, unreadable='error')
    with pytest.raises(InputError, match=r'cannot read .*/train/bee/1.png, UnidentifiedImageError'):
        dataset[5]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_missing_field_is_an_error_and_not_an_unreadable_image(images, workers):
    dataset = opened(images)
    dataset.reader = {}
    with pytest.raises(InputError) as error:
        next(iter(DataLoader(dataset, 1, num_workers=workers, sampler=[0])))
    assert error_text(error.value) == 'input_key and target_key must name fields of the data set: KeyError: 0'
    assert not dataset.failed.any()


def test_a_training_set_without_a_readable_image_is_an_error(broken):
    dataset = opened(broken, is_training=True)
    for file in (broken / 'train').rglob('*.png'):
        file.write_bytes(b'')
    with pytest.raises(InputError, match='no training image can be read'):
        dataset[0]


def test_held_out_images_are_the_same_in_every_training_and_have_their_own_transform(images):
    parts = []
    for seed in (1, 2):  # seeds of two trainings
        torch.manual_seed(seed)
        train, val = hold_out(opened(images, is_training=True), opened(images), 10)
        parts.append((list(train.indices), list(val.indices)))
    assert parts[0] == parts[1]
    assert not set(parts[0][0]) & set(parts[0][1]) and sorted(parts[0][0] + parts[0][1]) == list(range(48))
    assert (len(train), len(val)) == (38, 10) and len({label for _, label in val}) > 1
    val.transform = lambda image: 'val'
    assert val[0][0] == 'val' and train[0][0] != 'val'
    assert class_names(train) == class_names(val) == ['ape', 'bee', 'cat']


def test_a_held_out_image_never_replaces_an_unreadable_training_image(images, make_images, tmp_path):
    root = make_images(tmp_path)
    train, val = hold_out(opened(root, is_training=True), opened(root), 24)
    before = next(i for i in train.indices if i + 1 in val.indices)
    whole = opened(root)
    files = sorted((root / 'train').rglob('*.png'), key=lambda file: str(file))
    names = {i: whole.reader.filename(i, absolute=True) for i in range(48)}
    assert sorted(names.values()) == [str(file) for file in files]
    after = next((i for i in train.indices if i > before), train.indices[0])
    with open(names[before], 'wb'):
        pass
    assert train[list(train.indices).index(before)] == whole[after]
    assert readable_images(train).failed.nonzero().tolist() == [[before]]


@pytest.mark.parametrize('count', [0, -1, 47, 48, 100])
def test_holding_out_no_images_or_almost_all_is_refused(images, count):
    with pytest.raises(InputError, match='holdout must leave at least 2 images'):
        hold_out(opened(images), opened(images), count)


@pytest.mark.parametrize('name', ['cifar10', 'torch/no_such_data', 'folders', ' '])
def test_an_unknown_data_set_is_refused(images, name):
    with pytest.raises(InputError, match='dataset'):
        open_dataset(name, str(images), 'train')


def test_a_missing_folder_or_split_or_an_empty_one_is_refused(images, tmp_path):
    with pytest.raises(InputError, match="data_dir is missing: data set 'folder' needs it"):
        open_dataset('folder', None, 'train')
    with pytest.raises(InputError, match="data_dir must be a folder, '/nowhere' is not"):
        open_dataset('folder', '/nowhere', 'train')
    with pytest.raises(InputError, match="data_dir must have a subfolder for split 'test'"):
        open_dataset('folder', str(images), 'test')
    (tmp_path / 'train' / 'ape').mkdir(parents=True)
    with pytest.raises(InputError, match=r"data_dir .*, split 'train': Found 0 images"):
        open_dataset('folder', str(tmp_path), 'train')
    with pytest.raises(InputError, match="dataset torch/fashion_mnist, split 'train': Dataset not found"):
        open_dataset('torch/fashion_mnist', str(tmp_path), 'train')


def test_a_loader_worker_ignores_the_first_sigterm_and_not_the_second():
    alive = os.pipe()
    process = os.fork()
    if process == 0:
        assert start_worker(SimpleNamespace(seed=5)) == 5
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)  # the handler runs between two instructions of Python
        os.write(alive[1], b'!')
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert os.read(alive[0], 1) == b'!'
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def labels(dataset):
    dataset.transform = None
    return [dataset[i][1] for i in range(len(dataset))]


@pytest.mark.parametrize('names', [['cat', 'ape', 'bee'], ['dog', 'bee', 'cat', 'ape', 'eel']])
@pytest.mark.parametrize('kind', ['folder', 'torch/image_folder'])
def test_images_get_the_labels_that_the_model_has_for_their_classes(kind, names, images):
    root = str(images) if kind == 'folder' else str(images / 'validation')
    open_it = partial(open_dataset, kind, root, 'validation') if kind == 'folder' else partial(ImageFolder, root)
    plain, dataset = open_it(), open_it()
    match_classes(dataset, names, len(names))
    assert labels(dataset) == [names.index(['ape', 'bee', 'cat'][label]) for label in labels(plain)]
    assert class_names(dataset) == names


def test_a_class_that_the_model_does_not_have_is_an_error(images):
    with pytest.raises(InputError, match='must have the classes of the model, ape, bee, dog, not ape, bee, cat'):
        match_classes(open_dataset('folder', str(images), 'validation'), ['ape', 'bee', 'dog'], 3)


def test_a_model_without_class_names_takes_the_labels_as_they_are_if_there_is_one_for_each_class(images):
    dataset = open_dataset('folder', str(images), 'validation')
    match_classes(dataset, (), 3)
    assert dataset.target_transform is None and class_names(dataset) == ['ape', 'bee', 'cat']
    with pytest.raises(InputError, match=r'data_dir has 3 classes, ape, bee, cat, and .* which of its 10 they are'):
        match_classes(dataset, (), 10)


def test_an_image_without_a_label_stays_without_one_in_another_order_of_classes(images):
    dataset = opened(images, 'validation')
    match_classes(dataset, ['cat', 'bee', 'ape'], 3)
    assert dataset[0][1] == 2
    dataset._read = lambda index: (dataset.reader[index][0], -1)
    assert dataset[0][1] == -1


@pytest.mark.parametrize('names, expected', [
    (None, []), (['b', 'a', 3], ['b', 'a', '3']), ({'2': 'c', '0': 'a'}, ['a', 'class 1', 'c']),
    ({1: 'b'}, ['class 0', 'b', 'class 2'])])
def test_the_class_names_of_a_model_are_in_the_order_of_its_logits(names, expected):
    model = timm.create_model('cifar_resnet8', num_classes=3)
    model.pretrained_cfg['label_names'] = names
    assert label_names_of(model) == expected
