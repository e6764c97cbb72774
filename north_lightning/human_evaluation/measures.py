"""Statistics of ratings: pure functions of numbers.

In: scores, ratings, pairs. Out: intervals, agreement, strengths, effects. The unit is the item: two raters of one item
are not independent. The same input gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from north_lightning.evaluation.statistics import Estimate, Interval

NUM_DRAWS = 4000
PRIOR_PRECISION = 0.01
"""A normal prior with standard deviation 10 keeps the strength of a model that always wins finite."""


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """95% percentile interval of a mean, from samples of the items with replacement; one value an item."""
    data = np.asarray(values, dtype=np.float64)
    means = data[np.random.default_rng(0).integers(len(data), size=(NUM_DRAWS, len(data)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


# ---- agreement -------------------------------------------------------------------------------------------------------


def krippendorff_alpha(units: Sequence[Sequence[int]], num_values: int = 5) -> tuple[float, Interval] | None:
    """Krippendorff's alpha for ordinal ratings from 1 to ``num_values``, and its 95% interval over the units.

    Every unit holds the ratings it was given; those with fewer than two say nothing. None where there is no unit left,
    or all ratings are equal. Krippendorff (2019), Content Analysis, chapter 12; the interval is a bootstrap of units.
    """
    rated = [np.bincount(np.asarray(unit) - 1, minlength=num_values) for unit in units if len(unit) > 1]
    if not rated:
        return None
    pairs = np.array([(np.outer(one, one) - np.diag(one)) / (one.sum() - 1) for one in rated])
    alpha = _alpha(pairs.sum(axis=0))
    if math.isnan(alpha):
        return None
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(rated), np.full(len(rated), 1 / len(rated)), size=NUM_DRAWS // 4)
    drawn = np.array([_alpha(one) for one in np.tensordot(draws, pairs, axes=1)])
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return alpha, (float(low), float(high))


def _alpha(coincidences: np.ndarray) -> float:  # [values, values]
    totals = coincidences.sum(axis=1)
    middle = np.cumsum(totals) - totals / 2  # ordinal distance: ratings between the middles of two values
    distance = (middle[:, None] - middle[None]) ** 2
    expected = float(np.sum(np.outer(totals, totals) * distance)) / (totals.sum() - 1)
    return 1 - float(np.sum(coincidences * distance)) / expected if expected else math.nan


# ---- preferences -----------------------------------------------------------------------------------------------------


def bradley_terry(
    pairs: Sequence[tuple[int, int]], scores: Sequence[float], clusters: Sequence[Hashable], num_models: int
) -> tuple[list[Estimate], list[float]]:
    """Strength of every model, in log-odds around their mean; and the rate at which it would beat the average one.

    ``scores`` are the first one's of each pair: 1 won, 0 lost, 0.5 a tie, which is half a win for both. Bradley and
    Terry (1952), with errors clustered by item.
    """
    against = np.zeros((len(pairs), num_models))
    for row, (first, second) in enumerate(pairs):
        against[row, first], against[row, second] = 1, -1
    won = np.asarray(scores, dtype=np.float64)
    design = np.concatenate([against, against])[:, None, :]
    outcome = np.repeat([1, 0], len(pairs))
    strengths, covariance = cumulative_logit(design, outcome, np.concatenate([won, 1 - won]), [*clusters, *clusters])
    centered = np.eye(num_models) - 1 / num_models
    strengths, covariance = centered @ strengths, centered @ covariance @ centered
    freedom = max(1, len(set(clusters)) - 1)
    estimates = [
        Estimate(float(one), float(variance), freedom)
        for one, variance in zip(strengths, np.diag(covariance), strict=True)
    ]
    return estimates, [1 / (1 + math.exp(-one.value)) for one in estimates]


def preference_effects(
    effects: np.ndarray, preferences: Sequence[int], clusters: Sequence[Hashable]
) -> list[Estimate]:  # effects: [judgments, effects]
    """Log-odds by which each effect moves a five-point preference towards 5, all of them at once.

    A cumulative logit (McCullagh 1980) whose thresholds are symmetric: what favors a side whatever is on it is an
    effect, such as a column of ones. Errors are clustered by item.
    """
    data = np.asarray(effects, dtype=np.float64)
    inner, outer = [0, 1, -1, 0], [1, 0, 0, -1]  # of the thresholds between 1|2, 2|3, 3|4, 4|5
    thresholds = np.broadcast_to(np.array([inner, outer]).T, (len(data), 4, 2))
    design = np.concatenate([np.repeat(data[:, None, :], 4, axis=1), thresholds], axis=2)
    values, covariance = cumulative_logit(
        design, np.asarray(preferences) - 1, np.ones(len(data)), clusters, start=[0] * data.shape[1] + [0.5, 1.5]
    )
    freedom = max(1, len(set(clusters)) - 1)
    return [Estimate(float(values[at]), float(covariance[at, at]), freedom) for at in range(data.shape[1])]


def cumulative_logit(
    design: np.ndarray,
    outcomes: np.ndarray,
    weights: np.ndarray,
    clusters: Sequence[Hashable],
    start: Sequence[float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimates of ``P(outcome > k) = sigmoid(design[:, k] @ values)`` by Fisher scoring, and their covariance.

    ``design`` is [rows, outcomes - 1, values]. The covariance is the sandwich over clusters.
    """
    num_rows, num_steps, num_values = design.shape
    values = np.zeros(num_values) if start is None else np.asarray(start, dtype=np.float64)
    padded = np.zeros((num_rows, num_steps + 2, num_values))
    padded[:, 1:-1] = design
    prior = PRIOR_PRECISION * np.eye(num_values)
    for _ in range(200):
        above = np.ones((num_rows, num_steps + 2))
        above[:, 1:-1] = 1 / (1 + np.exp(-np.clip(design @ values, -40, 40)))
        above[:, -1] = 0
        slopes = (above * (1 - above))[:, :, None] * padded
        shares = np.maximum(above[:, :-1] - above[:, 1:], 1e-9)
        gradients = slopes[:, :-1] - slopes[:, 1:]
        information = np.einsum("n,nkp,nkq,nk->pq", weights, gradients, gradients, 1 / shares) + prior
        rows = np.arange(num_rows)
        by_row = weights[:, None] * gradients[rows, outcomes] / shares[rows, outcomes][:, None]
        step = np.linalg.solve(information, by_row.sum(axis=0) - prior @ values)
        values = values + step * min(1.0, 1.0 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-10:
            break
    labels = {label: number for number, label in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(labels), num_values))
    np.add.at(sums, [labels[label] for label in clusters], by_row)
    correction = len(labels) / max(1, len(labels) - 1)
    inverse = np.linalg.inv(information)
    return values, correction * inverse @ sums.T @ sums @ inverse
