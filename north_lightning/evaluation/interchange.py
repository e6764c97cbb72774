"""``python -m north_lightning results``: an evaluation in the formats that other tools read.

In: an evaluation's folder (``attempts.jsonl``, ``works/``). Out, per checkpoint: a log of Inspect
(``inspect/NAME.json``, for ``inspect view``), trajectories of Harbor (ATIF 1.8, ``atif/NAME/*.json``), predictions of
SWE-bench (one file a sample, where the tasks are its rows) and, if the data set is named, a results file of the Hugging
Face hub (``NAME/.eval_results/results.yaml``). Attempts that failed outside the model are errors in Inspect's log and
are in no other file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from north_lightning.errors import ConfigError, DataError
from north_lightning.evaluation.attempts import ATTEMPTS, Attempt, read_attempts
from north_lightning.evaluation.evaluate import SAMPLES_PER_SEED
from north_lightning.evaluation.summary import summarise
from north_lightning.evaluation.works import WORKS, Works
from north_lightning.run_folders import write_result
from north_lightning.sandbox.trees import copy_tree, delete_tree
from north_lightning.tasks import image_of, load_task_sets
from north_lightning.tasks.git import commit_all, git
from north_lightning.types import Task

SWE_BENCH = ("swe_bench", "swe_bench_pro")
_INSPECT_LIMITS = {"length": "token", "context": "context", "max_turns": "message", "timeout": "time"}


def write_results(
    evaluation: Path,
    output_dir: Path,
    task_sets: list[Path] | None = None,
    benchmark: str = "held-out tasks",
    dataset: str | None = None,
) -> None:
    """Write an evaluation for Inspect, Harbor, SWE-bench and the Hugging Face hub.

    Args:
        evaluation: The output folder of ``test``.
        output_dir: Where to; what is there of the same names is replaced, and set aside if it says something else.
        task_sets: The evaluation's tasks, for predictions: a patch is what an attempt changed in its task's files.
        benchmark: What the tasks are called.
        dataset: The data set on the hub, owner/name, for its results file.
    """
    attempts = latest(read_attempts(evaluation / ATTEMPTS))
    if not attempts:
        raise DataError(f"{evaluation / ATTEMPTS}: expected attempts of an evaluation, found none")
    works = Works(evaluation / WORKS)
    ended = datetime.fromtimestamp((evaluation / ATTEMPTS).stat().st_mtime, UTC)
    tasks = {task.id: task for task in (load_task_sets(task_sets) if task_sets else [])}
    written = []
    for name in dict.fromkeys(one.checkpoint for one in attempts):
        own = [one for one in attempts if one.checkpoint == name]
        if "/" in name or name.startswith("."):
            raise ConfigError(f"{evaluation}: expected names of checkpoints without '/', got {name!r}")
        written.append(
            _write(output_dir / "inspect" / f"{name}.json", json.dumps(inspect_log(own, works, benchmark, ended)))
        )
        for one in own:
            if works.has(one.kept):
                trajectory = json.dumps(atif_trajectory(one, works.read_record(one.kept)), indent=1)
                written.append(_write(output_dir / "atif" / name / f"{one.task_id}-{one.seed}.json", trajectory))
        for sample, lines in predictions(own, works, tasks).items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            written.append(_write(output_dir / "predictions" / f"{name}-{sample}.jsonl", text))
        if dataset is not None:
            rows = yaml.safe_dump(hub_results(own, benchmark, dataset, ended), sort_keys=False)
            written.append(_write(output_dir / name / ".eval_results" / "results.yaml", rows))
    print(f"{output_dir}: {len(written)} files of {len(attempts)} attempts")


def latest(attempts: Iterable[Attempt]) -> list[Attempt]:
    """Every attempt once, in order of checkpoint, task and sample: the last verdict, or the error if there is none."""
    kept: dict[tuple[object, ...], Attempt] = {}
    for one in attempts:
        place = (one.checkpoint, one.task_id, one.seed)
        if one.error is None or place not in kept or kept[place].error is not None:
            kept[place] = one
    return [kept[place] for place in sorted(kept)]


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path, text if text.endswith("\n") else f"{text}\n")
    return path


# ---- Inspect ---------------------------------------------------------------------------------------------------------


def inspect_log(attempts: Sequence[Attempt], works: Works, benchmark: str, ended: datetime) -> dict[str, Any]:
    """Inspect's ``EvalLog`` (format 2) of one checkpoint's attempts: an epoch a sample."""
    first, tasks = attempts[0], sorted({one.task_id for one in attempts})
    scored = [one for one in attempts if one.reward is not None]
    numbers = summarise(scored) if scored else {}
    metrics = {
        name: {"name": name, "value": value} for name, value in numbers.items() if isinstance(value, int | float)
    }
    for name in [name for name in numbers if name.endswith("_ci95")]:
        for end, value in zip(("low", "high"), numbers[name], strict=True):
            metrics[f"{name}_{end}"] = {"name": f"{name}_{end}", "value": value}
    score = {"name": "solved", "scorer": first.grader or first.verifier or "verifier", "metrics": metrics}
    epochs = {seed: number for number, seed in enumerate(sorted({one.seed for one in attempts}), 1)}
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "created": ended.isoformat(timespec="seconds"),
            "task": benchmark,
            "dataset": {"name": benchmark, "samples": len(tasks), "sample_ids": tasks},
            "model": first.checkpoint,
            "config": {"epochs": len(epochs)},
            "packages": {"north_lightning": version("north_lightning")},
            "metadata": {name: getattr(first, name) for name in ("weights", "harness", "settings", "verifier")},
        },
        "results": {
            "total_samples": len(attempts),
            "completed_samples": len(scored),
            "scores": [score | {"scored_samples": len(scored), "unscored_samples": len(attempts) - len(scored)}],
        },
        "samples": [_inspect_sample(one, epochs[one.seed], works) for one in attempts],
    }


def _inspect_sample(attempt: Attempt, epoch: int, works: Works) -> dict[str, Any]:
    messages = []
    if works.has(attempt.kept):
        messages = [_inspect_message(message) for message in works.read_record(attempt.kept)["messages"]]
    asked = [message for message in messages if message["role"] in ("system", "user")][:2]
    sample: dict[str, Any] = {
        "id": attempt.task_id,
        "epoch": epoch,
        "input": asked or attempt.task_id,
        "target": "",
        "messages": messages,
        "metadata": {name: getattr(attempt, name) for name in ("environment", "family", "seed", "task", "stop_reason")},
        "total_time": attempt.duration_s,
        "turn_count": attempt.turns,
    }
    if attempt.error is not None:
        return sample | {"error": {"message": attempt.error, "traceback": "", "traceback_ansi": ""}}
    if limit := _INSPECT_LIMITS.get(attempt.stop_reason):
        sample["limit"] = {"type": limit, "limit": -1}
    score = {"value": "C" if attempt.solved else "I", "metadata": {"reward": attempt.reward}}
    return sample | {"scores": {"solved": score}}


def _inspect_message(message: Mapping[str, Any]) -> dict[str, Any]:
    written: dict[str, Any] = {"role": message["role"], "content": message.get("content", "")}
    if message["role"] == "assistant":
        if reasoning := message.get("reasoning"):
            text = [{"type": "text", "text": written["content"]}] if written["content"] else []
            written["content"] = [{"type": "reasoning", "reasoning": reasoning}, *text]
        written["tool_calls"] = [
            {"id": call["id"], "function": call["name"], "arguments": call["arguments"], "type": "function"}
            for call in message.get("tool_calls", ())
        ]
    if message["role"] == "tool":
        written["tool_call_id"] = message["tool_call_id"]
    return written


# ---- Harbor ----------------------------------------------------------------------------------------------------------


def atif_trajectory(attempt: Attempt, record: Mapping[str, Any]) -> dict[str, Any]:
    """An attempt as ATIF 1.8; a tool's message is the observation of the step that called it."""
    steps: list[dict[str, Any]] = []
    turns = iter(record["turns"])
    for message in record["messages"]:
        if message["role"] == "tool":
            result = {"source_call_id": message["tool_call_id"], "content": message.get("content", "")}
            steps[-1].setdefault("observation", {"results": []})["results"].append(result)
            continue
        source = "agent" if message["role"] == "assistant" else message["role"]
        step: dict[str, Any] = {"step_id": len(steps) + 1, "source": source, "message": message.get("content", "")}
        if source == "agent":
            if reasoning := message.get("reasoning"):
                step["reasoning_content"] = reasoning
            if calls := message.get("tool_calls"):
                step["tool_calls"] = [
                    {"tool_call_id": call["id"], "function_name": call["name"], "arguments": call["arguments"]}
                    for call in calls
                ]
            if turn := next(turns, None):
                step["metrics"] = {"completion_tokens": turn["num_tokens"]}
        steps.append(step)
    return {
        "schema_version": "ATIF-v1.8",
        "session_id": f"{attempt.checkpoint}-{attempt.task_id}-{attempt.seed}",
        "agent": {"name": attempt.harness, "version": version("north_lightning"), "model_name": attempt.checkpoint},
        "steps": steps,
        "final_metrics": {"total_completion_tokens": attempt.generated_tokens, "total_steps": len(steps)},
        "extra": {"task_id": attempt.task_id, "reward": attempt.reward, "stop_reason": attempt.stop_reason},
    }


# ---- SWE-bench, Hugging Face -----------------------------------------------------------------------------------------


def predictions(
    attempts: Iterable[Attempt], works: Works, tasks: Mapping[str, Task]
) -> dict[str, list[dict[str, str]]]:
    """Sample -> lines of a predictions file: the patch that each attempt at a row of SWE-bench leaves."""
    files: dict[str, list[dict[str, str]]] = {}
    for one in attempts:
        task = tasks.get(one.task_id)
        is_lost = one.stop_reason != "invalid_action" and not works.has(one.kept)
        if one.family in SWE_BENCH and task is not None and one.reward is not None and not is_lost:
            seed, sample = divmod(one.seed, SAMPLES_PER_SEED)
            line = {
                "instance_id": one.task_id,
                "model_name_or_path": one.checkpoint,
                "model_patch": patch_of(one.kept, works, task) if works.has(one.kept) else "",
            }
            files.setdefault(f"{seed}-{sample}", []).append(line)
    return files


def patch_of(name: str, works: Works, task: Task) -> str:
    """What an attempt changed in its task's files, as ``git diff`` says it; files that it ignores are left out."""
    with TemporaryDirectory(prefix="north-patch-") as folder:
        before, after = Path(folder, "before"), Path(folder, "after")
        copy_tree(image_of(task), before)
        works.restore_work(name, task, after)
        for place in (*before.rglob(".git"), *after.rglob(".git")):
            delete_tree(place)
        commit_all(before)
        (before / ".git").rename(after / ".git")
        git(after, "add", "-A")
        return git(after, "diff", "--cached", "--binary", "HEAD").decode(errors="surrogateescape")


def hub_results(attempts: Sequence[Attempt], benchmark: str, dataset: str, ended: datetime) -> list[dict[str, Any]]:
    """Rows of ``.eval_results``: pass@1 with its interval, sample size and settings in the notes."""
    numbers = summarise(attempts)
    low, high = numbers["pass@1_ci95"]
    first = attempts[0]
    notes = (
        f"pass@1, 95% interval {100 * low:.1f} to {100 * high:.1f}; {numbers['num_tasks']} tasks, "
        f"{numbers['num_attempts']} attempts, {numbers['num_errors']} failed outside the model; harness "
        f"{first.harness}, grader {first.grader}, north_lightning {version('north_lightning')}"
    )
    return [
        {
            "dataset": {"id": dataset, "task_id": benchmark},
            "value": round(100 * numbers["pass@1"], 2),
            "date": ended.date().isoformat(),
            "notes": notes,
        }
    ]
