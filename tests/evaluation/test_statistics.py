"""Statistics against enumeration, other formulas and published examples."""

import math
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from benchmarks.bench_statistics import (
    SWE_BENCH_VERIFIED,
    crossed_coverage,
    draw,
    labels,
    paired_coverage,
    paired_results,
    planted_power,
    power,
    published,
    rate_coverage,
    single_run_coverage,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.evaluation.statistics import (
    _jackknife_bias,
    _jackknife_residuals,
    _units,
    count_against,
    count_estimate,
    event_clusters,
    holm,
    mean_estimate,
    paired_comparison,
    pass_at_k,
    rate_interval,
    recipe_comparison,
    student_t_p_value,
    student_t_quantile,
    unpaired_comparison,
)

# Darwin's maize, cross- minus self-fertilised, in eighths of an inch; Fisher, The Design of Experiments, chapter III.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("num_samples", range(1, 13))
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
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)]
)
def test_quantiles_of_students_t_equal_the_printed_table(freedom, quantile):
    assert student_t_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)


def test_students_t_is_normal_for_many_tasks_and_known_between_whole_degrees():
    assert student_t_quantile(0.975, 1e5) == pytest.approx(1.959964, abs=1e-4)
    assert student_t_quantile(0.95, 3) == pytest.approx(2.353, abs=6e-4)
    assert student_t_quantile(0.975, 3.37) == pytest.approx(2.99449, abs=1e-3)  # scipy 1.17, stats.t.ppf


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_of_single_attempts_is_close_to_the_published_score_interval(successes, trials, low, high):
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3; t in place of z is a little wider."""
    ours = rate_interval([1.0] * successes + [0.0] * (trials - successes))
    assert ours == pytest.approx((low, high), abs=0.02)
    assert low - 0.02 < ours[0] <= low + 1e-4
    assert high - 1e-4 <= ours[1] < high + 0.02


def test_the_interval_of_a_rate_stays_within_0_and_1_and_mirrors():
    for rates in ([0.0] * 5, [1.0] * 5, [0.0, 0.0, 0.0, 1 / 8], [0.5] * 9):
        low, high = rate_interval(rates)
        assert 0 <= low <= np.mean(rates) <= high <= 1
        assert high - low > 0.02
        assert rate_interval([1 - rate for rate in rates]) == pytest.approx((1 - high, 1 - low))
    assert rate_interval([0.5]) == (0.0, 1.0)
    assert rate_interval([0.5, 0.1, 0.9], clusters="aaa") == (0.0, 1.0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        rate_interval([0.5, 1.2])


def test_clusters_of_one_change_nothing_and_copies_of_a_task_add_no_information():
    rates = np.random.default_rng(0).random(26).tolist()
    assert rate_interval(rates, clusters=LETTERS) == pytest.approx(rate_interval(rates))
    alone, copied, independent = rate_interval(rates), rate_interval(rates * 4, LETTERS * 4), rate_interval(rates * 4)
    assert copied[1] - copied[0] == pytest.approx(alone[1] - alone[0], rel=0.1)
    assert independent[1] - independent[0] < 0.6 * (alone[1] - alone[0])


def variance_of_total(values, clusters):
    sums, sizes = _units(values, clusters)
    return np.sum(_jackknife_residuals(sums, sizes) ** 2) / _jackknife_bias(values, sums, sizes)


@pytest.mark.parametrize("correlation", [0.0, 0.2])
def test_residuals_of_unequal_clusters_add_up_to_the_variance_of_the_total(correlation):
    rng = np.random.default_rng(0)
    sizes = np.array([30, 10, 5, 5, 5, 5])
    noise = rng.normal(size=(4000, 6)).repeat(sizes, axis=1) * math.sqrt(correlation)
    studies = noise + rng.normal(size=(4000, 60)) * math.sqrt(1 - correlation)
    squares = [variance_of_total(study, labels(sizes)) for study in studies]
    truth = 60 * (1 - correlation) + correlation * np.sum(sizes**2)
    assert np.mean(squares) == pytest.approx(truth, rel=0.1)


def test_residuals_without_clusters_are_the_textbook_standard_error():
    values = np.array([0.0, 1 / 3, 1.0, 2 / 3, 1.0])
    assert variance_of_total(values, None) == pytest.approx(5 * np.var(values, ddof=1))


def test_the_sign_flip_test_equals_fishers_count_for_darwins_maize():
    """1726 of 32768 sums reach the observed one; here, ties but the observed signs count half."""
    signed = np.array(list(product((1, -1), repeat=15))) @ np.array(MAIZE)
    ties = int(np.sum(np.abs(signed) == sum(MAIZE)))
    assert np.sum(np.abs(signed) >= sum(MAIZE)) == 1726
    assert paired_comparison([0] * 15, MAIZE).p_value == pytest.approx((1726 - (ties - 2) / 2) / 32768)


def flip_p_value(sums):
    """By enumeration of all signs; ties count half, except the observed signs and their mirror image."""
    observed = abs(math.fsum(sums))
    flipped = [abs(math.fsum(s * d for s, d in zip(signs, sums, strict=True)))
               for signs in product((1, -1), repeat=len(sums))]  # fmt: skip
    ties = sum(abs(one - observed) <= 1e-9 for one in flipped)
    return (sum(one > observed + 1e-9 for one in flipped) + (ties - 2) / 2 + 2) / len(flipped)


@given(st.lists(st.sampled_from([-1.0, -1 / 3, 0.0, 1 / 3, 2 / 3, 0.1]), min_size=6, max_size=9))
@settings(max_examples=25, deadline=None)
def test_the_interval_holds_what_the_enumerated_test_does_not_reject(differences):
    clusters = ["whole" if index < 2 else str(index) for index in range(len(differences))]
    differences.append(0.25)
    clusters.append("more")
    gain = paired_comparison([0.0] * len(differences), differences, clusters)
    sums = {name: [] for name in clusters}
    for name, value in zip(clusters, differences, strict=True):
        sums[name].append(value)
    assert gain.p_value == pytest.approx(flip_p_value([math.fsum(values) for values in sums.values()]))
    for limit, outward in zip(gain.interval, (-1, 1), strict=True):
        if math.isfinite(limit):
            for step, rejected in ((outward * 1e-6, True), (-outward * 1e-6, gain.interval[0] == gain.interval[1])):
                shifted = [math.fsum(value - limit - step for value in values) for values in sums.values()]
                assert (flip_p_value(shifted) <= 0.05) == rejected


def test_random_splits_agree_with_all_of_them(monkeypatch):
    exact = paired_comparison([0] * 15, MAIZE)
    monkeypatch.setattr("north_lightning.evaluation.statistics.MAX_EXACT_UNITS", 0)
    monkeypatch.setattr("north_lightning.evaluation.statistics.NUM_HALVES", 20_000)
    drawn = paired_comparison([0] * 15, MAIZE)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.006)
    assert drawn.interval == pytest.approx(exact.interval, abs=0.6)
    assert drawn.minimal_detectable_effect == pytest.approx(exact.minimal_detectable_effect, rel=0.1)


def test_fewer_than_six_units_can_tell_nothing():
    for clusters in (None, "aabbcddddee"):
        values = [1.0] * (5 if clusters is None else 11)
        gain = paired_comparison([0.0] * len(values), values, clusters)
        assert gain.interval == (-math.inf, math.inf)
        assert gain.minimal_detectable_effect == math.inf
        assert gain.p_value == pytest.approx(2 / 2**5)
        assert paired_comparison([0.0] * 5, [1.0, 1.0, 1.0, -1.0, 0.0]).p_value > 0.05


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


def test_paired_comparison_knows_the_sign_and_repeats_itself():
    rng = np.random.default_rng(5)
    first = rng.binomial(3, 0.4, size=100) / 3
    second = np.clip(first + rng.binomial(1, 0.4, size=100) / 3, 0, 1)
    gain = paired_comparison(first, second)
    assert gain == paired_comparison(first, second)
    assert gain.difference == pytest.approx((second - first).mean())
    assert gain.interval[0] > 0
    assert gain.p_value < 0.001
    back = paired_comparison(second, first)
    assert back.difference == pytest.approx(-gain.difference)
    assert back.interval == pytest.approx((-gain.interval[1], -gain.interval[0]))


def test_the_interval_of_many_independent_differences_is_the_normal_one():
    differences = np.random.default_rng(0).normal(0.3, 1.0, size=500)
    gain = paired_comparison(np.zeros(500), differences)
    standard_error = np.std(differences, ddof=1) / math.sqrt(500)
    assert gain.interval == pytest.approx(differences.mean() + 1.96 * np.array([-1, 1]) * standard_error, abs=0.008)
    assert gain.minimal_detectable_effect == pytest.approx((1.96 + 0.8416) * standard_error, rel=0.06)


def test_equal_results_are_no_difference():
    same = paired_comparison([0.0, 1.0, 0.5] * 3, [0.0, 1.0, 0.5] * 3)
    assert (same.difference, same.interval, same.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert same.minimal_detectable_effect == math.inf


@pytest.mark.parametrize(
    ("first", "second", "clusters"),
    [([1.0], [1.0, 0.0], None), ([], [], None), ([1.0, math.nan], [1.0, 1.0], None), ([1.0, 0.0], [1.0, 1.0], "a")],
)
def test_results_that_cannot_be_paired_are_refused(first, second, clusters):
    with pytest.raises(ValueError, match="expected"):
        paired_comparison(first, second, clusters=clusters)


# Six hundred studies are known to a point; the benchmark repeats all of this with thousands and more designs.


@pytest.mark.parametrize("correlation", [0.0, 0.2])
def test_intervals_over_the_repositories_of_swe_bench_verified_cover_as_they_say(correlation):
    rng = np.random.default_rng(1)
    assert 0.92 <= rate_coverage(rng, 600, SWE_BENCH_VERIFIED, 0.6, correlation, attempts=3) <= 0.985
    assert 0.92 <= paired_coverage(rng, 600, SWE_BENCH_VERIFIED, (0.4, 0.55), correlation, attempts=3) <= 0.98


@pytest.mark.parametrize("rate", [0.5, 0.03])
def test_intervals_over_89_independent_tasks_cover_as_they_say(rate):
    assert 0.92 <= rate_coverage(np.random.default_rng(2), 600, (1,) * 89, rate, 0.0, attempts=8) <= 0.985


def test_a_test_without_an_effect_finds_one_in_twenty():
    rng = np.random.default_rng(3)
    first, second = (draw(rng, 600, SWE_BENCH_VERIFIED, 0.4, 0.1, attempts=1) for _ in range(2))
    low, high, p_values = paired_results(rng, second - first, SWE_BENCH_VERIFIED)
    assert 0.025 <= np.mean(p_values <= 0.05) <= 0.075
    assert not np.any((p_values <= 0.05) & (low < -1e-12) & (high > 1e-12))
    assert np.all(p_values[(low > 1e-12) | (high < -1e-12)] <= 0.05)


@pytest.mark.parametrize("sizes", [SWE_BENCH_VERIFIED, (1,) * 89])
def test_the_minimal_detectable_effect_is_found_four_times_out_of_five(sizes):
    found = power(
        np.random.default_rng(4),
        600,
        sizes,
        0.5,
        0.05 * (len(sizes) == 12),
        attempts=3,
        pilots=100 if len(sizes) == 12 else 8,
    )
    assert 0.74 <= found["found"] <= 0.86


def test_two_clusters_have_an_interval_that_is_finite_and_wide():
    low, high = rate_interval([0.2] * 20 + [0.6] * 20, clusters="a" * 20 + "b" * 20)
    assert 0.0 < low < 0.2 < 0.6 < high < 1.0


def test_event_clusters_count_equal_clusters_whole_and_a_dominating_one_nearly_alone():
    assert event_clusters([1, 0, 1, 0, 0, 0, 0, 0], "aabbccdd") == 2.0
    assert event_clusters([0, 1, 0, 1, 1, 1, 1, 1], "aabbccdd") == 2.0  # the unsolved ones are rarer
    assert event_clusters([1, 1, 1, 0, 0, 0, 0, 0, 1, 0], "aaabbbbbcc") == 16 / 10
    assert event_clusters([0, 0, 0], "aab") == 0.0


# ---- training seeds as a random effect -------------------------------------------------------------------------------


def test_a_balanced_study_has_the_variances_of_the_textbook_analysis():
    """Two-way random effects without clusters: (MS tasks + MS runs - MS interaction) / (tasks x runs)."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(4, 30)) + rng.normal(0, 2, size=(4, 1)) + rng.normal(0, 3, size=30)
    runs, tasks = data.shape
    by_run, by_task = data.mean(axis=1), data.mean(axis=0)
    rest = data - by_run[:, None] - by_task + data.mean()
    squares = (runs * by_task.var(ddof=1), tasks * by_run.var(ddof=1), (rest**2).sum() / ((runs - 1) * (tasks - 1)))
    estimate = mean_estimate(data)
    assert estimate.value == pytest.approx(data.mean())
    assert estimate.variance == pytest.approx((squares[0] + squares[1] - squares[2]) / (runs * tasks))
    over_seeds = squares[1] / (runs * tasks)
    freedom = estimate.variance**2 / ((squares[0] / (runs * tasks)) ** 2 / (tasks - 0.5) + over_seeds**2 / (runs - 1))
    assert estimate.freedom == pytest.approx(freedom, rel=0.05)


def test_a_comparison_of_recipes_adds_the_variance_over_the_runs_of_both():
    rng = np.random.default_rng(1)
    first = rng.normal(size=(3, 40)) + rng.normal(0, 2, size=(3, 1))
    second = 1.0 + rng.normal(size=(5, 40)) + rng.normal(0, 2, size=(5, 1))
    gain = recipe_comparison(first, second)
    means = second.mean(axis=1), first.mean(axis=1)
    least = np.var(means[0], ddof=1) / 5 + np.var(means[1], ddof=1) / 3
    half = (gain.interval[1] - gain.interval[0]) / 2
    assert gain.difference == pytest.approx(means[0].mean() - means[1].mean())
    assert half > student_t_quantile(0.975, 7) * math.sqrt(least) * 0.95
    assert (gain.p_value <= 0.05) == (gain.interval[0] > 0 or gain.interval[1] < 0)
    back = recipe_comparison(second, first)
    assert back.p_value == pytest.approx(gain.p_value)
    assert back.interval == pytest.approx((-gain.interval[1], -gain.interval[0]))


def test_one_run_a_side_is_the_paired_test_of_two_checkpoints():
    rng = np.random.default_rng(2)
    first, second = rng.random(20), rng.random(20)
    assert recipe_comparison([first], [second], LETTERS[:20]) == paired_comparison(first, second, LETTERS[:20])


@pytest.mark.parametrize(
    ("t", "freedom", "p_value"), [(2.776, 4, 0.05), (4.604, 4, 0.01), (2.228, 10, 0.05), (1.96, math.inf, 0.05)]
)
def test_p_values_of_students_t_equal_the_printed_table(t, freedom, p_value):
    assert student_t_p_value(t, freedom) == pytest.approx(p_value, abs=1e-4)
    assert student_t_p_value(-t, freedom) == student_t_p_value(t, freedom)


def test_a_published_count_against_a_fixed_share_is_the_score_test_and_wilsons_interval():
    gain = count_against(0.25, 81, 263)  # Newcombe 1998, table I, method 3: 0.2553 to 0.3662
    assert np.add(gain.interval, 0.25) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    z = (81 / 263 - 0.25) / math.sqrt(0.25 * 0.75 / 263)
    assert gain.p_value == pytest.approx(math.erfc(z / math.sqrt(2)))
    assert (gain.p_value <= 0.05) == (gain.interval[0] > 0)


def test_published_counts_are_told_apart_as_often_as_they_say():
    """All counts that 300 tasks can give, weighed by their probability."""
    numbers = np.arange(301)
    weights = np.array([math.comb(300, int(n)) * 0.3**n * 0.7 ** (300 - n) for n in numbers])
    likely = [int(n) for n in numbers if weights[n] > 1e-5]
    level = sum(
        weights[a] * weights[b]
        for a in likely
        for b in likely
        if unpaired_comparison(count_estimate(a, 300), count_estimate(b, 300)).p_value <= 0.05
    )
    assert 0.045 <= level <= 0.055


def test_intervals_of_recipes_of_three_runs_cover_as_they_say():
    covered = crossed_coverage(np.random.default_rng(6), 300, (1,) * 89, 3, 0.4, 3)
    assert 0.92 <= covered["rate"] <= 0.985
    assert 0.92 <= covered["difference"] <= 0.985


def test_one_run_covers_its_checkpoint_and_not_its_recipe():
    covered = single_run_coverage(np.random.default_rng(7), 300, 500, 1.0, 3)
    assert covered["its checkpoint"] >= 0.92
    assert covered["its recipe"] <= 0.7


def test_planted_gains_of_the_announcement_are_found_where_models_agree_on_what_is_hard():
    for sizes, gain in (((1,) * 89, 0.08), ((1,) * 500, 0.031)):
        assert planted_power(np.random.default_rng(1), 200, sizes, gain, 0.99)["found"] >= 0.72


def test_published_counts_are_judged_right():
    judged = published()
    assert judged["156 against 152 of 500"]["p_value"] > 0.7
    assert judged["20 recipes, 91 to 110 of 300"] == {
        "pairs_told_apart": 0, "better_than_a_fixed_quarter": 20, "better_than_75_of_300": 2,
    }  # fmt: skip
