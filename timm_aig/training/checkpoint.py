"""Training checkpoints: written whole or not at all, checked when read, the last good one found."""
import io
import os
import random
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple
from uuid import uuid4

import numpy as np
import torch

__all__ = ['CheckpointError', 'Checkpoints', 'rng_state', 'set_rng_state', 'write_atomically']

FORMAT = 'timm_aig-training-1'


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or does not belong to this training."""


def write_atomically(path: Path, write: Any, shared: bool = False) -> None:
    """Call write(file) on a temporary file, flush it to the disk and give it its name. Nothing is left on failure.

    The temporary file has one name, so that a killed process leaves no second one; shared, for a file that several
    processes may write at once, each has its own.
    """
    temporary = path.with_name(f'.{path.name}.{uuid4().hex}.tmp' if shared else f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name too
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


class Checkpoints:
    """The checkpoints of one training, files checkpoint-<step>.pt in a folder; the last two are kept."""

    def __init__(self, folder: Path, identity: Dict[str, Any]) -> None:
        """
        Args:
            folder: Where they are.
            identity: What a checkpoint must have in common with the training that resumes from it, JSON types.
        """
        self.folder = folder
        self.identity = identity

    def files(self) -> List[Path]:
        """Newest first."""
        found = [(re.fullmatch(r'checkpoint-(\d+)\.pt', path.name), path) for path in self.folder.iterdir()]
        return [path for _, path in sorted(((int(step[1]), path) for step, path in found if step), reverse=True)]

    def save(self, step: int, state: Dict[str, Any]) -> Path:
        """Write a checkpoint and remove those before the last two.

        Raises:
            CheckpointError: It cannot be written, a full disk for one. The earlier ones are still there then.
        """
        path = self.folder / f'checkpoint-{step:08d}.pt'
        state = {**state, 'format': FORMAT, 'identity': self.identity}
        for left in self.folder.glob('.checkpoint-*.tmp'):
            left.unlink(missing_ok=True)  # by a process that was killed while it wrote
        whole = io.BytesIO()  # torch's writer would not say why a disk takes no more
        torch.save(state, whole)
        try:
            write_atomically(path, lambda file: file.write(whole.getbuffer()))
        except OSError as e:
            raise CheckpointError(f'cannot write {path}: {e}') from e
        # one with more steps than this is torn, load_last passed it over: it must not push out the good one before
        for old in [file for file in self.files() if file <= path][2:]:
            old.unlink(missing_ok=True)
        return path

    def load_last(self) -> Tuple[Optional[Dict[str, Any]], List[str]]:
        """The newest checkpoint that is whole.

        Returns:
            Its state, None where there is no checkpoint, and what was wrong with newer ones.

        Raises:
            CheckpointError: There are checkpoints but none is whole, or one belongs to another training.
        """
        problems: List[str] = []
        for path in self.files():
            try:
                return self.load(path), problems
            except CheckpointError as e:
                if not isinstance(e.__cause__, Exception):  # whole, but foreign: older ones would be too
                    raise
                problems.append(str(e))
        if problems:
            raise CheckpointError(f'no checkpoint can be read: {"; ".join(problems)}')
        return None, problems

    def load(self, path: Path) -> Dict[str, Any]:
        """Read and check one checkpoint, without unpickling anything but tensors and plain values.

        Raises:
            CheckpointError: Torn, not a checkpoint of this trainer, or of another training.
        """
        try:
            with zipfile.ZipFile(path) as file:
                broken = file.testzip()  # torch.load itself does not look at the checksums
            if broken:
                raise zipfile.BadZipFile(f'bad checksum of {broken}')
            state = torch.load(path, map_location='cpu', weights_only=True)
        except Exception as e:  # a torn file makes all kinds
            reason = f'{type(e).__name__}: {" ".join(str(e).split())[:200]}'
            raise CheckpointError(f'{path} is torn or no checkpoint ({reason})') from e
        if not isinstance(state, dict) or state.get('format') != FORMAT:
            raise CheckpointError(f'{path} is not a training checkpoint of timm_aig.')
        theirs = state.get('identity', {})
        differ = [k for k in sorted(self.identity.keys() | theirs.keys()) if self.identity.get(k) != theirs.get(k)]
        if differ:
            what = ', '.join(f'{k} {theirs.get(k)!r} there and {self.identity.get(k)!r} here' for k in differ)
            raise CheckpointError(f'{path} is of another training: {what}.')
        return state


def rng_state() -> Dict[str, Any]:
    """State of the random generators of Python, NumPy and torch, in types that weights_only reads."""
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
    """Inverse of rng_state."""
    words, gauss = state['python']
    random.setstate((3, tuple(words), gauss))
    keys, position, has_gauss, gauss = state['numpy']
    np.random.set_state(('MT19937', keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
