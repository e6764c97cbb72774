"""The life cycle of the vLLM sidecar, or of several, during training.

In: the module's checkpoint. Out: running servers, started again when they die, stopped however training ends. Not here:
the server (``sampling``).

    found dead ─► sampling suspended ─► started      by a watching thread, also while an optimizer step runs
    weights pushed ─► sampling resumed               by the trainer's, between two steps or while it waits for rollouts

Where several processes train, process 0 has the servers, and all take part in the push.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from north_lightning.errors import ConfigError
from north_lightning.modules import CISPOModule, NorthModule
from north_lightning.parallel import on_process_zero
from north_lightning.sampling.sidecar import Sidecar
from north_lightning.sampling.watch import SidecarWatch
from north_lightning.types import Positive, Whole


class SidecarCallback(Callback):
    """Starts the sidecar before training, starts it again when it dies, and stops it afterwards.

    One that cannot be started, or dies too often, ends training with its log's last lines.

    Args:
        sidecar: Makes the sidecar; the checkpoint's folder and the log's path are filled in.
        max_restarts: Deaths borne with no optimizer step between.
        environments: One server is started for each entry, with these further environment variables, such as
            ``CUDA_VISIBLE_DEVICES``; all serve the same weights, and rollouts are spread over them.
        look_every_s: Seconds between two looks at a server.
    """

    def __init__(
        self,
        sidecar: Callable[[Path, Path], Sidecar] = Sidecar,
        max_restarts: Whole = 3,
        environments: Sequence[Mapping[str, str]] = ({},),
        look_every_s: Positive = 1.0,
    ) -> None:
        if not environments:
            raise ConfigError("environments: expected an entry for every server, at least one; got none")
        self._make = sidecar
        self.environments = environments
        self.max_restarts = max_restarts
        self.look_every_s = look_every_s
        self._sidecars: list[Sidecar] = []
        self._watch: SidecarWatch | None = None  # on process 0
        self._push: Callable[[], object] | None = None
        self._users: list[Callable[[], None]] = []

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

    def around_restart(self, suspend: Callable[[], None], resume: Callable[[], None]) -> None:
        """As ``SidecarWatch.around_outage``, on the process that has the servers."""
        self._watching().around_outage(suspend, resume)

    def push_after_restart(self, push: Callable[[], object]) -> None:
        """Have every process call ``push`` when servers have been started again. It pushes within ``pushing``."""
        self._push = push

    def pushing(self) -> AbstractContextManager[None]:
        """As ``SidecarWatch.pushing``, on the process that has the servers."""
        return self._watching().pushing()

    def died_in_push(self) -> bool:
        """As ``SidecarWatch.died_in_push``; every process calls it, and learns the same."""
        return on_process_zero(lambda: self._watching().died_in_push())

    def take_outages(self) -> list[tuple[int, float, float]]:
        """As ``SidecarWatch.take_outages``, on the process that has the servers."""
        return self._watching().take_outages()

    def check(self) -> None:
        """Push the weights of now if servers wait for them, having been started again; every process calls it.

        ``SidecarError`` for a server that cannot be started or has died too often.
        """
        if on_process_zero(self._is_due):
            assert self._push is not None
            self._push()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Before weights are pushed because it is their time."""
        self.check()
        if self._watch is not None:
            self._watch.note_progress()
            numbers = {"sidecar/deaths": float(self._watch.num_deaths), "sidecar/slow_or_paused_s": self._watch.odd_s}
            assert isinstance(pl_module, NorthModule)
            pl_module.record(numbers)

    def check_run(self, trainer: Trainer, module: LightningModule, data: object) -> None:
        """Refuse a model that no server can start from, and a server that cannot serve what the run asks for."""
        sidecar = self._make(_checkpoint_of(module), Path(trainer.default_root_dir) / "sidecar.log")
        if isinstance(module, CISPOModule) and module.router_replay and not sidecar.can_return_routed_experts:
            raise ConfigError(
                "model.router_replay: expected false (or no value, which decides by the server), because this server "
                "cannot return the experts it visits: it is vLLM's CPU build, or extra_args forbids it; got true"
            )
        sidecar.check()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "rollouts"):
                callback.rollouts.check_server(sidecar.max_model_len)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, NorthModule), f"expected a NorthModule, got {type(pl_module).__name__}"
        replays = on_process_zero(lambda: self._start(trainer, pl_module))
        if isinstance(pl_module, CISPOModule):
            pl_module.router_replay = replays
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "add_interruption"):
            data.add_interruption(self._is_due, self.check)

    def _start(self, trainer: Trainer, module: NorthModule) -> bool:
        """Start the servers; whether the module replays their routing."""
        checkpoint = _checkpoint_of(module)
        assert module.model is not None
        replays: bool | None = getattr(module, "router_replay", False)
        for index, environment in enumerate(self.environments):
            name = f"sidecar{index or ''}.log"
            sidecar = self._make(checkpoint, Path(trainer.default_root_dir) / name)
            sidecar.vocab_size = module.model.config.vocab_size
            replays = sidecar.can_return_routed_experts if replays is None else replays
            sidecar.return_routed_experts = bool(replays)
            if environment:
                sidecar.environment |= environment
            self._sidecars.append(sidecar)
        _start_all(self._sidecars)
        self._watch = SidecarWatch(self._sidecars, self.max_restarts, self.look_every_s)
        self._watch.start()
        return bool(replays)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        while self._users:
            self._users.pop()()
        if self._watch is not None:
            self._watch.stop()
        self._watch = self._push = None
        while self._sidecars:
            self._sidecars[-1].stop()
            self._sidecars.pop()

    def _running(self) -> list[Sidecar]:
        if not self._sidecars:
            raise ConfigError("the sidecar is not running: it is started when fit begins")
        return self._sidecars

    def _is_due(self) -> bool:
        return self._watching().is_due() and self._push is not None

    def _watching(self) -> SidecarWatch:
        assert self._watch is not None, "asked before fit has begun, or elsewhere than on process 0"
        return self._watch


def _checkpoint_of(module: LightningModule) -> Path:
    """What servers start from."""
    assert isinstance(module, NorthModule)
    if module.checkpoint is None:
        raise ConfigError(
            "model.checkpoint: expected a folder, because the sidecar starts from it; got nothing. A model with "
            "random weights has none: train it first (fit with SFTModule and HFCheckpoint)"
        )
    return module.checkpoint


def _start_all(sidecars: Sequence[Sidecar]) -> None:
    """At the same time; each is waited for, and the first error is raised."""
    if len(sidecars) == 1:
        sidecars[0].start()
        return
    with ThreadPoolExecutor(len(sidecars)) as threads:
        try:
            for started in [threads.submit(sidecar.start) for sidecar in sidecars]:
                started.result()
        except BaseException:  # the others are not waited for
            for sidecar in sidecars:
                sidecar.stop()
            raise


def running_sidecar(trainer: Trainer) -> SidecarCallback:
    """The trainer's ``SidecarCallback``; ``ConfigError`` if it has none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SidecarCallback):
            return callback
    raise ConfigError("trainer.callbacks: expected a SidecarCallback, got none")
