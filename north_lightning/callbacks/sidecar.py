"""The life cycle of the vLLM sidecar, or of several, during training.

In: the module's checkpoint. Out: running servers, started again when they die, stopped however training ends. Not here:
the server (``sampling``).

    found dead ─► users let go (sampling suspended) ─► started ─► users take it up (weights pushed, sampling resumed)

It is looked at while the trainer waits for rollouts and after every step, always from the trainer's thread: the weights
that are pushed again are those between two optimizer steps.
Where several processes train, process 0 has the only one, and its death ends training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
        environments: One server is started for each entry, with these further environment variables, such as
            ``CUDA_VISIBLE_DEVICES``; all serve the same weights, and rollouts are spread over them.
    """

    def __init__(
        self,
        sidecar: Callable[[Path, Path], Sidecar] = Sidecar,
        max_restarts: int = 3,
        environments: Sequence[Mapping[str, str]] = ({},),
    ) -> None:
        if not environments:
            raise ConfigError("environments: expected an entry for every server, at least one; got none")
        self._make = sidecar
        self.environments = environments
        self.max_restarts = max_restarts
        self._num_restarts = 0
        self._is_one_of_several = False
        self._let_go: list[Callable[[], None]] = []
        self._take_up: list[Callable[[], object]] = []
        self._sidecars: list[Sidecar] = []
        self._users: list[Callable[[], None]] = []
        self.outages: list[tuple[int, float, float]] = []
        """Index of the server, from when to when it was being started again, of the monotonic clock. Who reads them
        empties the list."""

    @property
    def urls(self) -> list[str]:
        """Of all servers."""
        return [sidecar.url for sidecar in self._running()]

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer that every running server takes, in tokens."""
        return min(sidecar.max_model_len for sidecar in self._running())

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
        """Whether a server was dead and has been replaced; ``SidecarError`` where it cannot be.

        Looks at nothing where several processes train: there, the data module's wait finds the death.
        """
        if self._is_one_of_several:
            return False
        dead = [sidecar for sidecar in self._sidecars if self._is_dead(sidecar)]
        if not dead:
            return False
        found = time.monotonic()
        for let_go in self._let_go:
            let_go()
        for sidecar in dead:
            sidecar.stop()
        _start_all(dead)
        up = time.monotonic()
        self.outages += [(self._sidecars.index(sidecar), found, up) for sidecar in dead]
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
        for index, environment in enumerate(self.environments):
            name = f"sidecar{index or ''}.log"
            sidecar = self._make(module.checkpoint, Path(trainer.default_root_dir) / name)
            sidecar.vocab_size = module.model.config.vocab_size
            if environment:
                sidecar.environment |= environment
            self._sidecars.append(sidecar)
        _start_all(self._sidecars)
        self._is_one_of_several = trainer.world_size > 1
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "add_check"):
            data.add_check(self._check_all_alive if self._is_one_of_several else self.check)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        while self._users:
            self._users.pop()()
        self._let_go, self._take_up = [], []
        while self._sidecars:
            self._sidecars.pop().stop()

    def _running(self) -> list[Sidecar]:
        if not self._sidecars:
            raise ConfigError("the sidecar is not running: it is started when fit begins")
        return self._sidecars

    def _check_all_alive(self) -> None:
        for sidecar in self._sidecars:
            sidecar.check_alive()

    def _is_dead(self, sidecar: Sidecar) -> bool:
        """Raises its error where there were too many."""
        try:
            sidecar.check_alive()
        except SidecarError as error:
            self._num_restarts += 1
            if self._num_restarts > self.max_restarts:
                raise
            log.warning("%s; starting it again", error)
            return True
        return False


def _start_all(sidecars: Sequence[Sidecar]) -> None:
    """At the same time; each is waited for, and the first error is raised."""
    if len(sidecars) == 1:
        sidecars[0].start()
        return
    with ThreadPoolExecutor(len(sidecars)) as threads:
        for started in [threads.submit(sidecar.start) for sidecar in sidecars]:
            started.result()


def running_sidecar(trainer: Trainer) -> SidecarCallback:
    """The trainer's ``SidecarCallback``; ``ConfigError`` if it has none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SidecarCallback):
            return callback
    raise ConfigError("trainer.callbacks: expected a SidecarCallback, got none")
