"""Rows that are full and hold every source's share of *trainable tokens*: mixing and packing as one choice.

In: how long every sample is, how many of its tokens are trained, which source it belongs to, the shares. Out: rows, as
lists of sample numbers. Not here: reading samples (``sources``), steps, passes and resuming (``stream``).

Drawing with probabilities equal to the shares misses them by far where lengths differ between sources; shares that hold
for what is drawn no longer hold for what a packer has let through; and a packer that is free to choose makes rows of
one source each, so that one optimizer step is unlike the next. Here the shares decide, with what has really been laid
into rows, which source is next, and the room that is left decides which of its samples: its oldest if that fits, else
its longest that fits. Rows are as full as best fit over all sources makes them, because only the end of a row is chosen
by length, from hundreds of samples of every source.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from north_lightning.errors import ConfigError

Order = Literal["random", "long_last"]

_NUMBER_BITS = 32
NUMBER_MASK = (1 << _NUMBER_BITS) - 1
"""A sample is handled as one integer, its length above its number: sorted by length, and cheap to compare."""


class SampleWindow:
    """The next samples of one source, to take the oldest from or the longest that fits.

    The source is gone through in rounds, every sample once a round, each round in an order of its own. A round is used
    up before the next one begins.

    Args:
        name: of the source; with the seed it decides the orders.
        numbers: its samples [N].
        lengths: tokens of every sample of the stream, by number.
        size: how many samples are held to choose from, at least (a quarter more are, after refilling).
        seed: decides the orders.
        order: ``long_last`` goes from short to long in every round.
    """

    def __init__(
        self, name: str, numbers: Sequence[int] | np.ndarray, lengths: np.ndarray, size: int, seed: int, order: Order
    ) -> None:
        self._numbers, self._lengths = np.asarray(numbers, dtype=np.int64), lengths
        self._size, self._seed, self._order = size, [seed, zlib.crc32(name.encode())], order
        self._round, self._position = 0, 0
        self._round_keys = self._shuffle()
        self._by_length: list[int] = []  # what is held, sorted
        self._by_age: deque[int] = deque()  # the same, and those of ``_gone``
        self._gone: set[int] = set()
        self._refill()

    @property
    def oldest(self) -> int | None:
        """The number of the sample that has been held longest; None at the end of a round."""
        return self._by_age[0] & NUMBER_MASK if self._by_age else None

    def take(self, room: int) -> tuple[int, int] | None:
        """The oldest sample if it has at most ``room`` tokens, else the longest that has; its number and length.

        Not at the end of a round.
        """
        by_length, by_age, gone = self._by_length, self._by_age, self._gone
        key = by_age[0]
        if key >> _NUMBER_BITS <= room:
            by_age.popleft()
            del by_length[bisect_left(by_length, key)]
        elif by_length[0] >> _NUMBER_BITS <= room:
            key = by_length.pop(bisect_right(by_length, (room << _NUMBER_BITS) | NUMBER_MASK) - 1)
            gone.add(key)
        else:
            return None
        if len(by_length) <= self._size:
            self._refill()
        while by_age and by_age[0] in gone:
            gone.discard(by_age.popleft())
        return key & NUMBER_MASK, key >> _NUMBER_BITS

    def begin_round(self) -> None:
        """Go through the source again; the last round has to be used up."""
        assert not self._by_length, "the round has samples left"
        self._round, self._position = self._round + 1, 0
        self._round_keys = self._shuffle()
        self._refill()

    def state_dict(self) -> dict[str, Any]:
        """The position and the numbers that are held, oldest first."""
        held = [key & NUMBER_MASK for key in self._by_age if key not in self._gone]
        return {"round": self._round, "position": self._position, "held": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if int(state["round"]) != self._round:
            self._round = int(state["round"])
            self._round_keys = self._shuffle()
        self._position = int(state["position"])
        self._by_age = deque(self._keys_of(np.array(state["held"], dtype=np.int64)).tolist())
        self._by_length, self._gone = sorted(self._by_age), set()

    def _shuffle(self) -> np.ndarray:
        shuffled = np.random.default_rng([*self._seed, self._round]).permutation(self._numbers)
        keys = self._keys_of(shuffled)
        return keys if self._order == "random" else keys[np.argsort(keys >> _NUMBER_BITS, kind="stable")]

    def _keys_of(self, numbers: np.ndarray) -> np.ndarray:
        return (self._lengths[numbers].astype(np.int64) << _NUMBER_BITS) | numbers

    def _refill(self) -> None:
        """In portions: sorting one in costs less than inserting its samples one by one."""
        if self._position == len(self._round_keys):
            return
        wanted = self._size + max(self._size // 4, 1) - len(self._by_length)
        new = self._round_keys[self._position : self._position + wanted].tolist()
        self._position += len(new)
        self._by_age.extend(new)
        self._by_length += new
        self._by_length.sort()


class MixedRows:
    """An endless sequence of rows, or one that ends with the last sample.

    As in weighted fair queueing, a source has run up ``placed tokens / share``, and the smallest goes first. That is
    measured at the middle of its next sample, so that long samples come early as often as late: no source is further
    from its share than about half of its longest sample.

    Args:
        windows: the sources, by name.
        trained_tokens: trainable tokens of every sample, by number; at least 1.
        shares: of the trainable tokens, for each source; need not sum to 1.
        row_tokens: the most tokens of a row; no sample is longer.
        repeat: whether a source that is used up begins again, or the others go on without it.
    """

    def __init__(
        self,
        windows: Mapping[str, SampleWindow],
        trained_tokens: Sequence[int],
        shares: Mapping[str, float],
        row_tokens: int,
        repeat: bool,
    ) -> None:
        if set(windows) != set(shares):
            raise ConfigError(f"shares: expected one for each of {sorted(windows)}, got {sorted(shares)}")
        for name, share in shares.items():
            if not (math.isfinite(share) and share > 0):
                raise ConfigError(f"shares.{name}: expected a number above 0, got {share}")
        total = sum(shares.values())
        self.shares = {name: share / total for name, share in shares.items()}
        self.placed_tokens = dict.fromkeys(shares, 0)
        self.num_rows = self.num_tokens = 0  # made by this object
        self._windows, self._trained_tokens = windows, trained_tokens
        self._row_tokens, self._repeat = row_tokens, repeat
        self._ranking: list[tuple[float, str]] = []  # furthest behind first; without sources that are used up
        self._rank_all()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        if not self._ranking:
            raise StopIteration
        row = []
        room = self._row_tokens
        while (taken := self._take(room)) is not None:
            row.append(taken[0])
            room -= taken[1]
        self.num_rows += 1
        self.num_tokens += self._row_tokens - room
        return row

    def begin_round(self) -> None:
        """Once all samples are used up: begin again with every source."""
        for window in self._windows.values():
            window.begin_round()
        self._rank_all()

    @property
    def achieved_shares(self) -> dict[str, float]:
        """Each source's part of the trainable tokens placed so far."""
        total = sum(self.placed_tokens.values())
        return {name: tokens / total if total else 0.0 for name, tokens in self.placed_tokens.items()}

    def state_dict(self) -> dict[str, Any]:
        """A few integers for every source, and the numbers of the samples it has in its window."""
        windows = {name: window.state_dict() for name, window in self._windows.items()}
        return {"placed_tokens": dict(self.placed_tokens), "windows": windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.placed_tokens = {name: int(state["placed_tokens"][name]) for name in self.shares}
        for name, window in self._windows.items():
            window.load_state_dict(state["windows"][name])
        self._rank_all()

    def _take(self, room: int) -> tuple[int, int] | None:
        """A sample of at most ``room`` tokens, of the source furthest behind that has one."""
        for place, (_, name) in enumerate(self._ranking):
            window = self._windows[name]
            if (taken := window.take(room)) is not None:
                del self._ranking[place]
                self.placed_tokens[name] += self._trained_tokens[taken[0]]
                self._rank(name, window)
                return taken
        return None

    def _rank(self, name: str, window: SampleWindow) -> None:
        following = window.oldest
        if following is None and self._repeat:
            window.begin_round()
            following = window.oldest
        if following is not None:
            middle = self.placed_tokens[name] + self._trained_tokens[following] / 2
            insort(self._ranking, (middle / self.shares[name], name))

    def _rank_all(self) -> None:
        self._ranking = []
        for name, window in self._windows.items():
            self._rank(name, window)
