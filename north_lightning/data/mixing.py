"""Draws samples from several sources so that each has its share of *trainable tokens*.

In: how many trainable tokens every sample of every source has, and the shares. Out: an endless sequence of samples. Not
here: reading them (``sources``), laying them into rows (``packing``).

Drawing with probabilities equal to the shares misses them by far where lengths differ between sources. Deficit
scheduling always draws from the source that is furthest below its share, so the error stays below one sample's tokens.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from north_lightning.errors import ConfigError, DataError


class DeficitMixer:
    """The sequence of draws: a function of the arguments and the position alone, repeated exactly after a resume.

    A source is gone through in a new random order each time it is exhausted, every sample once per round.

    Args:
        trained_tokens: for each source, the trainable tokens of each of its samples, after filters and drops.
        shares: for each source, its share of the trainable tokens drawn; need not sum to 1.
        seed: decides the orders.
    """

    def __init__(self, trained_tokens: Mapping[str, Sequence[int]], shares: Mapping[str, float], seed: int) -> None:
        if set(trained_tokens) != set(shares):
            raise ConfigError(f"shares: expected one for each of {sorted(trained_tokens)}, got {sorted(shares)}")
        for name, share in shares.items():
            if not (math.isfinite(share) and share > 0):
                raise ConfigError(f"shares.{name}: expected a number above 0, got {share}")
            if not any(trained_tokens[name]):
                raise DataError(f"source {name}: expected samples with trainable tokens, found none")
        total = sum(shares.values())
        self.shares = {name: share / total for name, share in shares.items()}
        self._trained_tokens = {name: trained_tokens[name] for name in shares}
        self._seed = seed
        self.drawn_tokens = dict.fromkeys(shares, 0)
        self._drawn_samples = dict.fromkeys(shares, 0)
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def draw(self) -> tuple[str, int]:
        """The next sample: its source and its index there."""
        # The source furthest below its share of everything drawn so far; the largest share while nothing was.
        total = sum(self.drawn_tokens.values())
        name = max(self.shares, key=lambda s: (self.shares[s] * total - self.drawn_tokens[s], self.shares[s]))
        round_, position = divmod(self._drawn_samples[name], len(self._trained_tokens[name]))
        index = int(self._order(name, round_)[position])
        self._drawn_samples[name] += 1
        self.drawn_tokens[name] += self._trained_tokens[name][index]
        return name, index

    @property
    def achieved_shares(self) -> dict[str, float]:
        """Each source's part of the trainable tokens drawn so far."""
        total = sum(self.drawn_tokens.values())
        return {name: tokens / total if total else 0.0 for name, tokens in self.drawn_tokens.items()}

    def state_dict(self) -> dict[str, Any]:
        """Two integers a source."""
        return {"drawn_tokens": dict(self.drawn_tokens), "drawn_samples": dict(self._drawn_samples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state["drawn_tokens"]) != set(self.shares):
            raise DataError(f"mixer state: expected sources {sorted(self.shares)}, got {sorted(state['drawn_tokens'])}")
        self.drawn_tokens = {name: int(state["drawn_tokens"][name]) for name in self.shares}
        self._drawn_samples = {name: int(state["drawn_samples"][name]) for name in self.shares}

    def _order(self, name: str, round_: int) -> np.ndarray:
        known = self._orders.get(name)
        if known is None or known[0] != round_:
            generator = np.random.default_rng([self._seed, zlib.crc32(name.encode()), round_])
            known = self._orders[name] = (round_, generator.permutation(len(self._trained_tokens[name])))
        return known[1]
