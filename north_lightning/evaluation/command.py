"""``python -m north_lightning test``: checkpoints over held-out tasks.

In: named checkpoints and task sets. Out: ``attempts.jsonl`` and ``summary.json`` in the output directory, and a table.
What was recorded for the same weights and tasks is not run again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.evaluation.attempts import Attempt, weights_digest
from north_lightning.evaluation.evaluate import Served, run_attempts
from north_lightning.evaluation.serve import SidecarFactory, checkpoint_server
from north_lightning.evaluation.summary import breakdown, compare, summarise
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.tasks import load_tasks
from north_lightning.types import Task

TABLE_ROWS = (
    "pass@1",
    "pass@8",
    "invalid_call_rate",
    "mean_turns",
    "mean_generated_tokens",
    "conclusion_rate",
    "loop_rate",
)


def evaluate(
    checkpoints: dict[str, Path],
    task_sets: list[Path],
    output_dir: Path,
    rollouts: RolloutSettings,
    sidecar: SidecarFactory,
    num_samples: int = 8,
    concurrency: int = 64,
    seed: int = 0,
    baseline: str | None = None,
) -> None:
    """Evaluate checkpoints over task sets, with paired comparisons against a baseline.

    Args:
        checkpoints: Name -> checkpoint directory, all of one shape and tokenizer.
        task_sets: Directories of held-out tasks, or listings.
        output_dir: Where attempts and summary are written; an earlier evaluation there is continued.
        rollouts: How attempts are made.
        sidecar: The vLLM server.
        num_samples: Attempts per task, each with its own seed.
        concurrency: Attempts at a time.
        seed: Of the first sample; the others count up.
        baseline: The checkpoint the others are compared with.
    """
    if baseline is not None and baseline not in checkpoints:
        raise ConfigError(f"baseline: expected one of {', '.join(checkpoints)}, got {baseline!r}")
    for name, path in checkpoints.items():
        if not (path / "config.json").exists():
            raise CheckpointError(f"checkpoints.{name}: {path} is not a checkpoint directory (no config.json)")
    tasks = [task for path in task_sets for task in load_tasks(path)]
    log = output_dir / "attempts.jsonl"
    output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Attempt]] = {}
    with checkpoint_server(list(checkpoints.values()), rollouts, sidecar, output_dir / "vllm.log") as server:
        for name, path in checkpoints.items():
            server.serve(path)
            served = Served(name, weights_digest(path))
            results[name] = attempt_with_progress(server.runner, tasks, served, num_samples, log, concurrency, seed)
    summary = _summary(results, baseline)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _print(summary, baseline)


def attempt_with_progress(
    runner: RolloutRunner,
    tasks: Sequence[Task],
    served: Served,
    num_samples: int,
    log: Path,
    concurrency: int,
    seed: int,
) -> list[Attempt]:
    """``run_attempts`` under a progress bar that shows the pass rate so far."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    solved = done = 0
    with Progress(*columns) as progress:
        bar = progress.add_task(served.checkpoint, total=len(tasks) * num_samples)

        def show(attempt: Attempt) -> None:
            nonlocal solved, done
            done += attempt.reward is not None
            solved += attempt.reward == 1.0
            progress.update(bar, advance=1, description=f"{served.checkpoint} pass@1 {solved / max(1, done):.1%}")

        async def attempt_all() -> list[Attempt]:
            try:
                return await run_attempts(runner, tasks, served, num_samples, log, concurrency, seed, show)
            finally:
                await runner.sampler.close()

        return asyncio.run(attempt_all())


def _summary(results: dict[str, list[Attempt]], baseline: str | None) -> dict[str, Any]:
    summary: dict[str, Any] = {"checkpoints": {}, "paired": {}}
    for name, attempts in results.items():
        summary["checkpoints"][name] = summarise(attempts) | {
            "by_environment": breakdown(attempts, lambda attempt: attempt.environment),
            "by_family": breakdown(attempts, lambda attempt: attempt.family),
        }
        if baseline is not None and name != baseline:
            summary["paired"][f"{name} - {baseline}"] = compare(results[baseline], attempts)
    return summary


def _print(summary: dict[str, Any], baseline: str | None) -> None:
    table = Table(title="held-out tasks")
    table.add_column("")
    rows = summary["checkpoints"]
    for name in rows:
        table.add_column(name, justify="right")
    for metric in TABLE_ROWS:
        values = [row.get(metric) for row in rows.values()]
        table.add_row(metric, *("–" if value is None else f"{value:.3f}" for value in values))
    console = Console()
    console.print(table)
    for pair, gain in summary["paired"].items():
        low, high = gain["ci95"]
        console.print(f"{pair}: pass@1 {gain['pass@1']:+.3f}, 95% interval [{low:+.3f}, {high:+.3f}], paired by task")
