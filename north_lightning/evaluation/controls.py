"""Controls of an evaluation: what a task's own solution scores, and what an attempt that does nothing scores.

In: tasks, and how attempts are graded. Out: a verdict on both for every task, kept in ``controls.json`` until the task,
its solution or its grading changes. A benchmark whose solutions do not score 1, or whose untouched tasks do not score
0, measures something else than what it says. Tests that do not end on the solution are no verdict on anything.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypedDict

from north_lightning.durable import replace_text
from north_lightning.errors import DataError, InfrastructureError, VerifierError
from north_lightning.evaluation.attempts import grading_digest, task_digest, verifier_digest
from north_lightning.rollout.attempt import AttemptLoop
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.rollout.stages import Timeouts
from north_lightning.sandbox.scratch import Scratch
from north_lightning.tasks import image_of
from north_lightning.types import Reward, Rollout, Task

SOLUTION = "solution/solve.sh"
SOLVE = "bash /solution/solve.sh </dev/null"
SOLUTION_TIMEOUT_S = 3600.0
"""Limit of a solution whose task does not limit its agent."""


class Control(TypedDict):
    """What is known of a task: None where it has no solution, or where a verdict could not be had."""

    gold: bool | None
    noop: bool | None
    why: str


NOTHING = Control(gold=None, noop=None, why="it has not run")


def run_controls(tasks: Sequence[Task], settings: AttemptSettings, path: Path, concurrency: int) -> dict[str, Control]:
    """Task id -> its controls; those in the file ``path`` are not run again if task and grading are the same."""
    known: dict[str, Control] = json.loads(path.read_text()) if path.exists() else {}
    verifier = settings.verifier
    keys = {
        task.id: f"{task.id} {task_digest(task)} {grading_digest(task)} {verifier_digest(verifier)} "
        f"{verifier.grader(task)} {_solution_digest(task)}"
        for task in tasks
    }
    loop = AttemptLoop(settings.sandboxes, settings.verifier, image_of, settings.timeouts or Timeouts())

    async def all_of_them() -> None:
        slots = asyncio.Semaphore(concurrency)

        async def one(task: Task) -> None:
            async with slots:
                known[keys[task.id]] = await _control(loop, task)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(known, indent=1) + "\n")

        await asyncio.gather(*(one(task) for task in tasks if known.get(keys[task.id], NOTHING)["noop"] is None))

    asyncio.run(all_of_them())
    return {name: known[key] for name, key in keys.items()}


def check_controls(controls: dict[str, Control], exceptions: Sequence[str]) -> dict[str, object]:
    """Shares for the summary; ``DataError`` names the tasks that fail and are no ``exceptions``."""
    if unknown := sorted(set(exceptions) - controls.keys()):
        raise DataError(f"exceptions: expected ids of tasks, got {', '.join(unknown[:5])}")
    failed = {
        name: one["why"] or ("its solution does not score 1" if not one["gold"] else "an untouched task scores 1")
        for name, one in controls.items()
        if not (one["gold"] is True and one["noop"] is False)
    }
    if left := [name for name in failed if name not in exceptions]:
        named = "; ".join(f"{name}: {failed[name]}"[:200] for name in left[:3])
        raise DataError(
            f"controls: expected every solution to score 1 and every untouched task 0, got {len(left)} of "
            f"{len(controls)} tasks that do not ({named}): repair the data or the grader, or name them in exceptions"
        )
    return {
        "gold": sum(one["gold"] is True for one in controls.values()) / len(controls),
        "noop": sum(one["noop"] is True for one in controls.values()) / len(controls),
        "exceptions": failed,
    }


def _solution_digest(task: Task) -> str:
    script = task.directory / SOLUTION
    return sha256(script.read_bytes()).hexdigest()[:16] if script.is_file() else "none"


async def _control(loop: AttemptLoop, task: Task) -> Control:
    if task.steps:
        return Control(gold=None, noop=None, why="a task of several steps, which controls do not run")
    try:
        noop = bool((await _verdict(loop, task, "")).solved)
        if not (task.directory / SOLUTION).is_file():
            return Control(gold=None, noop=noop, why=f"it has no {SOLUTION}")
        gold = await _verdict(loop, task, SOLVE)
        if gold.unended:
            return Control(gold=None, noop=None, why=f"its tests do not end on what its {SOLUTION} makes")
        return Control(gold=bool(gold.solved), noop=noop, why="")
    except InfrastructureError as error:
        return Control(gold=None, noop=None, why=f"{type(error).__name__}: {error}")


async def check_that_tests_end(runner: AttemptRunner, task: Task) -> None:
    """``VerifierError`` if ``task``'s tests do not end on its own solution, or untouched if it has none."""
    has_solution = (task.directory / SOLUTION).is_file()
    if (await _verdict(runner, task, SOLVE if has_solution else "")).unended:
        where = f"what its {SOLUTION} makes" if has_solution else f"the untouched task, which has no {SOLUTION},"
        raise VerifierError(
            f"task {task.id}: its tests do not end on {where} either: they hang, or this machine is too slow for their "
            "limit"
        )


async def _verdict(judge: AttemptLoop | AttemptRunner, task: Task, command: str) -> Reward:
    """On what ``command`` makes of the task in its sandbox."""
    scratch = Scratch("attempt")
    try:
        image = image_of(task) if task.root is None else None
        solution = task.directory / "solution"
        mounts = {"/solution": solution} if command else {}
        sandbox = await judge.sandboxes.open(image, read_only=mounts, root=task.root)
        try:
            if command:
                await sandbox.run(f"cd /work && {command}", task.agent_timeout_s or SOLUTION_TIMEOUT_S)
            await sandbox.snapshot(scratch.path / "work")
        finally:
            await sandbox.close()
        rollout = Rollout(task.id, task.environment, task.family, group_id=-1, index=0, seed=0)
        return await judge.verify(task, rollout, scratch.path / "work")
    finally:
        await asyncio.to_thread(scratch.delete)
