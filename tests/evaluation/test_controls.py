"""Solutions score 1 and untouched tasks 0, or the evaluation is refused."""

import json
from pathlib import Path

import pytest

from north_lightning.errors import DataError
from north_lightning.evaluation.controls import check_controls, run_controls
from north_lightning.harnesses import ReActTerminalHarness, SWEAgentHarness
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import load_task, write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import Task
from north_lightning.verifiers import UnitTestVerifier


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    sources = [terminal_task(0, 0, "heldout"), software_task(0, 0, "heldout"), terminal_task(1, 0, "heldout")]
    return [load_task(write_task(source, tmp_path / "tasks")) for source in sources]


@pytest.fixture
def settings() -> AttemptSettings:
    harnesses = {"terminal": ReActTerminalHarness(), "swe": SWEAgentHarness()}
    return AttemptSettings(harnesses=harnesses, verifier=UnitTestVerifier(), sandboxes=BubblewrapProvider())


def test_solutions_score_1_and_untouched_tasks_0(tasks: list[Task], settings: AttemptSettings, tmp_path: Path) -> None:
    found = run_controls(tasks, settings, tmp_path / "controls.json", 2)
    assert found == {task.id: {"gold": True, "noop": False, "why": ""} for task in tasks}
    assert check_controls(found, []) == {"gold": 1.0, "noop": 0.0, "exceptions": {}}


def test_what_fails_is_named_and_may_be_an_exception(
    tasks: list[Task], settings: AttemptSettings, tmp_path: Path
) -> None:
    (tasks[0].directory / "solution" / "solve.sh").write_text("true\n")
    (tasks[2].directory / "tests" / "test.sh").write_text("echo 1 >/logs/verifier/reward.txt\n")
    found = run_controls(tasks, settings, tmp_path / "controls.json", 2)
    with pytest.raises(
        DataError, match=r"2 of 3 tasks that do not .*does not score 1; .*untouched task scores 1"
    ) as error:
        check_controls(found, [])
    assert tasks[0].id in str(error.value)
    assert tasks[2].id in str(error.value)
    checked = check_controls(found, [tasks[0].id, tasks[2].id])
    assert (checked["gold"], checked["noop"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    with pytest.raises(DataError, match="expected ids of tasks, got nobody"):
        check_controls(found, ["nobody"])


def test_controls_are_run_again_only_where_task_or_grading_has_changed(
    tasks: list[Task], settings: AttemptSettings, tmp_path: Path
) -> None:
    path = tmp_path / "controls.json"
    run_controls(tasks, settings, path, 2)
    known = json.loads(path.read_text())
    for one in known.values():
        one["why"], one["gold"] = "", False  # what a new run would not say
    path.write_text(json.dumps(known))
    (tasks[1].directory / "tests" / "more.py").write_text("")
    found = run_controls(tasks, settings, path, 2)
    assert [found[task.id]["gold"] for task in tasks] == [False, True, False]


def test_a_verdict_that_could_not_be_had_is_no_pass_and_is_tried_again(
    tasks: list[Task], settings: AttemptSettings, tmp_path: Path
) -> None:
    test = tasks[0].directory / "tests" / "test.sh"
    text = test.read_text()
    test.write_text("exit 0\n")
    path = tmp_path / "controls.json"
    found = run_controls(tasks[:1], settings, path, 2)
    with pytest.raises(DataError, match="wrote neither reward.json nor reward.txt"):
        check_controls(found, [])
    (tasks[0].directory / "solution" / "solve.sh").unlink()
    test.write_text(text)
    found = run_controls(tasks[:1], settings, path, 2)
    with pytest.raises(DataError, match=r"it has no solution/solve.sh"):
        check_controls(found, [])
