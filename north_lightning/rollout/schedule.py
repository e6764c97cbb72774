"""Which task a group works on: a pure function of (seed, group id), so a resumed run repeats the same stream of tasks.

In: tasks and a share per environment. Out: the task of any group id. It knows nothing of queues or rollouts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from north_lightning.errors import ConfigError
from north_lightning.rollout.seeds import derive_seed
from north_lightning.types import Task


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
        self._seed = seed
        self._dealt: list[tuple[str, int]] = []  # group id -> (environment, how many it was dealt before)
        self._counts = dict.fromkeys(self._shares, 0)

    def task(self, group_id: int) -> Task:
        """The task of this group."""
        while len(self._dealt) <= group_id:
            position = len(self._dealt) + 1
            behind = max(self._shares, key=lambda name: (self._shares[name] * position - self._counts[name], name))
            self._dealt.append((behind, self._counts[behind]))
            self._counts[behind] += 1
        environment, count = self._dealt[group_id]
        tasks = self._tasks[environment]
        epoch, place = divmod(count, len(tasks))
        return tasks[self._order(environment, epoch)[place]]

    def _order(self, environment: str, epoch: int) -> list[int]:
        order = list(range(len(self._tasks[environment])))
        random.Random(derive_seed(self._seed, "tasks", environment, epoch)).shuffle(order)
        return order


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
