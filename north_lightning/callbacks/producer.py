"""Keeps the rollout queue filled while training runs.

In: tasks and how attempts at them are made. Out: groups in the data module's queue, and its statistics. Not here: the
producer itself (``rollout``), which runs without Lightning too. Where several processes train, process 0 produces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from north_lightning.callbacks.sidecar import running_sidecar
from north_lightning.callbacks.weight_sync import WeightSyncCallback
from north_lightning.data.rollouts import RolloutDataModule
from north_lightning.errors import ConfigError
from north_lightning.interfaces import RolloutQueue, TaskCurriculum
from north_lightning.modules import CISPOModule
from north_lightning.parallel import on_process_zero
from north_lightning.rollout import FailurePolicy, ProducerSpec, RolloutProducer
from north_lightning.rollout.accounts import Event
from north_lightning.rollout.ray import RayProducers, RayQueue, RayRolloutProducer
from north_lightning.rollout.records import forget_unended
from north_lightning.rollout.schedule import TaskSchedule
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.rollout.stages import Timeouts
from north_lightning.seeds import run_seed
from north_lightning.tasks import load_task_sets
from north_lightning.types import Count, Task

ROLLOUTS = "rollouts.jsonl"


class RolloutProducerCallback(Callback):
    """Starts the rollout process when training starts, stops it when training ends, and reports its failures.

    Args:
        task_sets: Folders of tasks, or listings.
        rollouts: How attempts are made.
        group_size: Attempts per task; each is the others' baseline.
        max_concurrent_groups: Groups that are sampled at a time.
        environment_weights: Environment -> share of groups. Default: in proportion to the number of tasks.
        seed: Seed of task order, prompt wording and sampling; the run's ``seed_everything`` by default.
        failures: How much failing infrastructure a run bears.
        keep_rollouts: Append every rollout to ``rollouts.jsonl`` in the run's folder.
        curriculum: How often each task is tried, from how it went. Default: once an epoch.
        ray: Make rollouts in Ray actors, each with ``max_concurrent_groups``; needs a ``RayQueue``. Default: in one
            process on this machine.
    """

    def __init__(
        self,
        task_sets: list[Path],
        rollouts: RolloutSettings,
        group_size: Count = 8,
        max_concurrent_groups: Count = 8,
        environment_weights: dict[str, float] | None = None,
        seed: int | None = None,
        failures: FailurePolicy | None = None,
        keep_rollouts: bool = True,
        curriculum: TaskCurriculum | None = None,
        ray: RayProducers | None = None,
    ) -> None:
        self.task_sets = task_sets
        self.rollouts = rollouts
        self.group_size = group_size
        self.max_concurrent_groups = max_concurrent_groups
        self.environment_weights = environment_weights
        self.seed = seed
        self.failures = failures
        self.keep_rollouts = keep_rollouts
        self.curriculum = curriculum
        self.ray = ray
        self._producer: RolloutProducer | RayRolloutProducer | None = None
        self._tasks: list[Task] = []
        self._schedule_state: dict[str, Any] = {}  # at the last step, or of the checkpoint that training goes on from

    def listen(self, listener: Callable[[Event], None]) -> None:
        """As ``RolloutProducer.listen``, on the process that has the producer."""
        assert self._producer is not None, "listen() before training starts"
        self._producer.listen(listener)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail before anything is started if commands cannot be isolated or tasks cannot be read."""
        if stage == "fit":
            self._check_settings(trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
            on_process_zero(self._prepare)
            on_process_zero(lambda: self._check_times(trainer.datamodule))  # type: ignore[attr-defined]

    def check_run(self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
        """``ConfigError`` for settings here that contradict those of other parts, or do not fit the tasks."""
        self._check_settings(trainer, module, data)
        if trainer.is_global_zero:
            self._prepare()
            assert isinstance(data, RolloutDataModule)
            self._check_times(data)
            assert isinstance(module, CISPOModule)
            assert module.tokenizer_dir is not None
            self._tasks = self.rollouts.fitting(self._tasks, module.tokenizer_dir)

    def _check_settings(self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
        if not isinstance(module, CISPOModule):
            raise ConfigError(f"model.class_path: expected a CISPOModule, got {type(module).__name__}")
        if not isinstance(data, RolloutDataModule):
            raise ConfigError(f"data.class_path: expected a RolloutDataModule, got {type(data).__name__}")
        if self.group_size < 2:
            raise ConfigError(f"group_size: expected at least 2, each the others' baseline, got {self.group_size}")
        if self.ray is not None and not isinstance(data.queue, RayQueue):
            got = type(data.queue).__name__
            raise ConfigError(f"data.queue: expected a RayQueue for producers in Ray actors, got {got}")
        attempts = self.group_size * self.max_concurrent_groups
        if (slots := getattr(self.rollouts.sandboxes, "max_slots", attempts)) < attempts:
            raise ConfigError(
                f"sandboxes.max_slots: expected at least group_size x max_concurrent_groups, {attempts}, got {slots}"
            )
        self._check_sampling(module)
        self._check_lengths(data)
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        if not any(isinstance(callback, WeightSyncCallback) for callback in before):
            raise ConfigError(
                "trainer.callbacks: expected a WeightSyncCallback before the RolloutProducerCallback, so that a "
                "resumed run pushes its weights before it samples"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, RolloutDataModule), f"expected a RolloutDataModule, got {type(data).__name__}"
        on_process_zero(lambda: self._start(trainer, pl_module, data))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        queue = trainer.datamodule.queue  # type: ignore[attr-defined]
        if self._producer is not None:
            for group in batch.groups:
                self._producer.schedule.observe(group)
        pl_module.log_dict(on_process_zero(lambda: self._numbers(queue)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        schedule = self._schedule_state if self._producer is None else self._producer.schedule.state_dict()
        return {"schedule": schedule, "seed": run_seed(self.seed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        now = run_seed(self.seed)
        if (then := state_dict.get("seed", now)) != now:
            raise ConfigError(
                f"seed_everything: expected the checkpoint's, {then}, got {now}: its groups are of other tasks; set it "
                f"back, or seed: {then} of RolloutProducerCallback"
            )
        self._schedule_state = state_dict["schedule"]

    def _prepare(self) -> None:
        if self._tasks:
            return
        self._tasks = load_task_sets(self.task_sets)
        self.rollouts.prepare(self._tasks)
        TaskSchedule(
            self._tasks, self.environment_weights, run_seed(self.seed)
        )  # refuses weights of environments that there are not

    def _start(self, trainer: Trainer, module: LightningModule, data: RolloutDataModule) -> None:
        self.rollouts.check_server(running_sidecar(trainer).max_model_len)
        kept = Path(trainer.default_root_dir) / ROLLOUTS if self.keep_rollouts else None
        if kept is not None:
            forget_unended(kept, data.queue.end_of)
        self._producer = self._make_producer(data.queue, self._spec(trainer, module), kept)
        if self._schedule_state:
            self._producer.schedule.load_state_dict(self._schedule_state)
        running_sidecar(trainer).stop_before(self._stop)
        running_sidecar(trainer).around_restart(self._producer.suspend, self._producer.resume)
        self._producer.start()
        data.add_check(self._producer.check)

    def _make_producer(
        self, queue: RolloutQueue, spec: ProducerSpec, kept: Path | None
    ) -> RolloutProducer | RayRolloutProducer:
        if self.ray is None:
            return RolloutProducer(queue, spec, self.failures, kept)
        assert isinstance(queue, RayQueue)  # checked
        return RayRolloutProducer(self.ray, queue, spec, self.failures, kept)

    def _numbers(self, queue: RolloutQueue) -> dict[str, float]:
        """To log; raises what stopped the producer, if anything did."""
        assert self._producer is not None
        self._producer.check()
        return {f"queue/{name}": value for name, value in queue.stats().items()} | {
            f"producer/{name}": value for name, value in self._producer.stats().items()
        }

    def _check_sampling(self, module: CISPOModule) -> None:
        """The module computes log-probabilities of the distribution that is sampled from."""
        rollouts = self.rollouts
        if module.temperature is None:
            module.temperature = rollouts.temperature
        if rollouts.temperature == 0:
            raise ConfigError("rollouts.temperature: expected more than 0 (attempts must differ), such as 1.0, got 0")
        if rollouts.temperature != module.temperature:
            raise ConfigError(
                f"rollouts.temperature: expected model.temperature, {module.temperature}, got {rollouts.temperature}"
            )
        if rollouts.top_p != 1.0:
            raise ConfigError(f"rollouts.top_p: expected 1.0, as in the trainer's softmax, got {rollouts.top_p}")

    def _check_lengths(self, data: RolloutDataModule) -> None:
        """The longest rollout fits in a row, before hours have gone by until there is one."""
        longest = self.rollouts.max_context_tokens
        if data.max_row_tokens is None:
            data.max_row_tokens = longest
        if data.max_row_tokens < longest:
            raise ConfigError(
                f"data.max_row_tokens: expected at least rollouts.max_context_tokens, {longest}, got "
                f"{data.max_row_tokens}"
            )

    def _check_times(self, data: RolloutDataModule) -> None:
        """What waits for an attempt waits as long as the attempt may take."""
        limits, queue = self.rollouts.timeouts or Timeouts(), data.queue
        slowest = max(self._tasks, key=limits.of_attempt)
        attempt_s = limits.of_attempt(slowest)
        waits = [("data.max_wait_s", data.max_wait_s)]
        if queue.head_timeout_s is not None:
            waits.append(("data.queue.head_timeout_s", queue.head_timeout_s))
            given_up_s = queue.head_timeout_s * (1 + queue.head_requeues)
            if data.max_wait_s < given_up_s:
                raise ConfigError(
                    f"data.max_wait_s: expected at least the {given_up_s:g} s after which the queue gives a group up "
                    f"(head_timeout_s, head_requeues), got {data.max_wait_s:g}"
                )
        for key, wait_s in waits:
            if wait_s < attempt_s:
                raise ConfigError(
                    f"{key}: expected at least the {attempt_s:g} s that an attempt at task {slowest.id!r} may take "
                    f"(rollouts.timeouts.attempt_s, {limits.attempt_s:g}, and the task's own limits), got {wait_s:g}"
                )

    def _spec(self, trainer: Trainer, pl_module: LightningModule) -> ProducerSpec:
        assert isinstance(pl_module, CISPOModule)
        assert pl_module.tokenizer_dir is not None
        make_runner = partial(
            self.rollouts.make_runner,
            pl_module.tokenizer_dir,
            running_sidecar(trainer).urls,
            record_routing=bool(pl_module.router_replay),
            salt_by_version=any(
                isinstance(one, WeightSyncCallback) and one.prefix_cache == "salted"
                for one in trainer.callbacks  # type: ignore[attr-defined]
            ),
        )
        return ProducerSpec(
            self._tasks,
            make_runner,
            self.group_size,
            self.max_concurrent_groups,
            self.environment_weights,
            run_seed(self.seed),
            self.curriculum,
        )

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.stop()
            self._schedule_state = self._producer.schedule.state_dict()
            self._producer = None
