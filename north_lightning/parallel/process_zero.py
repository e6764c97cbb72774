"""What process 0 does for all: the result, or the error, reaches every process.

In: a function that only process 0 runs, such as waiting for rollouts. Out: what it returned, or raised, on every
process; none is left behind in a collective that the others never join.

Messages go through a gloo group of their own, on the host: they take no GPU memory and do not cut into training's. It
waits a day, since process 0 may wait for hours; a process that has died is noticed at once by its closed connections.
"""

from __future__ import annotations

import functools
import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from north_lightning.errors import InfrastructureError, NorthError

T = TypeVar("T")

_PATIENCE = timedelta(days=1)


def on_process_zero(function: Callable[[], T], others: Callable[[], object] | None = None) -> T:
    """Call ``function`` on process 0 alone; every process gets what it returned, or raises what it raised.

    All processes have to call, in the same order. One process alone just calls the function.

    Args:
        function: its result has to be picklable, and small.
        others: what the other processes do meanwhile, such as their part of collectives that ``function`` joins.
    """
    if _is_alone():
        return function()
    error: BaseException | None = None
    message: list[tuple[T | None, BaseException | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            message = [(function(), None)]
        except BaseException as caught:  # SystemExit too: the others have to end with this process
            error = caught
            message = [(None, _portable(caught))]
    elif others is not None:
        others()
    dist.broadcast_object_list(message, src=0, group=_group(dist.group.WORLD))
    if error is not None:
        raise error
    result, received = message[0]
    if received is not None:
        raise received
    return result  # type: ignore[return-value]


def scatter_from_process_zero(values: Sequence[T] | None) -> T:
    """``values[rank]`` of process 0's ``values``, one for each process; the others give None."""
    if _is_alone():
        assert values is not None
        return values[0]
    received: list[T | None] = [None]
    dist.scatter_object_list(received, values, src=0, group=_group(dist.group.WORLD))  # type: ignore[arg-type]
    return received[0]  # type: ignore[return-value]


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


@functools.cache
def _group(world: ProcessGroup) -> ProcessGroup:
    """Made when first asked for, by all processes together."""
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, ProcessGroup)
    return group


def _portable(error: BaseException) -> BaseException:
    """The error, or one of ours that says the same and survives pickling, with this process's traceback as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))  # our own
    except Exception:
        kind = InfrastructureError if isinstance(error, InfrastructureError) else NorthError
        copy = kind(f"{type(error).__name__}: {error}")
    copy.add_note(f"On process 0:\n{trace}")
    return copy
