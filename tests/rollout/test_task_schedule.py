"""Which task a group gets: shares exact at every prefix, every task once per epoch, the same after a resume; and with
a curriculum, as often as the formula says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.errors import ConfigError
from north_lightning.interfaces import TaskCurriculum
from north_lightning.rollout import PassRateCurriculum, TaskSchedule
from north_lightning.rollout.schedule import CurriculumSchedule
from north_lightning.types import Reward, Rollout, RolloutGroup, Task


def tasks(**counts: int) -> list[Task]:
    return [
        Task(f"{environment}{i}", environment, "family", "go", Path("/none"), 4)
        for environment, count in counts.items()
        for i in range(count)
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4), st.integers(0, 300))
def test_shares_are_exact_up_to_rounding_at_every_prefix(weights: list[float], length: int) -> None:
    names = [f"e{i}_" for i in range(len(weights))]
    schedule = TaskSchedule(tasks(**dict.fromkeys(names, 3)), dict(zip(names, weights, strict=True)))
    dealt = Counter(schedule.task(i).environment for i in range(length))
    tolerance = max(1.0, (len(weights) - 1) / 2) + 1e-9
    for name, weight in zip(names, weights, strict=True):
        assert abs(dealt[name] - length * weight / sum(weights)) <= tolerance


def test_every_task_comes_once_per_epoch_in_changing_order() -> None:
    schedule = TaskSchedule(tasks(terminal=7), seed=3)
    epochs = [[schedule.task(epoch * 7 + i).id for i in range(7)] for epoch in range(5)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_task_depends_on_seed_and_group_id_only() -> None:
    members = tasks(terminal=9, swe=4)
    weights = {"terminal": 0.7, "swe": 0.3}
    forwards = TaskSchedule(members, weights, seed=5)
    backwards = TaskSchedule(members[::-1], dict(reversed(weights.items())), seed=5)
    expected = [forwards.task(i).id for i in range(100)]
    assert [backwards.task(i).id for i in reversed(range(100))][::-1] == expected
    assert [TaskSchedule(members, weights, seed=6).task(i).id for i in range(100)] != expected


def test_without_weights_every_task_is_as_likely_as_any_other() -> None:
    schedule = TaskSchedule(tasks(terminal=3, swe=1))
    assert Counter(schedule.task(i).id for i in range(40)) == dict.fromkeys(
        (t.id for t in tasks(terminal=3, swe=1)), 10
    )


@pytest.mark.parametrize(
    ("members", "weights", "message"),
    [
        ([], None, "at least one"),
        (tasks(terminal=1), {"terminal": 1.0, "swe": 1.0}, "environment_weights"),
        (tasks(terminal=1, swe=1), {"terminal": 1.0}, "environment_weights"),
        (tasks(terminal=1), {"terminal": 0.0}, "positive"),
        (tasks(terminal=1) * 2, None, "same id"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    members: list[Task], weights: dict[str, float] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TaskSchedule(members, weights)


# ---- curriculum ----------------------------------------------------------------------------------------------------


class Fixed(TaskCurriculum):
    """Weights that are given; remembers what it was told."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.observed: list[int] = []

    def begin(self, tasks: Sequence[Task]) -> None: ...

    def weight(self, task_id: str) -> float:
        return self.weights[task_id]

    def observe(self, group: RolloutGroup) -> None:
        self.observed.append(group.group_id)

    def state_dict(self) -> dict[str, Any]:
        return {"observed": self.observed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.observed = list(state["observed"])


def group(group_id: int, task_id: str, solved: int, attempts: int) -> RolloutGroup:
    rollouts = [Rollout(task_id, "terminal", "family", group_id, i, 0) for i in range(attempts)]
    for index, rollout in enumerate(rollouts):
        rollout.reward = Reward(float(index < solved))
    return RolloutGroup(group_id, task_id, "terminal", rollouts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=8), st.integers(1, 400), st.integers(0, 9))
def test_a_task_is_dealt_in_its_share_of_the_epochs(weights: list[float], num_groups: int, seed: int) -> None:
    """Against the sum of weights: all tasks of an environment have been through the same epochs but for the last."""
    members = tasks(terminal=len(weights))
    schedule = CurriculumSchedule(members, None, seed, Fixed({t.id: w for t, w in zip(members, weights, strict=True)}))
    dealt = Counter(schedule.task(i).id for i in range(num_groups))
    epochs = schedule.state_dict()["walked"]["terminal"] / len(weights)
    for task, weight in zip(members, weights, strict=True):
        assert abs(dealt[task.id] - weight * epochs) <= 2.0 + 1e-6  # to within one, and the epoch that is not over


def test_tasks_of_full_weight_are_dealt_as_without_a_curriculum_and_environments_keep_their_shares() -> None:
    members, weights = tasks(terminal=7, swe=3), {"terminal": 0.4, "swe": 0.6}
    plain = TaskSchedule(members, weights, seed=5)
    full = CurriculumSchedule(members, weights, 5, Fixed(dict.fromkeys((task.id for task in members), 1.0)))
    assert [full.task(i).id for i in range(100)] == [plain.task(i).id for i in range(100)]
    rarely = CurriculumSchedule(members, weights, 5, Fixed({t.id: 0.1 if "swe" in t.id else 1.0 for t in members}))
    assert [rarely.task(i).environment for i in range(100)] == [plain.task(i).environment for i in range(100)]


def test_the_weight_follows_the_pass_rate_by_the_formula() -> None:
    (task,) = tasks(terminal=1)
    calibrated = Task(**{name: getattr(task, name) for name in task.__slots__} | {"metadata": {"pass_rate": 0.75}})
    curriculum = PassRateCurriculum(min_weight=0.2, memory=0.5, prior_attempts=4)
    curriculum.begin([calibrated])
    assert curriculum.weight(task.id) == pytest.approx(4 * 0.75 * 0.25)
    curriculum.observe(group(0, task.id, solved=8, attempts=8))
    rate = (0.5 * 3 + 8) / (0.5 * 4 + 8)
    assert curriculum.pass_rate(task.id) == pytest.approx(rate)
    assert curriculum.weight(task.id) == pytest.approx(max(0.2, 4 * rate * (1 - rate)))
    for _ in range(20):
        curriculum.observe(group(0, task.id, solved=8, attempts=8))
    assert curriculum.weight(task.id) == 0.2  # always solved, and still seen now and then
    for _ in range(3):
        curriculum.observe(group(0, task.id, solved=0, attempts=8))
    assert 0.2 < curriculum.weight(task.id) < 1  # the policy has forgotten it
    uncalibrated = PassRateCurriculum()
    uncalibrated.begin([task])
    assert uncalibrated.weight(task.id) == 1.0


def test_a_resumed_curriculum_deals_the_same_tasks() -> None:
    members, weights = tasks(terminal=5, swe=4), {"terminal": 0.5, "swe": 0.5}

    def run(schedule: TaskSchedule, group_ids: range) -> list[str]:
        dealt = []
        for group_id in group_ids:
            task = schedule.task(group_id)
            dealt.append(task.id)
            if group_id % 3:  # the others are still in flight
                schedule.observe(group(group_id, task.id, solved=group_id % 9, attempts=8))
        return dealt

    whole = CurriculumSchedule(members, weights, 3, PassRateCurriculum())
    expected = run(whole, range(120))
    first, second = (CurriculumSchedule(members, weights, 3, PassRateCurriculum()) for _ in range(2))
    begun = run(first, range(50))
    second.load_state_dict(json.loads(json.dumps(first.state_dict()), object_hook=_integer_keys))
    assert [second.task(i).id for i in range(0, 50, 3)] == begun[::3]  # those in flight are begun anew, the same
    assert begun + run(second, range(50, 120)) == expected


def _integer_keys(mapping: dict[str, Any]) -> dict[Any, Any]:
    """JSON's keys are text; a checkpoint's are what they were."""
    return {int(key) if key.isdigit() else key: value for key, value in mapping.items()}


def test_a_resumed_run_may_have_other_tasks() -> None:
    before = CurriculumSchedule(tasks(terminal=3), None, 0, PassRateCurriculum())
    pending = [before.task(i).id for i in range(3)]
    after = CurriculumSchedule(tasks(terminal=5)[2:], None, 0, PassRateCurriculum())
    after.load_state_dict(before.state_dict())
    again = [after.task(i).id for i in range(6)]
    assert [now for now, then in zip(again, pending, strict=False) if then == "terminal2"] == ["terminal2"]
    assert set(again) == {"terminal2", "terminal3", "terminal4"}


@pytest.mark.parametrize("weight", [0.0, 1.5, float("nan")])
def test_a_weight_that_cannot_be_a_share_of_epochs_is_refused(weight: float) -> None:
    schedule = CurriculumSchedule(tasks(terminal=1), None, 0, Fixed({"terminal0": weight}))
    with pytest.raises(ConfigError, match="curriculum Fixed: expected weights above 0 and at most 1"):
        schedule.task(0)


@pytest.mark.parametrize("setting", [{"min_weight": 0.0}, {"memory": 1.1}, {"prior_attempts": 0.0}])
def test_curriculum_settings_that_cannot_work_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        PassRateCurriculum(**setting)
