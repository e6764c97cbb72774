"""Attempts at tasks by one checkpoint that a sampler serves: for evaluation, and for calibration before RL.

In: a runner, tasks, how many attempts each. Out: the attempts, every one recorded as soon as it ends. What is recorded
already is not run again; where only the grading has changed, what the attempt left is graded again. An infrastructure
failure is recorded as such, tried again in the next run, and never scored.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from north_lightning.errors import ConfigError, InfrastructureError
from north_lightning.evaluation.attempts import (
    Attempt,
    append_attempts,
    attempt_of,
    drop_torn_line,
    grading_digest,
    harness_digest,
    read_attempts,
    settings_digest,
    task_digest,
    verifier_digest,
)
from north_lightning.evaluation.controls import check_that_tests_end
from north_lightning.evaluation.works import Works
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.sandbox.scratch import Scratch
from north_lightning.types import Reward, Rollout, Task

SAMPLES_PER_SEED = 2**20
"""``Attempt.seed`` numbers the samples of all seeds: sample i of seed s is s times this, plus i."""

Action = Literal["REUSE", "REGRADE", "RERUN"]
_ATTEMPT_FIELDS = {"weights": "the weights", "task": "the task", "harness": "the harness", "settings": "the settings"}
_GRADING_FIELDS = {"tests": "the task's tests", "verifier": "the verifier", "grader": "the grader"}


@dataclass(frozen=True, slots=True)
class Served:
    """The checkpoint that the sampler serves: its name in reports, and the digest of its weights."""

    checkpoint: str
    weights: str


@dataclass(frozen=True, slots=True)
class Planned:
    """What is done about one attempt, and why."""

    task: Task
    sample: int
    identity: dict[str, Any]
    action: Action
    reason: str
    earlier: Attempt | None  # the attempt that is used or graded again


def plan_attempts(
    runner: AttemptRunner,
    tasks: Iterable[Task],
    served: Served,
    samples: range,
    recorded: Iterable[Attempt],
    works: Works | None = None,
    seed: int = 0,
) -> list[Planned]:
    """What is recorded and graded as it is now is used again; what was graded otherwise is graded again if what it left
    is kept; all else is run."""
    scored: dict[tuple[object, ...], Attempt] = {}
    latest: dict[tuple[object, ...], Attempt] = {}
    failed: dict[tuple[object, ...], Attempt] = {}
    for one in recorded:
        if one.error is None:
            scored[one.key] = latest[one.checkpoint, one.task_id, one.seed] = one
            failed.pop(one.key, None)
        else:
            failed[one.key] = one
    plan = []
    for task in tasks:
        whose = _identity(runner, task, served)
        for sample in samples:
            identity = {**whose, "seed": seed * SAMPLES_PER_SEED + sample}
            wanted = Attempt(**identity, reward=None)
            earlier = scored.get(wanted.key)
            if earlier is None:
                other = latest.get((served.checkpoint, task.id, wanted.seed))
                if error := failed.get(wanted.key):
                    reason = f"it failed outside the model: {error.error}"
                else:
                    reason = _changed(other, wanted, _ATTEMPT_FIELDS) if other else "it is not recorded"
                action: Action = "RERUN"
            elif not (reason := _changed(earlier, wanted, _GRADING_FIELDS)):
                action = "REUSE"
            elif earlier.stop_reason == "invalid_action":  # 0, without a verification
                action, reason = "REUSE", "its score is no verifier's"
            elif works is not None and works.has(earlier.kept) and not task.steps:
                action = "REGRADE"
            else:
                action, reason, earlier = "RERUN", f"{reason}, and what it left is not kept", None
            plan.append(Planned(task, sample, identity, action, reason, earlier))
    return plan


def _changed(earlier: Attempt, wanted: Attempt, names: dict[str, str]) -> str:
    changed = [what for name, what in names.items() if getattr(earlier, name) != getattr(wanted, name)]
    return f"{' and '.join(changed)} changed" if changed else ""


def describe_plan(plan: Sequence[Planned]) -> list[str]:
    """A line for every action and reason: how many attempts, at how many tasks."""
    counts = Counter((one.action, one.reason) for one in plan)
    tasks = {pair: len({one.task.id for one in plan if (one.action, one.reason) == pair}) for pair in counts}
    return [
        f"{action} {count} attempts at {tasks[action, reason]} tasks" + (f": {reason}" if reason else "")
        for (action, reason), count in sorted(counts.items())
    ]


def describe_attempts(plans: Mapping[str, Sequence[Planned]]) -> list[str]:
    """A line for every attempt."""
    return [
        f"{one.action:7} {name} {one.task.id} sample {one.sample}" + (f": {one.reason}" if one.reason else "")
        for name, plan in plans.items()
        for one in plan
    ]


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
    works: Works | None = None,
) -> list[Attempt]:
    """``num_samples`` attempts at every task, from sample ``first_sample`` on; the rest is ``carry_out``'s."""
    for name, value in (("num_samples", num_samples), ("concurrency", concurrency)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    samples = range(first_sample, first_sample + num_samples)
    plan = plan_attempts(runner, tasks, served, samples, read_attempts(log), works, seed)
    return await carry_out(runner, plan, log, concurrency, seed, on_attempt, on_rollout, works)


async def carry_out(
    runner: AttemptRunner,
    plan: Sequence[Planned],
    log: Path,
    concurrency: int,
    seed: int,
    on_attempt: Callable[[Attempt], None] = lambda attempt: None,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
    works: Works | None = None,
) -> list[Attempt]:
    """The attempts of ``plan``, at most ``concurrency`` at a time.

    A draw is a function of the task, ``seed`` and the sample's number, whatever else is attempted: another seed shares
    no draw with this one, and every checkpoint gets the same. Attempts at one task share their wording of the prompt.
    ``on_attempt`` is told every attempt, recorded ones too; ``on_rollout`` gets every new rollout before its attempt is
    recorded, so that none recorded was not given to it. ``works`` keeps what the attempts leave.
    """
    drop_torn_line(log)
    names: dict[tuple[int, int], str] = {}
    if works is not None:
        keep = works.keep_work
        runner.keep_work(lambda task, rollout, left: keep(names[rollout.group_id, rollout.index], task, left))
    slots = asyncio.Semaphore(concurrency)
    endings: dict[str, asyncio.Future[None]] = {}

    async def check_end(task: Task, reward: Reward | None) -> None:
        """Asked once a task: ``VerifierError`` if the tests that have not ended never do."""
        if reward is not None and reward.unended and not task.steps:
            if task.id not in endings:
                endings[task.id] = asyncio.ensure_future(check_that_tests_end(runner, task))
            await asyncio.shield(endings[task.id])

    async def rerun(planned: Planned) -> Attempt:
        group_id = int(planned.identity["task"], 16)
        name = names[group_id, planned.sample] = Works.name(Attempt(**planned.identity, reward=None).key)
        if works is not None:
            works.forget(name)
        rollout = await runner.run(planned.task, group_id=group_id, index=planned.sample, seed=seed)
        await check_end(planned.task, rollout.reward)
        on_rollout(rollout)
        if works is None:
            return attempt_of(rollout, planned.identity)
        works.keep_rollout(name, rollout)
        return attempt_of(rollout, planned.identity, name)

    async def one(planned: Planned) -> Attempt:
        if planned.action == "REUSE" and planned.earlier is not None:
            on_attempt(planned.earlier)
            return planned.earlier
        async with slots:
            try:
                if planned.action == "REGRADE" and planned.earlier is not None and works is not None:
                    attempt, reward = await regrade(runner, planned.task, planned.earlier, planned.identity, works)
                    await check_end(planned.task, reward)
                else:
                    attempt = await rerun(planned)
            except InfrastructureError as error:
                attempt = Attempt(**planned.identity, reward=None, error=f"{type(error).__name__}: {error}")
        append_attempts(log, [attempt])
        on_attempt(attempt)
        return attempt

    return list(await asyncio.gather(*map(one, plan)))


async def regrade(
    runner: AttemptRunner, task: Task, earlier: Attempt, identity: dict[str, Any], works: Works
) -> tuple[Attempt, Reward]:
    """``earlier`` with the verdict of today's verifier and tests on what it left.

    Raises:
        InfrastructureError: there is no verdict.
    """
    scratch = Scratch("attempt")
    try:
        workdir = scratch.path / "work"
        await asyncio.to_thread(works.restore_work, earlier.kept, task, workdir)
        rollout = works.read_rollout(earlier.kept)
        rollout.reward = await runner.verify(task, rollout, workdir)
    finally:
        await asyncio.to_thread(scratch.delete)
    works.keep_rollout(earlier.kept, rollout)
    verdict = {name: identity[name] for name in _GRADING_FIELDS}
    reward = rollout.reward
    return replace(earlier, **verdict, reward=reward.value, solved=bool(reward.solved)), reward


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
        "tests": grading_digest(task),
        "verifier": verifier_digest(runner.verifier),
        "grader": runner.verifier.grader(task),
    }
