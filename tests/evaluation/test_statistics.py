"""Statistics against enumeration, other formulas and published examples."""

import math
from fractions import Fraction
from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from north_lightning.evaluation.statistics import (
    bootstrap_interval,
    holm,
    mean_over_seeds,
    mean_with_interval,
    minimal_detectable_effect,
    paired_comparison,
    pass_at_k,
    sign_flip_p_value,
    wilson_interval,
)

# Darwin's maize, cross- minus self-fertilised, in eighths of an inch; Fisher, The Design of Experiments, chapter III.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_sample(num_samples):
    for num_correct in range(num_samples + 1):
        samples = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            draws = [any(draw) for draw in combinations(samples, k)]
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples():
    exact = 1 - Fraction(math.comb(1000 - 13, 100), math.comb(1000, 100))
    assert pass_at_k(1000, 13, 100) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_is_unbiased_over_binomial_samples():
    rate, num_samples, k = 0.3, 6, 4
    expected = sum(
        math.comb(num_samples, c) * rate**c * (1 - rate) ** (num_samples - c) * pass_at_k(num_samples, c, k)
        for c in range(num_samples + 1)
    )
    assert expected == pytest.approx(1 - (1 - rate) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 10), (3, 4, 1), (3, -1, 1), (3, 1, 0), (0, 0, 1)])
def test_pass_at_k_refuses_what_the_samples_cannot_tell(n, c, k):
    with pytest.raises(ValueError, match="num_samples"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_the_published_examples(successes, trials, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_limits_are_the_proportions_that_the_score_test_just_rejects(counts):
    successes, trials = counts
    share = successes / trials
    for limit in wilson_interval(successes, trials):
        assert 0 <= limit <= 1
        if 0 < limit < 1:
            z = abs(share - limit) / math.sqrt(limit * (1 - limit) / trials)
            assert z == pytest.approx(1.959964, abs=1e-5)


def test_mean_with_interval_is_the_textbook_formula():
    values = [0.0, 1 / 3, 1.0, 2 / 3, 1.0]
    estimate = mean_with_interval(values)
    standard_error = np.std(values, ddof=1) / math.sqrt(5)
    assert estimate.mean == pytest.approx(0.6)
    assert estimate.standard_error == pytest.approx(standard_error)
    assert estimate.interval == pytest.approx((0.6 - 1.959964 * standard_error, 0.6 + 1.959964 * standard_error))


def test_clusters_of_one_change_nothing_and_copies_of_a_task_add_no_information():
    values = [0.1, 0.5, 0.9, 0.2]
    alone = mean_with_interval(values)
    assert mean_with_interval(values, clusters="abcd").standard_error == pytest.approx(alone.standard_error)
    copied = mean_with_interval(values * 3, clusters="abcd" * 3)
    assert copied.standard_error == pytest.approx(alone.standard_error)
    assert mean_with_interval(values * 3).standard_error < 0.6 * alone.standard_error


def test_one_task_has_no_finite_interval():
    assert mean_with_interval([0.5]).interval == (-math.inf, math.inf)


def test_mean_over_seeds_averages_seeds_before_tasks():
    estimate = mean_over_seeds([[1, 1, 1, 1], [0], [1, 0]])
    assert estimate.mean == pytest.approx(0.5)
    assert estimate.standard_error == pytest.approx(np.std([1, 0, 0.5], ddof=1) / math.sqrt(3))
    with pytest.raises(ValueError, match="at least one seed"):
        mean_over_seeds([[1], []])


def test_the_interval_of_the_mean_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        rates = rng.beta(0.5, 0.5, size=80)
        low, high = mean_over_seeds(rng.binomial(1, rates, size=(3, 80)).T).interval
        covered += low <= 0.5 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_bootstrap_converges_to_the_quantiles_of_all_resamples():
    values = [-0.5, 0.1, 0.3, 0.9, 1.7]
    means = [np.mean(draw) for draw in product(values, repeat=5)]
    low, high = bootstrap_interval(values, num_resamples=200_000, seed=1)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.02)


def test_bootstrap_draws_whole_clusters():
    values, clusters = [1.0, 0.0, 0.5, 0.5, 2.0], "aabbc"
    groups = [values[0:2], values[2:4], values[4:5]]
    means = [np.mean(list(chain(*draw))) for draw in product(groups, repeat=3)]
    low, high = bootstrap_interval(values, clusters, num_resamples=100_000, confidence=0.8)
    assert low == pytest.approx(np.quantile(means, 0.1), abs=1e-9)
    assert high == pytest.approx(np.quantile(means, 0.9), abs=1e-9)


def test_bootstrap_is_repeated_exactly_by_its_seed_and_moves_with_the_values():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    shifted = bootstrap_interval(values + 2, seed=4)
    assert shifted == pytest.approx(np.add(bootstrap_interval(values, seed=4), 2))


def test_bootstrap_does_every_resample_it_is_asked_for():
    coarse = bootstrap_interval([0.0, 1.0], num_resamples=1, seed=0)
    assert coarse[0] == coarse[1]
    assert bootstrap_interval([0.0, 1.0], num_resamples=1500, seed=0) == (0.0, 1.0)


def test_sign_flip_test_equals_fishers_count_for_darwins_maize():
    assert sign_flip_p_value(MAIZE) == pytest.approx(1726 / 32768)


@given(st.lists(st.sampled_from([-1.0, -1 / 3, 0.0, 1 / 3, 2 / 3, 0.1]), min_size=1, max_size=9))
@example([-1.0, -1.0, 2 / 3, 2 / 3, 2 / 3])  # cancels to the last bit only
def test_sign_flip_test_equals_enumeration(differences):
    observed = abs(sum(differences))
    sums = [abs(math.fsum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in product((1, -1), repeat=len(differences))]  # fmt: skip
    expected = np.mean([one >= observed - 1e-9 for one in sums])
    assert sign_flip_p_value(differences) == pytest.approx(expected)


def test_random_sign_patterns_agree_with_all_of_them(monkeypatch):
    monkeypatch.setattr("north_lightning.evaluation.statistics.MAX_EXACT_UNITS", 0)
    assert sign_flip_p_value(MAIZE, num_resamples=100_000) == pytest.approx(1726 / 32768, abs=0.003)
    assert sign_flip_p_value([1.0] * 60, num_resamples=999) == pytest.approx(1 / 1000)


def test_sign_flips_of_clusters_flip_them_whole():
    assert sign_flip_p_value([1.0, 1.0, 1.0, 1.0]) == pytest.approx(2 / 16)
    assert sign_flip_p_value([1.0, 1.0, 1.0, 1.0], clusters="aabb") == pytest.approx(2 / 4)


def test_p_values_under_no_effect_are_not_too_small():
    rng = np.random.default_rng(7)
    p_values = [sign_flip_p_value(rng.normal(size=30), num_resamples=400, seed=i) for i in range(400)]
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.09


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values):
    """An adjusted p-value is the largest Bonferroni p-value of all sets of hypotheses that hold it."""
    indices = range(len(p_values))
    subsets = [subset for size in range(1, len(p_values) + 1) for subset in combinations(indices, size)]
    expected = [
        max(min(1.0, len(subset) * min(p_values[j] for j in subset)) for subset in subsets if i in subset)
        for i in indices
    ]
    assert holm(p_values) == pytest.approx(expected)


def test_holm_keeps_the_order_given_and_refuses_what_is_no_p_value():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="p_values"):
            holm([0.5, wrong])


def test_the_minimal_detectable_effect_is_found_four_times_out_of_five():
    standard_error = 0.02
    effect = minimal_detectable_effect(standard_error)
    estimates = np.random.default_rng(0).normal(effect, standard_error, size=200_000)
    assert np.mean(np.abs(estimates) > 1.959964 * standard_error) == pytest.approx(0.8, abs=0.005)


def test_paired_comparison_holds_the_parts_and_knows_the_sign():
    rng = np.random.default_rng(5)
    first = rng.binomial(3, 0.4, size=100) / 3
    second = np.clip(first + rng.binomial(1, 0.4, size=100) / 3, 0, 1)
    gain = paired_comparison(first, second, seed=2)
    differences = second - first
    assert gain.difference == pytest.approx(differences.mean())
    assert gain.interval == bootstrap_interval(differences, seed=2)
    assert gain.interval[0] > 0
    assert gain.p_value < 0.001
    assert gain.num_tasks == 100
    standard_error = np.std(differences, ddof=1) / 10
    assert gain.minimal_detectable_effect == pytest.approx((1.959964 + 0.841621) * standard_error, rel=1e-5)
    back = paired_comparison(second, first, seed=2)
    assert back.difference == pytest.approx(-gain.difference)
    assert back.interval == pytest.approx((-gain.interval[1], -gain.interval[0]))


def test_equal_results_are_no_difference():
    same = paired_comparison([0.0, 1.0, 0.5], [0.0, 1.0, 0.5])
    assert (same.difference, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize(
    ("first", "second", "clusters"),
    [([1.0], [1.0, 0.0], None), ([], [], None), ([1.0, math.nan], [1.0, 1.0], None), ([1.0, 0.0], [1.0, 1.0], "a")],
)
def test_results_that_cannot_be_paired_are_refused(first, second, clusters):
    with pytest.raises(ValueError, match="expected"):
        paired_comparison(first, second, clusters=clusters)
