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
    settings_digest,
    task_digest,
)
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.types import Rollout, Task

SAMPLES_PER_SEED = 2**20
"""``Attempt.seed`` numbers the samples of all seeds: sample i of seed s is s times this, plus i."""


@dataclass(frozen=True, slots=True)
class Served:
    """The checkpoint that the sampler serves: its name in reports, and the digest of its weights."""

    checkpoint: str
    weights: str


async def run_attempts(
    runner: AttemptRunner,
    tasks: Sequence[Task],
    served: Served,
    num_samples: int,
    log: Path,
    concurrency: int = 64,
    seed: int = 0,
    on_attempt: Callable[[Attempt], None] = lambda attempt: None,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
    first_sample: int = 0,
) -> list[Attempt]:
    """``num_samples`` attempts at every task, from sample ``first_sample`` on, at most ``concurrency`` at a time.

    A draw is a function of the task, ``seed`` and the sample's number, whatever else is attempted: another seed shares
    no draw with this one, and every checkpoint gets the same. Attempts at one task share their wording of the prompt.
    ``on_attempt`` is told every attempt, recorded ones too; ``on_rollout`` gets every new rollout before its attempt is
    recorded, so that none recorded was not given to it.
    """
    for name, value in (("num_samples", num_samples), ("concurrency", concurrency)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    drop_torn_line(log)
    recorded = {attempt.key: attempt for attempt in read_attempts(log) if attempt.error is None}
    slots = asyncio.Semaphore(concurrency)

    async def one(task: Task, identity: dict[str, Any], sample: int) -> Attempt:
        async with slots:
            try:
                rollout = await runner.run(task, group_id=int(identity["task"], 16), index=sample, seed=seed)
                attempt = attempt_of(rollout, identity)
                on_rollout(rollout)
            except InfrastructureError as error:
                attempt = Attempt(**identity, reward=None, error=f"{type(error).__name__}: {error}")
        append_attempts(log, [attempt])
        on_attempt(attempt)
        return attempt

    attempts: list[Attempt] = []
    pending = []
    for task in tasks:
        whose = _identity(runner, task, served)
        for sample in range(first_sample, first_sample + num_samples):
            identity = {**whose, "seed": seed * SAMPLES_PER_SEED + sample}
            earlier = recorded.get(Attempt(**identity, reward=None).key)
            if earlier is not None:
                attempts.append(earlier)
                on_attempt(earlier)
            else:
                pending.append(one(task, identity, sample))
    attempts += await asyncio.gather(*pending)
    return attempts


def _identity(runner: AttemptRunner, task: Task, served: Served) -> dict[str, Any]:
    return {
        "checkpoint": served.checkpoint,
        "weights": served.weights,
        "task_id": task.id,
        "task": task_digest(task),
        "environment": task.environment,
        "family": task.family,
        "harness": harness_digest(runner.harnesses[task.environment]),
        "settings": settings_digest(runner),
    }
