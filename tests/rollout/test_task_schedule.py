"""Which task a group gets: shares exact at every prefix, every task once per epoch, the same after a resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.errors import ConfigError
from north_lightning.rollout import TaskSchedule
from north_lightning.types import Task


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
