"""Trainer: the loop around a timm task, made to be killed at any moment and resumed bit for bit."""
import logging
import signal
import sys
from contextlib import nullcontext
from itertools import islice
from math import isfinite
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.data import Mixup
from timm.utils import dispatch_clip_grad, distribute_bn, random_seed, unwrap_model
from tqdm import tqdm

from ..blocks import gated_blocks
from ..config import InputError
from ..cost import Cost
from .checkpoint import CheckpointError, Checkpoints, rng_state, set_rng_state
from .data import readable_images
from .schedule import GateSchedule

__all__ = ['NonFiniteError', 'Stopped', 'Trainer']

_logger = logging.getLogger(__name__)

NONFINITE = ('stop', 'skip')
COUNTERS = ('epoch', 'position', 'step', 'skipped', 'counted', 'sums')


class NonFiniteError(RuntimeError):
    """The loss or its gradient is no longer finite."""


class Stopped(Exception):
    """SIGTERM came; the training is saved and can be resumed."""


class Trainer:
    """Trains a task, epoch by epoch.

    What a training does from a checkpoint on depends on nothing but the checkpoint: each epoch seeds the random
    generators anew, and a checkpoint inside an epoch keeps their states and the number of batches done.
    """

    def __init__(
            self,
            task: Any,
            loader: Any,
            optimizer: torch.optim.Optimizer,
            epochs: int,
            scheduler: Any = None,
            gate_schedule: Optional[GateSchedule] = None,
            cost: Optional[Cost] = None,
            amp_dtype: Optional[torch.dtype] = None,
            mixup: Optional[Mixup] = None,
            mixup_off_epoch: int = 0,
            clip_grad: Optional[float] = None,
            clip_mode: str = 'norm',
            grad_accum_steps: int = 1,
            nonfinite: str = 'stop',
            checkpoints: Optional[Checkpoints] = None,
            checkpoint_interval: int = 0,
            seed: int = 0,
            title: str = 'train',
    ) -> None:
        """
        Args:
            task: timm TrainingTask; its `forward(images, labels)` returns a dictionary with 'loss'.
            loader: Batches of images [B, C, H, W] and labels [B], reshuffled by torch's random generator each epoch.
            optimizer: Of the task's parameters.
            epochs: Number of epochs of the whole training.
            scheduler: timm scheduler that counts updates.
            gate_schedule: Set before each batch.
            cost: Of the adaptive model, to show the MACs share.
            amp_dtype: Autocast to it; float16 scales the loss.
            mixup: Applied to images and labels.
            mixup_off_epoch: Epoch to end it at, 0 for never.
            clip_grad: Gradient clipping value, see timm's dispatch_clip_grad.
            clip_mode: 'norm', 'value' or 'agc'.
            grad_accum_steps: Batches whose gradients are averaged for one update. The target-rate loss sees each of
                them by itself.
            nonfinite: 'stop' or 'skip' an update whose loss or gradient is not finite.
            checkpoints: Where to save, None for not at all.
            checkpoint_interval: Updates between checkpoints inside an epoch, 0 for none; there is one after each epoch.
            seed: Of everything random.
            title: In front of the progress bar.
        """
        self.task = task
        self.loader = loader
        self.optimizer = optimizer
        self.epochs = epochs
        self.scheduler = scheduler
        self.gate_schedule = gate_schedule
        self.cost = cost
        self.amp_dtype = amp_dtype
        self.mixup = mixup
        self.mixup_off_epoch = mixup_off_epoch
        self.clip_grad = clip_grad
        self.clip_mode = clip_mode
        self.grad_accum_steps = grad_accum_steps
        self.nonfinite = nonfinite
        self.checkpoints = checkpoints
        self.checkpoint_interval = checkpoint_interval
        self.seed = seed
        self.title = title

        self.device = task.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp_dtype == torch.float16)
        self.distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.epoch = 0  # epochs done
        self.position = 0  # batches done in the epoch under way
        self.step = 0  # updates done
        self.skipped = 0  # updates left out, not finite
        self.counted = 0  # batches of this epoch that its results are the mean of, those skipped are not
        self.sums: Dict[str, float] = {}  # of this epoch's results
        self._rng: Optional[Dict[str, Any]] = None  # to go on with inside an epoch
        self._buffers: List[torch.Tensor] = []  # as they were before an update that may be skipped
        self._terminated = False

    @property
    def model(self) -> nn.Module:
        return unwrap_model(self.task.get_eval_model())

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.loader) // self.grad_accum_steps)

    def fit(self, after_epoch: Callable[[int, Dict[str, float]], None] = lambda epoch, results: None) -> None:
        """Train to the end.

        after_epoch(epoch, mean results) is called behind each epoch's checkpoint,
        and again if the training is resumed from there.

        Raises:
            NonFiniteError: See `nonfinite`.
            CheckpointError: A checkpoint cannot be written.
            InputError: The loader gives fewer batches than its length, or a label without a class.
            Stopped: SIGTERM came.
        """
        previous = None
        try:  # only the main thread can, and only where there is something to save
            if self.checkpoints is not None:
                previous = signal.signal(signal.SIGTERM, self._terminate)
        except ValueError:
            pass
        try:
            if self.step == 0:
                self.save()  # a full disk is better met before the work than after it
            while self.epoch < self.epochs:
                after_epoch(self.epoch, self._train_epoch())
                self.epoch, self.position, self._rng, self.counted, self.sums = self.epoch + 1, 0, None, 0, {}
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)

    def _terminate(self, signum: int, frame: Any) -> None:
        self._terminated = True

    def _train_epoch(self) -> Dict[str, float]:
        self.task.train()
        random_seed((self.seed + 10_007 * self.epoch) % 2 ** 31, self.rank)
        for sampled in (self.loader, getattr(self.loader, 'loader', None)):
            for part in ('sampler', 'dataset'):
                if hasattr(getattr(sampled, part, None), 'set_epoch'):
                    getattr(sampled, part).set_epoch(self.epoch)
        if self.mixup is not None and self.mixup_off_epoch:
            self.mixup.mixup_enabled = self.epoch < self.mixup_off_epoch
        if self.position < len(self.loader):
            self._train_batches(iter(self.loader), len(self.loader))
            if self.distributed:
                distribute_bn(self.model, dist.get_world_size(), reduce=True)
                if self.task.has_ema():  # the first process's, which is the one in checkpoints
                    distribute_bn(unwrap_model(self.task.get_eval_model(ema=True)), dist.get_world_size())
            self._save_if(True)
        return {name: value / self.counted for name, value in self.sums.items()}

    def _train_batches(self, batches: Iterator[Any], count: int) -> None:
        if sum(1 for _ in islice(batches, self.position)) < self.position:
            raise InputError(f'gave fewer batches than the {self.position} that the checkpoint has seen.', 'dataset')
        if self._rng is not None:
            set_rng_state(self._rng)
        bar = tqdm(
            batches, f'{self.title} {self.epoch + 1}/{self.epochs}', count, initial=self.position, leave=False,
            disable=self.rank != 0, mininterval=0.5 if sys.stderr.isatty() else 30)
        self.optimizer.zero_grad()
        results: List[Dict[str, float]] = []  # of the batches of one update
        for images, labels in bar:
            results.append(self._forward_backward(images, labels, count))
            self.position += 1
            if self._update_is_due(self.position, count):
                if self._update(results):
                    self._add_to_sums(results)
                results = []
                bar.set_postfix(self._shown(), refresh=False)
                if self.position < count:
                    self._save_if(bool(self.checkpoint_interval) and self.step % self.checkpoint_interval == 0)
        if self.position < count:
            raise InputError(f'gave only {self.position} of the {count} batches of an epoch.', 'dataset')

    def _update_is_due(self, position: int, count: int) -> bool:
        """Whether the batch before a position is the last of an update."""
        return position % self.grad_accum_steps == 0 or position == count

    def _forward_backward(self, images: torch.Tensor, labels: torch.Tensor, count: int) -> Dict[str, float]:
        images = images.to(self.device, memory_format=torch.channels_last)
        labels = labels.to(self.device)
        num_classes = getattr(self.model, 'num_classes', 0)
        if num_classes and labels.ndim == 1 and not 0 <= labels.min() <= labels.max() < num_classes:
            raise InputError(
                f'is {num_classes}, the labels must be in [0, {num_classes}), not from {labels.min()} to '
                f'{labels.max()}.', 'num_classes')
        hard = labels
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        if self.gate_schedule is not None:
            self.gate_schedule.step(self.step / (self.epochs * self.updates_per_epoch))
        first = self.position - self.position % self.grad_accum_steps  # batch of this update
        size = min(self.grad_accum_steps, count - first)  # batches in it, the last one has what is left
        if self.nonfinite == 'skip' and self.position == first:
            self._buffers = [buffer.clone() for buffer in self.model.buffers()]
        with nullcontext() if self._update_is_due(self.position + 1, count) else self.task.no_sync():
            with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                result = self.task(images, labels)
            loss = result['loss'] * (result['loss'].detach() * 0 + 1)  # not finite: nor is then any gradient, anywhere
            self.scaler.scale(loss / size).backward()
        shown = {
            'loss': result['loss'].item(),
            'top1': 100 * (result['output'].argmax(1) == hard).float().mean().item(),
        }
        if 'block_rates' in result:
            rates = result['block_rates'].cpu().double()
            shown['execution_rate'] = rates.mean().item()
            if self.cost is not None:
                shown['macs_share'] = self.cost.share(rates[None]).item()
            shown.update((f'rate_{name}', rate) for name, rate in zip(gated_blocks(self.model), rates.tolist()))
        return shown

    def _add_to_sums(self, results: List[Dict[str, float]]) -> None:
        self.counted += len(results)
        for result in results:
            if self.distributed:
                values = torch.tensor(list(result.values()), dtype=torch.float64, device=self.device)
                dist.all_reduce(values)
                result = dict(zip(result, (values / dist.get_world_size()).tolist()))
            for name, value in result.items():
                self.sums[name] = self.sums.get(name, 0.) + value

    def _update(self, results: List[Dict[str, float]]) -> bool:
        """Whether the update of batches with these results was done, not skipped."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.task.get_clip_parameters() if p.grad is not None]
        # after the reduction of gradients over processes, so that all of them decide alike
        finite = bool(torch.nn.utils.get_total_norm([p.grad for p in parameters]).isfinite())
        skipped = not finite
        if skipped and self.scaler.is_enabled():  # gradients alone overflow until it has found its scale, 1 or more
            skipped = self._is_any(not all(isfinite(result['loss']) for result in results)) \
                or self.scaler.get_scale() < 1
        if skipped:
            self._meet_nonfinite(results)
        else:
            if self.clip_grad is not None:
                agc = self.clip_mode == 'agc'  # not for the head (2102.06171)
                parameters = self.task.get_clip_parameters(exclude_head=True) if agc else parameters
                dispatch_clip_grad(parameters, self.clip_grad, mode=self.clip_mode)
            self.scaler.step(self.optimizer)  # leaves out what overflowed float16
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if finite:
            self.task.update_ema(self.step)
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        return not skipped

    def _is_any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        if not self.distributed:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags)
        return bool(flags)

    def _meet_nonfinite(self, results: List[Dict[str, float]]) -> None:
        gates = gated_blocks(self.model)
        # a gate that answers NaN is where it began, or behind; NaN in the loss gives every gate a NaN gradient
        answers = [name for name in gates if not all(isfinite(result.get(f'rate_{name}', 0.)) for result in results)]
        gradients = [
            name for name, block in gates.items()
            if any(p.grad is not None and not p.grad.isfinite().all() for p in block.gate.parameters())
        ]
        if answers:
            where = f'the answer of gate {answers[0]} is the first that is not'
        elif not all(isfinite(result['loss']) for result in results):
            where = 'the loss is not, the answers of all gates are' if gates else 'the loss is not'
        else:
            where = f'the gradients of gates {", ".join(gradients)} are not' if gradients else 'those of the gates are'
        what = f'epoch {self.epoch + 1}, step {self.step}: loss or gradient is not finite; {where}'
        if self.nonfinite == 'stop':
            raise NonFiniteError(what)
        _logger.warning(f'Skipped the update of {what}')
        for buffer, before in zip(self.model.buffers(), self._buffers):
            buffer.copy_(before)  # batch statistics took part in the forward pass
        self.skipped += 1

    def _shown(self) -> Dict[str, str]:
        names = [name for name in ('loss', 'top1', 'execution_rate', 'macs_share') if name in self.sums]
        return {name: f'{self.sums[name] / self.counted:.3f}' for name in names}

    def _save_if(self, due: bool) -> None:
        """Save if due or SIGTERM came, which ends the training."""
        terminated = self._terminated
        if self.distributed:  # the signal reaches processes at different steps, they agree before torchrun kills them
            terminated = False
            if self.device.type == 'cpu' or self.step % 10 == 0 or self.position == len(self.loader):
                terminated = self._is_any(self._terminated)
        if due or terminated:
            self.save()
        if terminated:
            raise Stopped(f'stopped by SIGTERM in epoch {self.epoch + 1} after step {self.step}, saved.')

    def resume(self) -> None:
        """Go on from the last checkpoint that is whole, if there is any.

        Raises:
            CheckpointError: None of them is, it is another training's, or not all processes have the same.
        """
        assert self.checkpoints is not None
        state, problems = self.checkpoints.load_last()
        for problem in problems:
            _logger.warning(f'{problem}; going on with the one before.')
        if state is not None:
            self.load_state_dict(state)
            _logger.info(f'Resumed in epoch {self.epoch + 1} after step {self.step}.')
        if self.distributed:
            steps: List[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(steps, self.step)
            if len(set(steps)) > 1:
                raise CheckpointError(f'the processes have checkpoints of steps {steps}: they must share the folder.')

    def save(self) -> None:
        """Write a checkpoint now, from one of the processes.

        Raises:
            CheckpointError: It cannot be written.
        """
        if self.checkpoints is None:
            return
        local: List[Any] = [self._local_state()]
        if self.distributed:
            local = [None] * dist.get_world_size()
            dist.all_gather_object(local, self._local_state())
        if self.rank == 0:
            self.checkpoints.save(self.step, self.state_dict(local))

    def _local_state(self) -> Dict[str, Any]:
        images = readable_images(getattr(self.loader, 'dataset', None))
        return {'rng': rng_state(), 'unreadable': [] if images is None else images.failed.nonzero().flatten().tolist()}

    def state_dict(self, local: List[Any]) -> Dict[str, Any]:
        """All that the rest of the training depends on, with the local state of each process."""
        state = {
            **self.task.get_checkpoint_state(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(),
            'local': local,
            **{name: getattr(self, name) for name in COUNTERS},
        }
        if self.scheduler is not None:
            state['scheduler'] = self.scheduler.state_dict()
        if self.task.has_ema():
            state.update(self.task.get_checkpoint_state(ema=True))
        return state

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Go on where state_dict() was taken."""
        self.task.load_checkpoint_state(state['state_dict'])
        if self.task.has_ema():
            self.task.load_checkpoint_state(state['state_dict_ema'], ema=True)
        self.optimizer.load_state_dict(state['optimizer'])
        self.scaler.load_state_dict(state['scaler'])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state['scheduler'])
        for name in COUNTERS:
            setattr(self, name, state[name])
        local = state['local'][self.rank]
        self._rng = local['rng'] if self.position else None
        images = readable_images(getattr(self.loader, 'dataset', None))
        if images is not None:
            images.failed[local['unreadable']] = 1
