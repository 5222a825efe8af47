"""Trainer: the training loop around a timm task. A training can be killed at any time and resumed bit for bit."""
import logging
import signal
import sys
import threading
from contextlib import nullcontext
from itertools import islice
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.utils import distribute_bn, random_seed, unwrap_model
from tqdm import tqdm

from ..blocks import gated_blocks
from ..config import InputError
from ..cost import Cost
from .checkpoint import CheckpointError, Checkpoints, rng_state, set_rng_state
from .data import readable_images
from .schedule import GateSchedule
from .update import UpdateConfig, Updater, in_any_process

__all__ = ['NonFiniteError', 'Stopped', 'Trainer']

_logger = logging.getLogger(__name__)

COUNTERS = ('epoch', 'position', 'step', 'skipped')
LOG_INTERVAL = 50  # updates between two readings of the results for the progress bar


class NonFiniteError(RuntimeError):
    """The loss or a gradient is NaN or infinite."""


class Stopped(Exception):
    """The process received SIGTERM, or SIGINT from Ctrl-C. The training is saved and can be resumed."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class Trainer:
    """Trains a timm task.

    A resumed training depends on its checkpoint alone: each epoch seeds the random generators anew, and a checkpoint
    inside an epoch stores their states and the number of batches done.

    Results are summed on the device. The device is read once per update, to check it, and every LOG_INTERVAL updates.
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
            losses: Sequence[str] = (),
            amp_dtype: Optional[torch.dtype] = None,
            mixup: Optional[Mixup] = None,
            update: UpdateConfig = UpdateConfig(),  # noqa: B008, it is frozen
            checkpoints: Optional[Checkpoints] = None,
            checkpoint_interval: int = 0,
            seed: int = 0,
            title: str = 'train',
    ) -> None:
        """
        Args:
            task: timm TrainingTask, already compiled and distributed, whose model has `num_classes`. Its forward
                returns 'loss', 'output' and, for an adaptive model, 'block_rates', as AIGTask does.
            loader: Batches of images [B, C, H, W] and labels [B], shuffled by torch's random generator each epoch.
            optimizer: Optimizer of the task's parameters.
            epochs: Length of the whole training.
            scheduler: timm scheduler, stepped after each update; None keeps the learning rate.
            gate_schedule: Stepped before each batch.
            cost: MACs of the adaptive model; adds 'macs_share' to the results.
            losses: Further entries of what the task's forward returns, scalars to add to the results.
            amp_dtype: Autocast dtype; float16 also scales the loss. None trains without autocast.
            mixup: Applied to images and labels.
            update: Accumulation, clipping and non-finite updates.
            checkpoints: Where checkpoints are saved, None for nowhere.
            checkpoint_interval: Updates between checkpoints inside an epoch, 0 for none. Each epoch ends with one.
            seed: Seed of all random generators.
            title: Text before the progress bar.
        """
        self.task = task
        self.loader = loader
        self.optimizer = optimizer
        self.epochs = epochs
        self.scheduler = scheduler
        self.gate_schedule = gate_schedule
        self.cost = cost
        self.losses = ['loss', *losses]
        self.amp_dtype = amp_dtype
        self.mixup = mixup
        self.checkpoints = checkpoints
        self.checkpoint_interval = checkpoint_interval
        self.seed = seed
        self.title = title

        self.model: Any = unwrap_model(task.get_eval_model())
        self.rate_names = [f'rate_{name}' for name in gated_blocks(self.model)]  # in the results
        self.updater = Updater(task, optimizer, update, amp_dtype)
        self.accum_steps = update.grad_accum_steps
        self.updates_per_epoch = -(-len(loader) // self.accum_steps)
        self.images = readable_images(getattr(loader, 'dataset', None))
        self.device = task.device
        self.distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.distributed else 0
        self.epoch = 0  # finished epochs
        self.position = 0  # finished batches of the running epoch
        self.step = 0  # finished updates, including skipped ones
        self.skipped = 0  # updates skipped because they were not finite
        # this process's sums over the epoch, without skipped updates: batches, top1, losses, rate of each gated block
        dtype = torch.float32 if self.device.type == 'mps' else torch.float64
        self.sums = torch.zeros(2 + len(self.losses) + len(self.rate_names), dtype=dtype, device=self.device)
        self._rng: Optional[Dict[str, Any]] = None  # generator states to resume with inside an epoch
        self._signal = 0  # number of the signal that was received

    def fit(self, after_epoch: Callable[[int, Dict[str, float]], None] = lambda epoch, results: None) -> None:
        """Train up to the last epoch.

        Args:
            after_epoch: Called with the epoch and its mean results after each epoch's checkpoint, and again when the
                training resumes from that checkpoint.

        Raises:
            NonFiniteError: A loss or gradient is not finite, see UpdateConfig.nonfinite.
            CheckpointError: A checkpoint cannot be written.
            InputError: The loader gives fewer batches than its length, or a label outside [0, num_classes).
            Stopped: The process received SIGTERM or SIGINT. A second SIGINT does not wait for the running update.
        """
        previous: Dict[int, Any] = {}
        if self.checkpoints is not None and threading.current_thread() is threading.main_thread():
            previous = {signum: signal.signal(signum, self._on_signal) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            if self.step == 0:
                self.save()  # fail on a full disk before the training, not after it
            while self.epoch < self.epochs:
                after_epoch(self.epoch, self._train_epoch())
                self.epoch, self.position, self._rng = self.epoch + 1, 0, None
                self.sums.zero_()
        finally:
            if self.gate_schedule is not None:
                self.gate_schedule.finish()
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def results(self) -> Dict[str, float]:
        """Mean results of the epoch so far, over all processes. Each process must call it.

        Returns:
            The losses, 'top1' in percent and, for an adaptive model, 'execution_rate', 'macs_share' and 'rate_<block>'
            in [0, 1]. Empty if no update is done or all were skipped.
        """
        sums = self.sums.clone()
        if self.distributed:
            dist.all_reduce(sums)
        batches, *totals = sums.tolist()
        if not batches:
            return {}
        top1, *means = (total / batches for total in totals)
        rates = means[len(self.losses):]
        results = {**dict(zip(self.losses, means)), 'top1': top1}
        if rates:
            results['execution_rate'] = sum(rates) / len(rates)
            if self.cost is not None:
                results['macs_share'] = self.cost.share(torch.tensor([rates], dtype=torch.float64)).item()
            results.update(zip(self.rate_names, rates))
        return results

    def _on_signal(self, signum: int, frame: Any) -> None:
        self._signal = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.default_int_handler)

    def _train_epoch(self) -> Dict[str, float]:
        self.task.train()
        random_seed((self.seed + 10_007 * self.epoch) % 2 ** 31, self.rank)
        for name in ('sampler', 'dataset'):
            part: Any = getattr(self.loader, name, None)
            if hasattr(part, 'set_epoch'):
                part.set_epoch(self.epoch)
        if self.position < len(self.loader):
            self._train_batches()
            if self.distributed:
                distribute_bn(self.model, dist.get_world_size(), reduce=True)
                if self.task.has_ema():  # broadcast rank 0's, which is the one in checkpoints
                    distribute_bn(unwrap_model(self.task.get_eval_model(ema=True)), dist.get_world_size())
            self._save_if(True)
        return self.results()

    def _train_batches(self) -> None:
        """Train on the batches of the epoch that are left."""
        batches, count = iter(self.loader), len(self.loader)
        for _ in islice(batches, self.position):  # seen before the training was stopped
            pass
        if self._rng is not None:
            set_rng_state(self._rng)
        bar = tqdm(
            batches, f'{self.title} {self.epoch + 1}/{self.epochs}', count, initial=self.position, leave=False,
            disable=self.rank != 0, mininterval=0.5 if sys.stderr.isatty() else 30)
        self.optimizer.zero_grad()
        rows: List[torch.Tensor] = []  # results of the batches of the running update
        targets: List[torch.Tensor] = []  # their labels
        for images, labels in bar:
            targets.append(labels.to(self.device))
            # labels out of range would fail in the loss on the device; the update reports them
            rows.append(self._forward_backward(images, targets[-1].clamp(0, self.model.num_classes - 1)))
            self.position += 1
            if not self._ends_update(self.position):
                continue
            self._finish_update(torch.stack(rows).sum(0), torch.cat(targets))
            rows, targets = [], []
            if self.step % LOG_INTERVAL == 0:
                shown = {name: value for name, value in self.results().items() if name not in self.rate_names}
                bar.set_postfix(shown, refresh=False)
            if self.position < count:
                self._save_if(bool(self.checkpoint_interval) and self.step % self.checkpoint_interval == 0)
        if self.position < count:
            raise InputError(f'gave only {self.position} of the {count} batches of an epoch.', 'dataset')

    def _ends_update(self, position: int) -> bool:
        """Whether an update ends after this many batches of the epoch."""
        return position % self.accum_steps == 0 or position == len(self.loader)

    def _forward_backward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Add the gradients of one batch. Returns its results as a row that adds up to self.sums."""
        images = images.to(self.device, memory_format=torch.channels_last)
        target = labels
        if self.mixup is not None:
            images, target = self.mixup(images, labels)
        if self.gate_schedule is not None:
            self.gate_schedule.step(self.step / (self.epochs * self.updates_per_epoch))
        first = self.position - self.position % self.accum_steps  # first batch of the update
        if self.position == first:
            self.updater.begin()
        with nullcontext() if self._ends_update(self.position + 1) else self.task.no_sync():
            with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                result = self.task(images, target)
            # the last update of an epoch has the batches that are left
            self.updater.backward(result['loss'], min(self.accum_steps, len(self.loader) - first))
        top1 = 100 * (result['output'].argmax(1) == labels).float().mean()
        rates = [result['block_rates']] if self.rate_names else []
        losses = [result[name].detach() for name in self.losses]
        return torch.hstack([torch.ones_like(top1), top1, *losses, *rates]).to(self.sums)

    def _finish_update(self, sums: torch.Tensor, labels: torch.Tensor) -> None:
        """Update the weights and count the results, or deal with an update that is not finite."""
        problem = self.updater.finish(self.step + 1, labels, loss=sums[2], rates=sums[2 + len(self.losses):])
        where = f'epoch {self.epoch + 1}, step {self.step}'
        if problem is None:
            self.sums += sums
        elif self.updater.config.nonfinite == 'stop':
            raise NonFiniteError(f'{where}: {problem}')
        else:
            _logger.warning(f'Skipped the update of {where}: {problem}.')
            self.skipped += 1
        self.step += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)

    def _save_if(self, due: bool) -> None:
        """Save a checkpoint if it is due. After SIGTERM or SIGINT save one and raise Stopped."""
        terminated = bool(self._signal)
        if self.distributed:  # processes get the signal at different steps and must agree before torchrun kills them
            terminated = False
            if self.device.type == 'cpu' or self.step % 10 == 0 or self.position == len(self.loader):
                terminated = in_any_process(bool(self._signal), self.device)
        if due or terminated:
            self.save()
        if terminated:
            signum = signal.Signals(self._signal or signal.SIGTERM)
            raise Stopped(f'stopped by {signum.name} in epoch {self.epoch + 1} after step {self.step}, saved.', signum)

    def resume(self) -> None:
        """Load the last intact checkpoint, if there is one.

        Raises:
            CheckpointError: No checkpoint is intact, it belongs to another training, or the processes found different
                ones.
        """
        assert self.checkpoints is not None
        state, problems = self.checkpoints.load_last()
        for problem in problems:
            _logger.warning(f'{problem}; using the one before.')
        if state is not None:
            self.load_state_dict(state)
            _logger.info(f'Resumed in epoch {self.epoch + 1} after step {self.step}.')
        if self.distributed:
            steps: List[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(steps, self.step)
            if len(set(steps)) > 1:
                raise CheckpointError(f'the processes have checkpoints of steps {steps}: they must share the folder.')

    def save(self) -> None:
        """Write a checkpoint from rank 0. All processes of a distributed training must call it.

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
        unreadable = [] if self.images is None else self.images.failed.nonzero().flatten().tolist()
        return {'rng': rng_state(), 'sums': self.sums.tolist(), 'unreadable': unreadable}

    def state_dict(self, local: List[Any]) -> Dict[str, Any]:
        """Everything that the rest of the training depends on, with the local state of each process."""
        state = {
            **self.task.get_checkpoint_state(),
            'optimizer': self.optimizer.state_dict(),
            'scaler': self.updater.scaler.state_dict(),
            'local': local,
            **{name: getattr(self, name) for name in COUNTERS},
        }
        if self.scheduler is not None:
            state['scheduler'] = self.scheduler.state_dict()
        if self.task.has_ema():
            state.update(self.task.get_checkpoint_state(ema=True))
        return state

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore the training at the point where state_dict() was called."""
        self.task.load_checkpoint_state(state['state_dict'])
        if self.task.has_ema():
            self.task.load_checkpoint_state(state['state_dict_ema'], ema=True)
        self.optimizer.load_state_dict(state['optimizer'])
        self.updater.scaler.load_state_dict(state['scaler'])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state['scheduler'])
        for name in COUNTERS:
            setattr(self, name, state[name])
        local = state['local'][self.rank]
        self.sums.copy_(torch.tensor(local['sums'], dtype=self.sums.dtype))
        self._rng = local['rng'] if self.position else None
        if self.images is not None:
            self.images.failed[local['unreadable']] = 1
