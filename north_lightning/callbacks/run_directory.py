"""One trainer per run folder, and nothing lost when it is told to end.

In: ``trainer.default_root_dir``. Out: a lock while a run is alive, a checkpoint after a SIGTERM or Ctrl-C, the random
generators in every checkpoint. Not here: periodic checkpoints (Lightning's ``ModelCheckpoint``).
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from north_lightning.errors import ConfigError, InfrastructureError, NorthError, QueueError
from north_lightning.parallel import on_process_zero
from north_lightning.run_folders import INTERRUPTED, LOCK, LOGGERS
from north_lightning.signals import NUMBERS


class RunLock(Callback):
    """Refuses a second ``fit`` or ``predict`` in one run folder. The kernel frees the lock of a process that died."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._made: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "predict") and trainer.is_global_zero:
            self.take(trainer)

    def take(self, trainer: Trainer) -> None:
        """On process 0, before anything in the folder is touched."""
        if self._file is not None or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        self._made = None if folder.exists() else folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a+")
        except OSError as error:
            raise ConfigError(
                f"trainer.default_root_dir: expected a folder that can be written, got '{folder}': {error.strerror}"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise ConfigError(
                f"'{folder}' is in use by another trainer (process {holder}): set trainer.default_root_dir to another"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._file = file

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A run that could not begin leaves nothing."""
        folder = self._made if self._file is not None else None
        if folder is not None and {path.name for path in folder.iterdir()} <= {LOCK, LOGGERS}:
            shutil.rmtree(folder)
        self._release()

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class SaveOnTermination(Callback):
    """Writes ``interrupted.ckpt`` in the run's folder, for ``--resume auto``, when training ends before its end.

    After SIGTERM, SLURM's SIGUSR1 or a first Ctrl-C (SIGINT) the step is ended first. A second Ctrl-C ends the run at
    once and saves nothing. Where several processes train, what process 0 receives counts, for all and in the same step.
    After an error, what was trained before it is saved: as of the last complete step.

    Args:
        command: What the run was started with, to be shown with how to resume.
    """

    def __init__(self, command: str | None = None) -> None:
        self.received: signal.Signals | None = None
        self._command = command
        self._is_told = False
        self._tell_lightning: Any = None
        self._first_step = self._step = 0
        self._ready = 0
        self._validated_step = -1
        self._loops: dict[str, Any] | None = None  # as they were when step ``_step`` was complete
        self._is_rolled_back = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In place of Lightning's own handlers: one calls a collective, one saves, in the middle of a step."""
        self._first_step = trainer.global_step
        self._note_complete_step(trainer)
        if threading.current_thread() is not threading.main_thread():
            return
        self._tell_lightning = signal.getsignal(signal.SIGTERM)
        for number in NUMBERS:
            signal.signal(number, self._receive)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "add_check"):
            data.add_check(self._end_wait)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._note_complete_step(trainer)
        self._agree()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit":
            self._agree()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated_step = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        is_told = isinstance(exception, SIGTERMException)
        if trainer.state.fn != "fit" or self._loops is None:
            return
        if not is_told and not self._can_save_after(exception, trainer):
            return
        if trainer.global_step > self._step:  # something failed between the optimizer step and its end
            release = getattr(trainer.datamodule, "release_outstanding", None)  # type: ignore[attr-defined]
            if release is not None:
                release()
        else:  # batches of a step that was not taken are given again, and one that was validated is counted once
            is_under_way = trainer.fit_loop.epoch_loop.batch_progress.current.ready > self._ready
            self._is_rolled_back = is_under_way or self._validated_step == self._step
        path = Path(trainer.default_root_dir) / INTERRUPTED
        try:
            trainer.save_checkpoint(path)
        except (NorthError, OSError) as error:
            if is_told:
                raise
            print(f"nothing more could be saved: {error}", file=sys.stderr, flush=True)
            return
        if trainer.is_global_zero:
            command = "" if self._command is None else f": {self._command} --resume auto"
            ended = "terminated" if is_told else "saved"
            print(f"{ended} after {trainer.global_step} steps; resume with --resume auto{command}", flush=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._is_rolled_back:
            checkpoint["loops"]["fit_loop"] = self._loops

    def _can_save_after(self, exception: BaseException, trainer: Trainer) -> bool:
        """Something was trained, and every process has got this error and takes part in saving."""
        if not isinstance(exception, Exception) or trainer.global_step <= self._first_step:
            return False
        return trainer.world_size == 1 or isinstance(exception, InfrastructureError | QueueError)

    def _note_complete_step(self, trainer: Trainer) -> None:
        self._step, self._loops = trainer.global_step, trainer.fit_loop.state_dict()
        self._ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def _agree(self) -> None:
        """Have every process end if process 0 was told to: Lightning raises when the step at hand is counted."""
        if self._tell_lightning is None or self._is_told:
            return
        if (received := on_process_zero(lambda: self.received)) is not None:
            self.received, self._is_told = received, True
            self._tell_lightning(signal.SIGTERM, None)

    def _end_wait(self) -> None:
        if self.received is not None:
            raise SIGTERMException


class OwedValidation(Callback):
    """Makes up, in a run that goes on, the validation that its checkpoint was written before: Lightning takes it for
    done. Where validation, batches or epochs are set otherwise now, it is left out."""

    def __init__(self) -> None:
        self._owed: list[Any] | None = None
        self._max_steps: int | None = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._owed = _rhythm(trainer) if _is_validation_due(trainer) else None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._owed = None

    def state_dict(self) -> dict[str, Any]:
        return {"owed": self._owed}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Makes the checkpoint one that was written during the validation, which Lightning begins again."""
        owed = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("owed")
        if trainer.state.fn != "fit" or owed is None or owed != _rhythm(trainer):
            return
        loops = checkpoint["loops"]["fit_loop"]
        for counts in (loops["epoch_loop.batch_progress"][which] for which in ("total", "current")):
            counts["completed"] = counts["processed"]
        none = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
        loops["epoch_loop.val_loop.batch_progress"] |= {"current": none, "total": none | {"ready": 1, "started": 1}}
        if 0 < trainer.max_steps <= checkpoint["global_step"]:  # Lightning does not even begin after the last step
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = checkpoint["global_step"] + 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_validation_due(trainer):  # the data is another one
            self.on_validation_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._max_steps is not None:
            trainer.fit_loop.epoch_loop.max_steps, self._max_steps = self._max_steps, None


def _rhythm(trainer: Trainer) -> list[Any]:
    names = "val_check_interval check_val_every_n_epoch limit_val_batches limit_train_batches accumulate_grad_batches"
    return [getattr(trainer, name) for name in names.split()]


def _is_validation_due(trainer: Trainer) -> bool:
    """Whether Lightning validates after the batch that ends now; False where the clock decides."""
    loop, interval, epochs = trainer.fit_loop.epoch_loop, trainer.val_check_batch, trainer.check_val_every_n_epoch
    if not trainer.enable_validation or interval is None or (epochs and (trainer.current_epoch + 1) % epochs):
        return False
    if interval == float("inf"):
        return loop.batch_progress.is_last_batch
    return ((loop.batch_idx if epochs else loop.total_batch_idx) + 1) % interval == 0


class RandomState(Callback):
    """Puts Python's, NumPy's and torch's random generators into checkpoints: stochastic rounding and the like go on
    after a resume as they would have. Several processes resume with the first one's, as they start with one seed."""

    def __init__(self) -> None:
        self._resumed: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        name, keys, position, has_gauss, cached = np.random.get_state()
        return {
            "python": [version, list(words), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step, because setting up a run draws numbers too."""
        state, self._resumed = self._resumed, None
        if state is None:
            return
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
