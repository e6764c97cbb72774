"""Recorded trajectories: every task in them, real observations, and wordings that do not give the kind of task away."""

from __future__ import annotations

from collections import defaultdict

import pytest

from north_lightning.data.sources import read_samples
from north_lightning.errors import ConfigError, TaskError
from north_lightning.harnesses import ReActTerminalHarness, SWEAgentHarness
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.rollout.trajectories import record_trajectories
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks.build import TaskSetSettings, build_task_sets
from north_lightning.tasks.software import KINDS
from north_lightning.verifiers import UnitTestVerifier

NUM_SOFTWARE = 4 * len(KINDS)


@pytest.fixture(scope="module")
def task_sets(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    build_task_sets(
        directory,
        [TaskSetSettings("swe", "swe", "train", NUM_SOFTWARE), TaskSetSettings("terminal", "terminal", "train", 3)],
    )
    return directory


def attempts_with(*environments):
    harnesses = {"terminal": ReActTerminalHarness(), "swe": SWEAgentHarness()}
    return AttemptSettings(
        harnesses={name: harnesses[name] for name in environments},
        verifier=UnitTestVerifier(),
        sandboxes=BubblewrapProvider(),
    )


def record(task_sets, output_dir, **settings):
    record_trajectories(task_sets, output_dir, attempts_with("terminal", "swe"), **settings)
    return {path.stem: list(read_samples(path)) for path in output_dir.iterdir()}


def test_every_task_is_recorded_with_wordings_independent_of_its_kind(task_sets, tmp_path):
    recorded = record([task_sets / "swe"], tmp_path, look_around_fraction=0)["swe"]
    assert sorted(one.task_id for one in recorded) == [f"swe-train-{index:05d}" for index in range(NUM_SOFTWARE)]
    prompts = defaultdict(set)
    for one in recorded:
        prompts[int(one.task_id[-5:]) % len(KINDS)].add(one.messages[0].content)
        assert [message.role for message in one.messages[:4]] == ["system", "user", "assistant", "tool"]
        assert "def " in one.messages[3].content  # what the view of the module really showed
    assert all(len(wordings) > 1 for wordings in prompts.values())


def test_a_look_around_comes_first_and_questions_are_written_beside_the_trajectories(task_sets, tmp_path):
    recorded = record([task_sets / "terminal"], tmp_path, look_around_fraction=1, num_questions=28)
    counts = {source: len(samples) for source, samples in recorded.items()}
    assert counts == {"terminal": 3, "commands": 28, "words": 28}
    for one in recorded["terminal"]:
        assert one.messages[2].tool_calls[0].arguments == {"keystrokes": "ls"}
    assert any(character.isdigit() for one in recorded["words"] for character in one.messages[-1].content)


def test_a_solution_that_does_not_solve_its_task_is_an_error_that_names_it(tmp_path):
    build_task_sets(tmp_path / "tasks", [TaskSetSettings("terminal", "terminal", "train", 1)])
    (test,) = (tmp_path / "tasks").rglob("test.sh")
    test.write_text("echo 0 > /logs/verifier/reward.txt\n")
    with pytest.raises(TaskError, match=r"terminal-train-00000: the scripted solution scored .*, expected 1"):
        record([tmp_path / "tasks" / "terminal"], tmp_path / "data")


def test_an_environment_without_harness_is_refused_before_anything_runs(task_sets, tmp_path):
    with pytest.raises(ConfigError, match="harnesses: expected one for every environment, none for swe"):
        record_trajectories([task_sets / "swe"], tmp_path / "data", attempts_with("terminal"))
    assert not (tmp_path / "data").exists()


def test_no_task_at_a_time_is_refused(task_sets, tmp_path):
    with pytest.raises(ConfigError, match="concurrency: expected at least 1, got 0"):
        record(task_sets, tmp_path, concurrency=0)
