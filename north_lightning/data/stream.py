"""The endless sequence of optimizer steps of a training run, as rows of sample numbers.

In: how long every sample is, how many of its tokens are trained, which source it belongs to, shares. Out: step after
step of packed rows; the same on every rank and in every run with the same arguments, and after a resume. It holds
numbers, never tokens.

A pass is what Lightning calls an epoch. Without shares it is every sample exactly once, all sources side by side. With
shares it is as many trainable tokens as all samples have, or as many as ``max_epochs`` of the scarcest source allow;
small sources repeat in it and large ones are not used up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from north_lightning.data.mixing import MixedRows, Order, SampleWindow
from north_lightning.errors import DataError

WINDOW = 4096
"""Keys that a sliding layer of North sees, its own included."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The first pass, planned."""

    num_rows: int
    utilisation: float  # tokens over the room in its rows
    trained_tokens: dict[str, int]  # placed, by source
    shares: dict[str, float]  # of the trainable tokens, by source
    step_distances: dict[str, float]  # how far a single step's own share is from that, on average, by source
    times_placed: np.ndarray  # [S] of every sample


class StepStream:
    """``next_step()`` is the rows of one optimizer step, as lists of sample numbers.

    Within a step the rows that cost most attention come first, so that rows which ranks compute side by side cost about
    the same, however many ranks there are.

    Args:
        lengths: tokens of each sample [S]; none longer than ``row_tokens``.
        trained_tokens: trainable tokens of each sample [S]; at least 1.
        sources: for each source the numbers of its samples.
        shares: of trainable tokens, for each source; None takes everything exactly once per pass.
        row_tokens: the most tokens in a row.
        rows_per_step: rows of an optimizer step, over all micro-batches and ranks.
        seed: decides every order.
        buffer_samples: samples of each source that are held to choose from.
        order: ``long_last`` goes through every source from short to long samples.
        max_epochs: for some sources, how often a pass may go through them.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        trained_tokens: Sequence[int] | np.ndarray,
        sources: Mapping[str, Sequence[int]] | Mapping[str, np.ndarray],
        shares: Mapping[str, float] | None,
        row_tokens: int,
        seed: int,
        rows_per_step: int = 1,
        buffer_samples: int = 256,
        order: Order = "random",
        max_epochs: Mapping[str, float] | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._trained = np.asarray(trained_tokens, dtype=np.int64)
        if not len(self._lengths):
            raise DataError("training data: expected at least one sample after filters, found none")
        assert self._lengths.max() <= row_tokens, "samples longer than a row are dropped before"
        assert self._trained.min() >= 1, "samples with nothing to train are dropped before"
        self.sources = {name: np.asarray(numbers, dtype=np.int64) for name, numbers in sources.items()}
        self.row_tokens, self.rows_per_step = row_tokens, rows_per_step
        self._seed, self._buffer_samples, self._order = seed, buffer_samples, order
        supply = {name: int(self._trained[numbers].sum()) for name, numbers in self.sources.items()}
        self._repeat = shares is not None
        self._shares: Mapping[str, float] = supply if shares is None else shares
        self._trained_list = self._trained.tolist()  # reading one number of an array is slow
        self._costs = attention_cost(self._lengths).tolist()
        self._rows = self._make_rows()
        self.pass_tokens = _tokens_of_pass(supply, self._rows.shares, max_epochs or {} if self._repeat else {})

    @cached_property
    def fingerprint(self) -> str:
        """Names everything that decides the stream: equal fingerprints, equal steps."""
        facts = [self.row_tokens, self.rows_per_step, self._seed, self._buffer_samples, self._order, self._repeat]
        digest = hashlib.sha256(json.dumps([facts, dict(self._shares), self.pass_tokens]).encode())
        for values in (self._lengths, self._trained, *self.sources.values()):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def next_step(self) -> list[list[int]]:
        """The rows of the next optimizer step, the costliest first."""
        rows = [self._next_row() for _ in range(self.rows_per_step)]
        if self.rows_per_step > 1:
            rows.sort(key=lambda row: sum(map(self._costs.__getitem__, row)), reverse=True)
        return rows

    def count_trained(self, rows: Sequence[Sequence[int]]) -> int:
        """Trainable tokens of rows."""
        return sum(self._trained_list[number] for row in rows for number in row)

    def state_dict(self) -> dict[str, Any]:
        """Where the next step continues."""
        return self._rows.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rows.load_state_dict(state)

    def plan_pass(self) -> Pass:
        """The first pass, row by row; the stream stays where it is."""
        rows = self._make_rows()
        placed: list[list[int]] = [[0] * len(rows.shares)]  # at the end of each step
        numbers: list[int] = []
        while sum(rows.placed_tokens.values()) < self.pass_tokens:
            numbers += next(rows)
            if rows.num_rows % self.rows_per_step == 0:
                placed.append(list(rows.placed_tokens.values()))
        return Pass(
            num_rows=rows.num_rows,
            utilisation=rows.num_tokens / (rows.num_rows * self.row_tokens),
            trained_tokens=dict(rows.placed_tokens),
            shares=rows.achieved_shares,
            step_distances=dict(zip(rows.shares, _mean_distances(placed, list(rows.shares.values())), strict=True)),
            times_placed=np.bincount(numbers, minlength=len(self._lengths)),
        )

    def _next_row(self) -> list[int]:
        row = next(self._rows, None)
        if row is None:
            self._rows.begin_round()
            row = next(self._rows)
        return row

    def _make_rows(self) -> MixedRows:
        windows = {
            name: SampleWindow(name, self.sources[name], self._lengths, self._buffer_samples, self._seed, self._order)
            for name in self._shares
        }
        return MixedRows(windows, self._trained_list, self._shares, self.row_tokens, self._repeat)


def attention_cost(lengths: np.ndarray) -> np.ndarray:
    """What attention over a document of each length costs, in pairs of tokens for four layers of North: one sees all
    tokens before, three see ``WINDOW``."""
    return lengths * (lengths + 3 * np.minimum(lengths, WINDOW))


def _tokens_of_pass(supply: Mapping[str, int], shares: Mapping[str, float], max_epochs: Mapping[str, float]) -> int:
    allowed = [max_epochs[name] * supply[name] / shares[name] for name in max_epochs]
    return max(int(min([sum(supply.values()), *allowed])), 1)


def _mean_distances(placed: list[list[int]], shares: list[float]) -> list[float]:
    steps = np.diff(np.array(placed), axis=0)  # [steps, sources]
    if not len(steps):
        return [0.0] * len(shares)
    distances = np.abs(steps / steps.sum(1, keepdims=True) - np.array(shares))
    return [float(distance) for distance in distances.mean(0)]
