"""Best-fit packing: nothing lost, nothing cut, rows nearly as full as the bound."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.data import BestFitPacker
from north_lightning.data.stream import RowStream
from north_lightning.errors import ConfigError, DataError


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 40), max_size=120), row_tokens=st.integers(1, 50), buffer=st.integers(1, 60))
def test_every_document_that_fits_is_in_exactly_one_row_and_no_row_overflows(lengths, row_tokens, buffer):
    packer = BestFitPacker(row_tokens, buffer)
    rows = list(packer.pack(enumerate(lengths)))
    fitting = [index for index, length in enumerate(lengths) if length <= row_tokens]
    assert sorted(index for row in rows for index in row) == fitting
    assert all(row and sum(lengths[index] for index in row) <= row_tokens for row in rows)
    assert packer.num_too_long == len(lengths) - len(fitting)
    tokens = sum(lengths[index] for index in fitting)
    assert packer.num_tokens == tokens
    assert packer.num_rows == len(rows) >= math.ceil(tokens / row_tokens)
    assert packer.utilisation == pytest.approx(tokens / (len(rows) * row_tokens) if rows else 0.0)


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80))
def test_rows_never_number_more_than_twice_the_bound(lengths):
    """With everything in the buffer at most one row is at most half full."""
    rows = list(BestFitPacker(40, len(lengths)).pack(enumerate(lengths)))
    assert len(rows) <= 2 * math.ceil(sum(lengths) / 40)


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=150), buffer=st.integers(1, 20))
def test_no_document_waits_for_more_rows_than_the_buffer_holds(lengths, buffer):
    packer = BestFitPacker(40, buffer)
    arrived, waited = {}, []
    for index, length in enumerate(lengths):
        arrived[index] = packer.num_rows
        row = packer.add(index, length)
        waited += [packer.num_rows - arrived[document] for document in row or []]
    assert max(waited, default=0) <= buffer + 1


@pytest.mark.parametrize(("row_tokens", "utilisation"), [(65536, 0.995), (131072, 0.995)])
def test_rows_of_long_tailed_lengths_are_nearly_full(row_tokens, utilisation):
    lengths = np.random.default_rng(0).lognormal(8.6, 1.2, 5900).astype(int).clip(1, row_tokens).tolist()
    packer = BestFitPacker(row_tokens)
    rows = list(packer.pack(enumerate(lengths)))
    bound = math.ceil(sum(lengths) / row_tokens)
    assert packer.utilisation > utilisation, f"{len(rows)} rows, bound {bound}"


def test_settings_and_documents_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="row_tokens"):
        BestFitPacker(0)
    with pytest.raises(ConfigError, match="buffer_samples"):
        BestFitPacker(1, 0)
    with pytest.raises(ValueError, match="document 3"):
        BestFitPacker(1).add(3, 0)


# ---- the stream of rows -------------------------------------------------------------------------------------------

samples = st.lists(st.tuples(st.integers(2, 30), st.integers(1, 29)), min_size=2, max_size=40)


def stream(samples, shares=None, seed=0):
    lengths = [length for length, _ in samples]
    trained = [min(trained, length - 1) for length, trained in samples]
    sources = {"a": range(0, len(samples), 2), "b": range(1, len(samples), 2)}
    return RowStream(lengths, trained, sources, shares, 64, seed, 16)


@settings(deadline=None, max_examples=50)
@given(samples=samples, seed=st.integers(0, 5))
def test_without_shares_the_first_pass_holds_every_sample_exactly_once(samples, seed):
    rows = stream(samples, seed=seed)
    indices = [index for row in range(rows.rows_per_pass) for index in rows[row]]
    assert sorted(indices) == list(range(len(samples)))


@settings(deadline=None, max_examples=50)
@given(samples=samples, order=st.permutations(range(12)), weight=st.sampled_from([None, 0.2, 3.0]))
def test_a_row_is_the_same_in_whatever_order_rows_are_asked_for(samples, order, weight):
    shares = None if weight is None else {"a": weight, "b": 1.0}
    forward = stream(samples, shares)
    expected = [forward[row] for row in range(12)]
    other = stream(samples, shares)
    assert {row: other[row] for row in order} == dict(enumerate(expected))
    assert forward.fingerprint == other.fingerprint


def test_rows_are_shuffled_so_that_the_leftovers_do_not_come_last():
    """Pairs of 40 and 24 fill a row; unshuffled, the rows of a lone 40 would all end the epoch."""
    made = [(40, 1) if index % 4 else (24, 1) for index in range(200)]
    rows = RowStream([length for length, _ in made], [1] * 200, {"a": range(200)}, None, 64, seed=0)
    fill = [sum(made[index][0] for index in rows[row]) for row in range(rows.rows_per_pass)]
    packed = BestFitPacker(64).pack((index, length) for index, (length, _) in enumerate(made))
    assert [sum(made[index][0] for index in row) for row in packed][-30:] == [40] * 30
    assert set(fill[:30]) == set(fill[-30:]) == {40, 64}


def test_shares_hold_over_many_passes_and_a_pass_is_as_long_as_the_data():
    generator = np.random.default_rng(1)
    made = [(int(length), int(length) - 1) for length in generator.integers(2, 60, 400)]
    rows = stream(made, {"a": 0.9, "b": 0.1})
    tokens = [0, 0]
    for row in range(5 * rows.rows_per_pass):
        for index in rows[row]:
            tokens[index % 2] += made[index][1]
    assert tokens[0] / sum(tokens) == pytest.approx(0.9, abs=0.01)
    assert sum(tokens) == pytest.approx(5 * sum(trained for _, trained in made), rel=0.01)
    assert rows.pass_shares["a"] == pytest.approx(0.9, abs=0.01)


def test_fingerprint_changes_with_whatever_changes_the_stream():
    base = [(10, 3), (20, 5), (30, 9)]
    prints = {
        stream(base).fingerprint,
        stream(base, seed=1).fingerprint,
        stream([*base, (4, 1)]).fingerprint,
        stream([(10, 4), *base[1:]]).fingerprint,
        stream(base, {"a": 1.0, "b": 1.0}).fingerprint,
        stream(base, {"a": 2.0, "b": 1.0}).fingerprint,
    }
    assert len(prints) == 6


def test_a_stream_without_samples_is_refused():
    with pytest.raises(DataError, match="at least one sample"):
        RowStream([], [], {}, None, 64, 0)
