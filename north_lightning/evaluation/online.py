"""The curve of held-out pass@1 beside training: each point is measured on one snapshot of the weights.

In: snapshots. Out: points, one line of ``points.jsonl`` each. The trainer waits for nothing: a thread of its process
has the server's life and the pushes, a process with low priority has the attempts.

    snapshot ─► server started (once) ─► weights pushed ─► attempts, recorded as they end ─► point

The server's weights change only between two points, and every sampled token names their version, so a point never mixes
versions. An attempt is known by the digest of its weights: a point that was cut off goes on only with the same weights.
What fails is tried once more; a point that fails twice is lost, which is said, and training goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError, InfrastructureError, SamplerError, SidecarError
from north_lightning.evaluation.attempts import Attempt
from north_lightning.evaluation.evaluate import Served, run_attempts
from north_lightning.evaluation.summary import summarise
from north_lightning.history import History, read_history
from north_lightning.interfaces import WeightTransport
from north_lightning.rollout.child import begin_child, end_child, exit_grace_s, portable
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.sampling.sidecar import Sidecar
from north_lightning.sandbox.memory_kills import how_it_ended, num_memory_kills
from north_lightning.types import NOT_SAMPLED, Rollout, Task

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FOLDER, POINTS = "eval", "points.jsonl"
NICENESS = 10
"""Priority of the attempts. Commands have limits in seconds of a clock, so they must not starve, as the server may."""
SHOWN = ("mean_turns", "mean_generated_tokens", "invalid_call_rate", "num_tasks", "num_attempts", "num_errors")
"""What is logged of a point beside pass@1."""
NUM_TRIES = 2
POLL_S = 0.2


@dataclass(frozen=True)
class PointSpec:
    """How every point is measured. Picklable: it travels to the process of the attempts.

    Args:
        tasks: The held-out tasks.
        make_runner: Makes the runner from the server's URL, in the process of the attempts.
        num_samples: Attempts per task.
        concurrency: Attempts at a time.
        seed: Seed of prompt wording and sampling; all points have the same draws.
    """

    tasks: Sequence[Task]
    make_runner: Callable[[str], RolloutRunner]
    num_samples: int
    concurrency: int
    seed: int


@dataclass(frozen=True)
class Snapshot:
    """The weights after ``step`` optimizer steps, on the host."""

    step: int
    policy_version: int
    tensors: Sequence[tuple[str, Tensor]]

    def digest(self) -> str:
        """The first 16 hex digits of a SHA-256 of names and numbers."""
        import torch

        digest = sha256()
        for name, tensor in self.tensors:
            digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


class OnlineEvaluator:
    """Measures one snapshot at a time; all methods return at once but ``finish`` and ``stop``.

    Args:
        sidecar: The server, started with the first point.
        make_transport: Makes what carries the weights there, from its URL.
        spec: How a point is measured.
        folder: Where attempts and points are written.
    """

    def __init__(
        self, sidecar: Sidecar, make_transport: Callable[[list[str]], WeightTransport], spec: PointSpec, folder: Path
    ) -> None:
        sidecar.is_background = True
        self._sidecar, self._is_up = sidecar, False
        self._make_transport = make_transport
        self._spec = spec
        self._folder = folder
        self._points: list[dict[str, Any]] = []
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self.step: int | None = None
        """Of the snapshot that was handed in last."""

    @property
    def is_free(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def begin(self, snapshot: Snapshot) -> None:
        """Measure ``snapshot``; only while ``is_free``."""
        assert self.is_free, "one point at a time"
        self.step = snapshot.step
        self._thread = threading.Thread(target=self._try, args=(snapshot,), name="online-evaluation", daemon=True)
        self._thread.start()

    def take(self) -> list[dict[str, Any]]:
        """The points that have ended since the last call."""
        points, self._points = self._points, []
        return points

    def finish(self, within_s: float) -> bool:
        """Wait for the point that is being measured; whether it ended in time."""
        if self._thread is not None:
            self._thread.join(within_s)
        return self.is_free

    def stop(self) -> None:
        """End the server, the attempts and their sandboxes. What was recorded is kept."""
        self._stopping.set()
        if self._is_up and self._thread is not None:
            self._thread.join(exit_grace_s() + 1.0)  # the attempts first, so that they do not see the server disappear
        self._sidecar.stop()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(POLL_S)
            self._sidecar.stop()  # which the thread may have been about to start

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _try(self, snapshot: Snapshot) -> None:
        for left in reversed(range(NUM_TRIES)):
            try:
                self._points = [*self._points, self._measure(snapshot, is_last=not left)]
                return
            except Exception as error:  # no failure here may end training
                if self._stopping.is_set():
                    return
                then = "it is tried again" if left else "the point is lost"
                log.warning("evaluation of step %d: %s: %s; %s", snapshot.step, type(error).__name__, error, then)

    def _measure(self, snapshot: Snapshot, is_last: bool) -> dict[str, Any]:
        started = time.monotonic()
        self._serve(snapshot)
        served = Served(f"step {snapshot.step}", snapshot.digest())
        attempts = self._attempt(served, snapshot.policy_version)
        failed = [attempt for attempt in attempts if attempt.error is not None]
        scored = {attempt.task_id for attempt in attempts if attempt.error is None}
        if failed and not (is_last and len(scored) == len(self._spec.tasks)):
            raise InfrastructureError(f"{len(failed)} of {len(attempts)} attempts failed, such as: {failed[0].error}")
        point = {"step": snapshot.step, "eval/policy_version": snapshot.policy_version, "weights": served.weights}
        point |= numbers_of(attempts, self._spec.tasks) | {"eval/seconds": round(time.monotonic() - started, 3)}
        with (self._folder / POINTS).open("a") as file:
            file.write(json.dumps(point) + "\n")
        return point

    def _serve(self, snapshot: Snapshot) -> None:
        """Have a living server serve the snapshot's weights; one that fails is started again at the next try."""
        if self._is_up:
            try:
                self._sidecar.check_alive()
            except SidecarError as error:
                log.warning("%s; starting it again", error)
                self._sidecar.stop()
                self._is_up = False
        if self._stopping.is_set():
            raise SidecarError("the evaluation is being stopped")
        if not self._is_up:
            self._sidecar.start()
            self._is_up = True
        transport = self._make_transport([self._sidecar.url])
        try:
            transport.push(snapshot.tensors, snapshot.policy_version)
        finally:
            getattr(transport, "close", lambda: None)()

    def _attempt(self, served: Served, policy_version: int) -> list[Attempt]:
        """The attempts of a point, made by a process of their own; those that are recorded are not made again."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        arguments = pickle.dumps((self._spec, self._sidecar.url, served, policy_version, self._folder))
        process = context.Process(
            target=run_point, args=(theirs, arguments, os.getpid()), name="evaluation", daemon=True
        )
        kills, code = num_memory_kills(), None
        process.start()
        theirs.close()
        answer = None
        try:
            while not self._stopping.is_set() and answer is None:
                if multiprocessing.connection.wait([ours, process.sentinel], POLL_S):
                    answer = ours.recv()
        except (EOFError, OSError):
            pass  # it died
        finally:
            ours.close()
            if self._stopping.is_set():
                process.terminate()
            code = end_child(process, exit_grace_s())
        if isinstance(answer, Exception):
            raise answer
        if answer is None:
            raise InfrastructureError(f"the evaluation process {how_it_ended(code or 0, kills)}")
        attempts: list[Attempt] = answer
        return attempts


def numbers_of(attempts: Sequence[Attempt], tasks: Sequence[Task]) -> dict[str, float]:
    """What is logged of a point: pass@1 with its 95% interval, of all tasks and of each environment, and lengths."""
    repositories = {task.id: str(task.metadata["repository"]) for task in tasks if "repository" in task.metadata}
    numbers: dict[str, float] = {}
    environments = sorted({attempt.environment for attempt in attempts})
    for name in ["", *(f"{environment}/" for environment in environments)]:
        chosen = [attempt for attempt in attempts if name in ("", f"{attempt.environment}/")]
        summary = summarise(chosen, repositories, ks=(1,))
        low, high = summary["pass@1_ci95"]
        key = f"eval/{name}pass@1"
        numbers |= {key: summary["pass@1"], f"{key}/low": low, f"{key}/high": high}
        if not name:
            numbers |= {f"eval/{one}": float(summary[one]) for one in SHOWN}
    return numbers


def metric_names(tasks: Sequence[Task]) -> list[str]:
    """The names of all that a point logs."""
    blank = [Attempt("", "", task.id, "", task.environment, task.family, "", 0, 0.0, duration_s=0) for task in tasks]
    return [*numbers_of(blank, tasks), "eval/seconds", "eval/policy_version"]


def keep_points(path: Path, up_to_step: int) -> History:
    """The points of steps that the run still has, after a resume from ``up_to_step``; the file holds no others."""
    if not path.exists():
        return []
    points = [point for point in read_history(path) if point["step"] <= up_to_step]
    replace_text(path, "".join(json.dumps(point) + "\n" for point in points))
    return points


def choose_tasks(tasks: Sequence[Task], num_tasks: int | None) -> list[Task]:
    """``num_tasks`` of them, evenly from all families of all environments, the same in every run; all for None."""
    families = defaultdict[tuple[str, str], list[Task]](list)
    for task in sorted(tasks, key=lambda task: task.id):
        families[task.environment, task.family].append(task)
    in_turn = sorted(
        ((index / len(family), key, task) for key, family in families.items() for index, task in enumerate(family)),
        key=lambda one: one[:2],
    )
    if num_tasks is not None and num_tasks > len(tasks):
        raise ConfigError(f"num_tasks: expected at most the {len(tasks)} tasks of task_sets, got {num_tasks}")
    return [task for _, _, task in in_turn][:num_tasks]


# ---- the process of the attempts -------------------------------------------------------------------------------------


def run_point(connection: Connection, pickled: bytes, parent_pid: int) -> None:
    """Entry point of the process: sends the attempts of one point, or the error."""
    begin_child(parent_pid, "evaluation")
    os.nice(NICENESS)
    try:
        answer: Any = asyncio.run(_attempts_of_point(*pickle.loads(pickled)))  # from our own parent
    except Exception as error:
        answer = portable(error)
    with suppress(OSError):  # nobody waits for it any more
        connection.send(answer)


async def _attempts_of_point(
    spec: PointSpec, url: str, served: Served, policy_version: int, folder: Path
) -> list[Attempt]:
    def refuse_other_weights(rollout: Rollout) -> None:
        others = {*rollout.policy_versions} - {NOT_SAMPLED, policy_version}
        if others:
            raise SamplerError(f"expected tokens of policy version {policy_version} only, got {sorted(others)}")

    runner = spec.make_runner(url)
    limits = (spec.num_samples, folder / "attempts.jsonl", spec.concurrency, spec.seed)
    try:
        return await run_attempts(runner, spec.tasks, served, *limits, on_rollout=refuse_other_weights)
    finally:
        await runner.close()
