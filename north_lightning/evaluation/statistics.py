"""Statistics of benchmark results: pure functions of numbers.

In: scores per task. Out: 95% intervals, p-values and the effect a comparison can find. The unit is the task, or the
cluster of tasks (a repository) where there is one, because attempts at one task and tasks of one repository are not
independent of each other. Nothing here knows what an attempt is, and the same input gives the same numbers.
``tests/benchmarks/bench_statistics.py`` measures how often the intervals cover and how often the effect is found.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

Interval = tuple[float, float]

CONFIDENCE, POWER = 0.95, 0.8
MAX_EXACT_UNITS = 15
"""Up to this number of units, all their halves are looked at; beyond, ``NUM_HALVES`` random ones."""
NUM_HALVES = 4999
MIN_EVENT_CLUSTERS = 2.0
"""With fewer, the interval of a rate in correlated clusters is not to be trusted."""
NUM_STUDIES = 200
"""Simulated studies behind a minimal detectable effect."""


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """Second minus first, paired by task.

    ``p_value`` is two-sided, and at most 0.05 where the 95% ``interval`` leaves 0 out: both are of one test.
    ``minimal_detectable_effect`` is the true difference this test finds with a probability of 80%; smaller gains cannot
    be told from noise. Interval and effect are infinite below six units, which can never reach p = 0.05; so is the
    effect where all units differ alike.
    """

    difference: float
    interval: Interval
    p_value: float
    minimal_detectable_effect: float
    num_tasks: int


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of ``k`` samples, drawn without replacement from ``num_samples``, is correct.

    Unbiased for the pass@k of the sampler (https://arxiv.org/abs/2107.03374, eq. 1):
    ``1 - C(n - c, k) / C(n, k)``, as a product that cannot overflow.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"expected 0 <= num_correct <= num_samples and 1 <= k <= num_samples, got num_samples={num_samples}, "
            f"num_correct={num_correct}, k={k}"
        )
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_correct + 1, num_samples + 1))


def rate_interval(rates: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Interval:
    """95% interval of the mean of one rate per task, such as a task's share of solved attempts.

    A score interval (Wilson 1927) with the variance that the data show in place of the binomial one, and Student's t in
    place of z. The variance is the jackknife's over clusters (CV3), over its bias under equal correlation within them
    (https://doi.org/10.1162/REST_a_00552); t has ``G* - 1/2`` degrees of freedom: the effective number of clusters
    ``G* = n^2 / sum_g n_g^2`` is small where one repository holds most tasks.

    It is too short where few clusters hold what is solved, or unsolved if that is rarer: 12 repositories of a rate of
    3% and a correlation of 0.2 within them are covered in 84% of studies; in 78% of those with fewer than
    ``MIN_EVENT_CLUSTERS`` ``event_clusters``, and in 94% of the others.
    """
    data = _finite("rates", rates)
    if data.min() < 0 or data.max() > 1:
        raise ValueError(f"rates: expected numbers from 0 to 1, got {rates!r}")
    sums, sizes = _units(data, clusters)
    if len(sums) == 1:
        return 0.0, 1.0
    num, mean = len(data), float(data.mean())
    binomial = num * mean * (1 - mean)
    variance = float(np.sum(_jackknife_residuals(sums, sizes) ** 2)) / _jackknife_bias(data, sums, sizes)
    # A little of the binomial variance (found by simulation) keeps a handful of solved attempts from looking certain.
    design_effect = (variance + 0.15) / (binomial + 0.15)
    freedom = num**2 / float(np.sum(sizes**2)) - 0.5
    z2 = student_t_quantile((1 + CONFIDENCE) / 2, freedom) ** 2 * design_effect / num
    half = math.sqrt(z2 * mean * (1 - mean) + z2 * z2 / 4)
    return max(0.0, (mean + z2 / 2 - half) / (1 + z2)), min(1.0, (mean + z2 / 2 + half) / (1 + z2))


def event_clusters(rates: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Effective number of clusters that hold what is solved, or unsolved if that is rarer; 0 if there is none."""
    data = _finite("rates", rates)
    sums, _ = _units(data if data.mean() <= 0.5 else 1 - data, clusters)
    return float(sums.sum() ** 2 / np.sum(sums**2)) if sums.any() else 0.0


def paired_comparison(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> PairedComparison:
    """Whether ``second`` differs from ``first``; both hold one score per task, in the same order.

    The test flips the signs of whole units (Fisher's randomization test for pairs; with clusters, the restricted wild
    cluster bootstrap of https://doi.org/10.1162/rest.90.3.414 with Rademacher weights): its level is exact for
    symmetric differences, for any sizes of the clusters and any correlation within them. Inverted, it is an interval:
    a flip rejects the differences outside the means of the flipped and the other units (Hartigan 1969, typical values).
    """
    if len(first) != len(second):
        raise ValueError(f"expected the same tasks on both sides, got {len(first)} and {len(second)}")
    data = _finite("second - first", np.subtract(second, first))
    sums, sizes = _units(data, clusters)
    rng = np.random.default_rng(0)
    halves = _halves(len(sums), rng)
    low, high = _half_means(sums[None], sizes, halves)
    # The same test of other studies like this one: its own residuals, with random signs.
    residuals = _jackknife_residuals(sums, sizes)
    lowest, _ = _half_means(rng.choice([-1.0, 1.0], size=(NUM_STUDIES, len(sums))) * residuals, sizes, halves)
    effect = float(np.quantile(-_limit(lowest), POWER, method="higher")) if residuals.any() else math.inf
    return PairedComparison(
        difference=float(data.mean()),
        interval=(float(_limit(low)[0]), -float(_limit(-high)[0])),
        p_value=float(_p_values(low, high)[0]) if sums.any() else 1.0,
        minimal_detectable_effect=effect,
        num_tasks=len(data),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for looking at several benchmarks (Holm 1979), in the order given."""
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"p_values: expected numbers from 0 to 1, got {list(p_values)}")
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


@cache
def student_t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t for a probability from 0.5, by integration over the angle ``atan(t / sqrt(freedom))``."""
    angle = np.linspace(0.0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (max(freedom, 1.0) - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(2 * probability - 1, mass / mass[-1], angle))


def _finite(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0 or not np.isfinite(data).all():
        raise ValueError(f"{name}: expected a non-empty list of finite numbers, got {values!r}")
    return data


def _units(data: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values in each unit."""
    if clusters is None:
        return data, np.ones(len(data))
    if len(clusters) != len(data):
        raise ValueError(f"clusters: expected one label for each of {len(data)} values, got {len(clusters)}")
    numbers: dict[Hashable, int] = {}
    labels = np.array([numbers.setdefault(label, len(numbers)) for label in clusters])
    return np.bincount(labels, weights=data), np.bincount(labels).astype(np.float64)


def _jackknife_residuals(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``sqrt((G - 1) / G) r_g / (1 - n_g / n)`` of each of ``G`` units, ``r_g`` its residual sum: squares add up to the
    jackknife's variance of the total. Infinite for a single unit."""
    num_units, total = len(sums), sizes.sum()
    if num_units == 1:
        return np.full(1, np.inf)
    return math.sqrt((num_units - 1) / num_units) * (sums - sizes * sums.sum() / total) / (1 - sizes / total)


def _jackknife_bias(data: np.ndarray, sums: np.ndarray, sizes: np.ndarray) -> float:
    """Expected sum of the squared residuals over the variance of the total, at the correlation within the clusters that
    the analysis of variance shows."""
    num, num_units, squares = len(data), len(sums), float(np.sum(sums**2 / sizes))
    correlation = 0.0
    if num > num_units:
        within = max(0.0, float(np.sum(data**2)) - squares) / (num - num_units)
        between = squares - num * data.mean() ** 2 - (num_units - 1) * within
        excess = max(0.0, float(between)) / (num - float(np.sum(sizes**2)) / num)
        correlation = excess / max(excess + within, 1e-300)
    shares, variances = sizes / num, sizes * (1 + (sizes - 1) * correlation)
    total = variances.sum()
    each = (variances * (1 - 2 * shares) + shares**2 * total) / (1 - shares) ** 2
    return (num_units - 1) / num_units * float(each.sum() / total)


def _halves(num_units: int, rng: np.random.Generator) -> np.ndarray:  # [halves, units], 1 where a unit is in the half
    """Ways to split the units in two, the one that leaves a side empty apart; a split and its mirror image are one."""
    if num_units > MAX_EXACT_UNITS:
        return rng.integers(2, size=(NUM_HALVES, num_units)).astype(np.float64)
    return (np.arange(1, 2 ** (num_units - 1))[:, None] >> np.arange(num_units) & 1).astype(np.float64)


def _half_means(sums: np.ndarray, sizes: np.ndarray, halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smaller and the larger mean of the two sides of every split, for every row of ``sums``: [rows, halves]."""
    num = halves @ sizes
    inside = sums @ halves.T
    with np.errstate(divide="ignore", invalid="ignore"):
        means = inside / num, (sums.sum(axis=1, keepdims=True) - inside) / (sizes.sum() - num)
    empty = (num == 0) | (num == sizes.sum())
    return np.where(empty, -np.inf, np.minimum(*means)), np.where(empty, np.inf, np.maximum(*means))


def _limit(lows: np.ndarray) -> np.ndarray:
    """Lower end of the interval from the smaller means of each row: below it, p is at most 1 - CONFIDENCE."""
    rejected = math.floor((1 - CONFIDENCE) * (1 + lows.shape[1]) + 1e-9) - 1
    if rejected < 0:
        return np.full(len(lows), -np.inf)
    return np.partition(lows, rejected, axis=1)[:, rejected]


def _p_values(lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    """Mid-p-value of no difference from the half means of each row; the observed signs count in full."""
    rounding = 1e-9 * np.abs(np.where(np.isfinite(highs), highs, 0.0)).max(axis=1, keepdims=True, initial=0.0)
    beyond = np.sum((lows < -rounding) & (highs > rounding), axis=1)
    ties = np.sum((lows <= rounding) & (highs >= -rounding), axis=1) - beyond
    return (1 + beyond + ties / 2) / (1 + lows.shape[1])
