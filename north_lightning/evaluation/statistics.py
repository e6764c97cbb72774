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
from functools import cache, lru_cache
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]
Runs = Sequence[float] | Sequence[Sequence[float]] | np.ndarray
"""One number per task, of one training run or of each of several."""

CONFIDENCE, POWER = 0.95, 0.8
MAX_EXACT_UNITS = 15
"""Up to this number of units, all their halves are looked at; beyond, ``NUM_HALVES`` random ones."""
NUM_HALVES = 4999
MIN_EVENT_CLUSTERS = 2.0
"""With fewer, the interval of a rate in correlated clusters is not to be trusted."""
NUM_STUDIES = 200
"""Simulated studies behind a minimal detectable effect."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Second minus first.

    ``p_value`` is two-sided, and at most 0.05 where the 95% ``interval`` leaves 0 out: both are of one test.
    ``minimal_detectable_effect`` is the true difference this test finds with a probability of 80%; smaller gains cannot
    be told from noise. Interval and effect are infinite where six units or more are needed to reach p = 0.05 and there
    are fewer; so is the effect where all units differ alike.
    """

    difference: float
    interval: Interval
    p_value: float
    minimal_detectable_effect: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, the variance of its error, and the degrees of freedom which that variance is known with."""

    value: float
    variance: float
    freedom: float = math.inf

    @property
    def interval(self) -> Interval:
        half = _t(self.freedom, (1 + CONFIDENCE) / 2) * math.sqrt(self.variance)
        return self.value - half, self.value + half

    @property
    def comparison(self) -> Comparison:
        """Whether the number differs from 0, by Student's t."""
        error = math.sqrt(self.variance)
        return Comparison(
            difference=self.value,
            interval=self.interval,
            p_value=student_t_p_value(self.value / error, self.freedom) if error else float(self.value == 0),
            minimal_detectable_effect=sum(_t(self.freedom, p) for p in ((1 + CONFIDENCE) / 2, POWER)) * error
            or math.inf,
        )


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


def mean_estimate(runs: Runs, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of one number per task, from one training run or several of one recipe: ``runs`` is [runs, tasks].

    Tasks and training seeds are crossed random effects, attempts are within both. With a single run there is nothing to
    see of the training seeds: the error is about this checkpoint and not about its recipe.
    """
    return _crossed([_matrix("runs", runs)], clusters)


def rate_interval(runs: Runs, clusters: Sequence[Hashable] | None = None) -> Interval:
    """95% interval of the mean of one rate per task, such as a task's share of solved attempts; ``runs`` as above.

    A score interval (Wilson 1927) with the variance that the data show in place of the binomial one, and Student's t in
    place of z. The variance is the jackknife's over clusters (CV3), over its bias under equal correlation within them
    (https://doi.org/10.1162/REST_a_00552); t has ``G* - 1/2`` degrees of freedom: the effective number of clusters
    ``G* = n^2 / sum_g n_g^2`` is small where one repository holds most tasks. Several runs add the variance over
    training seeds (``_crossed``).

    It is too short where few clusters hold what is solved, or unsolved if that is rarer: 12 repositories of a rate of
    3% and a correlation of 0.2 within them are covered in 84% of studies; in 78% of those with fewer than
    ``MIN_EVENT_CLUSTERS`` ``event_clusters``, and in 94% of the others. It is a little too short where three training
    runs lie far apart: with a standard deviation of 9 points between runs, 89 tasks are covered in about 93%.
    """
    data = _matrix("rates", runs)
    if data.min() < 0 or data.max() > 1:
        raise ValueError(f"rates: expected numbers from 0 to 1, got {runs!r}")
    num, mean, error = data.shape[1], float(data.mean()), _crossed([data], clusters)
    if math.isinf(error.variance):
        return 0.0, 1.0
    # A little of the binomial variance (found by simulation) keeps a handful of solved attempts from looking certain.
    design_effect = (num**2 * error.variance + 0.15) / (num * mean * (1 - mean) + 0.15)
    return _score_interval(mean, _t(error.freedom, (1 + CONFIDENCE) / 2) ** 2 * design_effect / num)


def event_clusters(rates: Sequence[float] | np.ndarray, clusters: Sequence[Hashable]) -> float:
    """Effective number of clusters that hold what is solved, or unsolved if that is rarer; 0 if there is none."""
    data = _finite("rates", rates)
    sums, _ = _units(data if data.mean() <= 0.5 else 1 - data, clusters)
    return float(sums.sum() ** 2 / np.sum(sums**2)) if sums.any() else 0.0


def recipe_comparison(first: Runs, second: Runs, clusters: Sequence[Hashable] | None = None) -> Comparison:
    """Whether ``second`` differs from ``first``, paired by task; both are [runs, tasks], the runs training seeds.

    One run a side is ``paired_comparison``, about the two checkpoints. Several are about the recipe: Student's t with
    training seeds as a random effect beside the tasks. Both recipes see the same tasks and share no training seed.
    """
    before, after = _matrix("first", first), _matrix("second", second)
    if before.shape[1] != after.shape[1]:
        raise ValueError(f"expected the same tasks on both sides, got {before.shape[1]} and {after.shape[1]}")
    if len(before) == len(after) == 1:
        return paired_comparison(before[0], after[0], clusters)
    return _crossed([before, after], clusters).comparison


def unpaired_comparison(first: Estimate, second: Estimate) -> Comparison:
    """Whether two numbers of unrelated tasks differ (Welch 1947)."""
    parts = [(one.variance, one.variance, one.freedom) for one in (first, second)]
    return _welch(second.value - first.value, parts).comparison


def count_estimate(successes: int, trials: int) -> Estimate:
    """A published share of solved tasks, with the variance of Agresti and Caffo (2000), which is never 0."""
    share = (successes + 1) / (trials + 2)
    return Estimate(successes / trials, share * (1 - share) / trials)


def count_against(value: float, successes: int, trials: int) -> Comparison:
    """Whether a published share differs from a fixed ``value``: the score test, whose interval is Wilson's."""
    share, error, normal = successes / trials, math.sqrt(value * (1 - value) / trials), NormalDist()
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    low, high = wilson_interval(share, trials)
    return Comparison(
        difference=share - value,
        interval=(low - value, high - value),
        p_value=2 * normal.cdf(-abs(share - value) / error) if error else float(share == value),
        minimal_detectable_effect=(z + normal.inv_cdf(POWER)) * error or math.inf,
    )


def wilson_interval(share: float, trials: int) -> Interval:
    """95% interval of a share of independent trials (Wilson 1927)."""
    return _score_interval(share, NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2 / trials)


def paired_comparison(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> Comparison:
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
    return Comparison(
        difference=float(data.mean()),
        interval=(float(_limit(low)[0]), -float(_limit(-high)[0])),
        p_value=float(_p_values(low, high)[0]) if sums.any() else 1.0,
        minimal_detectable_effect=effect,
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


def student_t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t for a probability from 0.5."""
    angle, mass = _student_t_mass(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(2 * probability - 1, mass, angle))


def student_t_p_value(t: float, freedom: float) -> float:
    """Two-sided."""
    if math.isinf(freedom):
        return 2 * NormalDist().cdf(-abs(t))
    angle, mass = _student_t_mass(freedom)
    return float(1 - np.interp(math.atan(abs(t) / math.sqrt(freedom)), angle, mass))


@lru_cache(maxsize=64)
def _student_t_mass(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Angles ``atan(t / sqrt(freedom))`` and the probability between minus and plus each, integrated numerically."""
    angle = np.linspace(0.0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (max(freedom, 1.0) - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return angle, mass / mass[-1]


@cache
def _t(freedom: float, probability: float) -> float:
    return NormalDist().inv_cdf(probability) if math.isinf(freedom) else student_t_quantile(probability, freedom)


def _score_interval(mean: float, z2: float) -> Interval:
    """Wilson's; ``z2`` is the squared quantile over the effective number of trials."""
    half = math.sqrt(z2 * mean * (1 - mean) + z2 * z2 / 4)
    return max(0.0, (mean + z2 / 2 - half) / (1 + z2)), min(1.0, (mean + z2 / 2 + half) / (1 + z2))


def _crossed(sides: Sequence[np.ndarray], clusters: Sequence[Hashable] | None) -> Estimate:
    """Mean of one side, or of the second minus the first, [runs, tasks] each.

    The variance is that over tasks of the difference of the runs' means; to it, the sides add the variance over
    training seeds of their runs' means, less what attempts and seeds' favorite tasks put there, which the tasks'
    variance holds already (two-way random effects; with clusters, Cameron, Gelbach and Miller 2011). Where nothing is
    left, the seeds have no part in the degrees of freedom either.
    """
    means = [side.mean(axis=0) for side in sides]
    values = means[-1] - means[0] if len(sides) == 2 else means[0]
    tasks = _variance_of_mean(values, clusters)
    _, sizes = _units(values, clusters)
    parts = [(tasks, tasks, float(sizes.sum() ** 2 / np.sum(sizes**2)) - 0.5)]
    excess = uncertainty = 0.0
    for side, mean in zip(sides, means, strict=True):
        if (num := len(side)) > 1:
            over_seeds = float(side.mean(axis=1).var(ddof=1)) / num
            within = sum(_variance_of_mean(run - mean, clusters) for run in side) / (num - 1) / num
            excess += over_seeds - within
            uncertainty += over_seeds**2 / (num - 1)
    if excess > 0:
        parts.append((excess, math.sqrt(uncertainty), 1))
    return _welch(float(values.mean()), parts)


def _welch(value: float, parts: Sequence[tuple[float, float, float]]) -> Estimate:
    """Estimate with a variance in parts: each part, the chi-squared variable in it, and its degrees of freedom.

    Degrees of freedom of the sum are Satterthwaite's (1946), to two digits.
    """
    variance = sum(part for part, _, _ in parts)
    uncertainty = sum(known**2 / freedom for _, known, freedom in parts)
    if math.isinf(variance) or not uncertainty:
        return Estimate(value, variance)
    return Estimate(value, variance, max(1.0, float(f"{variance**2 / uncertainty:.2g}")))


def _variance_of_mean(data: np.ndarray, clusters: Sequence[Hashable] | None) -> float:
    sums, sizes = _units(data, clusters)
    if len(sums) == 1:
        return math.inf
    squares = float(np.sum(_jackknife_residuals(sums, sizes) ** 2))
    return squares / _jackknife_bias(data, sums, sizes) / len(data) ** 2


def _matrix(name: str, runs: Runs) -> np.ndarray:
    """[runs, tasks]; a single list is one run."""
    data = np.asarray(runs, dtype=np.float64)
    data = data[None] if data.ndim == 1 else data
    if data.ndim != 2 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"{name}: expected finite numbers, the same tasks in every run, got {runs!r}")
    return data


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
