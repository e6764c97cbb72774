"""Numbers of an evaluation from its attempts.

In: attempts, and which tasks share a repository. Out: per checkpoint the pass rates and trajectory metrics, and paired
comparisons between two checkpoints. Every mean and rate averages a task's attempts first and tasks then, so that a task
with more attempts does not weigh more; a rate per turn or per concluded attempt is a ratio of two such means. Attempts
that failed outside the model count in ``num_errors`` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from north_lightning.errors import DataError
from north_lightning.evaluation.attempts import Attempt
from north_lightning.evaluation.statistics import event_clusters, paired_comparison, pass_at_k, rate_interval


def by_task(attempts: Iterable[Attempt]) -> dict[str, list[Attempt]]:
    """Scored attempts of every task, in order of task id."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in sorted(attempts, key=lambda one: (one.task_id, one.seed)):
        if attempt.reward is not None:
            groups.setdefault(attempt.task_id, []).append(attempt)
    return groups


def summarise(
    attempts: Sequence[Attempt], repositories: Mapping[str, str] | None = None, ks: Sequence[int] = (1, 8)
) -> dict[str, Any]:
    """Metrics of one checkpoint; ``pass@k`` only where every task has at least ``k`` scored attempts.

    ``repositories`` (task id -> name) are the clusters of the 95% intervals ``pass@k_ci95``; with them,
    ``pass@k_event_clusters`` is the effective number of those that hold what is solved, or unsolved if that is rarer.
    """
    tasks = by_task(attempts)
    if not tasks:
        raise DataError("no scored attempts to summarise")
    smallest = min(len(group) for group in tasks.values())
    passed = {
        f"pass@{k}": [pass_at_k(len(group), _num_solved(group), k) for group in tasks.values()]
        for k in ks
        if k <= smallest
    }
    scored = [attempt for group in tasks.values() for attempt in group]
    solved_turns = [attempt.turns for attempt in scored if attempt.solved]

    def mean(value: Callable[[Attempt], float]) -> float:
        return _mean(_mean(map(value, group)) for group in tasks.values())

    clusters = _clusters(tasks, repositories)
    has_clusters = len(set(clusters)) < len(clusters)
    turns, concluded = mean(lambda one: one.turns), mean(_concluded)
    return {name: _mean(rates) for name, rates in passed.items()} | {
        **{f"{name}_ci95": list(rate_interval(rates, clusters)) for name, rates in passed.items()},
        **{f"{name}_event_clusters": event_clusters(rates, clusters) for name, rates in passed.items() if has_clusters},
        "mean_reward": mean(lambda one: one.reward or 0.0),
        "invalid_call_rate": mean(lambda one: one.invalid_turns) / max(1e-12, turns),
        "invalid_attempt_rate": mean(lambda one: one.invalid_turns > 0),
        "mean_turns": turns,
        "median_turns_solved": float(np.median(solved_turns)) if solved_turns else None,
        "mean_generated_tokens": mean(lambda one: one.generated_tokens),
        "loop_rate": mean(lambda one: one.looped),
        "conclusion_rate": concluded,
        "false_success_rate": mean(lambda one: _concluded(one) and not one.solved) / max(1e-12, concluded),
        "truncation_rate": mean(lambda one: one.stop_reason in ("length", "context", "max_turns")),
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
    before: Sequence[Attempt], after: Sequence[Attempt], repositories: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Paired by task: gain in pass@1 with its interval, and lengths on the attempts both solved.

    ``repositories`` are the clusters, as for ``summarise``. ``minimal_detectable_effect`` is None where no gain can be
    told from noise.
    """
    first, second = by_task(before), by_task(after)
    if first.keys() != second.keys():
        missing = sorted(first.keys() ^ second.keys())
        raise DataError(f"a paired comparison needs the same tasks on both sides; {missing[:3]} are on one side only")
    rates = [[_num_solved(group) / len(group) for group in side.values()] for side in (first, second)]
    gain = paired_comparison(rates[0], rates[1], _clusters(first, repositories))
    both = [task for task in first if _num_solved(first[task]) and _num_solved(second[task])]
    effect = gain.minimal_detectable_effect
    return {
        "pass@1": gain.difference,
        "ci95": [max(-1.0, gain.interval[0]), min(1.0, gain.interval[1])],
        "p_value": gain.p_value,
        "minimal_detectable_effect": effect if effect <= 1 else None,
        "num_tasks": len(first),
        "num_clusters": len(set(_clusters(first, repositories))),
        "seeds": sorted({attempt.seed for group in second.values() for attempt in group}),
        "turns_on_both_solved": [_solved_mean(side, both, "turns") for side in (first, second)],
        "generated_tokens_on_both_solved": [_solved_mean(side, both, "generated_tokens") for side in (first, second)],
    }


def _clusters(tasks: Iterable[str], repositories: Mapping[str, str] | None) -> list[str]:
    """A label per task: its repository, or the task itself."""
    return [(repositories or {}).get(task, f"task {task}") for task in tasks]


def _concluded(attempt: Attempt) -> bool:
    return attempt.stop_reason == "finished"


def _num_solved(attempts: Iterable[Attempt]) -> int:
    return sum(attempt.solved for attempt in attempts)


def _solved_mean(side: dict[str, list[Attempt]], tasks: Sequence[str], field: str) -> float | None:
    means = [_mean(getattr(attempt, field) for attempt in side[task] if attempt.solved) for task in tasks]
    return _mean(means) if means else None


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
