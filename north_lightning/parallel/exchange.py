"""Moving rows of a tensor between processes, differentiably: one collective, and what is made of it.

In: a tensor [rows, ...], how many rows go where. Out: the rows that arrive, in the order of the senders. The gradient
goes back the way the rows came. Every process of the group has to call, forward and backward, even with nothing to
send.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def exchange(rows: Tensor, send_counts: list[int], receive_counts: list[int], group: ProcessGroup) -> Tensor:
    """Send the first ``send_counts[0]`` rows to process 0 of the group, the next ``send_counts[1]`` to process 1, ...

    Args:
        rows: [sum(send_counts), ...]
        send_counts: rows for each process of the group.
        receive_counts: rows from each process of the group, as they sent them.
        group: who takes part.

    Returns:
        [sum(receive_counts), ...]
    """
    return _Exchange.apply(rows, send_counts, receive_counts, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_counts: list[int], receive_counts: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.counts, ctx.group = (send_counts, receive_counts), group
        return _all_to_all(rows, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        send_counts, receive_counts = ctx.counts
        return _all_to_all(grad_outputs[0], receive_counts, send_counts, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send_counts: list[int], receive_counts: list[int], group: ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=group)
    return received


def gather_rows(piece: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """All pieces end to end, [sum(counts), ...]; the gradient of a piece is the sum of all processes' gradients of it.

    Args:
        piece: [counts[rank], ...] this process's rows.
        counts: rows of each process of the group.
        group: who takes part.
    """
    own = [len(piece)] * len(counts)
    return exchange(piece.repeat(len(counts), *[1] * (piece.dim() - 1)), own, counts, group)


def reduce_rows(rows: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """This process's piece of the sum of all processes' ``rows``: the reverse of ``gather_rows``.

    Args:
        rows: [sum(counts), ...]
        counts: rows of each process's piece.
        group: who takes part.

    Returns:
        [counts[rank], ...]
    """
    own = counts[dist.get_rank(group)]
    received = exchange(rows, counts, [own] * len(counts), group)
    return received.unflatten(0, (len(counts), own)).sum(0)


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, by rank; for the few numbers of a step. One process alone gets its own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
