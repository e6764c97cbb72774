"""``python -m north_lightning test``: checkpoints over held-out tasks.

In: named checkpoints and task sets. Out: ``attempts.jsonl`` and ``summary.json`` in the output directory, and a table.
What was recorded for the same weights and tasks is not run again; what an attempt left is kept in ``works/``, and is
graded again where only tests or verifier have changed. ``plan.txt`` says what a continued evaluation did about each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from north_lightning.durable import replace_text
from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.evaluation.attempts import ATTEMPTS, Attempt
from north_lightning.evaluation.compare import ALL, Side, compare_sides, print_comparison, shown
from north_lightning.evaluation.controls import check_controls, run_controls
from north_lightning.evaluation.each import attempt_each, plan_each
from north_lightning.evaluation.evaluate import SAMPLES_PER_SEED, describe_attempts, describe_plan
from north_lightning.evaluation.serve import SidecarFactory, check_serving
from north_lightning.evaluation.statistics import mean_estimate
from north_lightning.evaluation.summary import breakdown, by_task, summarise
from north_lightning.evaluation.works import WORKS, Works
from north_lightning.rollout import ChatServer
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.run_folders import write_result
from north_lightning.tasks import load_task_sets
from north_lightning.types import Count, Task


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
        baseline: The checkpoint or server the others are compared with; the first one if left out.
        controls: Run every task's own solution, and an attempt that does nothing, before the first evaluation; refuse
            tasks whose solution does not score 1 or that score 1 untouched.
        exceptions: Ids of tasks that may fail the controls; the summary names them.
        dry_run: Print what would be done about each attempt (REUSE, REGRADE or RERUN, and why), and do nothing.
    """
    checkpoints, servers = checkpoints or {}, servers or {}
    _check_names(checkpoints, servers, baseline)
    if not checkpoints:
        rollouts.check_without_checkpoint()
        if sidecar is not None:
            raise ConfigError("sidecar: expected checkpoints for it to serve, got none: leave it out")
    if exceptions and not controls:
        raise ConfigError("exceptions: expected controls that they may fail, got controls: false")
    tasks = load_task_sets(task_sets)
    if checkpoints:
        if sidecar is None:
            raise ConfigError("sidecar: expected a vLLM server to serve the checkpoints, got none")
        check_serving(list(checkpoints.values()), tasks, rollouts, sidecar, output_dir)
    logs = output_dir / ATTEMPTS, output_dir / "vllm.log"
    works, is_continued = Works(output_dir / WORKS), logs[0].exists()
    plans = plan_each(checkpoints, servers, tasks, rollouts, logs[0], num_samples, seed, works)
    lines = describe_attempts({served.checkpoint: plan for served, plan in plans.items()})
    if dry_run:
        print("\n".join(lines))
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    if is_continued:
        replace_text(output_dir / "plan.txt", "\n".join(lines) + "\n")
        print("\n".join(f"{one.checkpoint}: {line}" for one, plan in plans.items() for line in describe_plan(plan)))
    checked = run_controls(tasks, rollouts, output_dir / "controls.json", concurrency) if controls else None
    shares = None if checked is None else check_controls(checked, exceptions or [])
    results = attempt_each(plans, checkpoints, servers, rollouts, sidecar, logs, concurrency, seed, works)
    sides = [
        Side(name, (attempts,), _protocol(attempts, tasks, rollouts, num_samples, seed))
        for name, attempts in results.items()
    ]
    sides.sort(key=lambda side: side.name != baseline)
    summary, compared = summary_of(sides, tasks)
    write_result(output_dir / "summary.json", json.dumps(summary | {"controls": shares}, indent=2) + "\n")
    print_comparison(compared)
    Console(highlight=False, soft_wrap=True).print(
        f"`python -m north_lightning compare {output_dir}` writes a page with all metrics and their differences"
    )


def _check_names(checkpoints: Mapping[str, Path], servers: Mapping[str, ChatServer], baseline: str | None) -> None:
    names = [*checkpoints, *servers]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"checkpoints and servers: expected one or more, each with its own name, got {names}")
    if baseline is not None and baseline not in names:
        raise ConfigError(f"baseline: expected one of {', '.join(names)}, got {baseline!r}")
    for name, path in checkpoints.items():
        if not (path / "config.json").exists():
            raise CheckpointError(f"checkpoints.{name}: {path} is not a checkpoint directory (no config.json)")


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
        "graders": _graders(attempts),
        "weights": attempts[0].weights,
        "num_samples": num_samples,
        "first_seed": seed * SAMPLES_PER_SEED,
        "task_sets": {task.id: task.directory.parent.name for task in tasks},
    }


def _graders(attempts: Sequence[Attempt]) -> list[str]:
    """What graded the attempts, with a digest of the tests it used: some graders are scripts that come with these."""
    tests: dict[str, set[tuple[str, str]]] = {}
    for attempt in attempts:
        tests.setdefault(attempt.grader, set()).add((attempt.task_id, attempt.tests))
    digests = {grader: sha256(repr(sorted(used)).encode()).hexdigest()[:8] for grader, used in tests.items()}
    return [f"{grader}, tests {digests[grader]}" for grader in sorted(tests)]


def summary_of(sides: Sequence[Side], tasks: Sequence[Task]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``summary.json`` holds of checkpoints, the first of them the baseline, and what is printed."""
    repositories = {task.id: str(task.metadata["repository"]) for task in tasks if "repository" in task.metadata}
    steps = {task.id: len(task.metadata["answer_files"]) for task in tasks if "extraction" in task.metadata}
    about, rows = _about(tasks), dict[str, Any]()
    for side in sides:
        attempts = side.runs[0]
        rows[side.name] = summarise(attempts, repositories) | {
            "by_environment": breakdown(attempts, lambda attempt: attempt.environment),
            "by_family": breakdown(attempts, lambda attempt: attempt.family),
            "protocol": side.protocol,
        }
        if steps:
            rows[side.name]["step_score"] = step_score(attempts, steps)["value"]
    compared = compare_sides(sides, sides[0].protocol["task_sets"], repositories)
    compared["notes"] += [f"{name.replace('_', ' ')}: {value}." for name, value in about.items()]
    compared["notes"] += [
        f"{side.name}: step score {shown(step_score(side.runs[0], steps))}." for side in sides if steps
    ]
    paired = {
        f"{row['second']} - {row['first']}": {"pass@1": row["metrics"]["pass@1"]["difference"]}
        | row["metrics"]["pass@1"] | row
        for row in compared["comparisons"]
        if row["tasks"] == ALL and "metrics" in row
    }  # fmt: skip
    return {"checkpoints": rows, "paired": paired, "repositories": repositories, **about}, compared


def _about(tasks: Sequence[Task]) -> dict[str, Any]:
    """What numbers of a benchmark are worth nothing without: the range of contest dates, how given steps were kept."""
    dates = [str(task.metadata["contest_date"]) for task in tasks if "contest_date" in task.metadata]
    modes = sorted({str(task.metadata["extraction"]) for task in tasks if "extraction" in task.metadata})
    found = {"contest_dates": [min(dates), max(dates)] if dates else None, "extraction": ", ".join(modes)}
    return {key: value for key, value in found.items() if value}


def step_score(attempts: Sequence[Attempt], steps: Mapping[str, int]) -> dict[str, Any]:
    """Share of all steps of all tasks that are solved, averaged over each task's attempts first (SciCode's sub-problem
    score), with its 95% interval over tasks. ``steps``: task id -> how many it has, of which its reward is the share
    solved."""
    groups = {name: group for name, group in by_task(attempts).items() if name in steps}
    mean_steps = sum(steps[name] for name in groups) / len(groups)
    estimate = mean_estimate([
        steps[name] / mean_steps * sum(one.reward or 0.0 for one in group) / len(group)
        for name, group in groups.items()
    ])  # fmt: skip
    low, high = estimate.interval
    return {"value": estimate.value, "ci95": [max(0.0, low), min(1.0, high)]}
