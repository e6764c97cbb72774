"""Rows by shares of trainable tokens: full, mixed, on target, each sample once a round, exact on resume."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.data import BestFitPacker, MixedRows, SampleWindow
from north_lightning.errors import ConfigError

ROW = 64
sources = st.lists(
    st.lists(st.tuples(st.integers(2, ROW), st.integers(1, ROW - 1)), min_size=1, max_size=30), min_size=1, max_size=4
)


def mixed(samples, shares=None, repeat=True, seed=0, size=8, order="random", row=ROW):
    """``samples``: for each source a list of (length, trained tokens)."""
    lengths = np.array([length for source in samples for length, _ in source])
    trained = [min(t, length - 1) for source in samples for length, t in source]
    bounds = np.cumsum([0, *map(len, samples)])
    names = "abcd"[: len(samples)]
    windows = {
        name: SampleWindow(name, range(start, end), lengths, size, seed, order)
        for name, start, end in zip(names, bounds, bounds[1:], strict=False)
    }
    return MixedRows(windows, trained, shares or dict.fromkeys(names, 1.0), row, repeat), lengths, trained, windows


@settings(deadline=None, max_examples=50)
@given(samples=sources, seed=st.integers(0, 5), size=st.integers(1, 40))
def test_without_repeating_every_sample_is_in_exactly_one_row_and_no_row_overflows(samples, seed, size):
    rows, lengths, _, _ = mixed(samples, repeat=False, seed=seed, size=size)
    made = list(rows)
    assert sorted(number for row in made for number in row) == list(range(len(lengths)))
    assert all(row and lengths[row].sum() <= ROW for row in made)
    assert rows.num_rows == len(made)
    assert rows.num_tokens == lengths.sum()


@settings(deadline=None, max_examples=30)
@given(samples=sources, weights=st.lists(st.floats(0.1, 1), min_size=4, max_size=4), seed=st.integers(0, 5))
def test_every_sample_of_a_source_comes_once_a_round(samples, weights, seed):
    rows, _, _, _ = mixed(samples, dict(zip("abcd"[: len(samples)], weights, strict=False)), seed=seed)
    seen = Counter(number for _ in range(60) for number in next(rows))
    first = 0
    for source in samples:
        counts = [seen[number] for number in range(first, first + len(source))]
        assert max(counts) - min(counts) <= 1
        first += len(source)


def long_tailed(num_samples=3000):
    generator = np.random.default_rng(0)
    shapes = {"a": (8.6, 1.0, 0.2), "b": (7.0, 1.0, 0.8), "c": (5.5, 0.8, 0.6)}
    samples = []
    for mean, deviation, fraction in shapes.values():
        lengths = generator.lognormal(mean, deviation, num_samples).astype(int).clip(8, 65536)
        samples.append([(int(length), max(1, int(fraction * length))) for length in lengths])
    return samples, {"a": 0.43, "b": 0.27, "c": 0.30}


def test_shares_of_what_is_in_rows_are_exact_where_sampling_by_share_misses_by_twenty_points():
    samples, shares = long_tailed()
    rows, _, trained, _ = mixed(samples, shares, size=256, row=65536)
    tokens = Counter()
    while sum(tokens.values()) < 5_000_000:
        for number in next(rows):
            tokens["abc"[number // 3000]] += trained[number]
    total = sum(tokens.values())
    assert tokens == rows.placed_tokens
    assert all(abs(tokens[name] - share * total) <= max(trained) for name, share in shares.items())
    generator = np.random.default_rng(1)
    drawn = dict.fromkeys(shares, 0)
    for name in generator.choice(list(shares), size=3000, p=list(shares.values())):
        drawn[name] += generator.choice([t for _, t in samples["abc".index(name)]])
    by_sampling = max(abs(drawn[name] / sum(drawn.values()) - share) for name, share in shares.items())
    assert max(abs(rows.achieved_shares[name] - share) for name, share in shares.items()) < 0.002
    assert by_sampling > 0.2


def test_rows_are_full_and_every_few_rows_hold_all_sources_where_best_fit_alone_makes_rows_of_one():
    samples, shares = long_tailed()
    rows, lengths, trained, _ = mixed(samples, shares, size=256, row=65536)
    made = [next(rows) for _ in range(160)]
    assert rows.num_tokens / (rows.num_rows * 65536) > 0.999
    assert mean_step_distance(made, trained, shares) < 0.12

    drawn = [number for row in made for number in row]
    packer = BestFitPacker(65536, 4096)
    homogeneous = list(packer.pack((number, int(lengths[number])) for number in drawn))
    assert mean_step_distance(homogeneous, trained, shares) > 2 * mean_step_distance(made, trained, shares)


def mean_step_distance(rows, trained, shares, rows_per_step=4):
    distances = []
    for start in range(0, len(rows) - rows_per_step, rows_per_step):
        tokens = Counter()
        for number in (number for row in rows[start : start + rows_per_step] for number in row):
            tokens["abc"[number // 3000]] += trained[number]
        distances.append(max(abs(tokens[name] / sum(tokens.values()) - share) for name, share in shares.items()))
    return float(np.mean(distances))


@settings(deadline=None, max_examples=30)
@given(samples=sources, cut=st.integers(0, 40), seed=st.integers(0, 3))
def test_restored_rows_continue_exactly(samples, cut, seed):
    whole = mixed(samples, seed=seed)[0]
    expected = [next(whole) for _ in range(60)]
    first = mixed(samples, seed=seed)[0]
    assert [next(first) for _ in range(cut)] == expected[:cut]
    second = mixed(samples, seed=seed)[0]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [next(second) for _ in range(60 - cut)] == expected[cut:]
    assert second.placed_tokens == whole.placed_tokens


def test_a_window_gives_its_oldest_sample_if_it_fits_and_else_its_longest_that_does():
    lengths = np.array([9, 3, 6, 5])
    window = next(w for w in (SampleWindow("a", range(4), lengths, 4, seed, "random") for seed in range(9)) if w.oldest)
    oldest = window.oldest
    assert lengths[oldest] < 9, "not the longest"
    assert window.take(9) == (oldest, lengths[oldest])
    left = sorted((int(lengths[n]), n) for n in range(4) if n != oldest)
    following = window.oldest
    room = int(lengths[following]) - 1
    fitting = [pair for pair in left if pair[0] <= room]
    expected = None if not fitting else (fitting[-1][1], fitting[-1][0])
    assert window.take(room) == expected
    assert window.take(1) is None


def test_long_last_goes_from_short_to_long_in_every_round():
    samples = [[(int(length), 1) for length in np.random.default_rng(0).integers(2, 60, 300)]]
    rows, lengths, _, _ = mixed(samples, order="long_last", repeat=False)
    means = [float(lengths[row].mean()) for row in rows]
    assert np.mean(means[:10]) < 15 < 50 < np.mean(means[-11:-1])


def test_orders_differ_by_seed_by_source_and_by_round():
    samples = [[(2, 1)] * 50, [(2, 1)] * 50]
    draws = [
        [number for _ in range(6) for number in next(rows)] for rows in (mixed(samples, seed=s)[0] for s in (0, 1))
    ]
    assert draws[0] != draws[1]
    of_a = [number for number in draws[0] if number < 50]
    of_b = [number - 50 for number in draws[0] if number >= 50]
    assert of_a[:50] != of_b[:50]
    assert of_a[:50] != of_a[50:100]


def test_shares_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="expected one for each"):
        mixed([[(2, 1)]], {"b": 1.0})
    for share in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="shares.a"):
            mixed([[(2, 1)]], {"a": share})


def test_no_source_is_ever_further_from_its_share_than_half_a_longest_sample():
    shares = {"a": 0.25, "b": 0.125, "c": 0.625}
    samples = [[(60, tokens)] * 40 for tokens in (10, 10, 2)]  # one sample a row
    rows, _, trained, _ = mixed(samples, shares)
    tokens, longest_gap = dict.fromkeys(shares, 0), 0.0
    for _ in range(120):
        (number,) = next(rows)
        tokens["abc"[number // 40]] += trained[number]
        total = sum(tokens.values())
        longest_gap = max(longest_gap, *(abs(tokens[name] - share * total) for name, share in shares.items()))
    assert longest_gap <= max(trained) / 2
