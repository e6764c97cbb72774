"""The file of finished rollouts agrees with the ledger, whatever a crash has left in it."""

from __future__ import annotations

import json
from pathlib import Path

from north_lightning.rollout import WindowedFIFOQueue
from north_lightning.rollout.records import append_records, forget_unended
from north_lightning.types import Rollout, RolloutGroup


def write(path: Path, *group_ids: int) -> None:
    append_records(path, [Rollout(f"task{i}", "terminal", "f", i, 0, 0) for i in group_ids])


def read(path: Path) -> list[int]:
    return [json.loads(line)["group_id"] for line in path.read_text().splitlines()]


def test_a_resumed_run_keeps_what_ended_and_samples_the_rest_again(tmp_path: Path) -> None:
    path, queue = tmp_path / "rollouts.jsonl", WindowedFIFOQueue(1, max_batches_ahead=3)
    for _ in range(4):
        queue.admit()
    queue.drop(1, "SandboxError")
    for group_id in (0, 2):
        queue.complete(RolloutGroup(group_id, "", "", []))
    queue.take(1)
    queue.release([0])
    write(path, 0, 1, 2, 7)
    with path.open("a") as file:
        file.write('{"group_id": 0, "torn')
    forget_unended(path, queue.end_of)
    assert read(path) == [0, 1]
    write(path, 2)
    assert read(path) == [0, 1, 2]


def test_a_fresh_run_in_the_folder_of_another_begins_with_no_rollouts(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    forget_unended(path, WindowedFIFOQueue(1, 1).end_of)
    assert not path.exists()
    write(path, 0, 1)
    forget_unended(path, WindowedFIFOQueue(1, 1).end_of)
    assert read(path) == []
