"""Rollout producers in Ray actors, each with a rollout process of its own, all working for one ``RayQueue``.

In: what a ``RolloutProducer`` is given, and how many there shall be. Out: the same methods, for all of them together.
A thread asks every actor how it is; one that died, or says nothing for too long, is replaced, and the queue hands its
groups to the others. Which task belongs to a group follows from its number: producers need not talk to each other.

The vLLM servers listen on loopback, so a producer on another machine reaches them through a tunnel that ends on its
own loopback. The run's folder is shared by all machines, as for checkpoints: rollouts are appended to one file there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from north_lightning.errors import ConfigError, InfrastructureError
from north_lightning.rollout.accounts import Event
from north_lightning.rollout.child import portable
from north_lightning.rollout.producer import START_TIMEOUT_S, FailurePolicy, ProducerSpec, RolloutProducer
from north_lightning.rollout.ray.cluster import as_here, connect
from north_lightning.rollout.ray.queue import RayQueue
from north_lightning.rollout.schedule import TaskSchedule
from north_lightning.sandbox.cpu_waits import slowdown
from north_lightning.types import Count, Positive

log = logging.getLogger(__name__)

ASK_EVERY_S = 0.5
END_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class RayProducers:
    """How producers are spread over a Ray cluster.

    Args:
        num_producers: Actors; Ray places them on different machines where it can.
        num_cpus: Reserved for each.
    """

    num_producers: Count = 2
    num_cpus: Positive = 1.0

    def __post_init__(self) -> None:
        if self.num_producers < 1:
            raise ConfigError(f"num_producers: expected at least 1, got {self.num_producers}")


class _Actor:
    """A producer in an actor's process; errors are answers."""

    def __init__(
        self, queue: RayQueue, spec: ProducerSpec, failures: FailurePolicy, rollouts_path: Path | None
    ) -> None:
        self._producer = RolloutProducer(queue, spec, failures, rollouts_path)

    def start(self, is_suspended: bool) -> None:
        if is_suspended:
            self._producer.suspend()
        self._producer.start()

    def report(self) -> tuple[dict[str, float], Exception | None]:
        stats = dict(self._producer.stats())
        try:
            self._producer.check()
        except Exception as error:
            return stats, portable(error)
        return stats, None

    def suspend(self) -> None:
        self._producer.suspend()

    def resume(self) -> None:
        self._producer.resume()

    def stop(self) -> None:
        self._producer.stop()


@dataclass
class _Member:
    """One producer as the trainer knows it."""

    name: str
    actor: Any
    asked: Any = None  # the pending answer to ``report``, and since when it is
    asked_at: float = 0.0
    stats: Mapping[str, float] | None = None


class RayRolloutProducer:
    """Several producers, used like the one ``RolloutProducer``.

    Args:
        producers: How many, and where.
        queue: They admit from it and complete into it.
        spec: What is sampled; ``max_concurrent_groups`` counts for each producer.
        failures: As of each producer; ``max_child_restarts`` bounds the deaths of actors too, and one is taken for dead
            when it has not answered for ``heartbeat_timeout_s``, more on a machine with more load than CPUs.
        rollouts_path: File to append finished rollouts to.
    """

    def __init__(
        self,
        producers: RayProducers,
        queue: RayQueue,
        spec: ProducerSpec,
        failures: FailurePolicy | None = None,
        rollouts_path: Path | None = None,
    ) -> None:
        if spec.curriculum is not None:
            raise ConfigError(
                "curriculum: expected none with producers in Ray actors, which deal tasks by group number alone; got "
                f"{type(spec.curriculum).__name__}"
            )
        self._producers = producers
        self._queue = queue
        self._spec = spec
        self._limits = failures or FailurePolicy()
        self._rollouts_path = rollouts_path
        self.schedule = TaskSchedule(spec.tasks, spec.environment_weights, spec.seed)
        self._members: list[_Member] = []
        self._lock = threading.Lock()  # of the members: the trainer's calls against the watching thread
        self._past: Counter[str] = Counter()  # of members that are gone
        self._num_started = 0
        self._deaths_in_a_row = 0
        self._is_suspended = False
        self._error: Exception | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- called by the trainer --------------------------------------------------------------------------------------

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start all and wait until they are ready; raises what went wrong in one."""
        assert self._thread is None, "start() twice"
        self._stopping.clear()
        ray = connect(self._queue.address)
        with self._lock:
            self._members = [self._new_member() for _ in range(self._producers.num_producers)]
            starting = [member.actor.start.remote(self._is_suspended) for member in self._members]
        try:
            ray.get(starting, timeout=timeout_s * slowdown())
        except ray.exceptions.RayTaskError as error:
            self.stop()
            raise error.cause from error
        except (ray.exceptions.RayError, TimeoutError) as error:
            self.stop()
            raise InfrastructureError(
                f"producers in Ray actors did not start within {timeout_s:g} s: {error}"
            ) from error
        self._thread = threading.Thread(target=self._watch, name="ray-producers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all with their sandboxes. Groups in flight stay admitted; producers that start later begin them anew."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        ray = connect(self._queue.address)
        with self._lock:
            members, self._members = self._members, []
        ending = [member.actor.stop.remote() for member in members]
        ray.wait(ending, num_returns=max(len(ending), 1), timeout=END_TIMEOUT_S) if ending else None
        for member in members:
            self._bury(member)

    def check(self) -> None:
        """Raise what stopped one of the producers, or more deaths than are borne."""
        if self._error is not None:
            raise self._error

    def suspend(self) -> None:
        """As ``RolloutProducer.suspend``, of all; returns when all have."""
        self._tell_all("suspend", is_suspended=True)

    def resume(self) -> None:
        self._tell_all("resume", is_suspended=False)

    def stats(self) -> Mapping[str, float]:
        """Sums over the producers, with those that are gone; ``actors`` are alive."""
        with self._lock:
            total = Counter(self._past)
            for member in self._members:
                total.update(member.stats or {})
            return {
                **{name: float(value) for name, value in sorted(total.items())},
                "actors": float(len(self._members)),
            }

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Not here: the accounts of samplers are made of one rollout process's moves."""
        raise ConfigError(
            "trainer.callbacks: TimeAccounts follows a rollout process on this machine, and these are in Ray actors; "
            "leave it out"
        )

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        try:
            while not self._stopping.wait(ASK_EVERY_S):
                for member in list(self._members):
                    death = self._hear(member)
                    if death is not None and not self._stopping.is_set():
                        self._replace(member, death)
        except Exception as error:
            self._error = error

    def _hear(self, member: _Member) -> str | None:
        """What the member died of, if it is dead; keeps what it reports, and raises its error."""
        ray = connect(self._queue.address)
        if member.asked is None:
            member.asked, member.asked_at = member.actor.report.remote(), time.monotonic()
        if not ray.wait([member.asked], timeout=0)[0]:
            silent_s = time.monotonic() - member.asked_at
            limit_s = self._limits.heartbeat_timeout_s + (START_TIMEOUT_S if member.stats is None else 0.0)
            is_late = silent_s > limit_s and silent_s > limit_s * slowdown()
            return f"said nothing for {silent_s:.0f} s" if is_late else None
        asked, member.asked = member.asked, None
        try:
            stats, error = ray.get(asked)
        except ray.exceptions.RayError as gone:
            return str(gone).splitlines()[0]
        if error is not None:
            raise error
        if stats.get("completed", 0.0) > (member.stats or {}).get("completed", 0.0):
            self._deaths_in_a_row = 0
        member.stats = stats
        return None

    def _replace(self, member: _Member, death: str) -> None:
        self._deaths_in_a_row += 1
        num_groups = self._bury(member)
        if self._deaths_in_a_row > self._limits.max_child_restarts:
            raise InfrastructureError(
                f"a producer in a Ray actor {death}; {self._deaths_in_a_row} times with no group completed between"
            )
        log.warning("a producer in a Ray actor %s; %d groups are handed out again by the queue", death, num_groups)
        with self._lock:
            self._past.update({k: v for k, v in (member.stats or {}).items() if k not in ("running", "waiting")})
            self._past["actor_restarts"] += 1
            fresh = self._new_member()
            self._members[self._members.index(member)] = fresh
            fresh.actor.start.remote(self._is_suspended)

    def _new_member(self) -> _Member:
        name = f"producer-{self._num_started}"
        self._num_started += 1
        options = {"num_cpus": self._producers.num_cpus, "scheduling_strategy": "SPREAD", **as_here()}
        queue = self._queue.joined_by(name)
        actor = connect(self._queue.address).remote(_Actor).options(**options)
        return _Member(name, actor.remote(queue, self._spec, self._limits, self._rollouts_path))

    def _bury(self, member: _Member) -> int:
        """End what is left of it, and say so to the queue; how many groups it had."""
        connect(self._queue.address).kill(member.actor)
        return self._queue.lose(member.name)

    def _tell_all(self, what: str, *, is_suspended: bool) -> None:
        ray = connect(self._queue.address)
        with self._lock:
            self._is_suspended = is_suspended
            told = [getattr(member.actor, what).remote() for member in self._members]
        ray.wait(told, num_returns=max(len(told), 1), timeout=END_TIMEOUT_S) if told else None
