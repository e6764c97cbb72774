"""Numbers of an evaluation from its attempts.

In: attempts. Out: per checkpoint the pass rates and trajectory metrics, and paired comparisons between two checkpoints.
Means are over tasks first, so a task with more attempts does not weigh more. Attempts that failed outside the model
count in ``num_errors`` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from north_lightning.errors import DataError
from north_lightning.evaluation.attempts import Attempt
from north_lightning.evaluation.statistics import paired_comparison, pass_at_k


def by_task(attempts: Iterable[Attempt]) -> dict[str, list[Attempt]]:
    """Scored attempts of every task, in order of task id."""
    groups: dict[str, list[Attempt]] = {}
    for attempt in sorted(attempts, key=lambda one: (one.task_id, one.seed)):
        if attempt.reward is not None:
            groups.setdefault(attempt.task_id, []).append(attempt)
    return groups


def summarise(attempts: Sequence[Attempt], ks: Sequence[int] = (1, 8)) -> dict[str, Any]:
    """Metrics of one checkpoint; ``pass@k`` only where every task has at least ``k`` scored attempts."""
    tasks = by_task(attempts)
    if not tasks:
        raise DataError("no scored attempts to summarise")
    smallest = min(len(group) for group in tasks.values())
    summary: dict[str, Any] = {
        f"pass@{k}": _mean(pass_at_k(len(group), _num_solved(group), k) for group in tasks.values())
        for k in ks
        if k <= smallest
    }
    scored = [attempt for group in tasks.values() for attempt in group]
    solved = [attempt for attempt in scored if attempt.solved]
    concluded = [attempt for attempt in scored if attempt.stop_reason == "finished"]
    turns = sum(attempt.turns for attempt in scored)
    return summary | {
        "mean_reward": _mean(attempt.reward for attempt in scored if attempt.reward is not None),
        "invalid_call_rate": sum(attempt.invalid_turns for attempt in scored) / max(1, turns),
        "invalid_attempt_rate": _share(scored, lambda attempt: attempt.invalid_turns > 0),
        "mean_turns": turns / len(scored),
        "median_turns_solved": float(np.median([attempt.turns for attempt in solved])) if solved else None,
        "mean_generated_tokens": _mean(attempt.generated_tokens for attempt in scored),
        "loop_rate": _share(scored, lambda attempt: attempt.looped),
        "conclusion_rate": len(concluded) / len(scored),
        "false_success_rate": _share(concluded, lambda attempt: not attempt.solved),
        "truncation_rate": _share(scored, lambda attempt: attempt.stop_reason in ("length", "context", "max_turns")),
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


def compare(before: Sequence[Attempt], after: Sequence[Attempt], seed: int = 0) -> dict[str, Any]:
    """Paired by task: gain in pass@1 with its interval, and lengths on the attempts both solved."""
    first, second = by_task(before), by_task(after)
    if first.keys() != second.keys():
        missing = sorted(first.keys() ^ second.keys())
        raise DataError(f"a paired comparison needs the same tasks on both sides; {missing[:3]} are on one side only")
    rates = [[_num_solved(group) / len(group) for group in side.values()] for side in (first, second)]
    gain = paired_comparison(rates[0], rates[1], seed=seed)
    both = [task for task in first if _num_solved(first[task]) and _num_solved(second[task])]
    return {
        "pass@1": gain.difference,
        "ci95": list(gain.interval),
        "p_value": gain.p_value,
        "num_tasks": len(first),
        "seeds": sorted({attempt.seed for group in second.values() for attempt in group}),
        "turns_on_both_solved": [_solved_mean(side, both, "turns") for side in (first, second)],
        "generated_tokens_on_both_solved": [_solved_mean(side, both, "generated_tokens") for side in (first, second)],
    }


def _num_solved(attempts: Iterable[Attempt]) -> int:
    return sum(attempt.solved for attempt in attempts)


def _solved_mean(side: dict[str, list[Attempt]], tasks: Sequence[str], field: str) -> float | None:
    values = [getattr(attempt, field) for task in tasks for attempt in side[task] if attempt.solved]
    return _mean(values) if values else None


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _share(attempts: Sequence[Attempt], holds: Callable[[Attempt], bool]) -> float:
    return sum(map(holds, attempts)) / max(1, len(attempts))
