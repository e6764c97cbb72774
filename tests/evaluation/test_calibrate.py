"""Which tasks a calibration keeps, with what budget, and what it writes down, against counts by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from north_lightning.errors import ConfigError
from north_lightning.evaluation import calibrate as module
from north_lightning.evaluation.attempts import Attempt
from north_lightning.evaluation.calibrate import budget, calibrate
from north_lightning.tasks import load_tasks, write_task
from north_lightning.tasks.terminal import terminal_task

SOLVED_IN = {0: [2, 3, 4, 9], 1: [None, 2, None, 4], 2: [None] * 4, 3: [3, None, None, None]}
"""Task -> the turns of each attempt, None where it fails."""


@pytest.fixture
def task_set(tmp_path: Path) -> Path:
    for index in SOLVED_IN:
        write_task(terminal_task(index, 0, "train"), tmp_path / "tasks")
    return tmp_path / "tasks"


def attempt(name: str, seed: int, turns: int | None) -> Attempt:
    labels = ("c", "w", name, name, "terminal", "even" if int(name[-1]) % 2 == 0 else "odd", "h")
    return Attempt(*labels, seed, float(turns is not None), solved=turns is not None, turns=turns or 7)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_attempts(tasks: Any, *settings: Any) -> dict[str, list[Attempt]]:
        measured = [attempt(task.id, seed, t) for task in tasks for seed, t in enumerate(SOLVED_IN[int(task.id[-1])])]
        return {"calibration": measured}

    monkeypatch.setattr(module, "check_serving", lambda *_: None)
    monkeypatch.setattr(module, "plan_each", lambda checkpoints, servers, tasks, *settings: tasks)
    monkeypatch.setattr(module, "attempt_each", all_attempts)


def test_tasks_solved_sometimes_are_kept_with_a_budget_from_their_solved_lengths(
    task_set: Path, attempts: None, tmp_path: Path
) -> None:
    output = tmp_path / "rl.jsonl"
    calibrate(tmp_path, [task_set], output, None, None, spare_turns=1)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["directory"][-1], row["max_turns"], row["pass_rate"]) for row in rows] == [
        ("1", 5, 0.5),
        ("3", 4, 0.25),
    ]
    assert [task.metadata["pass_rate"] for task in load_tasks(output)] == [0.5, 0.25]  # what a curriculum begins with
    numbers = json.loads((tmp_path / "rl.distribution.json").read_text())
    assert numbers["tasks_by_pass_rate"] == {"0": 1, "0.25": 1, "0.5": 1, "1": 1}
    assert numbers["solved_attempts_by_turns"] == {"2": 2, "3": 2, "4": 2, "9": 1}
    assert numbers["kept_tasks_by_budget"] == {"4": 1, "5": 1}
    assert numbers["by_family"]["odd"] == {
        "tasks": 2, "pass_rate": 3 / 8, "solved_turns_p50": 3.0, "solved_turns_p90": 3.8, "solved_turns_max": 4,
    }  # fmt: skip
    picture = (tmp_path / "rl.distribution.svg").read_text()
    assert picture.startswith("<?xml")
    calibrate(tmp_path, [task_set], output, None, None, spare_turns=1)  # type: ignore[arg-type]
    assert (tmp_path / "rl.distribution.svg").read_text().count("<path") == picture.count("<path")


@pytest.mark.parametrize(("quantile", "expected"), [(1.0, 10), (0.5, 5), (0.9, 9), (0.01, 4)])
def test_a_budget_is_a_quantile_plus_what_is_spare(quantile: float, expected: int) -> None:
    solved = [attempt("t0", seed, turns) for seed, turns in enumerate((2, 3, 4, 9))]
    assert budget(solved, quantile, 1, 20) == expected
    assert budget(solved, quantile, 1, 4) == 4


def test_a_quantile_beyond_its_range_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="budget_quantile"):
        calibrate(tmp_path, [], tmp_path / "rl.jsonl", None, None, budget_quantile=0.0)  # type: ignore[arg-type]
