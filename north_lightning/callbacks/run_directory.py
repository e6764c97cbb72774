"""One trainer per run folder, and nothing lost when it is told to end.

In: ``trainer.default_root_dir``. Out: a lock while a run is alive, a checkpoint after a SIGTERM or Ctrl-C, the random
generators in every checkpoint. Not here: periodic checkpoints (Lightning's ``ModelCheckpoint``).
"""

from __future__ import annotations

import fcntl
import os
import random
import shlex
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from north_lightning.errors import ConfigError
from north_lightning.parallel import on_process_zero
from north_lightning.run_folders import INTERRUPTED, LOCK


class RunLock(Callback):
    """Refuses a second ``fit`` or ``predict`` in one run folder. The kernel frees the lock of a process that died."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("fit", "predict") and trainer.is_global_zero:
            self.take(trainer)

    def take(self, trainer: Trainer) -> None:
        """On process 0, before anything in the folder is touched."""
        if self._file is not None or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
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
        self._release()

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class SaveOnTermination(Callback):
    """After a SIGTERM or a first Ctrl-C (SIGINT), ends the step and writes ``interrupted.ckpt`` in the run's folder.

    Nothing is lost or repeated by a run that is resumed from it with ``--ckpt_path``. A second Ctrl-C ends the run at
    once and saves nothing. Where several processes train, what process 0 receives counts, for all and in the same step.

    Args:
        command: What the run was started with, to be shown with how to resume.
    """

    def __init__(self, command: str | None = None) -> None:
        self.received: signal.Signals | None = None
        self._command = command
        self._is_told = False
        self._tell_lightning: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In place of Lightning's own handler, which calls a collective in the middle of whatever is going on."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._tell_lightning = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "add_check"):
            data.add_check(self._end_wait)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._agree()

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit":
            self._agree()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit":
            path = Path(trainer.default_root_dir) / INTERRUPTED
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                resume = f"--ckpt_path {shlex.quote(str(path))}"
                command = "" if self._command is None else f": {self._command} {resume}"
                print(f"terminated after {trainer.global_step} steps; resume with {resume}{command}", flush=True)

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
