"""``python -m north_lightning calibrate``: which tasks RL trains on, and how many turns each may take.

In: a checkpoint and task sets. Out: a listing (JSONL) of the tasks the checkpoint solves sometimes but not always, each
with a step budget: the longest of its solved attempts, plus ``spare_turns``. A task that is always or never solved has
no gradient; a budget larger than its solutions need teaches verbosity.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from north_lightning.errors import DataError
from north_lightning.evaluation.attempts import Attempt
from north_lightning.evaluation.each import attempt_with_each
from north_lightning.evaluation.serve import SidecarFactory
from north_lightning.evaluation.summary import by_task
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.tasks import load_task_sets


def calibrate(
    checkpoint: Path,
    task_sets: list[Path],
    output: Path,
    rollouts: RolloutSettings,
    sidecar: SidecarFactory,
    num_samples: int = 4,
    spare_turns: int = 1,
    concurrency: int = 64,
    seed: int = 0,
) -> None:
    """Measure pass@k of every task before RL; keep the tasks with something to learn.

    Args:
        checkpoint: The model that RL will start from.
        task_sets: Directories of training tasks, or listings.
        output: The listing to write; the attempts are kept beside it.
        rollouts: How attempts are made.
        sidecar: The vLLM server.
        num_samples: Attempts per task.
        spare_turns: Turns of the budget above the longest solved attempt.
        concurrency: Attempts at a time.
        seed: Of the first sample.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    logs = output.with_suffix(".attempts.jsonl"), output.with_suffix(".vllm.log")
    tasks = load_task_sets(task_sets)
    named = {"calibration": checkpoint}
    measured_by = attempt_with_each(named, tasks, rollouts, sidecar, logs, num_samples, concurrency, seed)
    attempts = by_task(measured_by["calibration"])
    kept, always, never, unmeasured = [], 0, 0, 0
    for task in tasks:
        measured = attempts.get(task.id, [])
        solved = [attempt for attempt in measured if attempt.solved]
        always += bool(measured) and len(solved) == len(measured)
        never += bool(measured) and not solved
        unmeasured += not measured
        if 0 < len(solved) < len(measured):
            kept.append(_row(task.directory, measured, solved, task.max_turns, spare_turns))
    failed = f"{unmeasured} could not be measured (errors in {logs[0]})"
    if not kept:
        raise DataError(f"no task has something to learn: {always} are always solved, {never} never, {failed}")
    output.write_text("".join(json.dumps(row) + "\n" for row in kept))
    Console(highlight=False).print(
        f"{output}: {len(kept)} of {len(tasks)} tasks kept, {always} always solved, {never} never"
        + (f", {failed}" if unmeasured else "")
    )


def _row(
    directory: Path, measured: list[Attempt], solved: list[Attempt], max_turns: int, spare_turns: int
) -> dict[str, object]:
    budget = min(max_turns, max(attempt.turns for attempt in solved) + spare_turns)
    return {"directory": str(directory.resolve()), "max_turns": budget, "pass_rate": len(solved) / len(measured)}
