"""Statistics of benchmark results: pure functions of numbers.

In: scores per task. Out: estimates with intervals and p-values. The unit of resampling is the task (or a cluster of
tasks, such as a repository), because the attempts at one task are not independent of each other. Nothing here knows
what an attempt is, and nothing draws a random number without a seed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]

MAX_EXACT_UNITS = 16
"""Up to so many units with a difference, every sign pattern is looked at; beyond, random ones."""

CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error and two-sided interval."""

    mean: float
    standard_error: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """Second minus first, paired by task.

    ``p_value`` is two-sided. ``minimal_detectable_effect`` is the true difference this comparison would find with a
    probability of 80% at the 5% level: a benchmark cannot tell smaller gains from noise.
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


def wilson_interval(num_successes: int, num_trials: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), for independent trials."""
    if num_trials < 1 or not 0 <= num_successes <= num_trials:
        raise ValueError(f"expected 0 <= num_successes <= num_trials and a trial, got {num_successes} of {num_trials}")
    z = _two_sided_quantile(confidence)
    share = num_successes / num_trials
    centre = share + z * z / (2 * num_trials)
    half = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    scale = 1 + z * z / num_trials
    low = 0.0 if num_successes == 0 else (centre - half) / scale
    high = 1.0 if num_successes == num_trials else (centre + half) / scale
    return low, high


def mean_with_interval(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Estimate:
    """Mean of one value per task, with the normal interval ``mean +- z SD / sqrt(n)``.

    With ``clusters`` (one label per value) the standard error is the cluster-robust one over ``G`` clusters,
    ``sqrt(G / (G - 1) sum_g (sum_{i in g} (x_i - mean))^2) / n``: the plain one when every cluster has one value.
    """
    data = _finite("values", values)
    mean = float(data.mean())
    standard_error = _standard_error(data, clusters)
    half = _two_sided_quantile(confidence) * standard_error
    return Estimate(mean, standard_error, (mean - half, mean + half))


def mean_over_seeds(
    scores: Sequence[Sequence[float]], clusters: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Estimate:
    """The headline number: ``scores[task][seed]`` averaged over a task's seeds first, then over tasks.

    The interval is for other tasks *and* other seeds: a task's mean varies by both. Tasks may differ in the number of
    seeds.
    """
    if any(len(row) == 0 for row in scores):
        raise ValueError("scores: expected at least one seed for every task")
    return mean_with_interval([float(np.mean(row)) for row in scores], clusters, confidence)


def paired_comparison(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedComparison:
    """Whether ``second`` differs from ``first``; both hold one score per task, in the same order.

    The interval is the percentile bootstrap over tasks, the p-value a sign-flip permutation test; with ``clusters``
    both resample whole clusters. The same seed gives the same result.
    """
    if len(first) != len(second):
        raise ValueError(f"expected the same tasks on both sides, got {len(first)} and {len(second)}")
    differences = _finite("second - first", np.subtract(second, first))
    return PairedComparison(
        difference=float(differences.mean()),
        interval=bootstrap_interval(differences, clusters, num_resamples, confidence, seed),
        p_value=sign_flip_p_value(differences, clusters, num_resamples, seed),
        minimal_detectable_effect=minimal_detectable_effect(_standard_error(differences, clusters)),
        num_tasks=len(differences),
    )


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean; whole clusters are drawn where there are any."""
    sums, counts = _units(_finite("values", values), clusters)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, num_resamples, CHUNK):
        drawn = rng.integers(len(sums), size=(min(CHUNK, num_resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def sign_flip_p_value(
    differences: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of "the differences are symmetric about 0" (Fisher's randomisation test for pairs).

    Exact over all sign patterns for few units, otherwise from random patterns with the observed one counted in, so
    that it is never 0.
    """
    sums, _ = _units(_finite("differences", differences), clusters)
    sums = sums[sums != 0]
    if len(sums) == 0:
        return 1.0
    # Sums that are equal on paper may differ by rounding, also where large terms cancel.
    observed = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()
    if len(sums) <= MAX_EXACT_UNITS:
        patterns = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ sums) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, num_resamples, CHUNK):
        signs = 1 - 2 * rng.integers(2, size=(min(CHUNK, num_resamples - start), len(sums)))
        extreme += int(np.sum(np.abs(signs @ sums) >= observed))
    return (1 + extreme) / (1 + num_resamples)


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


def minimal_detectable_effect(standard_error: float, significance: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a two-sided z-test with this standard error finds with probability ``power``."""
    if standard_error < 0 or not 0 < power < 1:
        raise ValueError(f"expected standard_error >= 0 and 0 < power < 1, got {standard_error} and {power}")
    return (_two_sided_quantile(1 - significance) + NormalDist().inv_cdf(power)) * standard_error


def _two_sided_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a number between 0 and 1, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _finite(name: str, values: Sequence[float] | np.ndarray) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0 or not np.isfinite(data).all():
        raise ValueError(f"{name}: expected a non-empty list of finite numbers, got {values!r}")
    return data


def _units(data: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values in each unit that is drawn or flipped as a whole."""
    if clusters is None:
        return data, np.ones(len(data))
    if len(clusters) != len(data):
        raise ValueError(f"clusters: expected one label for each of {len(data)} values, got {len(clusters)}")
    numbers: dict[Hashable, int] = {}
    labels = np.array([numbers.setdefault(label, len(numbers)) for label in clusters])
    return np.bincount(labels, weights=data), np.bincount(labels).astype(np.float64)


def _standard_error(data: np.ndarray, clusters: Sequence[Hashable] | None) -> float:
    """Of the mean; infinite for a single unit, which says nothing about the others."""
    residuals, _ = _units(data - data.mean(), clusters)
    num_units = len(residuals)
    if num_units == 1:
        return math.inf
    return math.sqrt(num_units / (num_units - 1) * float(np.sum(residuals**2))) / len(data)
