"""Keeps the rollout queue filled: the trainer's end of the rollout process.

In: free slots of the queue. Out: completed groups and visible drops. A thread pumps messages; the process behind it
samples.

    queue.admit ──► schedule ──► rollout process ──► queue.complete
                        ▲               │
                        └── dispatched again after a failure, a bounded number of times, then queue.drop(reason)

The thread waits for: messages of the process, at most ``POLL_S``. It never waits for the trainer, and the trainer
never waits for it except in ``start`` and ``stop``; it learns of failures by calling ``check``.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from north_lightning.errors import AttemptError, ConfigError, InfrastructureError, PromptTooLongError, QueueError
from north_lightning.interfaces import RolloutQueue, TaskCurriculum
from north_lightning.rollout.accounts import Began, Ended, Event, Told
from north_lightning.rollout.child import (
    Alive,
    Cancel,
    CancelAll,
    ChildSpec,
    Dispatch,
    Failed,
    Fatal,
    Finished,
    Ready,
    end_child,
    exit_grace_s,
    run_child,
)
from north_lightning.rollout.records import append_records
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.rollout.schedule import CurriculumSchedule, TaskSchedule
from north_lightning.sandbox.cpu_waits import MAX_SILENT_WORK_S, WORKS_FROM, WorkMeter, slowdown
from north_lightning.sandbox.memory_kills import how_it_ended, num_memory_kills
from north_lightning.types import Count, NotNegative, Positive, Task, Whole

log = logging.getLogger(__name__)

POLL_S = 0.05
START_TIMEOUT_S = 120.0
"""For the rollout process to be ready, on an idle machine."""
CHILD_DIED = "child_died"
DIED = "died"


@dataclass(frozen=True)
class ProducerSpec:
    """What is sampled. Everything in it is picklable: it travels to the rollout process.

    Args:
        tasks: The training tasks.
        make_runner: Called in the rollout process to build its runner.
        group_size: Attempts per task that share a baseline.
        max_concurrent_groups: Groups in the rollout process at a time.
        environment_weights: Environment -> share of groups. Default: in proportion to the number of tasks.
        seed: Of task order, prompt wording and sampling.
        curriculum: How often each task is tried. Default: once an epoch.
    """

    tasks: Sequence[Task]
    make_runner: Callable[[], RolloutRunner]
    group_size: int
    max_concurrent_groups: int
    environment_weights: Mapping[str, float] | None = None
    seed: int = 0
    curriculum: TaskCurriculum | None = None


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """How much failing infrastructure a run bears.

    Args:
        max_dispatches: Times a group is tried before it is dropped; once where the failure repeats with its seed (a
            prompt that is too long, an exception that its actions cause).
        redispatch_delay_s: Pause before a group's second try; doubles with every further one.
        max_consecutive_drops: So many dropped groups with none completed between stop the run. Those whose failure
            repeats with the seed count only once every task has been dropped.
        max_child_restarts: Deaths of the rollout process borne with no group completed between.
        heartbeat_timeout_s: A rollout process silent for longer is killed and restarted, if it does not work meanwhile.
    """

    max_dispatches: Count = 3
    redispatch_delay_s: NotNegative = 2.0
    max_consecutive_drops: Count = 8
    max_child_restarts: Whole = 3
    heartbeat_timeout_s: Positive = 60.0


@dataclass(frozen=True, slots=True)
class _Job:
    """A group the queue has admitted and the producer owes an end."""

    group_id: int
    num_failures: int = 0
    not_before: float = 0.0


class RolloutProducer:
    """Runs the rollout process for one queue.

    Args:
        queue: Where groups are admitted, completed and dropped.
        spec: What is sampled.
        failures: How much failing infrastructure a run bears.
        rollouts_path: File to append every finished rollout to, one JSON object a line.
    """

    def __init__(
        self,
        queue: RolloutQueue,
        spec: ProducerSpec,
        failures: FailurePolicy | None = None,
        rollouts_path: Path | None = None,
    ) -> None:
        if spec.max_concurrent_groups < 1:
            raise ConfigError(f"max_concurrent_groups: expected at least 1, got {spec.max_concurrent_groups}")
        self._queue = queue
        self._spec = spec
        self._limits = failures or FailurePolicy()
        self._rollouts_path = rollouts_path
        schedule = (spec.tasks, spec.environment_weights, spec.seed)
        self.schedule = (
            TaskSchedule(*schedule) if spec.curriculum is None else CurriculumSchedule(*schedule, spec.curriculum)
        )
        self._waiting: list[_Job] = []
        self._running: dict[int, _Job] = {}  # dispatch number -> job
        self._next_dispatch = 0
        self._counts: Counter[str] = Counter()
        self._consecutive_drops = 0
        self._unlucky_tasks: list[str] = []  # of groups dropped in a row whose failure repeats
        self._consecutive_deaths = 0
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._suspended = threading.Event()
        self._recalled = threading.Event()
        self._ready = threading.Event()
        self._process: SpawnProcess | None = None
        self._num_memory_kills = 0
        self._connection: Connection | None = None
        self._last_message = 0.0
        self._meter: WorkMeter | None = None  # of a process that has been silent for a while
        self._silent_work_s = 0.0
        self._listener: Callable[[Event], None] | None = None
        self.heavy_modules: tuple[str, ...] = ()

    # ---- called by the trainer --------------------------------------------------------------------------------------

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start the process and wait until it is ready; raises what went wrong in it."""
        assert self._thread is None, "start() twice"
        self._stopping.clear()
        self._ready.clear()
        self._thread = threading.Thread(target=self._pump, name="rollout-producer", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # before multiprocessing ends the process itself, which would look like a death
        started = time.monotonic()
        while not self._ready.wait(POLL_S):
            self.check()
            if time.monotonic() - started > timeout_s * slowdown():
                self.stop()
                raise InfrastructureError(f"the rollout process: expected it ready within {timeout_s:g} s, it was not")

    def stop(self) -> None:
        """End the process and its sandboxes. Groups in flight stay admitted; ``start`` dispatches them again."""
        atexit.unregister(self.stop)
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise what stopped the producer, if anything did."""
        if self._error is not None:
            raise self._error

    def suspend(self) -> None:
        """Stop sampling, for example while the sampler restarts: work in flight is thrown away, its groups are kept.

        From any thread. Once it has returned, nothing that was sampled in the meantime comes into the queue.
        """
        self._recalled.clear()
        self._suspended.set()
        pump = self._thread
        while pump is not None and pump.is_alive() and not self._recalled.wait(POLL_S):
            pass

    def resume(self) -> None:
        """Go on after ``suspend``: the kept groups are dispatched again under their ids, earlier failures forgiven."""
        self._suspended.clear()

    def stats(self) -> Mapping[str, float]:
        """Groups completed, dispatched again and late; restarts of the process; ``failures/<error class>``, of groups,
        and ``retried/<error class>``, of attempts that were begun anew within their group."""
        counts = {name: float(count) for name, count in sorted(self._counts.items())}
        return {"running": float(len(self._running)), "waiting": float(len(self._waiting)), **counts}

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Have ``listener`` called, from this object's thread, with what ``SamplerAccounts`` are made of."""
        self._listener = listener

    @property
    def child_pid(self) -> int | None:
        """Process id of the rollout process while there is one."""
        return self._process.pid if self._process is not None else None

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        try:
            self._start_child()
            while not self._stopping.is_set():
                if self._suspended.is_set():
                    self._recall()
                    self._recalled.set()
                elif self._ready.is_set():
                    self._interrupt()
                    self._dispatch()
                self._receive()
        except Exception as error:
            self._error = error
        finally:
            self._end_child()

    def _dispatch(self) -> None:
        now = time.monotonic()
        while len(self._running) < self._spec.max_concurrent_groups:
            job = next((job for job in self._waiting if job.not_before <= now), None)
            if job is not None:
                self._waiting.remove(job)
            else:
                group_id = self._queue.admit()
                if group_id is None:
                    return
                self._forget(group_id)  # where the queue wants it begun anew
                job = _Job(group_id)
            number, self._next_dispatch = self._next_dispatch, self._next_dispatch + 1
            self._running[number] = job
            self._send(Dispatch(number, job.group_id, self.schedule.task(job.group_id).id))

    def _interrupt(self) -> None:
        """Stop working on groups that the queue has given up or wants begun anew: they hold places of others."""
        for group_id in self._queue.interrupted():
            self._forget(group_id)

    def _forget(self, group_id: int) -> None:
        self._waiting = [job for job in self._waiting if job.group_id != group_id]
        for number in [number for number, job in self._running.items() if job.group_id == group_id]:
            del self._running[number]
            self._tell(Ended(number, None))
            self._counts["interrupted"] += 1
            self._send(Cancel(number))

    def _recall(self) -> None:
        if self._running:
            self._send(CancelAll())
        self._tell(*(Ended(number, None) for number in self._running))
        self._keep_all()
        self._waiting = [replace(job, num_failures=0, not_before=0.0) for job in self._waiting]
        self._consecutive_drops = 0

    def _receive(self) -> None:
        assert self._connection is not None
        assert self._process is not None
        ready = multiprocessing.connection.wait([self._connection, self._process.sentinel], POLL_S)
        if self._connection in ready:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                self._restart_child(DIED)
                return
            self._note_sign_of_life()
            self._handle(message)
        elif ready:
            self._restart_child(DIED)
        else:
            self._judge_silence()

    def _note_sign_of_life(self) -> None:
        self._last_message, self._meter, self._silent_work_s = time.monotonic(), None, 0.0

    def _judge_silence(self) -> None:
        """A process that says nothing for too long is replaced, if it does not work: it hangs. A busy one is slow."""
        silent_s = time.monotonic() - self._last_message
        limit_s = self._limits.heartbeat_timeout_s if self._ready.is_set() else START_TIMEOUT_S
        if self._meter is None:
            if silent_s > limit_s / 2 and self.child_pid is not None:
                self._meter = WorkMeter([self.child_pid])
        elif silent_s > limit_s:
            seconds, work = self._meter.measure()
            self._silent_work_s += work.ran_s
            if sum(work) < WORKS_FROM * seconds or self._silent_work_s > MAX_SILENT_WORK_S:
                self._restart_child(f"gave no sign of life for {limit_s:g} s")
                return
            self._counts["slow"] += 1
            log.warning(
                "the rollout process said nothing for %.0f s, but works: in %.0f s it ran for %.1f s and waited for "
                "a CPU for %.1f s",
                silent_s, seconds, work.ran_s, work.waited_s,
            )  # fmt: skip
            self._last_message = time.monotonic() - limit_s / 2

    def _handle(self, message: Ready | Alive | Finished | Failed | Fatal) -> None:
        if isinstance(message, Ready):
            self.heavy_modules = message.heavy_modules
            if message.heavy_modules:
                log.warning("the rollout process imported %s; it needs none of it", ", ".join(message.heavy_modules))
            self._ready.set()
        elif isinstance(message, Alive):
            self._tell(Told(message.at_s, message.moves))
            self._counts.update({f"retried/{name}": count for name, count in message.retried.items()})
        elif isinstance(message, Finished):
            self._finish(message)
        elif isinstance(message, Failed):
            self._tell(Ended(message.number, None))
            job = self._running.pop(message.number, None)
            if job is not None:
                self._fail(job, type(message.error).__name__, message.error)
        elif isinstance(message, Fatal):
            raise message.error

    def _finish(self, message: Finished) -> None:
        job = self._running.pop(message.number, None)
        if job is None:
            return  # recalled while its answer was under way; it is dispatched again
        self._tell(Ended(message.number, job.group_id))
        if self._rollouts_path is not None:
            append_records(self._rollouts_path, message.group.rollouts)
        try:
            self._queue.complete(message.group)
        except QueueError:
            # Each job is handed in once, so the queue itself has ended it (a head that took too long).
            self._counts["late"] += 1
            return
        self._counts["completed"] += 1
        self._consecutive_drops = self._consecutive_deaths = 0
        self._unlucky_tasks = []

    def _fail(self, job: _Job, reason: str, error: Exception) -> None:
        self._counts[f"failures/{reason}"] += 1
        num_failures = job.num_failures + 1
        repeats = isinstance(error, AttemptError | PromptTooLongError)
        if num_failures < self._limits.max_dispatches and not repeats:
            self._counts["redispatched"] += 1
            pause_s = self._limits.redispatch_delay_s * 2 ** (num_failures - 1)
            self._waiting.append(replace(job, num_failures=num_failures, not_before=time.monotonic() + pause_s))
            return
        task_id = self.schedule.task(job.group_id).id
        log.warning(
            "group %d (task %s) dropped after %d dispatches: %s: %s", job.group_id, task_id, num_failures, reason, error
        )
        try:
            self._queue.drop(job.group_id, reason)
        except QueueError:
            self._counts["late"] += 1
        if repeats:
            self._unlucky_tasks.append(task_id)
        else:
            self._consecutive_drops += 1
        num_drops = self._consecutive_drops
        if len(set(self._unlucky_tasks)) == len(self._spec.tasks):
            num_drops += len(self._unlucky_tasks)
        if num_drops >= self._limits.max_consecutive_drops:
            raise InfrastructureError(
                f"{num_drops} groups in a row failed up to {self._limits.max_dispatches} times each; "
                f"the last: {reason}: {error}"
            ) from error

    # ---- the process ------------------------------------------------------------------------------------------------

    def _start_child(self) -> None:
        spec = ChildSpec(self._spec.make_runner, tuple(self._spec.tasks), self._spec.group_size, self._spec.seed)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # From this thread: the kernel ties "die with the parent" to the thread that started the process.
        self._process = context.Process(
            target=run_child, args=(theirs, pickle.dumps(spec), os.getpid()), name="rollouts", daemon=True
        )
        self._num_memory_kills = num_memory_kills()
        self._process.start()
        self._tell(Began(time.monotonic()))
        theirs.close()
        self._note_sign_of_life()

    def _restart_child(self, what: str) -> None:
        lost, self._running = self._running, {}
        self._ready.clear()
        exit_code = self._end_child(patience_s=1.0 if what == DIED else 0.0)  # a silent one would not end by itself
        if what == DIED and exit_code is not None:
            what = how_it_ended(exit_code, self._num_memory_kills)
        error = InfrastructureError(f"the rollout process {what}")
        self._counts["child_restarts"] += 1
        self._consecutive_deaths += 1
        if self._consecutive_deaths > self._limits.max_child_restarts:
            self._waiting = [*lost.values(), *self._waiting]
            raise InfrastructureError(f"{error}, {self._consecutive_deaths} times with no group completed between")
        log.warning("%s; restarting it and dispatching %d groups again", error, len(lost))
        for job in lost.values():
            self._fail(job, CHILD_DIED, error)
        self._start_child()

    def _end_child(self, patience_s: float | None = None) -> int | None:
        """Let the process end by itself for a while, then kill it; either way with all that it has started."""
        self._keep_all()
        if self._connection is not None:
            self._connection.close()  # the process ends at the end of its input
            self._connection = None
        if self._process is None:
            return None
        process, self._process = self._process, None
        return end_child(process, exit_grace_s() + 1.0 if patience_s is None else patience_s)

    def _keep_all(self) -> None:
        self._waiting = [*self._running.values(), *self._waiting]
        self._running = {}

    def _tell(self, *events: Event) -> None:
        if self._listener is not None:
            for event in events:
                self._listener(event)

    def _send(self, message: Dispatch | Cancel | CancelAll) -> None:
        assert self._connection is not None
        try:
            self._connection.send(message)
        except OSError:
            log.debug("the rollout process is gone; noticed at the next receive")
