"""The life cycle of the vLLM sidecar during training.

In: the module's checkpoint. Out: a running server, stopped however training ends. Not here: the server (``sampling``).
Where several processes train, process 0 has the only one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from north_lightning.errors import ConfigError
from north_lightning.modules import NorthModule
from north_lightning.parallel import on_process_zero
from north_lightning.sampling.sidecar import Sidecar


class SidecarCallback(Callback):
    """Starts the sidecar before training and stops it afterwards; a dead one ends training with its log's last lines.

    Args:
        sidecar: Makes the sidecar; the checkpoint's folder and the log's path are filled in.
    """

    def __init__(self, sidecar: Callable[[Path, Path], Sidecar] = Sidecar) -> None:
        self._make = sidecar
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
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "add_check"):
            data.add_check(sidecar.check_alive)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        while self._users:
            self._users.pop()()
        if self._sidecar is not None:
            self._sidecar.stop()
            self._sidecar = None


def running_sidecar(trainer: Trainer) -> SidecarCallback:
    """The trainer's ``SidecarCallback``; ``ConfigError`` if it has none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SidecarCallback):
            return callback
    raise ConfigError("trainer.callbacks: expected a SidecarCallback, got none")
