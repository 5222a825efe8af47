"""Data sets for training and evaluation: timm's, with bad input reported before a training starts."""
import io
import logging
import signal
from bisect import bisect_left
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_input_data_config
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.transforms import Compose

from ..config import InputError

__all__ = [
    'HeldOut', 'ReadableImages', 'check_same_classes', 'class_names', 'convert_images', 'count_unreadable',
    'hold_out', 'label_names_of', 'match_classes', 'open_dataset', 'read_images', 'readable_images', 'resolve_config',
    'start_worker',
]

_logger = logging.getLogger(__name__)

MODES = {1: 'L', 3: 'RGB'}  # number of channels -> PIL mode
SOURCES = ('folder', 'torch/', 'hfds/', 'hfids/', 'tfds/', 'wds/')


class ReadableImages(Dataset):
    """A timm ImageDataset that reports unreadable images, where timm replaces them with others.

    An unreadable image raises InputError, or is counted and skipped: training gets the next readable image, evaluation
    a black image with label -1, which `evaluate` leaves out.
    """

    def __init__(self, dataset: ImageDataset, is_training: bool, unreadable: str = 'skip') -> None:
        """
        Args:
            dataset: Data set to read from.
            is_training: Replace skipped images by readable ones.
            unreadable: What to do with an unreadable image, 'skip' or 'error'.
        """
        self.reader: Any = dataset.reader
        self.mode = dataset.input_img_mode
        self.transform: Any = None
        self.target_transform: Any = None
        self.is_training = is_training
        self.unreadable = unreadable
        self.part: Sequence[int] = range(len(self.reader))  # indices of possible replacements, ascending
        self.failed = torch.zeros(len(self.reader), dtype=torch.uint8).share_memory_()  # loader workers write it

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        first = bisect_left(self.part, index)
        for offset in range(len(self.part) if self.is_training else 1):
            at = self.part[(first + offset) % len(self.part)] if offset else index
            try:
                file, label = self._read(at)
                with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
                    image = to_mode(opened, self.mode or opened.mode)
            except InputError:
                raise
            except Exception as e:  # each decoder has its own
                name = self.reader.filename(at, absolute=True)
                if self.unreadable == 'error':
                    raise InputError(f'cannot read {name}, {type(e).__name__}: {e}') from e
                if not self.failed[at]:
                    _logger.warning(f'Skipped {name}, {type(e).__name__}: {e}')
                self.failed[at] = True
                continue
            if label is not None and label >= 0 and self.target_transform is not None:  # -1 has no label
                label = self.target_transform(label)
            return (self.transform(image) if self.transform else image), -1 if label is None else label
        if self.is_training:
            raise InputError('no training image can be read.')
        image = Image.new(self.mode or 'RGB', (64, 64))
        return (self.transform(image) if self.transform else image), -1

    def _read(self, index: int) -> Tuple[Any, Any]:
        try:
            return self.reader[index]
        except (KeyError, TypeError) as e:  # not an unreadable image
            raise InputError(
                f'input_key and target_key must name fields of the data set: {type(e).__name__}: {e}') from e


class HeldOut(Subset):
    """Subset whose `transform` is that of its data set."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        super().__init__(dataset, indices)
        if isinstance(dataset, ReadableImages):
            dataset.part = indices  # never replace an image by one of the other part

    @property
    def transform(self) -> Any:
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform  # type: ignore[attr-defined]


def open_dataset(
        dataset: str,
        data_dir: Optional[str],
        split: str,
        is_training: bool = False,
        download: bool = False,
        unreadable: str = 'skip',
        **kwargs: Any,
) -> Any:
    """Open a split of a timm data set.

    Args:
        dataset: 'folder', or a timm name that starts with torch/, hfds/, hfids/, tfds/ or wds/.
        data_dir: Folder of the data set. For 'folder', images are in data_dir/split/class/.
        split: Name of the split, such as 'train' or 'validation'.
        is_training: Shuffle data sets without random access, and replace unreadable images.
        download: Let timm download the data set.
        unreadable: What to do with an unreadable image file, 'skip' or 'error'.
        **kwargs: Passed to timm's create_dataset.

    Returns:
        A torch Dataset with an attribute `transform`.

    Raises:
        InputError: The data set is unknown, missing, damaged, empty, or has a single class.
    """
    dataset = dataset or 'folder'
    if not dataset.startswith(SOURCES) or (dataset.startswith('folder') and dataset != 'folder'):
        raise InputError(f'must start with one of {", ".join(SOURCES)}, not {dataset!r}.', 'dataset')
    if not data_dir and not dataset.startswith(('hfds/', 'hfids/')):
        raise InputError(f'is missing: data set {dataset!r} needs it.', 'data_dir')
    local = dataset == 'folder' or (dataset.startswith('torch/') and not download)  # others also take URLs
    if local and not Path(data_dir or '').is_dir():
        raise InputError(f'must be a folder, {data_dir!r} is not.', 'data_dir')
    try:
        found: Any = create_dataset(
            '' if dataset == 'folder' else dataset, root=data_dir, split=split, is_training=is_training,
            download=download, **kwargs)
    except (Exception, SystemExit) as e:  # each kind of data set has its own
        what, argument = (data_dir, 'data_dir') if dataset == 'folder' else (dataset, 'dataset')
        raise InputError(f'{what}, split {split!r}: {str(e) or type(e).__name__}', argument) from e
    reader_root: Any = getattr(getattr(found, 'reader', found), 'root', None)
    in_folders = dataset in ('folder', 'torch/folder', 'torch/image_folder')
    if in_folders and data_dir and Path(reader_root).samefile(data_dir):
        # without that subfolder timm reads the whole folder: test images would be trained on
        raise InputError(f'must have a subfolder for split {split!r}, {data_dir!r} does not.', 'data_dir')
    if not isinstance(found, IterableDataset) and len(found) == 0:
        raise InputError(f'{dataset}: split {split!r} has no images.', 'dataset')
    if len(class_names(found)) == 1:
        raise InputError(f'must have at least 2 classes, found only {class_names(found)[0]!r}.', 'data_dir')
    return ReadableImages(found, is_training, unreadable) if isinstance(found, ImageDataset) else found


def readable_images(dataset: Any) -> Optional[ReadableImages]:
    """The ReadableImages behind a data set or subset, None for other kinds."""
    dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
    return dataset if isinstance(dataset, ReadableImages) else None


def count_unreadable(dataset: Any, device: torch.device) -> Optional[int]:
    """Number of images that any process failed to read so far, None for a data set that does not count them.

    All processes of a distributed run must call it.
    """
    images = readable_images(dataset)
    if images is None:
        return None
    failed = images.failed.to(device, copy=True)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    return int(failed.sum())


def start_worker(worker: Any) -> int:
    """Make a loader worker ignore the first SIGTERM and SIGINT. For `worker_seeding` of timm's create_loader.

    A scheduler, and Ctrl-C, signal all processes of a training at once, but the trainer needs its workers until it has
    saved a checkpoint. A second signal ends the worker: the loader sends one to workers that do not stop by themselves.

    Returns:
        The worker's seed.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))
    return worker.seed


def read_images(folder: str, config: Dict[str, Any], count: int) -> torch.Tensor:
    """Read images spread evenly over a folder.

    Args:
        folder: Folder with images, in subfolders or not.
        config: timm's data config of a model.
        count: Largest number of images.

    Returns:
        Images preprocessed for the model, [N, C, H, W] with N <= count.
    """
    dataset = ImageDataset(folder, transform=create_transform(**config), input_img_mode=None)
    convert_images(dataset, config['input_size'][0])
    count = min(count, len(dataset))
    return torch.stack([dataset[i * len(dataset) // count][0] for i in range(count)])


def class_names(dataset: Any) -> List[str]:
    """Class names of a data set in the order of the labels, empty if it has none."""
    dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
    names = getattr(dataset, 'classes', None) or getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    return [str(name) for name in names or ()]


def label_names_of(model: Any) -> List[str]:
    """Class names of a model in the order of its logits, empty if it has none.

    timm keeps them as a list, or as a dict from number to name if some classes have no name.
    """
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names') or ()
    if isinstance(names, dict):  # from JSON its keys are text
        named = {int(number): name for number, name in names.items()}
        names = [named.get(i, f'class {i}') for i in range(model.num_classes)]
    return [str(name) for name in names]


def match_classes(dataset: Any, names: Sequence[str], classes: int) -> None:
    """Map the labels of a data set to those of a model by the names of the classes: folders sort theirs.

    Args:
        dataset: Data set, or a subset of one. It may lack some of the classes.
        names: Class names of the model in the order of its labels, empty if it has none.
        classes: Number of classes of the model.

    Raises:
        InputError: The data set has a class that the model, which names its classes, does not have, or it has fewer
            classes than a model that does not name them.
    """
    own = class_names(dataset)
    if own and not names and len(own) < classes:
        raise InputError(
            f'has {len(own)} classes, {_shown(own)}, and the model does not say which of its {classes} they are. Take '
            f"one with {len(own)} classes, or save it with names: save_pretrained(..., model_config={{'label_names': "
            '[...]}).', 'data_dir')
    if not own or not names or own == list(names):
        return
    if not {*own} <= {*names}:
        raise InputError(f'must have the classes of the model, {_shown(names)}, not {_shown(own)}.', 'data_dir')
    dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
    if getattr(dataset, 'target_transform', dataset) is not None:
        raise InputError(f'must have its classes in the order of the model, {_shown(names)}, not {_shown(own)}.',
                         'dataset')
    dataset.target_transform = [list(names).index(name) for name in own].__getitem__
    dataset.classes = list(names)


def _shown(names: Sequence[str]) -> str:
    return ', '.join(names[:10]) + (f' and {len(names) - 10} more' if len(names) > 10 else '')


def hold_out(train: Any, copy: Any, count: int) -> Sequence[Any]:
    """Hold out some training images, to choose settings without the test set.

    Args:
        train: Training split.
        copy: The same split, opened again: the two parts get different transforms.
        count: Number of images to hold out, drawn at random, the same in every training.

    Returns:
        The images to train on, and the held-out images.

    Raises:
        InputError: count is below 1 or leaves fewer than two images, or the split has no random access.
    """
    if isinstance(train, IterableDataset) or not 0 < count < len(train) - 1:
        raise InputError(f'must leave at least 2 images of a data set with random access, not {count}.', 'holdout')
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    return HeldOut(train, sorted(order[count:])), HeldOut(copy, sorted(order[:count]))


def resolve_config(model: Any, given: Dict[str, Any]) -> Dict[str, Any]:
    """timm's data config of a model.

    Args:
        model: timm model.
        given: Entries that replace the model's own, where they are not None.

    Raises:
        InputError: The input size does not fit the model.
    """
    try:
        return resolve_input_data_config(model, {k: v for k, v in given.items() if v is not None})
    except ValueError as e:
        raise InputError(f'cannot be used: {e}', 'input_size') from e


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """A PIL image in another mode. 16 bits a pixel are scaled to 8: Pillow would make almost all of them white.

    Raises:
        ValueError: An image of 32 bits a pixel, whose range is not known.
    """
    if image.mode in ('I', 'F'):
        raise ValueError('the image has 32 bits a pixel, scale it to 8.')
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image.convert(mode)


def convert_images(dataset: Any, channels: int) -> None:
    """Make a data set convert its PIL images to grey (1 channel) or RGB (3) before its transform.

    Raises:
        InputError: Another number of channels.
    """
    if channels not in MODES:
        raise InputError(f'must have 1 or 3 channels, not {channels}.', 'input_size')
    dataset.transform = Compose([partial(to_mode, mode=MODES[channels]), dataset.transform])


def check_same_classes(train: Any, val: Any) -> None:
    """Check that two splits have the same class names.

    Raises:
        InputError: They differ.
    """
    differ = sorted(set(class_names(train)) ^ set(class_names(val)))
    if differ:
        raise InputError(f'must have the same classes in both splits, only one has {differ[:5]}.', 'data_dir')
