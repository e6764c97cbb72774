"""Sharing one packed row among processes: who holds which tokens, and which keys travel where.

In: a ``PackedRow`` of the whole row. Out: pieces of it. A row is cut into contiguous pieces, one for every context
process, and each of those into one for every tensor process; sizes differ by at most one token, so nothing is padded.

A token attends to tokens before it in its own document, within the window of its layer. So the keys that a context
process lacks are one run of tokens right before its piece: back to the window's reach, or to the start of the document
that its piece begins in, whichever is nearer. ``KeysBefore`` fetches that run from the processes that hold it. For a
sliding layer that is a halo of at most ``window`` tokens, for a global layer at most everything before; where a
document starts with the piece it is nothing.

Work is not balanced: the last process of a long document sees the most keys in global layers.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from north_lightning.errors import DataError
from north_lightning.model.attention import PackedRow
from north_lightning.parallel.exchange import exchange
from north_lightning.parallel.mesh import Layout


class RowPieces:
    """How this layout shares out a row of ``num_tokens``."""

    def __init__(self, num_tokens: int, layout: Layout) -> None:
        sizes = layout.sizes
        if num_tokens < sizes.row:
            raise DataError(f"expected a row of at least context x tensor = {sizes.row} tokens, got {num_tokens}")
        bounds = [num_tokens * i // sizes.row for i in range(sizes.row + 1)]
        first = layout.context_rank * sizes.tensor
        own = first + layout.tensor_rank
        self.held = slice(bounds[own], bounds[own + 1])
        """The tokens whose hidden states this process computes."""
        self.context_bounds = bounds[:: sizes.tensor]
        """[context + 1] where the context processes' pieces begin and end."""
        self.tensor_counts = [end - start for start, end in pairwise(bounds[first : first + sizes.tensor + 1])]
        """[tensor] tokens held by each process that shares this context process's piece."""


class KeysBefore:
    """The keys and values before a context process's piece, for layers of one window, in one row.

    Args:
        row: the whole row.
        bounds: [context + 1] of the pieces.
        num_window_keys: of the layers; None: unlimited.
        layout: whose context group.
    """

    def __init__(self, row: PackedRow, bounds: list[int], num_window_keys: int | None, layout: Layout) -> None:
        rank = layout.context_rank
        self._group = layout.context_group
        starts = list(accumulate(row.lengths, initial=0))
        pieces = list(pairwise(bounds))
        needs = [(_first_key(start, starts, num_window_keys), start) for start, _ in pieces]  # of each process
        begin, end = pieces[rank]
        sent = [_overlap(pieces[rank], need) for need in needs]  # tokens for each process
        received = [_overlap(piece, needs[rank]) for piece in pieces]
        self._send_counts = [stop - start for start, stop in sent]
        self._receive_counts = [stop - start for start, stop in received]
        index = torch.cat([torch.arange(start - begin, stop - begin) for start, stop in sent])
        self._index = index.to(row.cu_seqlens.device)
        self.row = _cut(row, starts, needs[rank][0], end, num_keys_only=begin - needs[rank][0])
        """What ``fetch`` returns, as the attention needs to know it."""

    def fetch(self, qkv: Tensor, num_heads: int) -> Tensor:
        """Queries, keys and values [t, H + 2J, C] of the piece, behind the keys and values that it lacks.

        Returns:
            [row.num_keys_only + t, H + 2J, C]; the queries of the fetched tokens are 0.
        """
        received = exchange(qkv[:, num_heads:][self._index], self._send_counts, self._receive_counts, self._group)
        no_queries = received.new_zeros(len(received), num_heads, qkv.shape[2])
        return torch.cat([torch.cat([no_queries, received], 1), qkv])


def _first_key(token: int, starts: list[int], num_window_keys: int | None) -> int:
    """The first token that ``token`` sees."""
    document = starts[bisect_right(starts, token) - 1]
    return document if num_window_keys is None else max(document, token - num_window_keys + 1)


def _overlap(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    start = max(first[0], second[0])
    return start, max(start, min(first[1], second[1]))


def _cut(row: PackedRow, starts: list[int], begin: int, end: int, num_keys_only: int) -> PackedRow:
    """Tokens ``begin:end``, with the positions that they have in the whole row."""
    bounds = [0, *(start - begin for start in starts if begin < start < end), end - begin]
    return PackedRow(
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=row.cu_seqlens.device),
        lengths=[stop - start for start, stop in pairwise(bounds)],
        positions=row.positions[begin:end],
        rotations=row.rotations[begin:end],
        num_keys_only=num_keys_only,
    )
