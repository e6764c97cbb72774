"""Completion-order queue: whatever finishes first is trained first. A worked example of a ``RolloutQueue``.

    queue:
      class_path: queues.completion_order.CompletionOrderQueue
      init_args: {num_slots: 48}

Never waits for a slow group, and so drifts toward short, easy tasks, and nothing bounds how old a group may get. That
is what the built-in windowed FIFO is for; this one shows the least a queue has to do.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from north_lightning.errors import QueueError
from north_lightning.interfaces import RolloutQueue
from north_lightning.types import RolloutGroup


class CompletionOrderQueue(RolloutQueue):
    """Trains groups in the order in which they finish.

    Args:
        num_slots: Groups between dispatch and the end of their training step; at least one batch.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._lock = threading.Lock()
        self._next_id = 0
        self._again: list[int] = []  # not ended when the checkpoint was written
        self._in_flight: set[int] = set()
        self._completed: list[RolloutGroup] = []
        self._taken: set[int] = set()
        self._num_trained = 0
        self._dropped: dict[int, str] = {}  # group id -> reason

    def max_policy_lag(self, push_every_k: int) -> int | None:
        """None: nothing bounds it. A queue that does not say so is refused."""
        return None

    def admit(self) -> int | None:
        with self._lock:
            if len(self._in_flight) + len(self._completed) + len(self._taken) >= self.num_slots:
                return None
            if self._again:
                group_id = self._again.pop(0)
            else:
                group_id, self._next_id = self._next_id, self._next_id + 1
            self._in_flight.add(group_id)
            return group_id

    def complete(self, group: RolloutGroup) -> None:
        with self._lock:
            self._end_flight(group.group_id)
            self._completed.append(group)

    def drop(self, group_id: int, reason: str) -> None:
        with self._lock:
            self._end_flight(group_id)
            self._dropped[group_id] = reason

    def take(self, num_groups: int) -> list[RolloutGroup] | None:
        with self._lock:
            if len(self._completed) < num_groups:
                return None
            batch, self._completed = self._completed[:num_groups], self._completed[num_groups:]
            self._taken.update(group.group_id for group in batch)
            return batch

    def release(self, group_ids: Iterable[int]) -> None:
        ids = set(group_ids)
        with self._lock:
            if not ids <= self._taken:
                raise QueueError(f"release: expected groups that were taken, got {sorted(ids - self._taken)}")
            self._taken -= ids
            self._num_trained += len(ids)

    def end_of(self, group_id: int) -> str | None:
        with self._lock:
            completed = (group.group_id for group in self._completed)
            if group_id >= self._next_id or group_id in {*self._again, *self._in_flight, *completed, *self._taken}:
                return None
            return self._dropped.get(group_id, "trained")

    def stats(self) -> Mapping[str, float]:
        with self._lock:
            return {
                "depth": float(len(self._in_flight) + len(self._completed) + len(self._taken)),
                "in_flight": float(len(self._in_flight)),
                "completed": float(len(self._completed)),
                "trained": float(self._num_trained),
                **{f"dropped/{reason}": float(count) for reason, count in Counter(self._dropped.values()).items()},
            }

    def state_dict(self) -> dict[str, Any]:
        with self._lock:
            completed = {group.group_id for group in self._completed}
            return {
                "next_id": self._next_id,
                "again": sorted(self._in_flight | completed | self._taken | set(self._again)),
                "num_trained": self._num_trained,
                "dropped": [[group_id, reason] for group_id, reason in self._dropped.items()],
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            self._next_id, self._again = state["next_id"], list(state["again"])
            self._num_trained, self._dropped = state["num_trained"], dict(state["dropped"])

    def _end_flight(self, group_id: int) -> None:
        if group_id not in self._in_flight:
            raise QueueError(f"group {group_id}: expected one that was admitted and has not ended")
        self._in_flight.remove(group_id)
