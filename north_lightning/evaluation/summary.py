"""Numbers of an evaluation from its attempts.

In: attempts, and which tasks share a repository. Out: per checkpoint the pass rates and trajectory metrics, and paired
comparisons between two checkpoints, or two recipes of several training runs each. Every mean and rate averages a task's
attempts first and tasks then, so that a task with more attempts does not weigh more; a rate per turn or per concluded
attempt is a ratio of two such means. Attempts that failed outside the model count in ``num_errors`` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from north_lightning.errors import DataError
from north_lightning.evaluation.attempts import Attempt
from north_lightning.evaluation.statistics import (
    Comparison,
    Interval,
    Runs,
    event_clusters,
    mean_estimate,
    pass_at_k,
    rate_interval,
    recipe_comparison,
)

Tasks = Mapping[str, list[Attempt]]

MAX_FAILED_SHARE = 0.02
"""Share of attempts that may fail outside the model without an alarm."""


class Metric(NamedTuple):
    """A mean over attempts, or a ratio of two; ``is_rate`` where an attempt's own number is from 0 to 1."""

    over: Callable[[Attempt], float]
    under: Callable[[Attempt], float] | None = None
    is_rate: bool = True


def _concluded(attempt: Attempt) -> bool:
    return attempt.stop_reason == "finished"


METRICS: dict[str, Metric] = {
    "mean_reward": Metric(lambda one: one.reward or 0.0, is_rate=False),
    "invalid_call_rate": Metric(lambda one: one.invalid_turns, lambda one: one.turns),
    "invalid_attempt_rate": Metric(lambda one: one.invalid_turns > 0),
    "mean_turns": Metric(lambda one: one.turns, is_rate=False),
    "mean_generated_tokens": Metric(lambda one: one.generated_tokens, is_rate=False),
    "loop_rate": Metric(lambda one: one.looped),
    "conclusion_rate": Metric(_concluded),
    "false_success_rate": Metric(lambda one: _concluded(one) and not one.solved, _concluded),
    "truncation_rate": Metric(lambda one: one.stop_reason in ("length", "context", "max_turns")),
    "ended_by_itself_rate": Metric(
        lambda one: one.stop_reason not in ("length", "context", "max_turns", "timeout", "loop")
    ),
}
"""``conclusion_rate``: submitted or answered; ``ended_by_itself_rate``: no limit and no loop detector ended it."""


def by_task(attempts: Iterable[Attempt]) -> dict[str, list[Attempt]]:
    """Scored attempts of every task, in order of task id."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in sorted(attempts, key=lambda one: (one.task_id, one.seed)):
        if attempt.reward is not None:
            groups.setdefault(attempt.task_id, []).append(attempt)
    return groups


def per_task(tasks: Tasks, ks: Iterable[int]) -> dict[str, np.ndarray]:
    """``pass@k`` for those ``ks`` that every task has attempts for, and ``METRICS``: one number per task, whose mean is
    the metric. A ratio is linearized: ratio plus the task's influence on it."""
    smallest = min(len(group) for group in tasks.values())
    values = {
        f"pass@{k}": np.array([pass_at_k(len(group), _num_solved(group), k) for group in tasks.values()])
        for k in ks
        if k <= smallest
    }
    for name, metric in METRICS.items():
        over = np.array([_mean(map(metric.over, group)) for group in tasks.values()])
        if metric.under is not None:
            under = np.array([_mean(map(metric.under, group)) for group in tasks.values()])
            size = max(1e-12, float(under.mean()))
            ratio = float(over.mean()) / size
            over = ratio + (over - ratio * under) / size
        values[name] = over
    return values


def interval_of(name: str, runs: Runs, clusters: Sequence[str]) -> Interval:
    """95% interval of a metric from its numbers per task, of one run or several."""
    metric = METRICS.get(name, Metric(lambda one: one.solved))
    if metric.is_rate and metric.under is None:
        return rate_interval(runs, clusters)
    low, high = mean_estimate(runs, clusters).interval
    return (max(0.0, low), min(1.0, high)) if metric.is_rate else (low, high)


def summarise(
    attempts: Sequence[Attempt], repositories: Mapping[str, str] | None = None, ks: Sequence[int] = (1, 8)
) -> dict[str, Any]:
    """Metrics of one checkpoint; ``pass@k`` only where every task has at least ``k`` scored attempts.

    ``repositories`` (task id -> name) are the clusters of the 95% intervals ``pass@k_ci95``; with them,
    ``pass@k_event_clusters`` is the effective number of those that hold what is solved, or unsolved if that is rarer.
    """
    tasks = by_task(attempts)
    if not tasks:
        failed = next((f": all {len(attempts)} failed outside the model, such as: {one.error}" for one in attempts), "")
        raise DataError(f"no scored attempts to summarise{failed}")
    values = per_task(tasks, ks)
    passed = {name: rates for name, rates in values.items() if name not in METRICS}
    scored = [attempt for group in tasks.values() for attempt in group]
    solved_turns = [attempt.turns for attempt in scored if attempt.solved]
    clusters = clusters_of(tasks, repositories)
    has_clusters = len(set(clusters)) < len(clusters)
    return {name: float(rates.mean()) for name, rates in values.items()} | {
        **{f"{name}_ci95": list(rate_interval(rates, clusters)) for name, rates in passed.items()},
        **{f"{name}_event_clusters": event_clusters(rates, clusters) for name, rates in passed.items() if has_clusters},
        "median_turns_solved": float(np.median(solved_turns)) if solved_turns else None,
        "num_tasks": len(tasks),
        "num_attempts": len(scored),
        "num_errors": sum(attempt.error is not None for attempt in attempts),
    }


def breakdown(attempts: Sequence[Attempt], key: Callable[[Attempt], str]) -> dict[str, float]:
    """pass@1 by a property of the attempts, such as environment or family."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        groups.setdefault(key(attempt), []).append(attempt)
    return {
        name: _mean(_num_solved(one) / len(one) for one in by_task(group).values())
        for name, group in sorted(groups.items())
    }


def compare(
    before: Sequence[Sequence[Attempt]],
    after: Sequence[Sequence[Attempt]],
    repositories: Mapping[str, str] | None = None,
    ks: Iterable[int] = (1,),
) -> dict[str, Any]:
    """Paired by task: the difference of every metric, and of the lengths of attempts at tasks that both solved. Each
    side is one training run's attempts, or those of several of one recipe.

    ``repositories`` are the clusters, as for ``summarise``. ``minimal_detectable_effect`` is None where no gain can be
    told from noise.
    """
    first, second = ([by_task(run) for run in side] for side in (before, after))
    names = list(first[0])
    for run in (*first, *second):
        if missing := sorted(run.keys() ^ first[0].keys()):
            raise DataError(
                f"a paired comparison needs the same tasks on both sides; {missing[:3]} are on one side only"
            )
    clusters = clusters_of(names, repositories)
    sides = [[per_task(run, ks) for run in side] for side in (first, second)]
    shared = [name for name in sides[0][0] if all(name in run for side in sides for run in side)]
    metrics = {
        name: _difference(name, [np.array([run[name] for run in side]) for side in sides], clusters) for name in shared
    }
    both = [name for name in names if all(_num_solved(run[name]) for run in (*first, *second))]
    for field in ("turns", "generated_tokens") if both else ():
        solved = [[[_solved_mean(run[task], field) for task in both] for run in side] for side in (first, second)]
        on_both = clusters_of(both, repositories)
        metrics[f"{field}_on_both_solved"] = _difference(field, solved, on_both) | {"num_tasks": len(both)}
    return {"num_tasks": len(names), "num_clusters": len(set(clusters)), "metrics": metrics}


def described(gain: Comparison, is_rate: bool = True) -> dict[str, Any]:
    """A comparison as JSON; bounds that say nothing are -1 and 1, or None where the numbers have none."""
    low, high = gain.interval
    effect = gain.minimal_detectable_effect
    return {
        "difference": gain.difference,
        "ci95": [max(-1.0, low), min(1.0, high)]
        if is_rate
        else [one if np.isfinite(one) else None for one in (low, high)],
        "p_value": gain.p_value,
        "minimal_detectable_effect": effect if effect <= (1 if is_rate else 1e300) else None,
    }


def clusters_of(tasks: Iterable[str], repositories: Mapping[str, str] | None) -> list[str]:
    """A label per task: its repository, or the task itself."""
    return [(repositories or {}).get(task, f"task {task}") for task in tasks]


def _difference(name: str, sides: Sequence[Runs], clusters: Sequence[str]) -> dict[str, Any]:
    is_rate = METRICS[name].is_rate if name in METRICS else name.startswith("pass@")
    values = [float(np.mean(side)) for side in sides]
    return {"values": values, **described(recipe_comparison(sides[0], sides[1], clusters), is_rate)}


def _num_solved(attempts: Iterable[Attempt]) -> int:
    return sum(attempt.solved for attempt in attempts)


def _solved_mean(attempts: Iterable[Attempt], field: str) -> float:
    return _mean(getattr(attempt, field) for attempt in attempts if attempt.solved)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
