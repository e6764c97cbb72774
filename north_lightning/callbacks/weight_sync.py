"""Pushes the trainer's weights to the sampler every few optimizer steps, and knows how old every trained token is.

In: optimizer steps. Out: publications, numbered from 1 (version 0 is what the sidecar was started with), and the policy
lag of each batch. Not here: how weights travel (``WeightTransport``).

After a step: push, if it is due; then release the step's groups; then checkpoints are written. The order matters. Slots
that are freed before the push would be filled by groups sampled from the old weights, and the queue's bound on the lag
would not hold; a checkpoint written before the release would train the groups a second time after a resume.

Where several processes train, process 0 has the transport. All gather the weights, one parameter at a time, so that
none holds the whole model; and all learn whether the push succeeded.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from north_lightning.callbacks.sidecar import SidecarCallback, running_sidecar
from north_lightning.data.rollouts import RolloutDataModule, RolloutStep
from north_lightning.errors import ConfigError, TrainingError, WeightPushError
from north_lightning.interfaces import WeightTransport
from north_lightning.model import NorthModel, named_hf_tensors
from north_lightning.modules import NorthModule
from north_lightning.parallel import on_process_zero
from north_lightning.sampling.transport import SharedMemoryTransport
from north_lightning.types import NOT_SAMPLED, Count, RolloutGroup, Whole


class WeightSyncCallback(Callback):
    """Publishes the weights every ``every_n_steps`` optimizer steps.

    Args:
        every_n_steps: Optimizer steps between pushes (K).
        transport: Makes the transport from the URLs of the servers.
        num_retries: How often a failed push is tried again; the sampler is paused meanwhile. Those that failed because
            a server died are tried again when it is up, and not counted.
        max_policy_lag: Refuse a batch with a token that is more optimizer steps old. Default: the bound that the queue
            proves (``max_policy_lag(every_n_steps)``).
    """

    def __init__(
        self,
        every_n_steps: Count = 4,
        transport: Callable[[list[str]], WeightTransport] = SharedMemoryTransport,
        num_retries: Whole = 2,
        max_policy_lag: Whole | None = None,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.num_retries = num_retries
        self.max_policy_lag = max_policy_lag
        self.version = 0
        self.seconds = 0.0  # spent in pushing so far
        self.pauses: list[tuple[float, float]] = []
        """From when to when pushes held sampling, of the monotonic clock. Who reads them empties the list."""
        self.published_at = {0: 0}  # version -> optimizer steps complete when it was published
        self._make_transport = transport
        self._transport: WeightTransport | None = None
        self._step = 0

    @property
    def prefix_cache(self) -> str | None:
        """What pushes do to the servers' prefix caches, if the transport says so; on process 0, once training has
        started."""
        return getattr(self._transport, "prefix_cache", None)

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def check_run(self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
        """``ConfigError`` where nothing says how old a trained token may be, or where the queue lets it be older."""
        if not isinstance(data, RolloutDataModule):
            return
        try:
            bound = data.queue.max_policy_lag(self.every_n_steps)
        except ConfigError:
            if self.max_policy_lag is None:
                raise
            return
        if self.max_policy_lag is not None and bound is not None and self.max_policy_lag < bound:
            got = self.max_policy_lag
            raise ConfigError(
                f"max_policy_lag: expected at least {bound}, as old as the queue lets a token be, got {got}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume the sidecar serves what training began with: push what training has come to."""
        self._step = trainer.global_step
        on_process_zero(lambda: self._open(running_sidecar(trainer).urls))
        queue = _rollout_data(trainer).queue
        if self.max_policy_lag is None:
            self.max_policy_lag = queue.max_policy_lag(self.every_n_steps)
        assert isinstance(pl_module, NorthModule), f"expected a NorthModule, got {type(pl_module).__name__}"
        if trainer.global_step > 0:
            self._publish(trainer, pl_module)
        running_sidecar(trainer).push_after_restart(partial(self._publish, trainer, pl_module))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutStep, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, NorthModule)
        lags = on_process_zero(lambda: self._lags_of_all(batch.groups, trainer.global_step))
        if self.max_policy_lag is not None:
            pl_module.log("policy_lag/bound", float(self.max_policy_lag))
        whole = sum(lags.values(), Counter[int]())
        pl_module.log_dict({f"policy_lag/{name}": value for name, value in _mean_and_max(whole).items()})
        pl_module.record({f"policy_lag/share_{lag}": count / whole.total() for lag, count in whole.items()})
        for environment, of_it in lags.items():
            pl_module.record(
                {f"policy_lag/{environment}/{name}": value for name, value in _mean_and_max(of_it).items()}
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutStep, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, NorthModule)
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._step % self.every_n_steps == 0:
                seconds = self._publish(trainer, pl_module)
                self.seconds += seconds
                pl_module.record({"weights/push_s": seconds} | on_process_zero(self._speed))
        pl_module.log("weights/version", float(self.version))
        _rollout_data(trainer).release(batch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "published_at": dict(self.published_at)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.version = state_dict["version"]
        self.published_at = dict(state_dict["published_at"])

    # ---- what they do ------------------------------------------------------------------------------------------------

    def policy_lags(self, group: RolloutGroup, step: int) -> Counter[int]:
        """How many sampled tokens are how many optimizer steps old, when trained in the step after ``step``."""
        versions = Counter[int]()
        for rollout in group.rollouts:
            versions.update(rollout.policy_versions)
        del versions[NOT_SAMPLED]
        unknown = versions.keys() - self.published_at.keys()
        if unknown:
            raise TrainingError(
                f"group {group.group_id}: sampled from weights that were never published (versions {sorted(unknown)}); "
                f"the latest is {self.version}"
            )
        lags = Counter[int]()
        for version, count in versions.items():
            lags[step - self.published_at[version]] += count
        return lags

    def _lags_of_all(self, groups: list[RolloutGroup], step: int) -> dict[str, Counter[int]]:
        """By environment."""
        lags = defaultdict[str, Counter[int]](Counter)
        for group in groups:
            lags_of_group = self.policy_lags(group, step)
            self._refuse_too_old(group, max(lags_of_group, default=0))
            lags[group.environment].update(lags_of_group)
        return dict(lags)

    def _refuse_too_old(self, group: RolloutGroup, lag: int) -> None:
        if self.max_policy_lag is not None and lag > self.max_policy_lag:
            raise TrainingError(
                f"group {group.group_id} (task {group.task_id}): expected tokens at most {self.max_policy_lag} "
                f"optimizer steps old, got {lag}"
            )

    def _publish(self, trainer: Trainer, pl_module: NorthModule) -> float:
        """Push under the next version; seconds it took. A version counts only once the sampler has confirmed it."""
        assert pl_module.model is not None
        started = time.monotonic()
        # Known before the push: the sampler may answer with the new version before the push returns.
        self.published_at[self.version + 1] = trainer.global_step
        num_failures = num_deaths = 0
        while True:
            try:
                self._push(running_sidecar(trainer), pl_module.model, self.version + 1)
                break
            except WeightPushError:
                if running_sidecar(trainer).died_in_push():
                    num_deaths += 1
                    continue
                num_failures += 1
                if num_failures > self.num_retries:
                    raise
        self.version += 1
        self._note_pause(started, num_failures + num_deaths)
        return time.monotonic() - started

    def _note_pause(self, started: float, num_failures: int) -> None:
        """Of the transport's report; the whole time where it has none, or where a failed push left sampling paused."""
        report = getattr(self._transport, "last_push", None)
        if report is None or num_failures:
            self.pauses.append((started, time.monotonic()))
        else:
            self.pauses.append((report.resumed_at - report.paused_seconds, report.resumed_at))

    def _speed(self) -> dict[str, float]:
        report = getattr(self._transport, "last_push", None)
        if report is None:
            return {}
        return {"weights/paused_s": report.paused_seconds, "weights/push_gb_s": report.num_bytes / report.seconds / 1e9}

    def _push(self, sidecar: SidecarCallback, model: NorthModel, version: int) -> None:
        """Every process takes every tensor, to the last, also where the push fails half way: the others gather too."""
        tensors = named_hf_tensors(model)

        def push() -> None:
            assert self._transport is not None
            try:
                with sidecar.pushing():
                    self._transport.push(tensors, version)
            finally:
                _take_all(tensors)

        on_process_zero(push, others=lambda: _take_all(tensors))

    def _open(self, urls: list[str]) -> None:
        self._transport = self._make_transport(urls)

    def _close(self) -> None:
        close = getattr(self._transport, "close", None)
        if close is not None:
            close()
        self._transport = None


def _mean_and_max(lags: Counter[int]) -> dict[str, float]:
    mean = sum(lag * count for lag, count in lags.items()) / max(lags.total(), 1)
    return {"max": float(max(lags, default=0)), "mean": mean}


def _take_all(tensors: Iterable[Any]) -> None:
    deque(tensors, maxlen=0)


def _rollout_data(trainer: Trainer) -> RolloutDataModule:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule):
        raise ConfigError(f"data: expected a RolloutDataModule, got {type(data).__name__}")
    return data
