"""``python -m north_lightning compare``: who is better, and what cannot be told.

In: output folders of ``test``, and published counts. Out: a table, what it says in words, ``compare.json`` and
``compare.html``. A number is shown with its protocol, tasks, attempts, training runs, interval, share of infrastructure
failures and grader, or not at all. Attempts are paired by task, and only where protocol, grader and task are the same.
Not here: the statistics (``statistics``), and what the metrics are (``summary``).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from north_lightning.errors import ConfigError, DataError
from north_lightning.evaluation.attempts import Attempt, read_attempts
from north_lightning.evaluation.statistics import (
    MIN_EVENT_CLUSTERS,
    Comparison,
    Estimate,
    count_against,
    count_estimate,
    event_clusters,
    holm,
    mean_estimate,
    rate_interval,
    unpaired_comparison,
)
from north_lightning.evaluation.summary import (
    MAX_FAILED_SHARE,
    by_task,
    clusters_of,
    compare,
    described,
    interval_of,
    per_task,
)

ALL = "all tasks"
"""The row of all task sets together."""
Read = tuple[list["Side"], Mapping[str, str], Mapping[str, str]]
"""Sides, and the task set and the cluster of each task."""
TOLD = ("invalid_call_rate", "mean_turns", "mean_generated_tokens", "conclusion_rate", "loop_rate")
"""What is printed of how attempts went."""
PROTOCOL = ("harness", "settings", "sampling", "limits", "verifier")
"""What two sides must share to be paired."""


@dataclass(frozen=True, slots=True)
class Side:
    """What is compared: training runs of one recipe (one is a checkpoint), or a published count, or a fixed share."""

    name: str
    runs: tuple[list[Attempt], ...] = ()  # the attempts of each
    protocol: Mapping[str, Any] = field(default_factory=dict)
    count: tuple[int, int] | None = None
    share: float | None = None

    def within(self, tasks: set[str]) -> list[list[Attempt]]:
        return [[attempt for attempt in run if attempt.task_id in tasks] for run in self.runs]


def read_all(words: Sequence[str | Path], cluster_by: str = "repository") -> Read:
    """The sides that ``words`` name (``compare_runs`` says how), and what their tasks belong to."""
    if cluster_by not in ("repository", "family", "task"):
        raise ConfigError(f"cluster_by: expected repository, family or task, got {cluster_by!r}")
    known: dict[str, dict[str, str]] = {"task_set": {}, "repository": {}, "family": {}, "task": {}}
    sides = [side for word in words for side in read_sides(word, known)]
    names = [side.name for side in sides]
    if len(set(names)) < len(names):
        raise ConfigError(f"sides: expected each with its own name (NAME=...), got {', '.join(names)}")
    return sides, known["task_set"], known[cluster_by]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_sides(word: str | Path, known: dict[str, dict[str, str]]) -> list[Side]:
    """The sides that one argument names, a path all of a folder; what their tasks belong to is added to ``known``."""
    if isinstance(word, Path):
        return [Side(name, (attempts,), protocol) for name, (attempts, protocol) in _read_run(str(word), known).items()]
    named = re.fullmatch(r"([^=/]+)=(.+)", word)
    name, text = (named[1], named[2]) if named else ("", word)
    if count := re.fullmatch(r"(\d+)/(\d+)", text):
        solved, num_tasks = int(count[1]), int(count[2])
        if not name or not 0 <= solved <= num_tasks or not num_tasks:
            raise ConfigError(f"sides: expected NAME=SOLVED/TASKS, such as theirs=156/500, got {word!r}")
        return [Side(name, count=(solved, num_tasks))]
    if name and re.fullmatch(r"0?\.\d+|0|1", text):
        return [Side(name, share=float(text))]
    runs = [[_read_run(place, known) for place in run.split("+")] for run in text.split(",")]
    if not name and len(runs) == len(runs[0]) == 1:
        return [Side(checkpoint, (attempts,), protocol) for checkpoint, (attempts, protocol) in runs[0][0].items()]
    merged: list[list[Attempt]] = []
    protocols: list[Mapping[str, Any]] = []
    for run in runs:
        for place, found in zip(text.split(",")[len(merged)].split("+"), run, strict=True):
            if len(found) > 1:
                raise ConfigError(
                    f"sides: expected one checkpoint of {place!r}, it holds {', '.join(found)}: add :NAME"
                )
        only = [next(iter(found.values())) for found in run]
        merged.append([attempt for attempts, _ in only for attempt in attempts])
        protocols += [protocol for _, protocol in only]
    for key in PROTOCOL:
        if different := _different(protocols, key):
            raise DataError(f"sides: the runs of {name or text!r} are not comparable: {different}")
    harnesses = {env: harness for protocol in protocols for env, harness in protocol["harness"].items()}
    graders = sorted({grader for protocol in protocols for grader in protocol["graders"]})
    return [Side(name or text, tuple(merged), {**protocols[0], "harness": harnesses, "graders": graders})]


def _read_run(place: str, known: dict[str, dict[str, str]]) -> dict[str, tuple[list[Attempt], Mapping[str, Any]]]:
    """Checkpoint -> the attempts and the protocol of its last evaluation in FOLDER or FOLDER:CHECKPOINT."""
    folder, colon, checkpoint = (place, "", "") if Path(place).is_dir() else place.rpartition(":")
    path = Path(folder if colon else place) / "summary.json"
    if not path.is_file():
        raise DataError(f"{path}: not found; `python -m north_lightning test` writes it when it has ended")
    summary = json.loads(path.read_text())
    rows = summary["checkpoints"]
    if checkpoint and checkpoint not in rows:
        raise ConfigError(f"sides: {path.parent} has no checkpoint {checkpoint!r}, it holds {', '.join(rows)}")
    recorded = read_attempts(path.with_name("attempts.jsonl"))
    found = {}
    for name in [checkpoint] if checkpoint else rows:
        protocol = rows[name].get("protocol", {})
        if missing := [key for key in (*PROTOCOL, "graders", "weights", "task_sets") if key not in protocol]:
            raise DataError(
                f"{path}: {name} is not comparable: {', '.join(missing)} missing; evaluate again with `python -m "
                "north_lightning test`, which reuses what it can"
            )
        latest: dict[tuple[str, int], Attempt] = {}
        for attempt in recorded:
            key = (attempt.task_id, attempt.seed)
            if _is_of(attempt, name, protocol) and (attempt.reward is not None or key not in latest):
                latest[key] = attempt
        found[name] = list(latest.values()), protocol
        known["task_set"] |= protocol["task_sets"]
        known["repository"] |= summary.get("repositories", {})
        known["family"] |= {attempt.task_id: attempt.family for attempt in latest.values()}
    return found


def _is_of(attempt: Attempt, name: str, protocol: Mapping[str, Any]) -> bool:
    samples = range(protocol["first_seed"], protocol["first_seed"] + protocol["num_samples"])
    return (
        (attempt.checkpoint, attempt.weights, attempt.settings) == (name, protocol["weights"], protocol["settings"])
        and attempt.harness == protocol["harness"].get(attempt.environment)
        and (attempt.verifier == protocol["verifier"] or attempt.reward is None)
        and any(grader.startswith(attempt.grader) for grader in protocol["graders"])
        and attempt.task_id in protocol["task_sets"]
        and attempt.seed in samples
    )


def _different(protocols: Sequence[Mapping[str, Any]], key: str) -> str:
    """Where the protocols differ in ``key``, in words; only shared environments have to share a harness."""
    for one, other in itertools.combinations(protocols, 2):
        left, right = one[key], other[key]
        if key == "harness":
            left, right = ({env: each[env] for env in one[key].keys() & other[key].keys()} for each in (left, right))
        if left != right:
            return f"{key} {left} against {right}"
    return ""


# ---- comparing -------------------------------------------------------------------------------------------------------


def compare_sides(sides: Sequence[Side], task_sets: Mapping[str, str], clusters: Mapping[str, str]) -> dict[str, Any]:
    """Everything that is shown, as JSON primitives."""
    members = _members(task_sets)
    notes: list[str] = []
    for kind, said in (
        (
            [side for side in sides if not side.runs],
            "published, its protocol, seeds, infrastructure failures and grader are not known here: compared unpaired, "
            "which finds less",
        ),
        (
            [side for side in sides if len(side.runs) == 1],
            "one training run: the intervals are about this checkpoint, not about its recipe",
        ),
        (
            [side for side in sides if len(side.runs) == 2],
            "two training runs, which say little about how runs differ: three or more are needed",
        ),
    ):
        if kind:
            notes.append(f"{', '.join(side.name for side in kind)}: {said}.")
    described_sides = describe_sides(sides, task_sets, clusters, notes)
    comparisons = []
    for side in sides[1:]:
        for name, tasks in members.items():
            if pair := _pair(sides[0], side, name, tasks, clusters, full=True):
                comparisons.append(pair)
    _adjust(comparisons)
    for row in comparisons:
        row["says"] = _say(row, sum("metrics" in one for one in comparisons))
    result = {"sides": described_sides, "comparisons": comparisons, "notes": list(dict.fromkeys(notes))}
    contenders = [side for side in sides if side.share is None]
    if len(contenders) > 2:
        result["winner"] = _winner(contenders, comparisons, members[ALL], clusters)
    return result


def describe_sides(
    sides: Sequence[Side], task_sets: Mapping[str, str], clusters: Mapping[str, str], notes: list[str]
) -> dict[str, Any]:
    """Each side's numbers in every task set; ``notes`` takes what is to be kept in mind."""
    return {side.name: _describe(side, _members(task_sets), clusters, notes) for side in sides}


def _members(task_sets: Mapping[str, str]) -> dict[str, set[str]]:
    names = list(dict.fromkeys(task_sets[task] for task in sorted(task_sets)))
    return {ALL: set(task_sets)} | {
        name: {task for task in task_sets if task_sets[task] == name} for name in names if len(names) > 1
    }


def _describe(
    side: Side, members: Mapping[str, set[str]], clusters: Mapping[str, str], notes: list[str]
) -> dict[str, Any]:
    """A side's numbers in every task set, each with what it needs to be read."""
    if not side.runs:
        what = "published count" if side.count else "fixed share, taken as exact"
        row: dict[str, Any] = {"pass@1": {"value": side.share, "ci95": None}}
        if side.count is not None:
            solved, num_tasks = side.count
            rates = [1.0] * solved + [0.0] * (num_tasks - solved)
            row = {"num_tasks": num_tasks, "pass@1": {"value": solved / num_tasks, "ci95": list(rate_interval(rates))}}
        return {"kind": what, "sets": {ALL: row}}
    numbers = {name: _metrics(side, name, tasks, clusters, notes) for name, tasks in members.items()}
    kind = "a checkpoint" if len(side.runs) == 1 else f"{len(side.runs)} training runs"
    return {"kind": kind, "protocol": dict(side.protocol), "sets": {name: one for name, one in numbers.items() if one}}


def _metrics(
    side: Side, name: str, tasks: set[str], clusters: Mapping[str, str], notes: list[str]
) -> dict[str, Any] | None:
    runs = side.within(tasks)
    attempted = [{attempt.task_id for attempt in run} for run in runs]
    if not all(attempted):
        return None
    scored = [by_task(run) for run in runs]
    shared = sorted(set.intersection(*(set(run) for run in scored)))
    if not shared:
        notes.append(f"{side.name} on {name}: not comparable: no task has a scored attempt in every run.")
        return None
    if left_out := len(set.union(*attempted)) - len(shared):
        num_all = len(shared) + left_out
        notes.append(f"{side.name} on {name}: {left_out} of {num_all} tasks lack a score in some run and are left out.")
    failed = sum(attempt.reward is None for run in runs for attempt in run) / sum(map(len, runs))
    if failed > MAX_FAILED_SHARE:
        notes.append(
            f"{side.name} on {name}: {failed:.1%} of the attempts failed outside the model, above "
            f"{MAX_FAILED_SHARE:.0%}: run `test` again, which retries them."
        )
    smallest = min(len(run[task]) for run in scored for task in shared)
    values = [per_task({task: run[task] for task in shared}, range(1, smallest + 1)) for run in scored]
    labels = clusters_of(shared, clusters)
    runs_of = {metric: np.array([one[metric] for one in values]) for metric in values[0]}
    rates = runs_of["pass@1"].mean(axis=0)
    if len(set(labels)) < len(labels) and event_clusters(rates, labels) < MIN_EVENT_CLUSTERS:
        notes.append(
            f"{side.name} on {name}: do not trust the interval of pass@1: too few clusters hold what is rarer."
        )
    return {
        "num_tasks": len(shared),
        "num_clusters": len(set(labels)),
        "attempts_per_task": smallest,
        "num_runs": len(runs),
        "infrastructure_share": failed,
        **{
            metric: {"value": float(numbers.mean()), "ci95": list(interval_of(metric, numbers, labels))}
            for metric, numbers in runs_of.items()
        },
    }


def _pair(
    first: Side, second: Side, name: str, tasks: set[str], clusters: Mapping[str, str], full: bool
) -> dict[str, Any] | None:
    """The comparison of two sides on one task set; None where either has none of it."""
    row: dict[str, Any] = {"first": first.name, "second": second.name, "tasks": name, "paired": False}
    if not first.runs or not second.runs:
        if name != ALL:
            return None
        values = [_estimate(side, tasks, {}).value for side in (first, second)]
        size = max([side.count[1] for side in (first, second) if side.count] or [len(tasks)])
        gain = described(_unpaired(first, second, tasks, clusters))
        return row | {"num_tasks": size, "metrics": {"pass@1": {"values": values, **gain}}}
    sides = [side.within(tasks) for side in (first, second)]
    if not all(run for side in sides for run in side):
        return None
    different = [_different((first.protocol, second.protocol), key) for key in PROTOCOL]
    if any(different):
        return row | {"not_comparable": "; ".join(filter(None, different))}
    groups = [by_task(run) for side in sides for run in side]
    everywhere = set.intersection(*(set(group) for group in groups))
    same = {
        task
        for task in everywhere
        if len({(one.task, one.tests, one.grader) for group in groups for one in group[task]}) == 1
    }
    if not same:
        return row | {"not_comparable": "no task with the same text, tests and grader has a score on both sides"}
    num_all = len(set.union(*(set(group) for group in groups)))
    if len(same) < num_all:
        changed = len(everywhere) - len(same)
        row["shared"] = (
            f"compared on the {len(same)} of {num_all} tasks that both share: {num_all - len(everywhere)} lack a score "
            f"on one side, {changed} differ in text, tests or grader"
        )
    smallest = min(len(group[task]) for group in groups for task in same)
    before, after = ([[one for one in run if one.task_id in same] for run in side] for side in sides)
    return row | {"paired": True} | compare(before, after, clusters, range(1, smallest + 1 if full else 2))


def _unpaired(first: Side, second: Side, tasks: set[str], clusters: Mapping[str, str]) -> Comparison:
    if first.share is not None and second.count is not None:
        return count_against(first.share, *second.count)
    if second.share is not None and first.count is not None:
        back = count_against(second.share, *first.count)
        low, high = back.interval
        return Comparison(-back.difference, (-high, -low), back.p_value, back.minimal_detectable_effect)
    return unpaired_comparison(*(_estimate(side, tasks, clusters) for side in (first, second)))


def _estimate(side: Side, tasks: set[str], clusters: Mapping[str, str]) -> Estimate:
    if side.share is not None:
        return Estimate(side.share, 0.0)
    if side.count is not None:
        return count_estimate(*side.count)
    scored = [by_task(run) for run in side.within(tasks)]
    shared = sorted(set.intersection(*(set(run) for run in scored)))
    rates = [per_task({task: run[task] for task in shared}, [1])["pass@1"] for run in scored]
    return mean_estimate(np.array(rates), clusters_of(shared, clusters))


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Holm over the comparisons (task sets and sides), metric by metric."""
    for metric in dict.fromkeys(name for row in rows for name in row.get("metrics", {})):
        tested = [row["metrics"][metric] for row in rows if metric in row.get("metrics", {})]
        for one, adjusted in zip(tested, holm([one["p_value"] for one in tested]), strict=True):
            one["p_value_holm"] = adjusted


# ---- words -----------------------------------------------------------------------------------------------------------


def _say(row: Mapping[str, Any], num_tests: int) -> str:
    """What the comparison of pass@1 means."""
    first, second, where = row["first"], row["second"], row["tasks"]
    if "not_comparable" in row:
        return f"{second} and {first} on {where}: not comparable: {row['not_comparable']}."
    one = row["metrics"]["pass@1"]
    (old, new), (low, high), adjusted = one["values"], one["ci95"], one["p_value_holm"]
    on = f"{row['num_tasks']} tasks" + (f" ({where})" if where != ALL else "")
    told = f"95% interval {_points(low)} to {_points(high)}, p = {one['p_value']:.2g}"
    told += f", {adjusted:.2g} adjusted for {num_tests} comparisons" if num_tests > 1 else ""
    shared = f" It is {row['shared']}." if "shared" in row else ""
    if adjusted <= 0.05:
        word = "better" if new > old else "worse"
        gain = f"{new:.1%} against {old:.1%}, {_points(new - old)} points"
        return f"{second} is {word} than {first} on {on}: {gain} ({told}).{shared}"
    effect = one["minimal_detectable_effect"]
    needed = "nothing can be told from these numbers"
    if effect is not None:
        needed = (
            f"the difference would have to be at least {100 * effect:.1f} points to be found in 4 of 5 such comparisons"
        )
    return (
        f"{second} with {new:.1%} and {first} with {old:.1%} of {on} cannot be told apart ({told}): {needed}.{shared}"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _winner(
    sides: Sequence[Side], done: Sequence[Mapping[str, Any]], tasks: set[str], clusters: Mapping[str, str]
) -> dict[str, Any]:
    """Whether one side is better than every other in pass@1, after Holm over all pairs."""
    rows = []
    for first, second in itertools.combinations(sides, 2):
        row = next(
            (row for row in done if (row["first"], row["second"], row["tasks"]) == (first.name, second.name, ALL)), None
        )
        row = row or _pair(first, second, ALL, tasks, clusters, full=False)
        if row is None or "not_comparable" in row:
            reason = "no task in common" if row is None else row["not_comparable"]
            return {"name": None, "says": f"no winner: {first.name} and {second.name} are not comparable: {reason}."}
        rows.append((first.name, second.name, row["metrics"]["pass@1"]))
    better: dict[str, set[str]] = {side.name: set() for side in sides}
    for (first_name, second_name, one), p_value in zip(rows, holm([one["p_value"] for *_, one in rows]), strict=True):
        if p_value <= 0.05:
            ahead, behind = (second_name, first_name) if one["difference"] > 0 else (first_name, second_name)
            better[ahead].add(behind)
    name = next((name for name, beaten in better.items() if len(beaten) == len(sides) - 1), None)
    told_apart = sum(map(len, better.values()))
    says = (
        f"{name} wins: it is better than each of the other {len(sides) - 1}"
        if name
        else f"no winner among {len(sides)}"
    )
    return {
        "name": name,
        "better_than": {name: sorted(beaten) for name, beaten in better.items() if beaten},
        "says": f"{says} ({told_apart} of {len(rows)} pairs can be told apart, adjusted for all of them).",
    }


def print_comparison(result: Mapping[str, Any]) -> None:
    """What ``test`` and ``compare`` print."""
    console = Console(highlight=False)
    table = Table(title="95% intervals; size: tasks x attempts x training runs; failed: outside the model")
    for title in ("", "tasks", "pass@1", "pass@k", "size", "failed"):
        table.add_column(title)
    for name, side in result["sides"].items():
        for tasks, row in side["sets"].items():
            k = row.get("attempts_per_task", 1)
            size = " x ".join(str(row[key]) for key in ("num_tasks", "attempts_per_task", "num_runs") if key in row)
            table.add_row(
                *(name, tasks, shown(row["pass@1"]), f"@{k} {shown(row[f'pass@{k}'])}" if k > 1 else "–", size or "–"),
                f"{row['infrastructure_share']:.1%}" if "infrastructure_share" in row else "not known",
            )
    console.print(table)
    plain = Console(highlight=False, soft_wrap=True)
    for name, side in result["sides"].items():
        row = next(iter(side["sets"].values()), dict[str, Any]())
        if told := [f"{metric} {shown(row[metric])}" for metric in TOLD if metric in row]:
            plain.print(f"{name}: {', '.join(told)}")
    protocols: dict[str, list[str]] = {}
    for name, side in result["sides"].items():
        protocols.setdefault(protocol_line(side), []).append(name)
    for protocol, names in protocols.items():
        plain.print(f"{', '.join(names)}: {protocol}")
    for line in (*(row["says"] for row in result["comparisons"]), *result["notes"]):
        plain.print(line)
    if "winner" in result:
        plain.print(result["winner"]["says"])


def protocol_line(side: Mapping[str, Any]) -> str:
    if "protocol" not in side:
        return f"{side['kind']}, protocol and grader not known"
    made = side["protocol"]
    harnesses = ", ".join(sorted(made["harness"].values()))
    graders = "; ".join(made["graders"])
    return f"{side['kind']}; {harnesses}; {made['sampling']}; {made['limits']}; graded by {graders}; {made['verifier']}"


def shown(number: Mapping[str, Any]) -> str:
    """A share or a mean with its interval."""
    is_share = abs(number["value"]) <= 1
    scale, digits = (100, 1) if is_share else (1, 2)
    text = f"{scale * number['value']:.{digits}f}{'%' * is_share}"
    if number["ci95"] is None:
        return f"{text} (exact)"
    low, high = (f"{scale * one:.{digits}f}" if math.isfinite(one) else "–" for one in number["ci95"])
    return f"{text} [{low}, {high}]"
