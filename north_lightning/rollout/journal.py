"""What every attempt of the rollout process is busy with, from when on: the raw material of the sampler's accounts.

In: marks that the attempt loop sets on its way (``busy_with``). Out: a list of ``Move``s, told to the trainer with
every sign of life. Without a journal (evaluation, calibration, recording) the marks cost nothing. It adds nothing up:
that is ``accounts``.

Journal, attempt and stage travel with the context of the asyncio task, so no signature between here and there knows
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from north_lightning.interfaces import Sampler
from north_lightning.types import Sample, SamplingParams

STAGES = ("sandbox", "harness", "verifier")
"""What an attempt waits for while it asks no server: a sandbox or its copy; an action carried out; the verdict."""


class Move(NamedTuple):
    """An attempt goes over to something else."""

    at_s: float  # of the monotonic clock, which all processes of a machine share
    attempt: int  # counted from 0 in one rollout process; a further try is another attempt
    dispatch: int  # whose group it belongs to
    to: str | int | None  # a stage, the index of the server that it asks, or None: it ends
    failed: bool = False  # it ends, and what was sampled for it is lost


@dataclass
class Journal:
    """Collects moves until they are told."""

    clock: Callable[[], float] = time.monotonic
    _moves: list[Move] = field(default_factory=list)
    _num_attempts: int = 0

    def take(self) -> list[Move]:
        """What happened since the last call, in order of time."""
        moves, self._moves = self._moves, []
        return moves

    @contextmanager
    def of_dispatch(self, number: int) -> Iterator[None]:
        """Attempts begun inside are written down, as made for this dispatch."""
        token = _dispatch.set(_Dispatch(self, number))
        try:
            yield
        finally:
            _dispatch.reset(token)

    def begin(self) -> int:
        """The number of a new attempt."""
        self._num_attempts += 1
        return self._num_attempts - 1

    def write(self, move: Move) -> None:
        self._moves.append(move)


@dataclass(frozen=True, slots=True)
class _Dispatch:
    journal: Journal
    number: int


@dataclass(slots=True)
class _Attempt:
    dispatch: _Dispatch
    number: int
    stage: str | int | None = STAGES[0]

    def move(self, to: str | int | None, failed: bool = False) -> None:
        if self.stage is None:
            return  # ended: this is work that was given up and ignores its cancellation
        journal = self.dispatch.journal
        journal.write(Move(journal.clock(), self.number, self.dispatch.number, to, failed))
        self.stage = to


_dispatch: ContextVar[_Dispatch | None] = ContextVar("dispatch", default=None)
_attempt: ContextVar[_Attempt | None] = ContextVar("attempt", default=None)


@contextmanager
def one_attempt() -> Iterator[None]:
    """All of one attempt; it begins with the first stage. An exception means that its tokens are lost."""
    dispatch = _dispatch.get()
    if dispatch is None:
        yield
        return
    attempt = _Attempt(dispatch, dispatch.journal.begin())
    token = _attempt.set(attempt)
    attempt.move(attempt.stage)
    try:
        yield
    except BaseException:
        attempt.move(None, failed=True)
        raise
    else:
        attempt.move(None)
    finally:
        _attempt.reset(token)


@contextmanager
def busy_with(what: str | int) -> Iterator[None]:
    """The present attempt is busy with this stage, or asks this server; afterwards with what it was before."""
    attempt = _attempt.get()
    if attempt is None:
        yield
        return
    before = attempt.stage
    attempt.move(what)
    try:
        yield
    finally:
        attempt.move(before)


class JournalledSampler(Sampler):
    """A sampler whose requests are written down as asked of one server.

    Args:
        sampler: Of that server.
        index: Of the server, in the order of its URLs.
    """

    def __init__(self, sampler: Sampler, index: int) -> None:
        self.sampler = sampler
        self.index = index

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        with busy_with(self.index):
            return await self.sampler.generate(prompt_token_ids, params)

    async def close(self) -> None:
        await self.sampler.close()
