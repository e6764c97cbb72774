"""Windowed FIFO: near the head of the queue groups are trained in completion order, behind it in dispatch order.

In: group ids handed out by ``admit``, finished groups by ``complete``. Out: batches of groups by ``take``. Every
group ends exactly once: trained, dropped with a reason, or pending in the checkpoint. It does not choose tasks,
produce rollouts or wait: no call blocks.

A queue that trains whatever finishes first drifts toward short, easy tasks; a strict FIFO waits for its slowest
member. The window (MiniMax-M2, section 6.2.4) lets a bounded number of groups overtake. Both extremes are settings:
``window=1`` and ``window="unbounded"``.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from north_lightning.errors import ConfigError, QueueError
from north_lightning.interfaces import RolloutQueue
from north_lightning.types import Count, Positive, RolloutGroup, Whole

HEAD_TIMEOUT = "head_timeout"
TRAINED = "trained"


class WindowedFIFOQueue(RolloutQueue):
    """Completed groups of ``[head, head + window - 1]`` in completion order; ``head`` is the oldest that has not ended.

    **Order.** Taking a younger group does not move the window: it stays anchored at the oldest group that is neither
    taken nor dropped, so at most ``window - 1`` groups overtake any other.

    **Pace.** A slot is charged from ``admit`` until ``release`` or ``drop``; there are ``(max_batches_ahead + 1) *
    groups_per_batch`` of them. Nothing finished is ever thrown away for its age: what could become too old is not
    admitted. ``max_policy_lag`` is the bound in learner steps that follows, with its proof.

    **Fairness.** The first n groups that leave (trained or dropped) are the n oldest, but for at most ``window - 1``
    that overtook as many others. So whatever shares the dispatch order gives to environments, every prefix of the
    trained groups has them to within ``window - 1`` groups and what was dropped, however slow an environment is.

    **Stuck heads.** The time limit runs while ``take`` waits for the oldest unfinished group and a producer has it.
    When it is up, the group is handed out once more under its id, place and slot, at most ``head_requeues`` times; then
    it is dropped with the reason ``head_timeout``. Both are counted in ``stats``, and named once by ``interrupted``.

    **Resume.** A resumed queue hands every group that had not ended out again, under its old id and oldest first,
    before any new id. That includes groups that were completed but not yet released: the checkpoint stays a handful of
    integers, and what they are trained on is sampled anew from the resumed weights.

    Args:
        groups_per_batch: Groups of one optimizer step (P).
        max_batches_ahead: How many batches may be sampled ahead of the one that is trained (S); 0 is synchronous.
        window: Width W of the window in groups; 1 is a strict FIFO, ``unbounded`` completion order, for which no bound
            on the age of a group exists. Default: 0.3 of the slots.
        head_timeout_s: How long the oldest unfinished group may keep ``take`` waiting. Default: for ever.
        head_requeues: How often such a group is handed out once more before it is dropped.
        clock: Monotonic seconds.
    """

    groups_per_batch: int

    def __init__(
        self,
        groups_per_batch: Count,
        max_batches_ahead: Whole,
        window: int | Literal["unbounded"] | None = None,
        head_timeout_s: Positive | None = None,
        head_requeues: Whole = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if groups_per_batch < 1:
            raise ConfigError(f"groups_per_batch: expected at least 1, got {groups_per_batch}")
        if max_batches_ahead < 0:
            raise ConfigError(f"max_batches_ahead: expected at least 0, got {max_batches_ahead}")
        if isinstance(window, int) and window < 1:
            raise ConfigError(f"window: expected at least 1 (a strict FIFO), got {window}")
        if head_timeout_s is not None and not head_timeout_s > 0:
            raise ConfigError(f"head_timeout_s: expected a positive number of seconds, got {head_timeout_s}")
        if head_requeues < 0 or (head_requeues and head_timeout_s is None):
            raise ConfigError(f"head_requeues: expected at least 0, with head_timeout_s, got {head_requeues}")
        self.groups_per_batch = groups_per_batch
        self.max_batches_ahead = max_batches_ahead
        self.num_slots = (max_batches_ahead + 1) * groups_per_batch
        default = max(1, math.floor(0.3 * self.num_slots))
        self.window = math.inf if window == "unbounded" else default if window is None else window
        self.head_timeout_s = head_timeout_s
        self.head_requeues = head_requeues
        self._clock = clock
        self._lock = threading.Lock()
        self._next_id = 0
        self._pending: list[int] = []  # not ended when the checkpoint was written, not admitted again yet; ascending
        self._in_flight: set[int] = set()
        self._completed: dict[int, RolloutGroup] = {}  # in completion order
        self._taken: set[int] = set()
        self._num_trained = 0
        self._dropped: dict[int, str] = {}  # group id -> reason
        self._requeued: list[int] = []  # in flight, to be handed out by admit() once more
        self._num_requeues: Counter[int] = Counter()  # of groups in flight
        self._num_requeued = 0
        self._interrupted: list[int] = []
        self._waiting_for: int | None = None  # the head that made take() wait, and since when
        self._waiting_since = 0.0

    def max_policy_lag(self, push_every_k: int) -> int | None:
        """Upper bound, in learner steps, on the age of the weights that produced any trained token; None for none.

        With P groups per batch, S batches ahead, B = (S + 1) P slots, a window of W, and weights pushed every K steps::

            S + ceil((W - 1) / P) + K - 1        (K - 1 when S = 0)

        Let group g be admitted when n steps are complete and trained in the step that begins when m are. Before g is
        taken, the trainer can take only

        - groups older than g: all that are not released hold a slot, so with g's own at most B - 1;
        - groups younger than g: they are within the window, whose head is at most g, so at most W - 1.

        Whole batches among them: m - n <= floor((B - 1 + W - 1) / P) = S + ceil((W - 1) / P). The weights being
        served at admission are at most K - 1 steps older than n. With S = 0 a batch needs every slot, g's included: m
        = n.

        A group that is handed out once more keeps its place and slot, so the bound counts from its first admission.

        Two things are the caller's: every step takes ``groups_per_batch`` groups, and a step that pushes weights
        releases its groups *after* the push. Released before, they make room for groups that are still sampled from the
        weights of K steps ago, and the bound is one too small.
        """
        if push_every_k < 1:
            raise ConfigError(f"push_every_k: expected at least 1, got {push_every_k}")
        if self.max_batches_ahead == 0:
            return push_every_k - 1
        if math.isinf(self.window):
            return None
        return self.max_batches_ahead + math.ceil((self.window - 1) / self.groups_per_batch) + push_every_k - 1

    def admit(self) -> int | None:
        with self._lock:
            if self._requeued:
                group_id = self._requeued.pop(0)
                _discard(self._interrupted, group_id)  # a producer that works on it already starts it over
                return group_id
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
            self._dropped[group_id] = reason

    def interrupted(self) -> list[int]:
        with self._lock:
            interrupted, self._interrupted = self._interrupted, []
            return interrupted

    def take(self, num_groups: int) -> list[RolloutGroup] | None:
        if not 1 <= num_groups <= self.num_slots:
            raise QueueError(f"take: expected between 1 and {self.num_slots} groups (the slots), got {num_groups}")
        with self._lock:
            chosen = self._choose(num_groups)
            if chosen is None:
                self._give_up_overdue_head()
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

    def end_of(self, group_id: int) -> str | None:
        with self._lock:
            unended = (self._pending, self._in_flight, self._completed, self._taken)
            if group_id >= self._next_id or any(group_id in groups for groups in unended):
                return None
            return self._dropped.get(group_id, TRAINED)

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
                "requeued": float(self._num_requeued),
                "head_wait_s": self._clock() - self._waiting_since if waiting else 0.0,
                **{f"dropped/{reason}": float(len(ids)) for reason, ids in self._ids_by_reason().items()},
            }

    def state_dict(self) -> dict[str, Any]:
        with self._lock:
            return {
                "next_id": self._next_id,
                "pending": sorted([*self._pending, *self._in_flight, *self._completed, *self._taken]),
                "num_trained": self._num_trained,
                "dropped": self._ids_by_reason(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        next_id, num_trained = int(state["next_id"]), int(state["num_trained"])
        pending = [int(group_id) for group_id in state["pending"]]
        dropped = {int(group_id): str(reason) for reason, ids in state["dropped"].items() for group_id in ids}
        unended_or_dropped = {*pending, *dropped}
        if len(unended_or_dropped) != len(pending) + len(dropped) or num_trained + len(unended_or_dropped) != next_id:
            raise QueueError(
                f"queue state: expected every one of {next_id} groups to be trained, dropped or pending, "
                f"got {num_trained} trained, dropped {dropped}, pending {pending}"
            )
        with self._lock:
            if self._next_id:
                raise QueueError(
                    "queue state: expected an unused queue to load it into, got one that has admitted groups"
                )
            self._next_id, self._pending, self._num_trained = next_id, sorted(pending), num_trained
            self._dropped = dropped

    def _num_charged(self) -> int:
        return len(self._in_flight) + len(self._completed) + len(self._taken)

    def _ids_by_reason(self) -> dict[str, list[int]]:
        return {
            reason: sorted(group_id for group_id, why in self._dropped.items() if why == reason)
            for reason in sorted(set(self._dropped.values()))
        }

    def _leave_flight(self, group_id: int, verb: str) -> None:
        if group_id not in self._in_flight:
            raise QueueError(f"group {group_id} cannot be {verb}: it was not admitted, or has been {verb} already")
        self._in_flight.remove(group_id)
        self._num_requeues.pop(group_id, None)
        _discard(self._requeued, group_id)
        _discard(self._interrupted, group_id)

    def _choose(self, num_groups: int) -> list[int] | None:
        if len(self._completed) < num_groups:
            return None
        waiting = dict.fromkeys(self._completed)  # in completion order
        # Pending groups are younger than all of these: they are admitted again oldest first, before any new one.
        oldest_first = iter(sorted(self._in_flight.union(waiting)))
        head = next(oldest_first)
        chosen: dict[int, None] = {}
        while len(chosen) < num_groups:
            while head in chosen:
                head = next(oldest_first)
            eligible = next((group_id for group_id in waiting if group_id < head + self.window), None)
            if eligible is None:
                return None
            del waiting[eligible]
            chosen[eligible] = None
        return list(chosen)

    def _give_up_overdue_head(self) -> None:
        """Called when ``take`` has to wait: start the clock of the group it waits for, or act if its time is up.

        That is the oldest unfinished group: everything before it could be taken, and would make it the head.
        """
        head = min(self._in_flight, default=None)
        now = self._clock()
        if head in self._requeued:
            self._waiting_for = None  # nobody works on it: its time starts when it has been handed out
        elif head != self._waiting_for:
            self._waiting_for, self._waiting_since = head, now
        elif head is not None and self.head_timeout_s is not None and now - self._waiting_since >= self.head_timeout_s:
            self._waiting_for = None
            if self._num_requeues[head] < self.head_requeues:
                self._num_requeues[head] += 1
                self._num_requeued += 1
                self._requeued.append(head)
            else:
                self._leave_flight(head, "dropped")
                self._dropped[head] = HEAD_TIMEOUT
            self._interrupted.append(head)


def _discard(groups: list[int], group_id: int) -> None:
    if group_id in groups:
        groups.remove(group_id)
