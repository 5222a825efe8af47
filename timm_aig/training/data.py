"""Data sets for training and evaluation: timm's, with bad input found before it costs a training."""
import io
import logging
import signal
from bisect import bisect_left
from operator import methodcaller
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform, resolve_input_data_config
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.transforms import Compose

from ..config import InputError

__all__ = [
    'ReadableImages', 'check_same_classes', 'class_names', 'convert_images', 'count_unreadable',
    'hold_out', 'open_dataset', 'read_images', 'readable_images', 'resolve_config', 'start_worker',
]

_logger = logging.getLogger(__name__)

UNREADABLE = ('skip', 'error')
MODES = {1: 'L', 3: 'RGB'}  # of PIL, by channels
SOURCES = ('folder', 'torch/', 'hfds/', 'hfids/', 'tfds/', 'wds/')


class ReadableImages(Dataset):
    """The images of a timm ImageDataset, none of them silently replaced by another.

    An unreadable image raises InputError, or is skipped and counted: in training the next readable one takes its place,
    in evaluation it is black and its label -1, for `evaluate` to leave out.
    """

    def __init__(self, dataset: ImageDataset, is_training: bool, unreadable: str = 'skip') -> None:
        """
        Args:
            dataset: What to read.
            is_training: Replace unreadable images.
            unreadable: 'skip' or 'error'.
        """
        self.reader: Any = dataset.reader
        self.mode = dataset.input_img_mode
        self.transform: Any = None
        self.is_training = is_training
        self.unreadable = unreadable
        self.part: Sequence[int] = range(len(self.reader))  # where replacements come from, ascending
        self.failed = torch.zeros(len(self.reader), dtype=torch.uint8).share_memory_()  # written by loader workers

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        first = bisect_left(self.part, index)
        for offset in range(len(self.part) if self.is_training else 1):
            at = self.part[(first + offset) % len(self.part)] if offset else index
            try:
                file, label = self._read(at)
                with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
                    image = opened.convert(self.mode or opened.mode)
            except InputError:
                raise
            except Exception as e:  # decoders raise all kinds
                name = self.reader.filename(at, absolute=True)
                if self.unreadable == 'error':
                    raise InputError(f'cannot read {name}, {type(e).__name__}: {e}') from e
                if not self.failed[at]:
                    _logger.warning(f'Skipped {name}, {type(e).__name__}: {e}')
                self.failed[at] = True
                continue
            return (self.transform(image) if self.transform else image), -1 if label is None else label
        if self.is_training:
            raise InputError('none of the training images can be read.')
        image = Image.new(self.mode or 'RGB', (64, 64))
        return (self.transform(image) if self.transform else image), -1

    def _read(self, index: int) -> Tuple[Any, Any]:
        try:
            return self.reader[index]
        except (KeyError, TypeError) as e:  # no image's fault
            raise InputError(f'or target_key: {type(e).__name__}: {e}', 'input_key') from e


class HeldOut(Subset):
    """Some images of a data set, with a transform of their own."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        super().__init__(dataset, indices)
        if isinstance(dataset, ReadableImages):
            dataset.part = indices  # an unreadable image is not replaced by one that the other part has

    @property
    def transform(self) -> Any:
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform  # type: ignore[attr-defined]


def open_dataset(
        name: str,
        root: Optional[str],
        split: str,
        is_training: bool = False,
        download: bool = False,
        unreadable: str = 'skip',
        **kwargs: Any,
) -> Any:
    """Open a split of a timm data set.

    Args:
        name: 'folder' or timm's: torch/..., hfds/..., hfids/..., tfds/..., wds/...
        root: Its folder; for 'folder' one with a subfolder for each split and in it one for each class.
        split: Its name, 'train' or 'validation' for one.
        is_training: The split is for training.
        download: Let timm download it.
        unreadable: What to do with an unreadable image file, 'skip' or 'error'.
        **kwargs: More for timm's create_dataset.

    Returns:
        A torch Dataset with an attribute `transform`.

    Raises:
        InputError: Unknown, missing, broken, or without images.
    """
    name = name or 'folder'
    if not name.startswith(SOURCES) or (name.startswith('folder') and name != 'folder'):
        raise InputError(f'must start with one of {", ".join(SOURCES)}, not {name!r}.', 'dataset')
    if not root and not name.startswith(('hfds/', 'hfids/')):
        raise InputError(f'is missing: {name} needs one.', 'data_dir')
    local = name == 'folder' or (name.startswith('torch/') and not download)  # others read addresses too
    if local and not Path(root or '').is_dir():
        raise InputError(f'must be a folder, {root!r} is not.', 'data_dir')
    try:
        dataset: Any = create_dataset(
            '' if name == 'folder' else name, root=root, split=split, is_training=is_training, download=download,
            **kwargs)
    except (Exception, SystemExit) as e:  # every kind of data set has its own
        what, argument = (root, 'data_dir') if name == 'folder' else (name, 'dataset')
        raise InputError(f'{what}, split {split!r}: {str(e) or type(e).__name__}', argument) from e
    reader_root: Any = getattr(getattr(dataset, 'reader', dataset), 'root', None)
    if name in ('folder', 'torch/folder', 'torch/image_folder') and root and Path(reader_root).samefile(root):
        # timm takes the folder itself for a split that it does not find: test images would be training images
        raise InputError(f'must have a subfolder for split {split!r}, {root!r} does not.', 'data_dir')
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise InputError(f'{name}: split {split!r} has no images.', 'dataset')
    if len(class_names(dataset)) == 1:
        raise InputError(f'must have at least 2 classes, found only {class_names(dataset)[0]!r}.', 'data_dir')
    return ReadableImages(dataset, is_training, unreadable) if isinstance(dataset, ImageDataset) else dataset


def readable_images(dataset: Any) -> Optional[ReadableImages]:
    """The data set that counts unreadable images, None if it is of a kind that does not."""
    dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
    return dataset if isinstance(dataset, ReadableImages) else None


def count_unreadable(dataset: Any, device: torch.device) -> Optional[int]:
    """Images that could not be read so far, by any process; None for a data set that does not count them."""
    images = readable_images(dataset)
    if images is None:
        return None
    failed = images.failed.to(device, copy=True)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(failed, dist.ReduceOp.MAX)
    return int(failed.sum())


def start_worker(worker: Any) -> int:
    """The worker_seeding of timm's create_loader: lets a loader worker live through the first SIGTERM.

    The signal often goes to all processes of a training at once, and it needs its workers until it has saved.
    The second one ends a worker: a loader that is torn down may have to send it.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    return worker.seed


def read_images(folder: str, config: Dict[str, Any], count: int) -> torch.Tensor:
    """At most count images of a folder, spread over it, as a data config of timm wants them, [N, C, H, W]."""
    dataset = ImageDataset(
        folder, transform=create_transform(**config), input_img_mode=MODES[config['input_size'][0]])
    count = min(count, len(dataset))
    return torch.stack([dataset[i * len(dataset) // count][0] for i in range(count)])


def class_names(dataset: Any) -> List[str]:
    """Names that a data set gives its classes, in order of their labels; empty if it has none."""
    dataset = dataset.dataset if isinstance(dataset, Subset) else dataset
    names = getattr(dataset, 'classes', None) or getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
    return [str(name) for name in names or ()]


def hold_out(train: Any, copy: Any, count: int, seed: int = 0) -> Sequence[Any]:
    """Keep some training images back, for choices that must not see the test set.

    Args:
        train: The training split.
        copy: The same split once more, since the two parts get transforms of their own.
        count: Images to hold out, drawn at random.
        seed: Of the draw, so that every training of a comparison holds out the same images.

    Returns:
        The images to train on, and those held out.

    Raises:
        InputError: Fewer than two images would be left, or the split has no length.
    """
    if isinstance(train, IterableDataset) or not 0 < count < len(train) - 1:
        raise InputError(f'must leave at least 2 images of a data set with random access, not {count}.', 'holdout')
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    return HeldOut(train, sorted(order[count:])), HeldOut(copy, sorted(order[:count]))


def resolve_config(model: Any, given: Dict[str, Any]) -> Dict[str, Any]:
    """timm's data config of a model, with what was given rather than None.

    Raises:
        InputError: Images of a size that the model does not take.
    """
    try:
        return resolve_input_data_config(model, {k: v for k, v in given.items() if v is not None})
    except ValueError as e:
        raise InputError(f'cannot be used: {e}', 'input_size') from e


def convert_images(dataset: Any, channels: int) -> None:
    """Put in front of a data set's transform what gives PIL images so many channels, 1 or 3.

    Raises:
        InputError: Another number of channels.
    """
    if channels not in MODES:
        raise InputError(f'must have 1 or 3 channels, not {channels}.', 'input_size')
    dataset.transform = Compose([methodcaller('convert', MODES[channels]), dataset.transform])


def check_same_classes(train: Any, val: Any) -> None:
    """Raise InputError unless both splits name the same classes."""
    differ = sorted(set(class_names(train)) ^ set(class_names(val)))
    if differ:
        raise InputError(f'must have the same classes in both splits, only one has {differ[:5]}.', 'data_dir')
