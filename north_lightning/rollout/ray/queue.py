"""A rollout queue that lives in a Ray actor, for producers in other processes and on other machines.

In and out: as of every ``RolloutQueue``, each call one round trip. The actor holds the real queue and knows which
producer works on which group; what a lost producer has not finished is handed out again. It holds no settings of the
run, chooses no tasks, and executes nothing that it is sent.
"""

from __future__ import annotations

import secrets
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from north_lightning.errors import ConfigError, InfrastructureError, QueueError
from north_lightning.interfaces import RolloutQueue
from north_lightning.rollout.ray.cluster import NAMESPACE, as_here, connect
from north_lightning.rollout.ray.wire import pack, unpack
from north_lightning.sandbox.cpu_waits import slowdown
from north_lightning.types import RolloutGroup

HERE = "trainer"
"""Who calls, where it is no producer actor."""
_CONNECTING = threading.Lock()


class QueueService:
    """What the actor does; plain Python. Calls come one at a time.

    A group that two producers worked on (its head took too long, or its producer was taken for lost) ends with whoever
    is first; the other's end is a ``QueueError``, as in every queue.
    """

    def __init__(self, queue: RolloutQueue) -> None:
        self._queue = queue
        self._finished: dict[int, bytes] = {}
        self._owners: dict[int, str] = {}  # of groups in flight
        self._orphans: deque[int] = deque()
        self._interrupted: dict[str, list[int]] = defaultdict(list)

    def admit(self, producer: str) -> int | None:
        self._take_back_interrupted()
        group_id = self._orphans.popleft() if self._orphans else self._queue.admit()
        if group_id is not None:
            self._owners[group_id] = producer
            if group_id in self._interrupted[producer]:  # it had the group before, and starts it over
                self._interrupted[producer].remove(group_id)
        return group_id

    def complete(self, group: tuple[int, str, str], data: bytes) -> None:
        """``group``: its id, task and environment. The queue inside sees a group without rollouts."""
        self._queue.complete(RolloutGroup(*group, rollouts=[]))
        self._finished[group[0]] = data
        self._ended(group[0])

    def drop(self, group_id: int, reason: str) -> None:
        self._queue.drop(group_id, reason)
        self._ended(group_id)

    def take(self, num_groups: int) -> list[bytes] | None:
        groups = self._queue.take(num_groups)
        return None if groups is None else [self._finished.pop(group.group_id) for group in groups]

    def interrupted(self, producer: str) -> list[int]:
        self._take_back_interrupted()
        return self._interrupted.pop(producer, [])

    def lose(self, producer: str) -> int:
        """The producer is gone: hand its groups out again, oldest first. How many there were."""
        self._take_back_interrupted()
        lost = sorted(group_id for group_id, owner in self._owners.items() if owner == producer)
        for group_id in lost:
            del self._owners[group_id]
        self._orphans = deque(sorted([*self._orphans, *lost]))
        self._interrupted.pop(producer, None)
        return len(lost)

    def release(self, group_ids: list[int]) -> None:
        self._queue.release(group_ids)

    def end_of(self, group_id: int) -> str | None:
        return self._queue.end_of(group_id)

    def stats(self) -> dict[str, float]:
        return {**self._queue.stats(), "orphans": float(len(self._orphans))}

    def state_dict(self) -> dict[str, Any]:
        return self._queue.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._queue.load_state_dict(state)

    def _take_back_interrupted(self) -> None:
        """Before anything is handed out: what the queue has given up or hands out itself has no owner here."""
        for group_id in self._queue.interrupted():
            owner = self._owners.pop(group_id, None)
            if owner is not None:
                self._interrupted[owner].append(group_id)
            elif group_id in self._orphans:
                self._orphans.remove(group_id)

    def _ended(self, group_id: int) -> None:
        self._owners.pop(group_id, None)
        if group_id in self._orphans:
            self._orphans.remove(group_id)


class _Answers:
    """The actor's class: a ``QueueError`` is an answer, so that callers get it as itself."""

    def __init__(self, make: Callable[[], RolloutQueue]) -> None:
        self._service = QueueService(make())

    def call(self, method: str, *arguments: Any) -> tuple[Any, str | None]:
        try:
            return getattr(self._service, method)(*arguments), None
        except QueueError as error:
            return None, str(error)


class RayQueue(RolloutQueue):
    """``queue`` in a Ray actor. The actor is made at the first call, and ends with the process that made it.

    Its death, or silence for ``timeout_s``, is an ``InfrastructureError``: training ends, and goes on from the last
    checkpoint, as after the death of a trainer that holds its queue itself.

    Args:
        queue: Makes the queue inside, a ``WindowedFIFOQueue`` for example.
        address: Of a Ray cluster with token authentication, as ``ray.init`` takes it; by default a cluster is started
            on this machine, for this process.
        timeout_s: Limit for each call on an idle machine; on a busy one it grows with the load of each CPU.
    """

    def __init__(self, queue: Callable[[], RolloutQueue], address: str | None = None, timeout_s: float = 60.0) -> None:
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
        self._make = queue
        self.address = address
        self.timeout_s = timeout_s
        self.name = f"queue-{secrets.token_hex(8)}"
        self.producer = HERE
        self._like = queue()  # for questions about settings, which need no round trip
        self.groups_per_batch = self._like.groups_per_batch
        self.head_timeout_s, self.head_requeues = self._like.head_timeout_s, self._like.head_requeues
        self._actor: Any = None
        self._is_closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_actor": None, "_like": None}

    def max_policy_lag(self, push_every_k: int) -> int | None:
        """As of the queue inside."""
        return self._like.max_policy_lag(push_every_k)

    def joined_by(self, producer: str) -> RayQueue:
        """The same queue for a producer of that name, to be sent to it."""
        self._connected()
        joined = RayQueue(self._make, self.address, self.timeout_s)
        joined.name, joined.producer = self.name, producer
        return joined

    def admit(self) -> int | None:
        found: int | None = self._call("admit", self.producer)
        return found

    def complete(self, group: RolloutGroup) -> None:
        self._call("complete", (group.group_id, group.task_id, group.environment), pack(group))

    def drop(self, group_id: int, reason: str) -> None:
        self._call("drop", group_id, reason)

    def take(self, num_groups: int) -> list[RolloutGroup] | None:
        found = self._call("take", num_groups)
        return None if found is None else [unpack(data) for data in found]

    def release(self, group_ids: Iterable[int]) -> None:
        self._call("release", list(group_ids))

    def end_of(self, group_id: int) -> str | None:
        end: str | None = self._call("end_of", group_id)
        return end

    def interrupted(self) -> list[int]:
        """Those that this producer works on."""
        return list(self._call("interrupted", self.producer))

    def lose(self, producer: str) -> int:
        """As ``QueueService.lose``."""
        return int(self._call("lose", producer))

    def stats(self) -> Mapping[str, float]:
        """As of the queue inside; ``orphans`` are groups of lost producers that wait for another."""
        return dict(self._call("stats"))

    def state_dict(self) -> dict[str, Any]:
        return dict(self._call("state_dict"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._call("load_state_dict", dict(state))

    def close(self) -> None:
        """End the actor; no call after this one."""
        if self._actor is not None and self.producer == HERE:
            connect(self.address).kill(self._actor)
        self._is_closed = True

    def _connected(self) -> Any:
        with _CONNECTING:
            return self._actor_of(connect(self.address))

    def _actor_of(self, ray: Any) -> Any:
        if self._is_closed:
            raise InfrastructureError("the queue has been closed: training has ended")
        if self._actor is None:
            if self.producer == HERE:
                self._actor = ray.remote(_Answers).options(name=self.name, num_cpus=0, **as_here()).remote(self._make)
            else:
                self._actor = ray.get_actor(self.name, namespace=NAMESPACE)
        return self._actor

    def _call(self, method: str, *arguments: Any) -> Any:
        actor = self._connected()
        ray = connect(self.address)
        try:
            answer, problem = ray.get(actor.call.remote(method, *arguments), timeout=self.timeout_s * slowdown())
        except ray.exceptions.GetTimeoutError as error:
            raise InfrastructureError(f"the queue's actor did not answer {method} in {self.timeout_s:g} s") from error
        except (ray.exceptions.RayError, ValueError) as error:
            raise InfrastructureError(f"the queue's actor is gone ({method}): {error}") from error
        if problem is not None:
            raise QueueError(problem)
        return answer
