"""What every queue promises, shown on this one: its order, one end per group, nothing lost by a resume."""

from __future__ import annotations

import json

import pytest
from completion_order import CompletionOrderQueue

from north_lightning.errors import QueueError
from north_lightning.types import RolloutGroup


def group(group_id: int) -> RolloutGroup:
    return RolloutGroup(group_id, f"task{group_id}", "terminal", [])


def filled_queue() -> CompletionOrderQueue:
    queue = CompletionOrderQueue(num_slots=4)
    assert [queue.admit() for _ in range(5)] == [0, 1, 2, 3, None]
    return queue


def test_groups_are_trained_in_the_order_in_which_they_finish() -> None:
    queue = filled_queue()
    for group_id in (3, 1, 2):
        queue.complete(group(group_id))
    assert [member.group_id for member in queue.take(2) or []] == [3, 1]
    assert queue.take(2) is None
    assert queue.admit() is None
    queue.release([3, 1])
    assert [queue.admit(), queue.admit(), queue.admit()] == [4, 5, None]


def test_a_group_ends_once() -> None:
    queue = filled_queue()
    queue.drop(0, "SandboxError")
    queue.complete(group(1))
    for group_id in (0, 1, 9):
        with pytest.raises(QueueError):
            queue.complete(group(group_id))
        with pytest.raises(QueueError):
            queue.drop(group_id, "again")
    with pytest.raises(QueueError):
        queue.release([1])
    assert queue.stats()["dropped/SandboxError"] == 1.0


def test_a_resume_loses_nothing_and_repeats_nothing_trained() -> None:
    queue = filled_queue()
    for group_id in (2, 0):
        queue.complete(group(group_id))
    queue.take(1)
    queue.release([2])
    queue.drop(3, "SamplerError")
    resumed = CompletionOrderQueue(num_slots=4)
    resumed.load_state_dict(json.loads(json.dumps(queue.state_dict())))
    assert [resumed.admit() for _ in range(5)] == [0, 1, 4, 5, None]
    assert resumed.stats()["trained"] == 1.0
