"""The endless sequence of packed rows of a training run, by number.

In: how long every sample is, how many of its tokens are trained, which source it belongs to, shares. Out: for any row
number the samples in it; the same on every rank and in every run with the same arguments. It holds indices, never
tokens.

Rows come pass by pass. A pass draws as many trainable tokens as all samples together have: without shares that is every
sample exactly once; with shares, small sources repeat and large ones are not exhausted. The samples of a pass are
packed, and its rows shuffled so that the fullest and the emptiest do not end up together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from north_lightning.data.mixing import DeficitMixer
from north_lightning.data.packing import BestFitPacker
from north_lightning.errors import DataError


class RowStream:
    """``stream[row]`` is the list of sample numbers in that row, for any row from 0 on; going forward is cheap.

    Args:
        lengths: tokens of each sample [S]; none longer than ``row_tokens``.
        trained_tokens: trainable tokens of each sample [S].
        sources: for each source the numbers of its samples.
        shares: of trainable tokens, for each source; None takes everything exactly once per pass.
        row_tokens: the most tokens in a row.
        seed: decides every order.
        buffer_samples: documents the packer chooses from.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        trained_tokens: Sequence[int],
        sources: Mapping[str, Sequence[int]],
        shares: Mapping[str, float] | None,
        row_tokens: int,
        seed: int,
        buffer_samples: int = 4096,
    ) -> None:
        if not lengths:
            raise DataError("training data: expected at least one sample after filters, found none")
        assert max(lengths) <= row_tokens, "samples longer than a row are dropped before"
        self._lengths, self._trained_tokens = lengths, trained_tokens
        self._row_tokens, self._seed, self._buffer_samples = row_tokens, seed, buffer_samples
        # Without shares all sources form one pool: proportional, and nothing is drawn twice.
        self._pools = {"": list(range(len(lengths)))} if shares is None else {s: list(sources[s]) for s in shares}
        self._shares = {"": 1.0} if shares is None else dict(shares)
        self.sources = sources
        self._start_over()
        self.rows_per_pass = len(self._rows)
        self.utilisation = self._packer.utilisation
        self.pass_shares = self._count_shares()

    @property
    def fingerprint(self) -> str:
        """Names everything that decides the stream: equal fingerprints, equal rows."""
        names = {name: list(map(int, numbers)) for name, numbers in self._pools.items()}
        facts = [self._row_tokens, self._seed, self._buffer_samples, self._shares, names]
        content = json.dumps([*facts, list(self._lengths), list(self._trained_tokens)])
        return hashlib.sha256(content.encode()).hexdigest()

    def __getitem__(self, row: int) -> list[int]:
        if row < self._first_row:
            self._start_over()
        while row >= self._first_row + len(self._rows):
            self._first_row += len(self._rows)
            self._plan_pass(self._pass + 1)
        return self._rows[row - self._first_row]

    def count_trained(self, row: int) -> int:
        """Trainable tokens of a row."""
        return sum(self._trained_tokens[sample] for sample in self[row])

    def _start_over(self) -> None:
        trained = {name: [self._trained_tokens[i] for i in numbers] for name, numbers in self._pools.items()}
        self._mixer = DeficitMixer(trained, self._shares, self._seed)
        self._first_row = 0
        self._plan_pass(0)

    def _plan_pass(self, number: int) -> None:
        self._pass = number
        self._packer = BestFitPacker(self._row_tokens, self._buffer_samples)
        rows = list(self._packer.pack((sample, self._lengths[sample]) for sample in self._draw_pass()))
        order = np.random.default_rng([self._seed, number]).permutation(len(rows))
        self._rows = [rows[position] for position in order]

    def _draw_pass(self) -> list[int]:
        """Samples until as many trainable tokens are drawn, over all passes, as that many times the data has."""
        if len(self._pools) == 1:
            ((name, numbers),) = self._pools.items()
            return [numbers[self._mixer.draw()[1]] for _ in numbers]
        goal = (self._pass + 1) * sum(self._trained_tokens[i] for numbers in self._pools.values() for i in numbers)
        drawn = []
        while sum(self._mixer.drawn_tokens.values()) < goal:
            name, index = self._mixer.draw()
            drawn.append(self._pools[name][index])
        return drawn

    def _count_shares(self) -> dict[str, float]:
        owner = {number: name for name, numbers in self.sources.items() for number in numbers}
        tokens = dict.fromkeys(self.sources, 0)
        for row in self._rows:
            for sample in row:
                tokens[owner[sample]] += self._trained_tokens[sample]
        total = sum(tokens.values())
        return {name: count / total if total else 0.0 for name, count in tokens.items()}
