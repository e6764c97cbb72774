"""Which task a group works on: a pure function of (seed, group id), so a resumed run repeats the same stream of tasks.

In: tasks and a share per environment; with a curriculum also how groups went, which is then part of the checkpoint.
Out: the task of any group id. It knows nothing of queues or rollouts.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from north_lightning.errors import ConfigError
from north_lightning.interfaces import TaskCurriculum
from north_lightning.seeds import derive_seed
from north_lightning.types import RolloutGroup, Task


class TaskSchedule:
    """Groups are dealt to the environment that is furthest behind its share; its tasks are dealt in shuffled epochs.

    Every prefix of the stream has the shares up to rounding: no environment depends on luck, and none runs dry.
    Within an environment each task comes once per epoch, in an order that differs from epoch to epoch.

    Args:
        tasks: All tasks; their order does not matter, their ids must differ.
        weights: Environment -> share (any positive scale). Default: in proportion to the number of tasks.
        seed: Of the order.
    """

    def __init__(self, tasks: Sequence[Task], weights: Mapping[str, float] | None = None, seed: int = 0) -> None:
        self._tasks: dict[str, list[Task]] = {}
        for task in sorted(tasks, key=lambda task: task.id):
            self._tasks.setdefault(task.environment, []).append(task)
        if len({task.id for task in tasks}) != len(tasks):
            raise ConfigError("tasks: expected every id once, got two tasks with the same id")
        self._shares = _shares(self._tasks, weights)
        self._by_id = {task.id: task for task in tasks}
        self._seed = seed
        self._orders: dict[str, tuple[int, list[int]]] = {}  # environment -> epoch, its order
        self._dealt: list[tuple[str, int]] = []  # group id -> (environment, how many it was dealt before)
        self._counts = dict.fromkeys(self._shares, 0)

    def task(self, group_id: int) -> Task:
        """The task of this group."""
        environment, count = self._place(group_id)
        tasks = self._tasks[environment]
        epoch, place = divmod(count, len(tasks))
        return tasks[self._order(environment, epoch)[place]]

    def observe(self, group: RolloutGroup) -> None:
        """A group was trained; nothing follows from it here."""

    def state_dict(self) -> dict[str, Any]:
        """What cannot be computed from the seed: here, nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken."""

    def _place(self, group_id: int) -> tuple[str, int]:
        """The environment of a group, and how many groups it was dealt before."""
        while len(self._dealt) <= group_id:
            position = len(self._dealt) + 1
            behind = max(self._shares, key=lambda name: (self._shares[name] * position - self._counts[name], name))
            self._dealt.append((behind, self._counts[behind]))
            self._counts[behind] += 1
        return self._dealt[group_id]

    def _order(self, environment: str, epoch: int) -> list[int]:
        known_epoch, order = self._orders.get(environment, (-1, []))
        if known_epoch != epoch:
            order = list(range(len(self._tasks[environment])))
            random.Random(derive_seed(self._seed, "tasks", environment, epoch)).shuffle(order)
            self._orders[environment] = (epoch, order)
        return order


class CurriculumSchedule(TaskSchedule):
    """Environments keep their shares and epochs their order, but a task is dealt in some epochs only.

    In every epoch a task gathers its weight, and is dealt when it has gathered a whole 1. So a task of weight w is
    dealt in w E of E epochs, to within one; the point at which it starts is random. None is ever given up.

    Args:
        tasks: As for ``TaskSchedule``, like the next two.
        weights: Of environments.
        seed: Of order and starting points.
        curriculum: Says how much each task weighs now.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        weights: Mapping[str, float] | None,
        seed: int,
        curriculum: TaskCurriculum,
    ) -> None:
        super().__init__(tasks, weights, seed)
        curriculum.begin(tasks)
        self._curriculum = curriculum
        self._lock = threading.Lock()  # dealt from the producer's thread, observed from the trainer's
        self._gathered = {task.id: random.Random(derive_seed(seed, "gathered", task.id)).random() for task in tasks}
        self._walked = dict.fromkeys(self._shares, 0)  # environment -> tasks considered so far
        self._num_assigned = 0
        self._assigned: dict[int, str] = {}  # group id -> task id, of groups that have not been trained

    def task(self, group_id: int) -> Task:
        with self._lock:
            while self._num_assigned <= group_id:
                environment, _ = self._place(self._num_assigned)
                self._assigned[self._num_assigned] = self._next(environment).id
                self._num_assigned += 1
            return self._by_id[self._assigned[group_id]]

    def observe(self, group: RolloutGroup) -> None:
        with self._lock:
            self._assigned.pop(group.group_id, None)
            self._curriculum.observe(group)

    def state_dict(self) -> dict[str, Any]:
        with self._lock:
            return {
                "gathered": dict(self._gathered),
                "walked": dict(self._walked),
                "num_assigned": self._num_assigned,
                "assigned": dict(self._assigned),
                "curriculum": self._curriculum.state_dict(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Tasks that are new to the run begin as in a fresh one; groups of tasks that are gone get another."""
        with self._lock:
            self._gathered |= {name: value for name, value in state["gathered"].items() if name in self._by_id}
            self._walked |= {name: count for name, count in state["walked"].items() if name in self._walked}
            self._num_assigned = state["num_assigned"]
            self._assigned = {}
            for group_id, task_id in state["assigned"].items():
                environment, _ = self._place(group_id)
                self._assigned[group_id] = task_id if task_id in self._by_id else self._next(environment).id
            self._curriculum.load_state_dict(state["curriculum"])

    def _next(self, environment: str) -> Task:
        tasks = self._tasks[environment]
        while True:
            epoch, place = divmod(self._walked[environment], len(tasks))
            self._walked[environment] += 1
            task = tasks[self._order(environment, epoch)[place]]
            weight = self._curriculum.weight(task.id)
            if not 0 < weight <= 1:
                name = type(self._curriculum).__name__
                raise ConfigError(
                    f"curriculum {name}: expected weights above 0 and at most 1, got {weight} ({task.id})"
                )
            self._gathered[task.id] += weight
            if self._gathered[task.id] >= 1:
                self._gathered[task.id] -= 1
                return task


def _shares(tasks: Mapping[str, Sequence[Task]], weights: Mapping[str, float] | None) -> dict[str, float]:
    if not tasks:
        raise ConfigError("tasks: expected at least one, got none")
    if weights is None:
        weights = {name: len(members) for name, members in tasks.items()}
    if set(weights) != set(tasks):
        raise ConfigError(
            f"environment_weights: expected one per environment of the tasks {sorted(tasks)}, got {sorted(weights)}"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
        raise ConfigError(f"environment_weights: expected positive numbers, got {dict(weights)}")
    total = math.fsum(weights.values())
    return {name: weights[name] / total for name in sorted(weights)}
