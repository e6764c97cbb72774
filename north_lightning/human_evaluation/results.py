"""The numbers of a study: who is preferred, how sure that is, and what else moved the raters.

In: a study, its judgments and, once it is open, the seal. Out: one JSON-able dictionary. Without the seal it holds what
names no model: progress, attention, agreement, and the pull of side and length.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from north_lightning.evaluation.statistics import (
    Estimate,
    mean_estimate,
    paired_comparison,
    rate_interval,
    wilson_interval,
)
from north_lightning.human_evaluation.measures import (
    bootstrap_interval,
    bradley_terry,
    krippendorff_alpha,
    preference_effects,
)
from north_lightning.human_evaluation.store import Judgment
from north_lightning.human_evaluation.study import Seal, Study
from north_lightning.human_evaluation.submissions import FUNCTIONALITIES

TIES = "About the same counts as half a win for both. Cannot judge is left out. Every item counts once: raters of one \
item are averaged."
MIN_ATTENTION = 0.5
"""Raters who pass a smaller share of their attention items are left out, and counted."""


@dataclass(frozen=True, slots=True)
class Row:
    """One judgment; ``left`` and ``right`` are attempts, ``preference`` is 1 (left) to 5 (right)."""

    rater: str
    item: str
    functionality: str
    comparison: str
    left: str
    right: str
    lengths: tuple[int, int]
    judgment: Judgment

    @property
    def preference(self) -> int | None:
        return self.judgment.preference


def study_results(study: Study, judgments: Mapping[str, Judgment], seal: Seal | None) -> dict[str, Any]:
    """All numbers; those that need the models are None while there is no seal."""
    every, planted = _rows(study, judgments)
    attention = _attention(study, planted)
    failed = [
        rater for rater, one in attention.items() if one["shown"] and one["passed"] < MIN_ATTENTION * one["shown"]
    ]
    rows = [row for row in every if row.rater not in failed]
    ids = {rater: [one.id for one in seats] for rater, seats in study.assignments.items()}
    twice = [group for group in _grouped(rows, lambda row: row.comparison).values() if len(group) > 1]
    results: dict[str, Any] = {
        "format": 1,
        "is_unsealed": seal is not None,
        "tie_convention": TIES,
        "models": list(seal.models) if seal else None,
        "num_comparisons": len({one.id for one in study.comparisons.values() if not one.expected}),
        "num_judgments": len(rows),
        "num_judged_twice": len(twice),
        "num_cannot_judge": sum(row.preference is None for row in rows),
        "progress": {rater: [sum(one in judgments for one in own), len(own)] for rater, own in ids.items()},
        "attention": attention,
        "raters_left_out": failed,
        "agreement": _agreement(rows),
        "bias": _bias(rows, seal),
        "pairs": None,
        "bradley_terry": None,
        "rubrics": None,
    }
    if seal is not None and rows:
        results["pairs"] = [_pair(rows, every, seal, *pair) for pair in combinations(seal.models, 2)]
        results["rubrics"] = _rubrics(study, rows, seal)
        if len(seal.models) > 2:
            results["bradley_terry"] = _strengths(rows, seal)
    return results


def _rows(study: Study, judgments: Mapping[str, Judgment]) -> tuple[list[Row], list[Row]]:
    """Judgments of comparisons, and of attention items."""
    rows: tuple[list[Row], list[Row]] = [], []
    for rater, seats in study.assignments.items():
        for one in seats:
            if one.id in judgments:
                comparison = study.comparison_of(one)
                lengths = study.lengths[one.left], study.lengths[one.right]
                row = Row(
                    rater, comparison.item, comparison.functionality, one.comparison, one.left, one.right, lengths,
                    judgments[one.id],
                )  # fmt: skip
                rows[bool(comparison.expected)].append(row)
    return rows


def _attention(study: Study, planted: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Per rater: attention items that were answered, and those where the right attempt was preferred."""
    counts = {rater: {"shown": 0, "passed": 0} for rater in study.assignments}
    for row in planted:
        is_left = study.comparisons[row.comparison].expected == row.left
        counts[row.rater]["shown"] += 1
        counts[row.rater]["passed"] += (row.preference or 3) < 3 if is_left else (row.preference or 3) > 3
    return counts


def _agreement(rows: Sequence[Row]) -> dict[str, Any]:
    """Krippendorff's alpha of preferences, all turned to the same side, and of each statement's ratings."""
    units: dict[str, dict[Any, list[int]]] = {"preference": defaultdict(list)}
    for row in rows:
        if row.preference is not None:
            units["preference"][row.comparison].append(row.preference if row.left < row.right else 6 - row.preference)
        for attempt, answers in row.judgment.answers.items():
            for statement, value in answers.items():
                if value is not None:
                    units.setdefault(statement, defaultdict(list))[row.comparison, attempt].append(value)
    found = {}
    for name, of_unit in units.items():
        num = sum(len(ratings) > 1 for ratings in of_unit.values())
        alpha = krippendorff_alpha(list(of_unit.values()))
        found[name] = {"alpha": alpha and alpha[0], "ci95": alpha and list(alpha[1]), "num_units": num}
    return found


def _bias(rows: Sequence[Row], seal: Seal | None) -> dict[str, Any]:
    """How often the left and the longer attempt is preferred, ties as halves; and, where the models are known, the pull
    of side and length beside their quality."""
    judged = [row for row in rows if row.preference is not None]
    uneven = [row for row in judged if row.lengths[0] != row.lengths[1]]
    longer = [1 - _left_score(row) if row.lengths[1] > row.lengths[0] else _left_score(row) for row in uneven]
    found = {
        "left_preferred": _share([_left_score(row) for row in judged], judged),
        "longer_preferred": _share(longer, uneven),
        "effects": None,
    }
    if seal is not None and len({row.item for row in judged}) > len(seal.models) + 4:
        names, columns = ["left", "twice_as_long"], [[-1.0] * len(judged)]
        columns.append([math.log2((row.lengths[1] + 1) / (row.lengths[0] + 1)) for row in judged])
        for model in seal.models[1:]:
            names.append(f"{model} instead of {seal.models[0]}")
            columns.append([(seal.attempts[row.right] == model) - (seal.attempts[row.left] == model) for row in judged])
        kept = [at for at, column in enumerate(columns) if any(column)]
        effects = preference_effects(
            np.array([columns[at] for at in kept]).T,
            [row.preference or 3 for row in judged],
            [row.item for row in judged],
        )
        found["effects"] = {names[at]: _described(one) for at, one in zip(kept, effects, strict=True)}
    return found


def _pair(rows: Sequence[Row], every: Sequence[Row], seal: Seal, first: str, second: str) -> dict[str, Any]:
    """``first`` against ``second``, in all functionalities and in each."""
    own = [row for row in rows if _models(row, seal) == {first, second}]
    kinds = [kind for kind in FUNCTIONALITIES if any(row.functionality == kind for row in own)]
    return {
        "models": [first, second],
        "overall": _win_rate(own, seal, first),
        "by_functionality": {
            kind: _win_rate([row for row in own if row.functionality == kind], seal, first) for kind in kinds
        },
        "with_all_raters": _win_rate([row for row in every if _models(row, seal) == {first, second}], seal, first),
    }


def _win_rate(rows: Sequence[Row], seal: Seal, first: str) -> dict[str, Any] | None:
    """None without a judgment."""
    judged = [row for row in rows if row.preference is not None]
    if not judged:
        return None
    by_item = _grouped(judged, lambda row: row.item)
    towards = {id(row): _towards(row, seal, first) for row in judged}
    scores = [float(np.mean([_score(towards[id(row)]) for row in group])) for group in by_item.values()]
    rate, values = float(np.mean(scores)), list(towards.values())
    decided = [value for value in values if value != 3]
    return {
        "win_rate": rate,
        "wilson_ci95": list(wilson_interval(rate, len(scores))),
        "clustered_ci95": list(rate_interval(scores)),
        "bootstrap_ci95": list(bootstrap_interval(scores)),
        "p_value": paired_comparison([0.5] * len(scores), scores).p_value,
        "num_items": len(scores),
        "num_judgments": len(judged),
        "wins": sum(value > 3 for value in values),
        "ties": values.count(3),
        "losses": sum(value < 3 for value in values),
        "win_rate_without_ties": sum(value > 3 for value in decided) / len(decided) if decided else None,
        "preferences": [values.count(value) for value in (5, 4, 3, 2, 1)],
    }


def _strengths(rows: Sequence[Row], seal: Seal) -> dict[str, Any]:
    judged = [row for row in rows if row.preference is not None]
    pairs = [
        (seal.models.index(seal.attempts[row.left]), seal.models.index(seal.attempts[row.right])) for row in judged
    ]
    items = [row.item for row in judged]
    estimates, rates = bradley_terry(pairs, [_left_score(row) for row in judged], items, len(seal.models))
    return {
        model: {"strength": one.value, "ci95": list(one.interval), "wins_against_average": rate}
        for model, one, rate in zip(seal.models, estimates, rates, strict=True)
    }


def _rubrics(study: Study, rows: Sequence[Row], seal: Seal) -> dict[str, Any]:
    """Functionality -> statement -> model -> mean rating with its interval; an item counts once."""
    ratings: dict[tuple[str, str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for attempt, answers in row.judgment.answers.items():
            for statement, value in answers.items():
                if value is not None:
                    ratings[row.functionality, statement, seal.attempts[attempt]][row.item].append(value)
    table: dict[str, Any] = {}
    for kind, statements in study.rubrics.items():
        for statement in statements:
            means = {}
            for model in seal.models:
                if of_items := [float(np.mean(one)) for one in ratings[kind, statement, model].values()]:
                    one = mean_estimate(of_items)
                    low, high = (max(1.0, one.interval[0]), min(5.0, one.interval[1]))
                    means[model] = {"mean": one.value, "ci95": [low, high], "num_items": len(of_items)}
            table.setdefault(kind, {})[statement] = means
    return table


# ---- one judgment ----------------------------------------------------------------------------------------------------


def _models(row: Row, seal: Seal) -> set[str]:
    return {seal.attempts[row.left], seal.attempts[row.right]}


def _towards(row: Row, seal: Seal, model: str) -> int:
    """The preference as 5 for ``model``, 1 for the other."""
    value = row.preference or 3
    return 6 - value if seal.attempts[row.left] == model else value


def _score(preference: int) -> float:
    return 0.5 if preference == 3 else float(preference > 3)


def _left_score(row: Row) -> float:
    return 1 - _score(row.preference or 3)


def _share(scores: Sequence[float], rows: Sequence[Row]) -> dict[str, Any] | None:
    if not scores:
        return None
    interval = rate_interval(scores, [row.item for row in rows])
    return {"share": float(np.mean(scores)), "ci95": list(interval), "num_judgments": len(scores)}


def _described(one: Estimate) -> dict[str, Any]:
    return {"log_odds": one.value, "ci95": list(one.interval), "p_value": one.comparison.p_value}


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
