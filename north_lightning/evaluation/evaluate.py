"""Attempts at tasks by one checkpoint that a sampler serves: for evaluation, and for calibration before RL.

In: a runner, tasks, how many attempts each. Out: the attempts, every one recorded as soon as it ends. What is recorded
already is not run again. An infrastructure failure is recorded as such, tried again in the next run, and never scored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from north_lightning.errors import ConfigError, InfrastructureError
from north_lightning.evaluation.attempts import (
    Attempt,
    append_attempts,
    attempt_of,
    drop_torn_line,
    harness_digest,
    read_attempts,
    task_digest,
)
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.types import Task


@dataclass(frozen=True, slots=True)
class Served:
    """The checkpoint that the sampler serves: its name in reports, and the digest of its weights."""

    checkpoint: str
    weights: str


async def run_attempts(
    runner: RolloutRunner,
    tasks: Sequence[Task],
    served: Served,
    num_samples: int,
    log: Path,
    concurrency: int = 64,
    seed: int = 0,
    on_attempt: Callable[[Attempt], None] = lambda attempt: None,
) -> list[Attempt]:
    """``num_samples`` attempts at every task, at most ``concurrency`` at a time; sample ``i`` has seed ``seed + i``.

    Attempts at one task share their wording of the prompt, and every checkpoint sees the same.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples: expected at least 1, got {num_samples}")
    drop_torn_line(log)
    recorded = {attempt.key: attempt for attempt in read_attempts(log) if attempt.error is None}
    slots = asyncio.Semaphore(concurrency)

    async def one(number: int, task: Task, identity: dict[str, Any], sample: int) -> Attempt:
        async with slots:
            try:
                rollout = await runner.run(task, group_id=number, index=sample, seed=seed)
                attempt = attempt_of(rollout, identity)
            except InfrastructureError as error:
                attempt = Attempt(**identity, reward=None, error=f"{type(error).__name__}: {error}")
        append_attempts(log, [attempt])
        on_attempt(attempt)
        return attempt

    attempts: list[Attempt] = []
    pending = []
    for number, task in enumerate(tasks):
        identity = _identity(runner, task, served)
        for sample in range(num_samples):
            key = (served.weights, identity["task"], identity["harness"], seed + sample)
            if key in recorded:
                attempts.append(recorded[key])
                on_attempt(recorded[key])
            else:
                pending.append(one(number, task, {**identity, "seed": seed + sample}, sample))
    attempts += await asyncio.gather(*pending)
    return attempts


def _identity(runner: RolloutRunner, task: Task, served: Served) -> dict[str, Any]:
    return {
        "checkpoint": served.checkpoint,
        "weights": served.weights,
        "task_id": task.id,
        "task": task_digest(task),
        "environment": task.environment,
        "family": task.family,
        "harness": harness_digest(runner.harnesses[task.environment]),
    }
