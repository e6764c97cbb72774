"""Producer and queue together under every schedule of answers, failures, deaths, suspensions, stops and head time-outs:
every group that was admitted comes to an end.

The thread and the process are left out: the machine plays both, one message at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from queue_machine import TIMEOUT_S, FakeClock, group
from rollout_fakes import no_runner

from north_lightning.errors import SandboxError
from north_lightning.rollout import FailurePolicy, ProducerSpec, RolloutProducer, WindowedFIFOQueue
from north_lightning.rollout.child import Cancel, CancelAll, Dispatch, Failed, Finished
from north_lightning.rollout.producer import DIED
from north_lightning.types import Task

TASKS = [Task(f"task{i}", "terminal", "echo", "Say hello.", Path(), 4) for i in range(3)]
PATIENT = FailurePolicy(max_dispatches=2, redispatch_delay_s=0.0, max_consecutive_drops=9999, max_child_restarts=9999)


class Pipe:
    """The rollout process as the producer sees it: what it works on, and answers that were sent before a cancellation
    reached it."""

    def __init__(self) -> None:
        self.working: dict[int, int] = {}  # dispatch -> group
        self.under_way: list[tuple[int, int]] = []

    def send(self, message: Any) -> None:
        if isinstance(message, Dispatch):
            assert message.group_id not in self.working.values(), "two dispatches of one group at the same time"
            self.working[message.number] = message.group_id
        elif isinstance(message, Cancel):
            self.under_way.append((message.number, self.working.pop(message.number)))
        elif isinstance(message, CancelAll):
            self.under_way += self.working.items()
            self.working = {}

    def close(self) -> None:
        self.working, self.under_way = {}, []


class ThreadlessProducer(RolloutProducer):
    def _start_child(self) -> None:
        self.pipe = self._connection = Pipe()  # type: ignore[assignment]
        self._ready.set()


class ProducerAndQueue(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 4), window=st.integers(1, 4), requeues=st.integers(0, 2), places=st.integers(1, 5))
    def start(self, slots: int, window: int, requeues: int, places: int) -> None:
        self.clock = FakeClock()
        self.queue = WindowedFIFOQueue(1, slots - 1, window, TIMEOUT_S, requeues, self.clock)
        self.producer = ThreadlessProducer(self.queue, ProducerSpec(TASKS, no_runner, 2, places), PATIENT)
        self.producer._start_child()

    @rule()
    def turn(self) -> None:
        """What the thread does before it waits for a message."""
        if self.producer._suspended.is_set():
            self.producer._recall()
        else:
            self.producer._interrupt()
            self.producer._dispatch()

    @precondition(lambda self: self.producer.pipe.working)
    @rule(pick=st.integers(0, 1000), fails=st.booleans())
    def answer(self, pick: int, fails: bool) -> None:
        working = list(self.producer.pipe.working.items())
        number, group_id = working[pick % len(working)]
        del self.producer.pipe.working[number]
        self.producer._handle(Failed(number, SandboxError("no room")) if fails else Finished(number, group(group_id)))

    @precondition(lambda self: self.producer.pipe.under_way)
    @rule(fails=st.booleans())
    def answer_what_was_cancelled(self, fails: bool) -> None:
        number, group_id = self.producer.pipe.under_way.pop()
        self.producer._handle(Failed(number, SandboxError("no room")) if fails else Finished(number, group(group_id)))

    @rule(seconds=st.sampled_from([1.0, TIMEOUT_S, TIMEOUT_S]))
    def keep_the_trainer_waiting(self, seconds: float) -> None:
        for _ in range(2):
            while (batch := self.queue.take(1)) is not None:
                self.queue.release([member.group_id for member in batch])
            self.clock.now += seconds

    @rule(stops=st.sampled_from([None, None, None, False, True]))
    def die_or_stop(self, stops: bool | None) -> None:
        if stops:
            self.producer._end_child()
            self.producer._start_child()
        elif stops is not None:
            self.producer._restart_child(DIED)

    @rule(seconds=st.just(TIMEOUT_S))
    def interrupt_the_head(self, seconds: float) -> None:
        self.turn()
        self.keep_the_trainer_waiting(seconds)
        self.turn()

    @rule(is_suspended=st.booleans())
    def suspend_or_resume(self, is_suspended: bool) -> None:
        if is_suspended:
            self.producer._suspended.set()
            self.turn()
        else:
            self.producer.resume()

    @invariant()
    def every_group_has_one_job_and_the_process_works_on_nothing_else(self) -> None:
        owed = [job.group_id for job in (*self.producer._waiting, *self.producer._running.values())]
        assert len(set(owed)) == len(owed)
        assert set(self.producer._running) == set(self.producer.pipe.working)

    def teardown(self) -> None:
        """Without further faults everything that was admitted ends."""
        if not hasattr(self, "producer"):
            return
        self.producer.resume()
        self.turn()
        admitted = int(self.queue.state_dict()["next_id"])
        for _ in range(20):
            while self.producer.pipe.working:
                self.answer(0, False)
            self.keep_the_trainer_waiting(0.0)
            self.turn()
        assert all(self.queue.end_of(group_id) is not None for group_id in range(admitted))


ProducerAndQueue.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestProducerAndQueue = ProducerAndQueue.TestCase
