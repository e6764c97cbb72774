"""Lays documents into rows of at most ``row_tokens`` without cutting any.

In: indices and lengths, one document at a time (no tokens). Out: rows, as lists of indices. Concatenating and cutting
would fill every row, at the price of documents that lose their beginning: nothing here truncates or splits.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator

from north_lightning.errors import ConfigError


class BestFitPacker:
    """Buffered best fit: a row starts with the document that has waited longest and is filled with the largest that
    fit.

    The oldest goes first so that none waits for ever; with thousands of documents to choose from, rows are still nearly
    as full as the best known order makes them.

    Args:
        row_tokens: the most tokens of a row.
        buffer_samples: how many documents are held to choose from.
    """

    def __init__(self, row_tokens: int, buffer_samples: int = 4096) -> None:
        for name, value in (("row_tokens", row_tokens), ("buffer_samples", buffer_samples)):
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        self.row_tokens = row_tokens
        self.buffer_samples = buffer_samples
        self.num_rows = 0
        self.num_tokens = 0
        self.num_too_long = 0
        self._by_length: list[tuple[int, int, int]] = []  # length, arrival, index; sorted
        self._by_arrival: deque[tuple[int, int, int]] = deque()
        self._gone: set[int] = set()  # arrivals that left ``_by_length`` but not yet ``_by_arrival``
        self._arrivals = 0

    def add(self, index: int, length: int) -> list[int] | None:
        """Hand in a document; a finished row once more than ``buffer_samples`` are held.

        A document longer than a row is left out and counted in ``num_too_long``.
        """
        if length < 1:
            raise ValueError(f"document {index}: expected at least one token, got {length}")
        if length > self.row_tokens:
            self.num_too_long += 1
            return None
        document = (length, self._arrivals, index)
        self._arrivals += 1
        insort(self._by_length, document)
        self._by_arrival.append(document)
        return self._make_row() if len(self._by_length) > self.buffer_samples else None

    def flush(self) -> Iterator[list[int]]:
        """Rows of everything still held."""
        while self._by_length:
            yield self._make_row()

    def pack(self, documents: Iterable[tuple[int, int]]) -> Iterator[list[int]]:
        """Rows of all ``(index, length)``; each document that fits in a row is in exactly one."""
        for index, length in documents:
            if (row := self.add(index, length)) is not None:
                yield row
        yield from self.flush()

    @property
    def utilisation(self) -> float:
        """Tokens in finished rows over the tokens they have room for."""
        return self.num_tokens / (self.num_rows * self.row_tokens) if self.num_rows else 0.0

    def _make_row(self) -> list[int]:
        room = self.row_tokens
        document: tuple[int, int, int] | None = self._pop_oldest()
        row = []
        while document is not None:
            row.append(document[2])
            room -= document[0]
            document = self._pop_largest_within(room)
        self.num_rows += 1
        self.num_tokens += self.row_tokens - room
        return row

    def _pop_oldest(self) -> tuple[int, int, int]:
        while (document := self._by_arrival.popleft())[1] in self._gone:
            self._gone.discard(document[1])
        del self._by_length[bisect_left(self._by_length, document)]
        return document

    def _pop_largest_within(self, room: int) -> tuple[int, int, int] | None:
        end = bisect_right(self._by_length, (room, self._arrivals, 0))
        if end == 0:
            return None
        length = self._by_length[end - 1][0]
        document = self._by_length.pop(bisect_left(self._by_length, (length, -1, 0)))  # the oldest of that length
        self._gone.add(document[1])
        return document
