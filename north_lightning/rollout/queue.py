"""Windowed FIFO: near the head of the queue groups are trained in completion order, behind it in dispatch order.

In: group ids handed out by ``admit``, finished groups by ``complete``. Out: batches of groups by ``take``. Every
group ends exactly once: trained, dropped with a reason, or pending in the checkpoint. It does not choose tasks,
produce rollouts or wait: no call blocks.

A queue that trains whatever finishes first drifts toward short, easy tasks; a strict FIFO waits for its slowest
member. The window (MiniMax-M2, section 6.2.4) lets a bounded number of groups overtake.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from north_lightning.errors import ConfigError, QueueError
from north_lightning.interfaces import RolloutQueue
from north_lightning.types import RolloutGroup

HEAD_TIMEOUT = "head_timeout"


class WindowedFIFOQueue(RolloutQueue):
    """Completed groups of ``[head, head + window - 1]`` in completion order; ``head`` is the oldest that has not ended.

    Taking a younger group does not move the window: it stays anchored at the oldest group that is neither taken nor
    dropped, so at most ``window - 1`` groups overtake any other. A slot is charged from ``admit`` until ``release`` or
    ``drop``; there are ``(max_batches_ahead + 1) * groups_per_batch`` of them.

    A resumed queue hands every group that had not ended out again, under its old id and oldest first, before any new
    id. That includes groups that were completed but not yet released: the checkpoint stays a handful of integers, and
    what they are trained on is sampled anew from the resumed weights.

    Args:
        groups_per_batch: Groups of one optimizer step (P).
        max_batches_ahead: How many batches may be sampled ahead of the one that is trained (S); 0 is synchronous.
        window: Width W of the window in groups; 1 is a strict FIFO. Default: 0.3 of the slots.
        head_timeout_s: The oldest unfinished group is dropped with the reason ``head_timeout`` once it has kept
            ``take`` waiting for longer. Default: never.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        groups_per_batch: int,
        max_batches_ahead: int,
        window: int | None = None,
        head_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if groups_per_batch < 1:
            raise ConfigError(f"groups_per_batch: expected at least 1, got {groups_per_batch}")
        if max_batches_ahead < 0:
            raise ConfigError(f"max_batches_ahead: expected at least 0, got {max_batches_ahead}")
        if window is not None and window < 1:
            raise ConfigError(f"window: expected at least 1 (a strict FIFO), got {window}")
        if head_timeout_s is not None and not head_timeout_s > 0:
            raise ConfigError(f"head_timeout_s: expected a positive number of seconds, got {head_timeout_s}")
        self.groups_per_batch = groups_per_batch
        self.max_batches_ahead = max_batches_ahead
        self.num_slots = (max_batches_ahead + 1) * groups_per_batch
        self.window = window if window is not None else max(1, math.floor(0.3 * self.num_slots))
        self.head_timeout_s = head_timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._next_id = 0
        self._pending: list[int] = []  # not ended when the checkpoint was written, not admitted again yet; ascending
        self._in_flight: set[int] = set()
        self._completed: dict[int, RolloutGroup] = {}  # in completion order
        self._taken: set[int] = set()
        self._num_trained = 0
        self._dropped: Counter[str] = Counter()
        self._waiting_for: int | None = None  # the head that made take() wait, and since when
        self._waiting_since = 0.0

    def max_policy_lag(self, push_every_k: int) -> int:
        """Upper bound, in learner steps, on the age of the weights that produced any trained token.

        With P groups per batch, S batches ahead, B = (S + 1) P slots, a window of W, and weights pushed every K steps::

            S + ceil((W - 1) / P) + K - 1        (K - 1 when S = 0)

        Let group g be admitted when n steps are complete and trained in the step that begins when m are. Before g is
        taken, the trainer can take only

        - groups older than g: all that are not released hold a slot, so with g's own at most B - 1;
        - groups younger than g: they are within the window, whose head is at most g, so at most W - 1.

        Whole batches among them: m - n <= floor((B - 1 + W - 1) / P) = S + ceil((W - 1) / P). The weights being
        served at admission are at most K - 1 steps older than n. With S = 0 a batch needs every slot, g's included: m
        = n.

        Two things are the caller's: every step takes ``groups_per_batch`` groups, and a step that pushes weights
        releases its groups *after* the push. Released before, they make room for groups that are still sampled from the
        weights of K steps ago, and the bound is one too small.
        """
        if push_every_k < 1:
            raise ConfigError(f"push_every_k: expected at least 1, got {push_every_k}")
        if self.max_batches_ahead == 0:
            return push_every_k - 1
        return self.max_batches_ahead + math.ceil((self.window - 1) / self.groups_per_batch) + push_every_k - 1

    def admit(self) -> int | None:
        with self._lock:
            if self._num_charged() >= self.num_slots:
                return None
            if self._pending:
                group_id = self._pending.pop(0)
            else:
                group_id = self._next_id
                self._next_id += 1
            self._in_flight.add(group_id)
            return group_id

    def complete(self, group: RolloutGroup) -> None:
        with self._lock:
            self._leave_flight(group.group_id, "completed")
            self._completed[group.group_id] = group

    def drop(self, group_id: int, reason: str) -> None:
        with self._lock:
            self._leave_flight(group_id, "dropped")
            self._dropped[reason] += 1

    def take(self, num_groups: int) -> list[RolloutGroup] | None:
        if not 1 <= num_groups <= self.num_slots:
            raise QueueError(f"take: expected between 1 and {self.num_slots} groups (the slots), got {num_groups}")
        with self._lock:
            chosen = self._choose(num_groups)
            if chosen is None:
                self._drop_overdue_head()
                return None
            self._waiting_for = None
            self._taken.update(chosen)
            return [self._completed.pop(group_id) for group_id in chosen]

    def release(self, group_ids: Iterable[int]) -> None:
        ids = list(group_ids)
        with self._lock:
            if len(set(ids)) != len(ids) or not self._taken.issuperset(ids):
                raise QueueError(f"release: expected groups that were taken and not yet released, got {ids}")
            self._taken.difference_update(ids)
            self._num_trained += len(ids)

    def stats(self) -> Mapping[str, float]:
        """``depth`` is the number of charged slots; ``head_wait_s`` how long the head has made ``take`` wait."""
        with self._lock:
            waiting = self._waiting_for is not None and self._waiting_for in self._in_flight
            return {
                "depth": float(self._num_charged()),
                "in_flight": float(len(self._in_flight)),
                "completed": float(len(self._completed)),
                "pending": float(len(self._pending)),
                "trained": float(self._num_trained),
                "head_wait_s": self._clock() - self._waiting_since if waiting else 0.0,
                **{f"dropped/{reason}": float(count) for reason, count in sorted(self._dropped.items())},
            }

    def state_dict(self) -> dict[str, Any]:
        with self._lock:
            return {
                "next_id": self._next_id,
                "pending": sorted([*self._pending, *self._in_flight, *self._completed, *self._taken]),
                "num_trained": self._num_trained,
                "dropped": dict(self._dropped),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        next_id, pending = int(state["next_id"]), [int(group_id) for group_id in state["pending"]]
        num_trained, dropped = int(state["num_trained"]), {str(k): int(v) for k, v in state["dropped"].items()}
        if num_trained + sum(dropped.values()) + len(pending) != next_id or len(set(pending)) != len(pending):
            raise QueueError(
                f"queue state: expected every one of {next_id} groups to be trained, dropped or pending, "
                f"got {num_trained} trained, {sum(dropped.values())} dropped, pending {pending}"
            )
        with self._lock:
            if self._next_id:
                raise QueueError(
                    "queue state: expected an unused queue to load it into, got one that has admitted groups"
                )
            self._next_id, self._pending, self._num_trained = next_id, sorted(pending), num_trained
            self._dropped = Counter(dropped)

    def _num_charged(self) -> int:
        return len(self._in_flight) + len(self._completed) + len(self._taken)

    def _leave_flight(self, group_id: int, verb: str) -> None:
        if group_id not in self._in_flight:
            raise QueueError(f"group {group_id} cannot be {verb}: it was not admitted, or has been {verb} already")
        self._in_flight.remove(group_id)

    def _choose(self, num_groups: int) -> list[int] | None:
        if len(self._completed) < num_groups:
            return None
        waiting = dict.fromkeys(self._completed)  # in completion order
        chosen: list[int] = []
        while len(chosen) < num_groups:
            # Pending groups are younger than all of these: they are admitted again oldest first, before any new one.
            head = min(self._in_flight.union(waiting))
            eligible = next((group_id for group_id in waiting if group_id < head + self.window), None)
            if eligible is None:
                return None
            del waiting[eligible]
            chosen.append(eligible)
        return chosen

    def _drop_overdue_head(self) -> None:
        """Called when ``take`` has to wait: start the clock of the group it waits for, or drop it if its time is up.

        That is the oldest unfinished group: everything before it could be taken, and would make it the head.
        """
        head = min(self._in_flight, default=None)
        now = self._clock()
        if head != self._waiting_for:
            self._waiting_for, self._waiting_since = head, now
        elif head is not None and self.head_timeout_s is not None and now - self._waiting_since >= self.head_timeout_s:
            self._in_flight.remove(head)
            self._dropped[HEAD_TIMEOUT] += 1
            self._waiting_for = None
