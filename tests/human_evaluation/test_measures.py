"""The measures equal independent implementations: formulas written out, scipy's optimizer, published packages."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize

from north_lightning.evaluation.statistics import wilson_interval
from north_lightning.human_evaluation.measures import (
    PRIOR_PRECISION,
    bootstrap_interval,
    bradley_terry,
    krippendorff_alpha,
    preference_effects,
)


def alpha_written_out(units: list[list[int]]) -> float:
    """Pair by pair: observed against expected ordinal disagreement (Krippendorff 2019, 12.3.3)."""
    rated = [unit for unit in units if len(unit) > 1]
    values = [value for unit in rated for value in unit]
    counts = [values.count(value) for value in range(1, 6)]

    def disagreement(c: int, k: int) -> float:
        low, high = min(c, k), max(c, k)
        return (sum(counts[low - 1 : high]) - (counts[low - 1] + counts[high - 1]) / 2) ** 2

    observed = sum(
        disagreement(a, b) / (len(unit) - 1) for unit in rated for a, b in itertools.permutations(unit, 2)
    ) / len(values)
    expected = sum(disagreement(a, b) for a, b in itertools.permutations(values, 2)) / len(values) / (len(values) - 1)
    return 1 - observed / expected


def random_units(seed: int, noise: float) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    units = []
    for truth in rng.integers(1, 6, size=40):
        raters = int(rng.integers(1, 5))
        units.append([int(np.clip(round(truth + rng.normal(0, noise)), 1, 5)) for _ in range(raters)])
    return units


@pytest.mark.parametrize("noise", [0.0, 0.4, 1.0, 5.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alpha_equals_its_definition(seed: int, noise: float) -> None:
    units = random_units(seed, noise)
    found = krippendorff_alpha(units)
    assert found is not None
    assert found[0] == pytest.approx(alpha_written_out(units), abs=1e-12)
    assert found[1][0] <= found[0] <= found[1][1]


def test_alpha_equals_the_krippendorff_package() -> None:
    package = pytest.importorskip("krippendorff")
    units = random_units(3, 1.0)
    table = np.full((4, len(units)), np.nan)
    for number, unit in enumerate(units):
        table[: len(unit), number] = unit
    theirs = package.alpha(table, level_of_measurement="ordinal", value_domain=[1, 2, 3, 4, 5])
    found = krippendorff_alpha(units)
    assert found is not None
    assert found[0] == pytest.approx(theirs, abs=1e-12)


def test_alpha_of_ratings_that_say_nothing_is_none() -> None:
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[3], [4]]) is None
    assert krippendorff_alpha([[3, 3], [3, 3, 3]]) is None


def games(seed: int, num: int) -> tuple[list[tuple[int, int]], list[float]]:
    rng = np.random.default_rng(seed)
    strengths = np.array([0.9, 0.2, -0.1, -1.0])
    pairs, scores = [], []
    for _ in range(num):
        first, second = (int(one) for one in rng.choice(4, 2, replace=False))
        pairs.append((first, second))
        is_won = rng.random() < 1 / (1 + math.exp(strengths[second] - strengths[first]))
        scores.append(0.5 if rng.random() < 0.2 else float(is_won))
    return pairs, scores


def test_bradley_terry_is_the_maximum_of_its_likelihood() -> None:
    pairs, scores = games(0, 300)
    estimates, rates = bradley_terry(pairs, scores, range(300), 4)

    def loss(strengths: np.ndarray) -> float:
        total = PRIOR_PRECISION / 2 * float(strengths @ strengths)
        for (first, second), score in zip(pairs, scores, strict=True):
            gap = strengths[first] - strengths[second]
            total += score * math.log1p(math.exp(-gap)) + (1 - score) * math.log1p(math.exp(gap))
        return total

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    found = np.array([one.value for one in estimates])
    np.testing.assert_allclose(found, best - best.mean(), atol=1e-5)
    np.testing.assert_allclose(rates, 1 / (1 + np.exp(-found)))


def test_bradley_terry_equals_choix() -> None:
    choix = pytest.importorskip("choix")
    pairs, scores = games(1, 300)
    decided = [(pair, score) for pair, score in zip(pairs, scores, strict=True) if score != 0.5]
    estimates, _ = bradley_terry([pair for pair, _ in decided], [score for _, score in decided], range(len(decided)), 4)
    theirs = choix.opt_pairwise(
        4, [pair if score else pair[::-1] for pair, score in decided], alpha=PRIOR_PRECISION / 2
    )
    np.testing.assert_allclose([one.value for one in estimates], theirs - theirs.mean(), atol=1e-4)


def test_a_model_that_always_wins_has_a_finite_strength() -> None:
    estimates, _ = bradley_terry([(0, 1), (1, 2), (0, 2)] * 10, [1.0, 1.0, 1.0] * 10, range(30), 3)
    values = [one.value for one in estimates]
    assert values[0] > values[1] > values[2]
    assert all(math.isfinite(one) for one in values)


def test_preference_effects_are_the_maximum_of_their_likelihood() -> None:
    rng = np.random.default_rng(4)
    effects = np.column_stack([rng.choice([-1.0, 1.0], 250), np.ones(250), rng.normal(size=250)])
    latent = effects @ [0.7, -0.4, 0.3] + rng.logistic(size=250)
    preferences = 1 + np.digitize(latent, [-1.5, -0.5, 0.5, 1.5])
    found = preference_effects(effects, preferences.tolist(), range(250))

    def loss(values: np.ndarray) -> float:
        pull, (inner, outer) = effects @ values[:3], values[3:]
        edges = np.array([-np.inf, -outer, -inner, inner, outer, np.inf])
        shares = stats.logistic.cdf(edges[preferences] - pull) - stats.logistic.cdf(edges[preferences - 1] - pull)
        return PRIOR_PRECISION / 2 * float(values @ values) - float(np.log(np.maximum(shares, 1e-12)).sum())

    best = minimize(loss, [0, 0, 0, 0.5, 1.5], method="BFGS", options={"gtol": 1e-5})
    np.testing.assert_allclose([one.value for one in found], best.x[:3], atol=1e-4)
    # Without clusters the sandwich estimates what the information does.
    np.testing.assert_allclose([one.variance**0.5 for one in found], np.diag(best.hess_inv)[:3] ** 0.5, rtol=0.15)


def test_ratings_of_one_item_count_as_one_in_the_errors() -> None:
    rng = np.random.default_rng(5)
    effects = np.column_stack([rng.choice([-1.0, 1.0], 60), np.ones(60)])
    preferences = rng.integers(1, 6, size=60).tolist()
    once = preference_effects(effects, preferences, range(60))
    tripled = preference_effects(
        np.repeat(effects, 3, axis=0), np.repeat(preferences, 3).tolist(), np.repeat(range(60), 3)
    )
    for one, three in zip(once, tripled, strict=True):
        assert three.variance == pytest.approx(one.variance, rel=0.01)


def test_intervals_equal_scipys() -> None:
    for wins, trials in ((0, 5), (3, 7), (56, 85), (85, 85)):
        theirs = stats.binomtest(wins, trials).proportion_ci(method="wilson")
        assert wilson_interval(wins / trials, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    scores = np.random.default_rng(6).choice([0.0, 0.5, 1.0], size=85, p=[0.3, 0.1, 0.6])
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=20_000, rng=7).confidence_interval
    assert bootstrap_interval(scores.tolist()) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert bootstrap_interval(scores.tolist()) == bootstrap_interval(scores.tolist())
