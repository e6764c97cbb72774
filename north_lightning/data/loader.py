"""Micro-batches of one rank, exact on resume, with or without worker processes.

In: a ``StepStream`` and the samples its numbers mean. Out: packed rows. The main process plans and workers only copy
tokens, so what is trained does not depend on how many workers there are; and the state that is saved is that of the
last batch *given to the trainer*, whatever was made ahead of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from north_lightning.data.store import TokenStore
from north_lightning.data.stream import StepStream
from north_lightning.errors import DataError
from north_lightning.types import PackedBatch

Plan = tuple[list[int], int, int]
"""A row, and the trainable tokens and documents of its whole optimizer step."""


class ValidationLoader:
    """A fixed list of rows. Not a list, because Lightning would take every row for a loader."""

    def __init__(self, rows: Sequence[PackedBatch]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self._rows)


class SFTLoader:
    """One epoch of micro-batches for one rank; sized, and exact on resume.

    Sized, because Lightning fetches one batch ahead of an unsized loader and would lose it on resume. Micro-batch ``m``
    of a step on rank ``r`` is the step's row ``m * world_size + r``.

    Args:
        store: what the stream's numbers mean.
        stream: rows of sample numbers, step by step.
        accumulate: micro-batches per optimizer step.
        world_size: number of ranks that get different rows.
        rank: this one among them.
        num_workers: processes that make batches ahead.
        repeat: begin every epoch with the first step again.
    """

    def __init__(
        self,
        store: TokenStore,
        stream: StepStream,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        num_workers: int = 0,
        repeat: bool = False,
    ) -> None:
        assert stream.rows_per_step == accumulate * world_size, "the stream was made for another split"
        self._store, self._stream = store, stream
        self._accumulate, self._world_size, self._rank = accumulate, world_size, rank
        self._num_workers = num_workers
        self._rows_per_pass: int | None = None
        self._position = stream.state_dict()  # of the first step of which not all batches were given
        self._first = self._position if repeat else None
        self._batch = 0  # micro-batches given in this epoch
        self._resumed = False

    def __len__(self) -> int:
        if self._rows_per_pass is None:
            self._rows_per_pass = self._stream.plan_pass().num_rows
        return -(-self._rows_per_pass // self._stream.rows_per_step) * self._accumulate

    def __iter__(self) -> Iterator[PackedBatch]:
        length = len(self)
        if not self._resumed or self._batch >= length:
            self._batch = 0
            self._position = self._first or self._position
        self._resumed = False
        assert self._batch % self._accumulate == 0, "an epoch begins and resumes between optimizer steps"
        positions: deque[dict[str, Any]] = deque()  # after each step that is planned and not completely given
        plans = self._plan((length - self._batch) // self._accumulate, positions)
        for batch in self._load(plans):
            self._batch += 1
            if self._batch % self._accumulate == 0:
                self._position = positions.popleft()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and what it is made of."""
        return {
            "stream": self._stream.fingerprint,
            "position": self._position,
            "steps_of_epoch": self._batch // self._accumulate,
            "unfinished_batches": self._batch % self._accumulate,
            "rows_per_pass": self._rows_per_pass,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch given; ``DataError`` where that cannot be the same stream."""
        if state["stream"] != self._stream.fingerprint:
            raise DataError(
                "resume: expected the data, row_tokens, shares, seed and rows per optimizer step of the checkpoint, "
                "got others; restore them, or start a new stage from the checkpoint's weights"
            )
        if state["unfinished_batches"]:
            raise DataError(
                f"resume: expected a checkpoint between optimizer steps, got one {state['unfinished_batches']} batches "
                "into a step; its accumulated gradients are lost, use another checkpoint"
            )
        self._position = state["position"]
        self._batch = int(state["steps_of_epoch"]) * self._accumulate
        self._rows_per_pass = state["rows_per_pass"]
        self._resumed = True

    def _load(self, plans: Iterator[Plan]) -> Iterable[PackedBatch]:
        if self._num_workers == 0:
            return (self._store.pack(*plan) for plan in plans)
        return DataLoader(_Rows(self._store), batch_size=None, sampler=plans, num_workers=self._num_workers)

    def _plan(self, num_steps: int, positions: deque[dict[str, Any]]) -> Iterator[Plan]:
        """The rows of this rank in the next steps."""
        self._stream.load_state_dict(self._position)
        for _ in range(num_steps):
            step = self._stream.next_step()
            positions.append(self._stream.state_dict())
            trained = self._stream.count_trained(step)
            documents = sum(map(len, step))
            for row in step[self._rank :: self._world_size]:
                yield row, trained, documents


class _Rows(Dataset[PackedBatch]):
    """Rows by their plan instead of by a number."""

    def __init__(self, store: TokenStore) -> None:
        self._store = store

    def __getitem__(self, plan: Plan) -> PackedBatch:
        return self._store.pack(*plan)
