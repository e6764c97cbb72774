"""What a calibration saw, in numbers and in one picture: how often tasks are solved, in how many turns.

In: every task's attempts and the budgets that were set. Out: JSON, and an SVG beside it. It decides nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from north_lightning.evaluation.attempts import Attempt
from north_lightning.rollout.metrics import percentile
from north_lightning.run_folders import write_result


def distribution(attempts: Mapping[str, Sequence[Attempt]], budgets: Mapping[str, int]) -> dict[str, Any]:
    """Counts of tasks by pass rate, of solved attempts by turns, and of kept tasks by budget.

    ``by_family`` has for each family its tasks, its pass rate, and the 50th and 90th percentile and the largest of the
    turns of its solved attempts.
    """
    families: dict[str, list[Attempt]] = {}
    for several in attempts.values():
        for attempt in several:
            families.setdefault(attempt.family, []).append(attempt)
    rates = [sum(one.solved for one in several) / len(several) for several in attempts.values() if several]
    solved = [one.turns for several in attempts.values() for one in several if one.solved]
    return {
        "tasks_by_pass_rate": {f"{rate:g}": count for rate, count in sorted(Counter(rates).items())},
        "solved_attempts_by_turns": _counts(solved),
        "kept_tasks_by_budget": _counts(list(budgets.values())),
        "by_family": {family: _family(several) for family, several in sorted(families.items())},
    }


def _family(attempts: Sequence[Attempt]) -> dict[str, float | None]:
    turns = [one.turns for one in attempts if one.solved]
    return {
        "tasks": len({one.task_id for one in attempts}),
        "pass_rate": len(turns) / len(attempts),
        "solved_turns_p50": percentile(turns, 50) if turns else None,
        "solved_turns_p90": percentile(turns, 90) if turns else None,
        "solved_turns_max": max(turns, default=None),
    }


def _counts(values: Sequence[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def write_distribution(numbers: Mapping[str, Any], path: Path) -> None:
    """``<path>.distribution.json`` and ``<path>.distribution.svg``."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    write_result(path.with_suffix(".distribution.json"), json.dumps(numbers, indent=1) + "\n")
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = (
        ("tasks_by_pass_rate", "share of attempts that solve the task", "tasks"),
        ("solved_attempts_by_turns", "turns of a solved attempt", "attempts"),
        ("kept_tasks_by_budget", "step budget of a kept task", "tasks"),
    )
    for number, (key, xlabel, ylabel) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 3, number)
        bars = axes.bar(list(numbers[key]), list(numbers[key].values()), color="#2f6f9f")
        axes.bar_label(bars, fontsize=7)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
    FigureCanvasSVG(figure).print_svg(str(path.with_suffix(".distribution.svg")), metadata={"Date": None})
