"""Best-fit packing: nothing lost, nothing cut, rows nearly as full as the bound."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.data import BestFitPacker
from north_lightning.errors import ConfigError


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


def test_a_document_that_fills_the_rest_of_a_row_to_the_last_token_is_in_it():
    assert list(BestFitPacker(10, 5).pack([(0, 6), (1, 4)])) == [[0, 1]]
    assert list(BestFitPacker(10, 5).pack([(0, 6), (1, 5), (2, 4), (3, 4)])) == [[0, 2], [1, 3]]
