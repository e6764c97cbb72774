"""The queue against plain lists, under every schedule: put, complete, fail, too late, take, poll, train, publish, wait,
save, crash; then the same with producers that work on what they are handed.

The model shares no code with the queue: a status per group, and the rules of the docstring read off it.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from north_lightning.errors import QueueError
from north_lightning.rollout.queue import WindowedFIFOQueue
from north_lightning.rollout.ray.queue import QueueService
from north_lightning.types import RolloutGroup


def group(group_id: int) -> RolloutGroup:
    return RolloutGroup(group_id, f"task{group_id}", "terminal", [])


def ids(groups: list[RolloutGroup] | None) -> list[int] | None:
    return None if groups is None else [member.group_id for member in groups]


def filled(queue: WindowedFIFOQueue) -> list[int]:
    """Admit until every slot is charged."""
    admitted = []
    while (group_id := queue.admit()) is not None:
        admitted.append(group_id)
    return admitted


def complete(queue: WindowedFIFOQueue, *group_ids: int) -> None:
    for group_id in group_ids:
        queue.complete(group(group_id))


@dataclass
class FakeClock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class Learner:
    """Trains a queue and pushes every ``push_every_k`` steps; what is admitted is sampled at once, at its oldest."""

    def __init__(self, queue: WindowedFIFOQueue, push_every_k: int, releases_after_push: bool = True) -> None:
        self.queue = queue
        self.push_every_k = push_every_k
        self.releases_after_push = releases_after_push
        self.step = 0
        self.served_step = 0
        self.sampled_at: dict[int, int] = {}
        self.trained: list[int] = []
        self.max_lag = 0

    def admit_all(self) -> list[int]:
        admitted = filled(self.queue)
        self.sampled_at |= dict.fromkeys(admitted, self.served_step)
        return admitted

    def train(self, batch: list[int]) -> None:
        for group_id in batch:
            self.max_lag = max(self.max_lag, self.step - self.sampled_at[group_id])
        self.trained += batch
        self.step += 1
        if not self.releases_after_push:
            self.queue.release(batch)
            self.admit_all()
        if self.step % self.push_every_k == 0:
            self.served_step = self.step
        if self.releases_after_push:
            self.queue.release(batch)


TIMEOUT_S = 10.0


@dataclass
class Model:
    """What should be so. ``status`` of group i: pending, flight, done, taken, trained or dropped."""

    status: list[str] = field(default_factory=list)
    finish_order: list[int] = field(default_factory=list)
    to_restart: list[int] = field(default_factory=list)
    to_name: list[int] = field(default_factory=list)  # by ``interrupted``
    restarts: dict[int, int] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)  # taken, not trained yet
    trained: list[int] = field(default_factory=list)
    step: int = 0
    waits_for: int | None = None
    waits_since: float = 0.0

    def having(self, *statuses: str) -> list[int]:
        return [group_id for group_id, status in enumerate(self.status) if status in statuses]

    def end_flight(self, group_id: int, status: str) -> None:
        self.status[group_id] = status
        self.to_restart = [i for i in self.to_restart if i != group_id]
        self.to_name = [i for i in self.to_name if i != group_id]

    def next_batch(self, num_groups: int, window: int) -> list[int] | None:
        status, batch = list(self.status), []
        for _ in range(num_groups):
            unended = [i for i, name in enumerate(status) if name in ("pending", "flight", "done")]
            ready = [i for i in self.finish_order if status[i] == "done" and i < unended[0] + window]
            if not ready:
                return None
            status[ready[0]] = "taken"
            batch.append(ready[0])
        return batch


class QueueAgainstListModel(RuleBasedStateMachine):
    """The queue does what lists do, and no batch is older than the bound. ``num_steps`` counts all rules ever run."""

    num_steps = 0

    @initialize(
        num_groups=st.integers(1, 3),
        ahead=st.integers(0, 3),
        window=st.integers(1, 8),
        push_every_k=st.integers(1, 3),
        head_requeues=st.integers(0, 2),
    )
    def start(self, num_groups: int, ahead: int, window: int, push_every_k: int, head_requeues: int) -> None:
        self.clock = FakeClock()
        self.settings = (num_groups, ahead, window, TIMEOUT_S, head_requeues)
        self.queue = self.new_queue()
        self.learner = Learner(self.queue, push_every_k)
        self.model = Model()
        self.save()

    def new_queue(self) -> WindowedFIFOQueue:
        num_groups, ahead, window, timeout_s, head_requeues = self.settings
        return WindowedFIFOQueue(num_groups, ahead, window, timeout_s, head_requeues, self.clock)

    @rule()
    def put(self) -> None:
        model = self.model
        if model.to_restart:
            again = model.to_restart.pop(0)
            assert self.queue.admit() == again
            model.to_name = [i for i in model.to_name if i != again]
        elif len(model.having("flight", "done", "taken")) >= self.queue.num_slots:
            assert self.queue.admit() is None
        else:
            expected = min(model.having("pending"), default=len(model.status))
            assert self.queue.admit() == expected
            model.status[expected : expected + 1] = ["flight"]
            self.learner.sampled_at[expected] = self.learner.served_step

    @precondition(lambda self: self.model.having("flight"))
    @rule(pick=st.integers(0, 1000))
    def complete(self, pick: int) -> None:
        flying = self.model.having("flight")
        group_id = flying[pick % len(flying)]
        complete(self.queue, group_id)
        self.model.end_flight(group_id, "done")
        self.model.finish_order.append(group_id)

    @precondition(lambda self: self.model.having("flight"))
    @rule(pick=st.integers(0, 1000))
    def fail(self, pick: int) -> None:
        flying = self.model.having("flight")
        group_id = flying[pick % len(flying)]
        self.queue.drop(group_id, "SandboxError")
        self.model.end_flight(group_id, "dropped")

    @rule(pick=st.integers(0, 1000), drops=st.booleans())
    def come_too_late(self, pick: int, drops: bool) -> None:
        """Or too early: nothing changes, and nothing is silent."""
        landed = [*self.model.having("pending", "done", "taken", "trained", "dropped"), len(self.model.status)]
        group_id = landed[pick % len(landed)]
        with pytest.raises(QueueError):
            self.queue.drop(group_id, "late") if drops else complete(self.queue, group_id)
        if group_id not in self.model.having("taken"):
            with pytest.raises(QueueError):
                self.queue.release([group_id])

    @rule()
    def poll(self) -> None:
        assert self.queue.interrupted() == self.model.to_name
        self.model.to_name = []

    @rule()
    def keep_the_trainer_waiting(self) -> None:
        """Too long for what it waits for, if it has to wait."""
        self.take()
        self.wait(TIMEOUT_S)
        self.take()

    @rule()
    def take(self) -> None:
        model = self.model
        expected = model.next_batch(self.queue.groups_per_batch, self.settings[2])
        assert ids(self.queue.take(self.queue.groups_per_batch)) == expected
        if expected is None:
            self.wait_for_head()
            return
        model.waits_for = None
        model.batches.append(expected)
        for group_id in expected:
            model.status[group_id] = "taken"
            model.finish_order.remove(group_id)

    def wait_for_head(self) -> None:
        model = self.model
        head = min(model.having("flight"), default=None)
        if head in model.to_restart:  # nobody works on it: its time begins when somebody does
            model.waits_for = None
        elif head != model.waits_for:
            model.waits_for, model.waits_since = head, self.clock.now
        elif head is not None and self.clock.now - model.waits_since >= TIMEOUT_S:
            model.waits_for = None
            model.restarts[head] = model.restarts.get(head, 0) + 1
            if model.restarts[head] <= self.queue.head_requeues:
                model.to_restart.append(head)
            else:
                model.end_flight(head, "dropped")
            model.to_name.append(head)

    @rule(seconds=st.sampled_from([1.0, TIMEOUT_S]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.model.batches)
    @rule()
    def train(self) -> None:
        batch = self.model.batches.pop(0)
        self.learner.train(batch)
        self.model.step += 1
        self.model.trained += batch
        for group_id in batch:
            self.model.status[group_id] = "trained"

    @rule()
    def publish(self) -> None:
        self.learner.served_step = self.learner.step

    @rule()
    def save(self) -> None:
        self.saved = (copy.deepcopy(self.model), json.dumps(self.queue.state_dict()))

    @rule()
    def crash_and_restore(self) -> None:
        """Everything since the last checkpoint is lost, and what was under way then is handed out again."""
        model, state = copy.deepcopy(self.saved[0]), self.saved[1]
        self.queue = self.learner.queue = self.new_queue()
        self.queue.load_state_dict(json.loads(state))
        model.status = ["pending" if name in ("flight", "done", "taken") else name for name in model.status]
        model.batches, model.finish_order, model.restarts = [], [], {}
        model.to_restart, model.to_name = [], []
        model.waits_for = None
        self.model = model
        self.learner.step = self.learner.served_step = model.step  # a resumed trainer pushes before it samples

    @invariant()
    def no_batch_is_older_than_the_bound(self) -> None:
        type(self).num_steps += 1
        bound = self.queue.max_policy_lag(self.learner.push_every_k)
        assert bound is not None
        assert self.learner.max_lag <= bound

    @invariant()
    def every_group_is_accounted_for_once(self) -> None:
        model = self.model
        assert len(set(model.trained)) == len(model.trained)
        stats = self.queue.stats()
        for name, status in (("in_flight", "flight"), ("completed", "done"), ("pending",) * 2, ("trained",) * 2):
            assert stats[name] == len(model.having(status)), name
        dropped = sum(value for name, value in stats.items() if name.startswith("dropped/"))
        assert dropped == len(model.having("dropped"))
        assert stats["depth"] == len(model.having("flight", "done", "taken"))
        for group_id, status in enumerate(model.status):
            end = self.queue.end_of(group_id)
            assert (end is not None) == (status in ("trained", "dropped"))
            assert (end == "trained") == (status == "trained")


class ProducersOfOneQueue(RuleBasedStateMachine):
    """Producers that hold what ``admit`` hands them, drop it when it is ``interrupted``, and die: no group is left that
    nobody works on, none has two workers, and none that has ended is handed out.
    """

    NAMES = ("a", "b", "c")

    @initialize(slots=st.integers(1, 4), window=st.integers(1, 4), head_requeues=st.integers(0, 2))
    def start(self, slots: int, window: int, head_requeues: int) -> None:
        self.clock = FakeClock()
        self.queue = QueueService(WindowedFIFOQueue(1, slots - 1, window, TIMEOUT_S, head_requeues, self.clock))
        self.held: dict[str, list[int]] = {name: [] for name in self.NAMES}
        self.ended = Counter[int]()

    @rule(name=st.sampled_from(NAMES))
    def admit(self, name: str) -> None:
        group_id = self.queue.admit(name)
        if group_id is not None:
            assert self.queue.end_of(group_id) is None
            assert not self.ended[group_id]
            self.held[name] = [*(i for i in self.held[name] if i != group_id), group_id]  # begun anew where it was held

    @rule(name=st.sampled_from(NAMES))
    def poll(self, name: str) -> None:
        named = self.queue.interrupted(name)
        assert len(set(named)) == len(named)
        self.held[name] = [i for i in self.held[name] if i not in named]

    @precondition(lambda self: any(self.held.values()))
    @rule(pick=st.integers(0, 1000), drops=st.booleans())
    def end_one(self, pick: int, drops: bool) -> None:
        working = [(name, group_id) for name, ids in self.held.items() for group_id in ids]
        name, group_id = working[pick % len(working)]
        self.held[name].remove(group_id)
        try:
            if drops:
                self.queue.drop(group_id, "SandboxError")
            else:
                self.queue.complete((group_id, "task", "terminal"), b"")
        except QueueError:
            return  # somebody else was first, or the queue has given it up
        self.ended[group_id] += 1
        assert self.ended[group_id] == 1

    @rule(seconds=st.sampled_from([1.0, TIMEOUT_S, TIMEOUT_S]))
    def keep_the_trainer_waiting(self, seconds: float) -> None:
        for _ in range(2):
            while self.queue._queue.take(1) is not None:
                pass
            self.clock.now += seconds

    @rule(name=st.sampled_from(NAMES))
    def die(self, name: str) -> None:
        self.held[name] = []
        self.queue.lose(name)

    @rule()
    def settle(self) -> None:
        """When all have asked and nothing more is handed out, every group in flight has exactly one worker."""
        for name in self.NAMES:
            self.poll(name)
        for name in self.NAMES * 8:
            self.admit(name)
            for other in self.NAMES:
                self.poll(other)
        workers = Counter(group_id for ids in self.held.values() for group_id in ids)
        unended = {group_id for group_id in range(1000) if self.is_in_flight(group_id)}
        assert {group_id for group_id in workers if group_id in unended} == unended
        assert all(workers[group_id] == 1 for group_id in unended)

    def is_in_flight(self, group_id: int) -> bool:
        return group_id in self.queue._queue._in_flight  # type: ignore[attr-defined]

    def teardown(self) -> None:
        if hasattr(self, "queue"):
            self.settle()
