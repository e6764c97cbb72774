"""Shares of trainable tokens, order, and state of the deficit mixer."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.data import DeficitMixer
from north_lightning.errors import ConfigError, DataError

sources = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.integers(1, 500), min_size=1, max_size=20), min_size=1, max_size=4
)


def draws(mixer, count):
    return [mixer.draw() for _ in range(count)]


@settings(deadline=None, max_examples=60)
@given(trained=sources, weights=st.lists(st.floats(0.05, 1), min_size=4, max_size=4), seed=st.integers(0, 9))
def test_no_source_is_ever_further_from_its_share_than_a_few_samples(trained, weights, seed):
    shares = dict(zip(sorted(trained), weights, strict=False))
    mixer = DeficitMixer(trained, shares, seed)
    longest = max(max(tokens) for tokens in trained.values())
    tokens = dict.fromkeys(trained, 0)
    for name, index in draws(mixer, 200):
        tokens[name] += trained[name][index]
        total = sum(tokens.values())
        for source, share in mixer.shares.items():
            assert abs(tokens[source] - share * total) <= len(trained) * longest
    assert tokens == mixer.drawn_tokens


def test_shares_are_met_within_half_a_point_where_sampling_by_share_misses_by_more_than_twenty():
    generator = np.random.default_rng(0)
    trained = {
        "agentic": generator.lognormal(8, 1.2, 2000).astype(int).tolist(),
        "code": generator.lognormal(6, 1.0, 2000).astype(int).tolist(),
        "chat": generator.lognormal(4.5, 0.8, 2000).astype(int).tolist(),
    }
    shares = {"agentic": 0.43, "code": 0.27, "chat": 0.30}
    mixer = DeficitMixer(trained, shares, seed=0)
    while sum(mixer.drawn_tokens.values()) < 3_000_000:
        mixer.draw()
    deficit_error = max(abs(mixer.achieved_shares[name] - share) for name, share in shares.items())
    tokens = dict.fromkeys(shares, 0)
    for name in generator.choice(list(shares), size=3000, p=list(shares.values())):
        tokens[name] += generator.choice(trained[name])
    sampling_error = max(abs(tokens[name] / sum(tokens.values()) - share) for name, share in shares.items())
    assert deficit_error < 0.005
    assert sampling_error > 0.2


@settings(deadline=None, max_examples=30)
@given(trained=sources, cut=st.integers(0, 60), seed=st.integers(0, 9))
def test_a_restored_mixer_continues_exactly(trained, cut, seed):
    shares = dict.fromkeys(trained, 1.0)
    whole = draws(DeficitMixer(trained, shares, seed), 120)
    first = DeficitMixer(trained, shares, seed)
    assert draws(first, cut) == whole[:cut]
    second = DeficitMixer(trained, shares, seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert draws(second, 120 - cut) == whole[cut:]


@settings(deadline=None, max_examples=30)
@given(trained=sources)
def test_every_sample_of_a_source_comes_once_per_round(trained):
    mixer = DeficitMixer(trained, dict.fromkeys(trained, 1.0), seed=0)
    seen = {name: [] for name in trained}
    for name, index in draws(mixer, 300):
        seen[name].append(index)
    for name, indices in seen.items():
        size = len(trained[name])
        for start, end in pairwise(range(0, len(indices) + 1, size)):
            assert sorted(indices[start:end]) == list(range(size))


def test_order_differs_by_seed_and_by_round():
    trained = {"a": [1] * 50}
    first, second = (draws(DeficitMixer(trained, {"a": 1.0}, seed), 100) for seed in (0, 1))
    assert first != second
    assert first[:50] != first[50:]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="expected one for each"):
        DeficitMixer({"a": [1]}, {"b": 1.0}, 0)
    for share in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="shares.a"):
            DeficitMixer({"a": [1]}, {"a": share}, 0)
    with pytest.raises(DataError, match="source a"):
        DeficitMixer({"a": [0, 0]}, {"a": 1.0}, 0)
    with pytest.raises(DataError, match="mixer state"):
        DeficitMixer({"a": [1]}, {"a": 1.0}, 0).load_state_dict({"drawn_tokens": {"b": 0}, "drawn_samples": {"b": 0}})
