"""``python -m north_lightning test``: checkpoints over held-out tasks.

In: named checkpoints and task sets. Out: ``attempts.jsonl`` and ``summary.json`` in the output directory, and a table.
What was recorded for the same weights and tasks is not run again; what an attempt left is kept in ``works/``, and is
graded again where only tests or verifier have changed. ``plan.txt`` says what a continued evaluation did about each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from north_lightning.durable import replace_text
from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.evaluation.attempts import ATTEMPTS, Attempt
from north_lightning.evaluation.controls import check_controls, run_controls
from north_lightning.evaluation.each import attempt_with_each, attempt_with_servers, plan_each
from north_lightning.evaluation.evaluate import SAMPLES_PER_SEED, describe_attempts, describe_plan
from north_lightning.evaluation.serve import SidecarFactory, check_serving
from north_lightning.evaluation.statistics import MIN_EVENT_CLUSTERS, holm
from north_lightning.evaluation.summary import MAX_FAILED_SHARE, breakdown, by_task, compare, summarise
from north_lightning.evaluation.works import WORKS, Works
from north_lightning.rollout import ChatServer
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.run_folders import write_result
from north_lightning.tasks import load_task_sets
from north_lightning.types import Count, Task

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
    task_sets: list[Path],
    output_dir: Path,
    rollouts: RolloutSettings,
    checkpoints: dict[str, Path] | None = None,
    sidecar: SidecarFactory | None = None,
    servers: dict[str, ChatServer] | None = None,
    num_samples: Count = 8,
    concurrency: Count = 64,
    seed: int = 0,
    baseline: str | None = None,
    controls: bool = False,
    exceptions: list[str] | None = None,
    dry_run: bool = False,
) -> None:
    """Evaluate checkpoints, and models behind OpenAI-compatible servers, with paired comparisons against a baseline.

    Args:
        task_sets: Directories of held-out tasks, or listings.
        output_dir: Where attempts and summary are written; an earlier evaluation there is continued.
        rollouts: How attempts are made.
        checkpoints: Name -> checkpoint directory, all of one shape and tokenizer.
        sidecar: The vLLM server that serves the checkpoints.
        servers: Name -> an OpenAI-compatible server, asked by chat completions.
        num_samples: Attempts per task, each with its own seed.
        concurrency: Attempts at a time.
        seed: Seed of prompt wording and sampling; every checkpoint gets the same.
        baseline: The checkpoint or server the others are compared with.
        controls: Run every task's own solution, and an attempt that does nothing, before the first evaluation; refuse
            tasks whose solution does not score 1 or that score 1 untouched.
        exceptions: Ids of tasks that may fail the controls; the summary names them.
        dry_run: Print what would be done about each attempt (REUSE, REGRADE or RERUN, and why), and do nothing.
    """
    checkpoints, servers = checkpoints or {}, servers or {}
    names = [*checkpoints, *servers]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"checkpoints and servers: expected one or more, each with its own name, got {names}")
    if not checkpoints:
        rollouts.check_without_checkpoint()
        if sidecar is not None:
            raise ConfigError("sidecar: expected checkpoints for it to serve, got none: leave it out")
    if exceptions and not controls:
        raise ConfigError("exceptions: expected controls that they may fail, got controls: false")
    if baseline is not None and baseline not in names:
        raise ConfigError(f"baseline: expected one of {', '.join(names)}, got {baseline!r}")
    for name, path in checkpoints.items():
        if not (path / "config.json").exists():
            raise CheckpointError(f"checkpoints.{name}: {path} is not a checkpoint directory (no config.json)")
    tasks = load_task_sets(task_sets)
    if checkpoints:
        if sidecar is None:
            raise ConfigError("sidecar: expected a vLLM server to serve the checkpoints, got none")
        check_serving(list(checkpoints.values()), tasks, rollouts, sidecar, output_dir)
    logs = output_dir / ATTEMPTS, output_dir / "vllm.log"
    works = Works(output_dir / WORKS)
    is_continued = logs[0].exists()
    if dry_run or is_continued:
        planned = plan_each(checkpoints, servers, tasks, rollouts, logs[0], num_samples, seed, works)
        plans = {served.checkpoint: plan for served, plan in planned.items()}
    if dry_run:
        print("\n".join(describe_attempts(plans)))
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    if is_continued:
        replace_text(output_dir / "plan.txt", "\n".join(describe_attempts(plans)) + "\n")
        for name, plan in plans.items():
            print("\n".join(f"{name}: {line}" for line in describe_plan(plan)))
    checked = None
    if controls:
        found = run_controls(tasks, rollouts, output_dir / "controls.json", concurrency)
        checked = check_controls(found, exceptions or [])
    results: dict[str, list[Attempt]] = {}
    if sidecar is not None and checkpoints:
        results |= attempt_with_each(checkpoints, tasks, rollouts, sidecar, logs, num_samples, concurrency, seed, works)
    results |= attempt_with_servers(servers, tasks, rollouts, logs[0], num_samples, concurrency, seed, works)
    repositories = {task.id: str(task.metadata["repository"]) for task in tasks if "repository" in task.metadata}
    summary = _summary(results, baseline, repositories)
    summary |= {"repositories": repositories, "controls": checked, **_about(tasks)}
    steps = {task.id: len(task.metadata["answer_files"]) for task in tasks if "extraction" in task.metadata}
    for name, attempts in results.items() if steps else ():
        summary["checkpoints"][name]["step_score"] = step_score(attempts, steps)
    for name, attempts in results.items():
        summary["checkpoints"][name]["protocol"] = _protocol(attempts, tasks, rollouts, num_samples, seed)
    write_result(output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    _print(summary)


def _protocol(
    attempts: Sequence[Attempt], tasks: Sequence[Task], rollouts: RolloutSettings, num_samples: int, seed: int
) -> dict[str, Any]:
    """How the attempts were made and graded: what ``compare`` shows with every number, and finds them again by."""
    turns = [task.max_turns for task in tasks]
    limits = {name: rollouts.harnesses[name].action_limit_s for name in sorted({task.environment for task in tasks})}
    commands = ", ".join(f"{seconds:g} s a command of {name}" for name, seconds in limits.items() if seconds)
    return {
        "harness": {attempt.environment: attempt.harness for attempt in attempts},
        "settings": attempts[0].settings,
        "sampling": f"temperature {rollouts.temperature:g}, top_p {rollouts.top_p:g}",
        "limits": f"{min(turns)} to {max(turns)} turns, {rollouts.max_turn_tokens} tokens a turn, "
        f"{rollouts.max_context_tokens} in all, {commands}".rstrip(", "),
        "verifier": attempts[0].verifier,
        "weights": attempts[0].weights,
        "num_samples": num_samples,
        "first_seed": seed * SAMPLES_PER_SEED,
        "task_sets": {task.id: task.directory.parent.name for task in tasks},
    }


def _summary(results: dict[str, list[Attempt]], baseline: str | None, repositories: dict[str, str]) -> dict[str, Any]:
    summary: dict[str, Any] = {"checkpoints": {}, "paired": {}}
    for name, attempts in results.items():
        summary["checkpoints"][name] = summarise(attempts, repositories) | {
            "by_environment": breakdown(attempts, lambda attempt: attempt.environment),
            "by_family": breakdown(attempts, lambda attempt: attempt.family),
        }
        if baseline is not None and name != baseline:
            summary["paired"][f"{name} - {baseline}"] = compare([results[baseline]], [attempts], repositories)
    gains = summary["paired"].values()
    for gain, adjusted in zip(gains, holm([gain["p_value"] for gain in gains]), strict=True):
        gain["p_value_holm"] = adjusted
    return summary


def _about(tasks: Sequence[Task]) -> dict[str, Any]:
    """What numbers of a benchmark are worth nothing without: the range of contest dates, how given steps were kept."""
    dates = [str(task.metadata["contest_date"]) for task in tasks if "contest_date" in task.metadata]
    modes = sorted({str(task.metadata["extraction"]) for task in tasks if "extraction" in task.metadata})
    found = {"contest_dates": [min(dates), max(dates)] if dates else None, "extraction": ", ".join(modes)}
    return {key: value for key, value in found.items() if value}


def step_score(attempts: Sequence[Attempt], steps: Mapping[str, int]) -> float:
    """Share of all steps of all tasks that are solved, averaged over each task's attempts first (SciCode's sub-problem
    score). ``steps``: task id -> how many it has, of which its reward is the share solved."""
    groups = {name: group for name, group in by_task(attempts).items() if name in steps}
    solved = sum(steps[name] * sum(one.reward or 0.0 for one in group) / len(group) for name, group in groups.items())
    return solved / sum(steps[name] for name in groups) if groups else 0.0


def _print(summary: dict[str, Any]) -> None:
    table = Table(title="held-out tasks")
    table.add_column("")
    rows = summary["checkpoints"]
    for name in rows:
        table.add_column(name, justify="right")
    for metric in (*TABLE_ROWS, *(["step_score"] if any("step_score" in row for row in rows.values()) else [])):
        values = [row.get(metric) for row in rows.values()]
        table.add_row(metric, *("–" if value is None else f"{value:.3f}" for value in values))
        intervals = [row.get(f"{metric}_ci95") for row in rows.values()]
        if any(intervals):
            table.add_row(
                "  95% interval", *("–" if one is None else f"{one[0]:.3f} to {one[1]:.3f}" for one in intervals)
            )
    console = Console()
    console.print(table)
    if "contest_dates" in summary:
        console.print("problems of contests of {} to {}".format(*summary["contest_dates"]))
    if "extraction" in summary:
        console.print(f"given steps: {summary['extraction']}")
    for name, row in rows.items():
        failed = row["num_errors"] / (row["num_errors"] + row["num_attempts"])
        if failed > MAX_FAILED_SHARE:
            console.print(
                f"{name}: {failed:.1%} of the attempts failed outside the model, and are in no number above (expected: "
                f"at most {MAX_FAILED_SHARE:.0%}); the same command tries them again"
            )
        number = row.get("pass@1_event_clusters", MIN_EVENT_CLUSTERS)
        if number < MIN_EVENT_CLUSTERS:
            rare = "solved" if row["pass@1"] <= 0.5 else "unsolved"
            console.print(
                f"{name}: do not trust the interval of pass@1, the {rare} tasks are in effectively {number:.1f} "
                f"repositories; {MIN_EVENT_CLUSTERS:g} are needed"
            )
    for pair, gain in summary["paired"].items():
        low, high = gain["ci95"]
        effect = gain["minimal_detectable_effect"]
        found = "no effect reliably" if effect is None else f"an effect of {effect:.3f} with 80% probability"
        console.print(
            f"{pair}: pass@1 {gain['pass@1']:+.3f}, 95% interval {low:+.3f} to {high:+.3f}, p = {gain['p_value']:.2g} "
            f"({gain['p_value_holm']:.2g} adjusted for {len(summary['paired'])} comparisons); "
            f"{gain['num_tasks']} tasks in {gain['num_clusters']} clusters find {found}"
        )
