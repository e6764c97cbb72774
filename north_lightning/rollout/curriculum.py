"""Tasks are tried the more often the more an attempt at them can teach.

In: how often each task was solved. Out: its weight. It deals no task: that is ``schedule``'s part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from north_lightning.errors import ConfigError
from north_lightning.interfaces import TaskCurriculum
from north_lightning.rollout.metrics import is_solved
from north_lightning.types import Fraction, NotNegative, Positive, RolloutGroup, Task


class PassRateCurriculum(TaskCurriculum):
    """A task weighs ``max(min_weight, 4 p (1 - p))``, p being its pass rate of late.

    A binary reward has the variance p (1 - p), and with leave-one-out advantages that is what a group's gradient is
    made of: none where all attempts succeed or none, most where half do. Pass rates are remembered with decay, since
    the policy changes: before a group of G attempts of which S succeed, both sums are multiplied by ``memory``::

        solved = memory * solved + S        attempts = memory * attempts + G        p = solved / attempts

    They begin as if ``prior_attempts`` had been made, at the rate that calibration found (one half where it did not).

    Args:
        min_weight: Of tasks that are always or never solved; they come back in so many of all epochs.
        memory: Share of what was known that a new group leaves.
        prior_attempts: How much the rate before training counts.
    """

    def __init__(self, min_weight: Positive = 0.1, memory: Fraction = 0.7, prior_attempts: NotNegative = 8.0) -> None:
        if not 0 < min_weight <= 1:
            raise ConfigError(f"min_weight: expected above 0 and at most 1, got {min_weight}")
        if not 0 <= memory <= 1:
            raise ConfigError(f"memory: expected between 0 and 1, got {memory}")
        if not prior_attempts > 0:
            raise ConfigError(f"prior_attempts: expected a positive number, got {prior_attempts}")
        self.min_weight = min_weight
        self.memory = memory
        self.prior_attempts = prior_attempts
        self._solved: dict[str, float] = {}
        self._attempts: dict[str, float] = {}

    def begin(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self._attempts[task.id] = self.prior_attempts
            self._solved[task.id] = self.prior_attempts * float(task.metadata.get("pass_rate", 0.5))

    def pass_rate(self, task_id: str) -> float:
        """Of late, between 0 and 1."""
        return self._solved[task_id] / self._attempts[task_id]

    def weight(self, task_id: str) -> float:
        rate = self.pass_rate(task_id)
        return max(self.min_weight, 4.0 * rate * (1.0 - rate))

    def observe(self, group: RolloutGroup) -> None:
        solved = sum(map(is_solved, group.rollouts))
        self._solved[group.task_id] = self.memory * self._solved[group.task_id] + solved
        self._attempts[group.task_id] = self.memory * self._attempts[group.task_id] + len(group.rollouts)

    def state_dict(self) -> dict[str, Any]:
        return {"solved": dict(self._solved), "attempts": dict(self._attempts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Tasks that are new to the run keep what ``begin`` gave them."""
        known = self._attempts.keys()
        self._solved |= {name: value for name, value in state["solved"].items() if name in known}
        self._attempts |= {name: value for name, value in state["attempts"].items() if name in known}
