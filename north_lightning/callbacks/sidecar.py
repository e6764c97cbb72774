"""The life cycle of the vLLM sidecar during training.

In: the module's checkpoint. Out: a running server, started again when it dies, stopped however training ends. Not here:
the server (``sampling``).

    found dead ─► users let go (sampling suspended) ─► started ─► users take it up (weights pushed, sampling resumed)

It is looked at while the trainer waits for rollouts and after every step, always from the trainer's thread: the weights
that are pushed again are those between two optimizer steps.
Where several processes train, process 0 has the only one, and its death ends training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from north_lightning.errors import ConfigError, SidecarError
from north_lightning.modules import NorthModule
from north_lightning.parallel import on_process_zero
from north_lightning.sampling.sidecar import Sidecar

log = logging.getLogger(__name__)


class SidecarCallback(Callback):
    """Starts the sidecar before training, starts it again when it dies, and stops it afterwards.

    One that cannot be started, or dies too often, ends training with its log's last lines. Where several processes
    train, every death does: one of them alone cannot gather the weights to push.

    Args:
        sidecar: Makes the sidecar; the checkpoint's folder and the log's path are filled in.
        max_restarts: Deaths borne with no optimizer step between.
    """

    def __init__(self, sidecar: Callable[[Path, Path], Sidecar] = Sidecar, max_restarts: int = 3) -> None:
        self._make = sidecar
        self.max_restarts = max_restarts
        self._num_restarts = 0
        self._is_one_of_several = False
        self._let_go: list[Callable[[], None]] = []
        self._take_up: list[Callable[[], object]] = []
        self._sidecar: Sidecar | None = None
        self._users: list[Callable[[], None]] = []

    @property
    def url(self) -> str:
        if self._sidecar is None:
            raise ConfigError("the sidecar is not running: it is started when fit begins")
        return self._sidecar.url

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer that the running server takes, in tokens."""
        if self._sidecar is None:
            raise ConfigError("the sidecar is not running: it is started when fit begins")
        return self._sidecar.max_model_len

    def stop_before(self, stop_user: Callable[[], None]) -> None:
        """Have ``stop_user`` called before the sidecar is stopped, so that it does not see it disappear."""
        self._users.append(stop_user)

    def around_restart(self, let_go: Callable[[], None] | None, take_up: Callable[[], object]) -> None:
        """Have ``let_go`` called when the server is found dead and ``take_up`` when a new one, serving version 0, is
        up; in the order of registration."""
        if let_go is not None:
            self._let_go.append(let_go)
        self._take_up.append(take_up)

    def check(self) -> bool:
        """Whether the server was dead and has been replaced; ``SidecarError`` where it cannot be.

        Looks at nothing where several processes train: there, the data module's wait finds the death.
        """
        if self._sidecar is None or self._is_one_of_several:
            return False
        try:
            self._sidecar.check_alive()
            return False
        except SidecarError as error:
            self._num_restarts += 1
            if self._num_restarts > self.max_restarts:
                raise
            log.warning("%s; starting it again", error)
        for let_go in self._let_go:
            let_go()
        self._sidecar.stop()
        self._sidecar.start()
        up = time.monotonic()
        for take_up in self._take_up:
            take_up()
        log.warning("the vLLM sidecar samples again, %.1f s after it was up", time.monotonic() - up)
        return True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before weights are pushed to it."""
        if not self.check():
            self._num_restarts = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, NorthModule), f"expected a NorthModule, got {type(pl_module).__name__}"
        if pl_module.checkpoint is None:
            raise ConfigError("model.checkpoint: expected a folder, because the sidecar starts from it; got nothing")
        on_process_zero(lambda: self._start(trainer, pl_module))

    def _start(self, trainer: Trainer, module: NorthModule) -> None:
        assert module.checkpoint is not None
        assert module.model is not None
        sidecar = self._make(module.checkpoint, Path(trainer.default_root_dir) / "sidecar.log")
        sidecar.vocab_size = module.model.config.vocab_size
        self._sidecar = sidecar
        sidecar.start()
        self._is_one_of_several = trainer.world_size > 1
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "add_check"):
            data.add_check(sidecar.check_alive if self._is_one_of_several else self.check)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        while self._users:
            self._users.pop()()
        self._let_go, self._take_up = [], []
        if self._sidecar is not None:
            self._sidecar.stop()
            self._sidecar = None


def running_sidecar(trainer: Trainer) -> SidecarCallback:
    """The trainer's ``SidecarCallback``; ``ConfigError`` if it has none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SidecarCallback):
            return callback
    raise ConfigError("trainer.callbacks: expected a SidecarCallback, got none")
