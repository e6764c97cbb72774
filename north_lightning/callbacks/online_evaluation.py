"""The curve of held-out pass@1 while RL goes on: every point is of one policy version, and training waits for none.

In: held-out tasks; the weights every so many optimizer steps. Out: ``eval/*`` in every logger, ``eval/points.jsonl``
and ``eval/attempts.jsonl`` in the run's folder. Not here: how a point is measured (``evaluation.online``).

A point belongs to the step whose weights it measured (``eval/step``), although it ends later. Where several processes
train, all gather the weights; process 0 has the evaluation.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from north_lightning.callbacks.producer import RolloutProducerCallback
from north_lightning.callbacks.weight_sync import WeightSyncCallback
from north_lightning.errors import ConfigError
from north_lightning.evaluation.online import (
    FOLDER,
    POINTS,
    OnlineEvaluator,
    PointSpec,
    Snapshot,
    choose_tasks,
    keep_points,
    metric_names,
)
from north_lightning.interfaces import WeightTransport
from north_lightning.model import named_hf_tensors
from north_lightning.modules import NorthModule
from north_lightning.parallel import on_process_zero
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.sampling.sidecar import Sidecar
from north_lightning.sampling.transport import SharedMemoryTransport
from north_lightning.seeds import run_seed
from north_lightning.tasks import load_task_sets
from north_lightning.types import Count, NotNegative, Task

log = logging.getLogger(__name__)

SCORE = "eval/pass@1"


class OnlineEvaluation(Callback):
    """Measures pass@1 on held-out tasks during RL, on a server of its own.

    ``ModelCheckpoint(monitor="eval/pass@1", mode="max")`` sees the newest point from the step on in which it ends, and
    NaN before the first; the checkpoint that it saves then is later than the measured weights.

    Args:
        task_sets: Folders of held-out tasks, or listings; none may be trained on.
        every_n_steps: Optimizer steps between points, from step 0 on; a multiple of WeightSyncCallback's, so that
            every point is of a published version. A point that is due while another is measured is skipped.
        sidecar: Makes the server; the checkpoint's folder and the log's path are filled in. It runs on CPU time that
            nobody else wants, and keeps its memory between points.
        rollouts: How attempts are made. Default: as for training.
        num_tasks: Use so many of the tasks, the same in every point, evenly from all families. Default: all.
        num_samples: Attempts per task.
        concurrency: Attempts at a time.
        seed: Seed of prompt wording and sampling, the same in every point; the run's ``seed_everything`` by default.
        transport: Makes, from the server's URL, what carries a copy of the weights there.
        finish_within_s: Seconds that the end of training waits for a point that is being measured; then it is skipped.
    """

    def __init__(
        self,
        task_sets: list[Path],
        every_n_steps: Count,
        sidecar: Callable[[Path, Path], Sidecar] = Sidecar,
        rollouts: RolloutSettings | None = None,
        num_tasks: Count | None = None,
        num_samples: Count = 1,
        concurrency: Count = 16,
        seed: int | None = None,
        transport: Callable[[list[str]], WeightTransport] = SharedMemoryTransport,
        finish_within_s: NotNegative = 600.0,
    ) -> None:
        self.task_sets = task_sets
        self.every_n_steps = every_n_steps
        self.num_tasks = num_tasks
        self.num_samples = num_samples
        self.concurrency = concurrency
        self.seed = seed
        self.finish_within_s = finish_within_s
        self._own_rollouts = rollouts
        self._make_sidecar = sidecar
        self._make_transport = transport
        self._evaluator: OnlineEvaluator | None = None  # on process 0, while training runs
        self._is_on = False
        self._step = 0
        self._latest = {SCORE: math.nan, "eval/step": math.nan}

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def check_run(self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
        """``ConfigError`` for settings here that contradict those of other parts, or do not fit the tasks."""
        sync = _only(trainer, WeightSyncCallback)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if callbacks.index(sync) > callbacks.index(self):
            raise ConfigError(
                "trainer.callbacks: expected the OnlineEvaluation after the WeightSyncCallback, whose versions it "
                "measures, got it before"
            )
        if self.every_n_steps % sync.every_n_steps:
            raise ConfigError(
                f"OnlineEvaluation.every_n_steps: expected a multiple of WeightSyncCallback.every_n_steps, "
                f"{sync.every_n_steps}, got {self.every_n_steps}"
            )
        assert isinstance(module, NorthModule)
        if trainer.is_global_zero and module.checkpoint is not None:  # without one, the sampler's server cannot start
            tasks = self._tasks()
            trained = {task.id for task in load_task_sets(_only(trainer, RolloutProducerCallback).task_sets)}
            if both := trained & {task.id for task in tasks}:
                raise ConfigError(
                    f"OnlineEvaluation.task_sets: expected held-out tasks, got {len(both)} that are trained on, such "
                    f"as {min(both)}"
                )
            rollouts, sidecar = self._rollouts(trainer), self._sidecar(trainer, module)
            sidecar.check()
            rollouts.check_server(sidecar.max_model_len)
            rollouts.prepare(tasks)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, NorthModule)
        self._is_on = not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._step = trainer.global_step
        if self._is_on and on_process_zero(lambda: self._start(trainer, pl_module)):
            self._begin_point(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_on:
            return
        assert isinstance(pl_module, NorthModule)
        self._latest = on_process_zero(lambda: self._log_points(trainer))
        pl_module.log_dict(self._latest, logger=False)
        if trainer.global_step == self._step:
            return  # a micro-batch of a step that is not complete
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0 and on_process_zero(self._is_free):
            self._begin_point(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluator is not None:
            if not self._evaluator.is_free:
                log.warning("waiting at most %g s for the last point of the evaluation", self.finish_within_s)
            if not self._evaluator.finish(self.finish_within_s):
                log.warning("the point of step %s is skipped: it did not end in time", self._evaluator.step)
            self._log_points(trainer)
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    # ---- what they do ------------------------------------------------------------------------------------------------

    def _start(self, trainer: Trainer, module: NorthModule) -> bool:
        """Make the evaluator; whether a point is due: the run has none of its last multiple of ``every_n_steps``."""
        assert module.tokenizer_dir is not None
        tasks = self._tasks()
        folder = Path(trainer.default_root_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        make_runner = partial(self._rollouts(trainer).make_runner, module.tokenizer_dir)
        spec = PointSpec(tasks, make_runner, self.num_samples, self.concurrency, run_seed(self.seed))
        self._evaluator = OnlineEvaluator(self._sidecar(trainer, module), self._make_transport, spec, folder)
        points = keep_points(folder / POINTS, trainer.global_step)
        if points:
            self._note(points[-1])
        for logger in trainer.loggers:  # W&B, which would draw points over the step in which they ended
            define = getattr(getattr(logger, "experiment", None), "define_metric", None)
            if define is not None:
                for name in metric_names(tasks):
                    define(name, step_metric="eval/step")
        due = trainer.global_step // self.every_n_steps * self.every_n_steps
        return not any(point["step"] >= due for point in points)

    def _begin_point(self, trainer: Trainer, module: NorthModule) -> None:
        """Copy the weights to the host and hand them in; every process takes every tensor, to the last."""
        assert module.model is not None
        sync = _only(trainer, WeightSyncCallback)
        assert sync.published_at[sync.version] == trainer.global_step, "a point of weights that were not published"
        tensors = named_hf_tensors(module.model)

        def begin() -> None:
            assert self._evaluator is not None
            copies = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in tensors]
            self._evaluator.begin(Snapshot(trainer.global_step, sync.version, copies))

        on_process_zero(begin, others=lambda: deque(tensors, maxlen=0))

    def _is_free(self) -> bool:
        assert self._evaluator is not None
        if not self._evaluator.is_free:
            log.warning(
                "the evaluation of step %d is skipped: that of step %s is not over", self._step, self._evaluator.step
            )
        return self._evaluator.is_free

    def _log_points(self, trainer: Trainer) -> dict[str, float]:
        """Hand the points that have ended to the loggers; what monitors see."""
        assert self._evaluator is not None
        for point in self._evaluator.take():
            self._note(point)
            numbers = {name: value for name, value in point.items() if name.startswith("eval/")}
            for logger in trainer.loggers:
                logger.log_metrics(numbers | {"eval/step": float(point["step"])}, step=trainer.global_step - 1)
        return self._latest

    def _note(self, point: dict[str, Any]) -> None:
        self._latest = {SCORE: point[SCORE], "eval/step": float(point["step"])}

    def _stop(self) -> None:
        evaluator, self._evaluator, self._is_on = self._evaluator, None, False
        if evaluator is not None:
            evaluator.stop()

    def _rollouts(self, trainer: Trainer) -> RolloutSettings:
        return self._own_rollouts or _only(trainer, RolloutProducerCallback).rollouts

    def _tasks(self) -> list[Task]:
        return choose_tasks(load_task_sets(self.task_sets), self.num_tasks)

    def _sidecar(self, trainer: Trainer, module: NorthModule) -> Sidecar:
        assert module.checkpoint is not None
        return self._make_sidecar(module.checkpoint, Path(trainer.default_root_dir) / FOLDER / "vllm.log")


def _only(trainer: Trainer, kind: type[Any]) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))  # type: ignore[attr-defined]
