"""Steps of rows: passes, shares over passes, balanced attention, positions, fingerprints."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.data import StepStream
from north_lightning.errors import DataError

samples = st.lists(st.tuples(st.integers(2, 30), st.integers(1, 29)), min_size=2, max_size=40)


def stream(samples, shares=None, seed=0, rows_per_step=1, **settings):
    lengths = [length for length, _ in samples]
    trained = [min(trained, length - 1) for length, trained in samples]
    sources = {"a": range(0, len(samples), 2), "b": range(1, len(samples), 2)}
    return StepStream(lengths, trained, sources, shares, 64, seed, rows_per_step, 16, **settings)


@settings(deadline=None, max_examples=30)
@given(samples=samples, seed=st.integers(0, 5))
def test_without_shares_every_pass_holds_every_sample_exactly_once(samples, seed):
    steps = stream(samples, seed=seed)
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(samples):
            seen += steps.next_step()[0]
        assert sorted(seen) == list(range(len(samples)))


@settings(deadline=None, max_examples=30)
@given(samples=samples, weight=st.sampled_from([None, 0.2, 3.0]), cut=st.integers(0, 12), rows=st.integers(1, 3))
def test_a_restored_stream_continues_exactly(samples, weight, cut, rows):
    shares = None if weight is None else {"a": weight, "b": 1.0}
    whole, first, second = (stream(samples, shares, rows_per_step=rows) for _ in range(3))
    expected = [whole.next_step() for _ in range(12)]
    assert [first.next_step() for _ in range(cut)] == expected[:cut]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.next_step() for _ in range(12 - cut)] == expected[cut:]


def test_the_planned_pass_is_what_the_stream_then_gives():
    made = [(int(length), int(length) - 1) for length in np.random.default_rng(1).integers(2, 60, 400)]
    steps = stream(made, {"a": 0.9, "b": 0.1})
    planned = steps.plan_pass()
    tokens = Counter()
    room = 0
    for _ in range(planned.num_rows):
        (row,) = steps.next_step()
        for number in row:
            tokens["ab"[number % 2]] += made[number][1]
        room += 64 - sum(made[number][0] for number in row)
    assert tokens == planned.trained_tokens
    assert planned.shares["a"] == pytest.approx(0.9, abs=0.01)
    assert planned.utilisation == pytest.approx(1 - room / (64 * planned.num_rows))
    total = sum(trained for _, trained in made)
    assert total <= sum(tokens.values()) < total + 64


def test_a_pass_ends_where_the_scarcest_source_has_used_up_its_epochs():
    made = [(10, 5)] * 400
    whole = stream(made, {"a": 0.8, "b": 0.2})
    capped = stream(made, {"a": 0.8, "b": 0.2}, max_epochs={"a": 0.5, "b": 3})
    assert whole.pass_tokens == 2000
    assert capped.pass_tokens == 0.5 * 200 * 5 / 0.8
    assert capped.plan_pass().trained_tokens["a"] == pytest.approx(0.5 * 200 * 5, abs=30)


def test_rows_of_a_step_are_in_the_order_of_their_attention_so_that_neighbours_cost_the_same():
    generator = np.random.default_rng(0)
    made = [(int(length), 1) for length in generator.lognormal(2.0, 1.0, 2000).clip(2, 64)]
    step = stream(made, rows_per_step=8).next_step()
    costs = [sum(made[number][0] ** 2 + 3 * made[number][0] ** 2 for number in row) for row in step]
    assert costs == sorted(costs, reverse=True)
    side_by_side = [max(pair) / min(pair) for pair in zip(costs[::2], costs[1::2], strict=True)]
    assert max(side_by_side) < max(costs) / min(costs)


def test_fingerprint_changes_with_whatever_changes_the_stream():
    base = [(10, 3), (20, 5), (30, 9)]
    shares = {"a": 1.0, "b": 1.0}
    prints = {
        stream(base).fingerprint,
        stream(base, seed=1).fingerprint,
        stream([*base, (4, 1)]).fingerprint,
        stream([(10, 4), *base[1:]]).fingerprint,
        stream([(11, 3), *base[1:]]).fingerprint,
        stream(base, rows_per_step=2).fingerprint,
        stream(base, order="long_last").fingerprint,
        stream(base, shares).fingerprint,
        stream(base, {"a": 2.0, "b": 1.0}).fingerprint,
        stream(base, shares, max_epochs={"a": 0.5}).fingerprint,
    }
    assert len(prints) == 10
    assert stream(base).fingerprint == stream(base).fingerprint


def test_a_stream_without_samples_is_refused():
    with pytest.raises(DataError, match="at least one sample"):
        StepStream([], [], {}, None, 64, 0)


def test_a_pass_that_may_take_next_to_nothing_is_one_row():
    steps = stream([(10, 4), (12, 5)] * 20, {"a": 1.0, "b": 1.0}, max_epochs={"a": 1e-6})
    assert steps.plan_pass().num_rows == 1
