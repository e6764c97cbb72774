"""``python -m north_lightning calibrate``: which tasks RL trains on, and how many turns each may take.

In: a checkpoint and task sets. Out: a listing (JSONL) of the tasks the checkpoint solves sometimes but not always, each
with a step budget: a quantile of the turns of its solved attempts, plus ``spare_turns``. A task that is always or never
solved has no gradient; a budget larger than its solutions need teaches verbosity. Beside the listing: the attempts (a
stopped calibration goes on), and what they say of all tasks, in numbers and as a picture (``distribution``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from north_lightning.errors import ConfigError, DataError
from north_lightning.evaluation.attempts import Attempt
from north_lightning.evaluation.distribution import distribution, write_distribution
from north_lightning.evaluation.each import attempt_each, plan_each
from north_lightning.evaluation.serve import SidecarFactory, check_serving
from north_lightning.evaluation.summary import by_task
from north_lightning.rollout.metrics import percentile
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.run_folders import write_result
from north_lightning.tasks import load_task_sets
from north_lightning.types import Count, Fraction, Whole


def calibrate(
    checkpoint: Path,
    task_sets: list[Path],
    output: Path,
    rollouts: RolloutSettings,
    sidecar: SidecarFactory,
    num_samples: Count = 4,
    spare_turns: Whole = 1,
    budget_quantile: Fraction = 1.0,
    concurrency: Count = 64,
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
        spare_turns: Turns of the budget above what solved attempts took.
        budget_quantile: Which quantile of the turns of a task's solved attempts that is; 1 is the longest.
        concurrency: Attempts at a time.
        seed: Seed of prompt wording and sampling.
    """
    if not 0 < budget_quantile <= 1:
        raise ConfigError(f"budget_quantile: expected a number above 0, at most 1, got {budget_quantile}")
    tasks = load_task_sets(task_sets)
    check_serving([checkpoint], tasks, rollouts, sidecar, output.parent)
    if output.is_dir():
        raise ConfigError(f"output: expected a file to write, got the folder '{output}'")
    output.parent.mkdir(parents=True, exist_ok=True)
    logs = output.with_suffix(".attempts.jsonl"), output.with_suffix(".vllm.log")
    named = {"calibration": checkpoint}
    plans = plan_each(named, {}, tasks, rollouts, logs[0], num_samples, seed)
    measured_by = attempt_each(plans, named, {}, rollouts, sidecar, logs, concurrency, seed)
    attempts = by_task(measured_by["calibration"])
    kept: dict[str, dict[str, object]] = {}
    budgets: dict[str, int] = {}
    always, never, unmeasured = 0, 0, 0
    for task in tasks:
        measured = attempts.get(task.id, [])
        solved = [attempt for attempt in measured if attempt.solved]
        always += bool(measured) and len(solved) == len(measured)
        never += bool(measured) and not solved
        unmeasured += not measured
        if 0 < len(solved) < len(measured):
            budgets[task.id] = budget(solved, budget_quantile, spare_turns, task.max_turns)
            kept[task.id] = {
                "directory": str(task.directory.resolve()),
                "max_turns": budgets[task.id],
                "pass_rate": len(solved) / len(measured),
            }
    failed = f"{unmeasured} could not be measured (errors in {logs[0]})"
    write_distribution(distribution(attempts, budgets), output)
    if not kept:
        raise DataError(f"no task has something to learn: {always} are always solved, {never} never, {failed}")
    write_result(output, "".join(json.dumps(row) + "\n" for row in kept.values()))
    Console(highlight=False).print(
        f"{output}: {len(kept)} of {len(tasks)} tasks kept, {always} always solved, {never} never"
        + (f", {failed}" if unmeasured else "")
    )


def budget(solved: Sequence[Attempt], quantile: float, spare_turns: int, max_turns: int) -> int:
    """Turns that an attempt may take, from those that solved attempts took; never more than the task allows."""
    turns = percentile([attempt.turns for attempt in solved], 100 * quantile)
    return min(max_turns, math.ceil(turns) + spare_turns)
