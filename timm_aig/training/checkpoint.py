"""Training checkpoints: written atomically, verified when read, with the last intact one as a fallback."""
import io
import os
import random
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch

__all__ = ['CheckpointError', 'Checkpoints', 'rng_state', 'set_rng_state', 'write_atomically']

FORMAT = 'timm_aig-training-3'


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another training."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file so that at any time it is the old one or the complete new one, even after a crash.

    Args:
        path: File to create or replace.
        write: Called with a temporary file beside it, open for binary writing. The file is synced and renamed
            afterwards, and removed if anything fails.

    Raises:
        OSError: It cannot be written. The error names path.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != 'nt':  # which cannot open folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # makes the rename durable
            finally:
                os.close(folder)
    except OSError as e:
        if not e.errno:
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e  # a full disk does not name the file
    finally:
        temporary.unlink(missing_ok=True)


class Checkpoints:
    """Checkpoints of one training, as checkpoint-<step>.pt in a folder. The last two are kept."""

    def __init__(self, folder: Path, identity: Dict[str, Any]) -> None:
        """
        Args:
            folder: Existing folder.
            identity: Settings that must be equal when a training resumes from a checkpoint, as JSON types.
        """
        self.folder = folder
        self.identity = identity

    def files(self) -> List[Path]:
        """Paths of the checkpoints, newest first."""
        found = [(re.fullmatch(r'checkpoint-(\d+)\.pt', path.name), path) for path in self.folder.iterdir()]
        return [path for _, path in sorted(((int(step[1]), path) for step, path in found if step), reverse=True)]

    def save(self, step: int, state: Dict[str, Any]) -> Path:
        """Write a checkpoint and remove all but the last two. Returns its path.

        Raises:
            CheckpointError: It cannot be written, for example to a full disk. Earlier checkpoints are kept.
        """
        path = self.folder / f'checkpoint-{step:08d}.pt'
        state = {**state, 'format': FORMAT, 'identity': self.identity}
        for left in self.folder.glob('.checkpoint-*.tmp'):
            left.unlink(missing_ok=True)  # from a process that was killed while it wrote
        buffer = io.BytesIO()  # torch.save to a full disk does not say that the disk is full
        torch.save(state, buffer)
        try:
            write_atomically(path, lambda file: file.write(buffer.getbuffer()))
        except OSError as e:
            raise CheckpointError(f'cannot write {path}: {e.strerror or e}') from e
        # load_last skipped files of later steps because they are damaged: they do not count as one of the two
        for old in [file for file in self.files() if file <= path][2:]:
            old.unlink(missing_ok=True)
        return path

    def load_last(self) -> Tuple[Optional[Dict[str, Any]], List[str]]:
        """Load the newest intact checkpoint.

        Returns:
            Its state, or None without any checkpoint, and a message for each newer one that is damaged.

        Raises:
            CheckpointError: All checkpoints are damaged, or the newest intact one belongs to another training.
        """
        problems: List[str] = []
        for path in self.files():
            try:
                return self.load(path), problems
            except CheckpointError as e:
                if e.__cause__ is None:  # intact, but of another training, and so are older ones
                    raise
                problems.append(str(e))
        if problems:
            raise CheckpointError(f'no checkpoint can be read: {"; ".join(problems)}')
        return None, problems

    def load(self, path: Path) -> Dict[str, Any]:
        """Load and verify one checkpoint. Only tensors and plain values are unpickled.

        Raises:
            CheckpointError: It is damaged, has another format, or belongs to another training.
        """
        try:
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()  # torch.load does not check them
            if broken:
                raise zipfile.BadZipFile(f'wrong checksum of {broken}')
            state = torch.load(path, map_location='cpu', weights_only=True)
        except Exception as e:  # the type depends on where the file is damaged
            reason = f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'
            raise CheckpointError(f'{path} is damaged or not a checkpoint ({reason})') from e
        if not isinstance(state, dict) or state.get('format') != FORMAT:
            raise CheckpointError(f'{path} is not a training checkpoint of this version of timm_aig.')
        theirs = state.get('identity', {})
        differ = [k for k in sorted(self.identity.keys() | theirs.keys()) if self.identity.get(k) != theirs.get(k)]
        if differ:
            what = ', '.join(f'{k} was {theirs.get(k)!r} and is now {self.identity.get(k)!r}' for k in differ)
            raise CheckpointError(f'{path} belongs to another training: {what}.')
        return state


def rng_state() -> Dict[str, Any]:
    """State of the random generators of Python, NumPy and torch, in types that torch.load(weights_only=True) reads."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state: Dict[str, Any] = {
        'python': [list(random.getstate()[1]), random.getstate()[2]],
        'numpy': [torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Dict[str, Any]) -> None:
    """Restore the result of rng_state()."""
    words, gauss = state['python']
    random.setstate((3, tuple(words), gauss))
    keys, position, has_gauss, gauss = state['numpy']
    np.random.set_state(('MT19937', keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
