"""Time limits that would turn a slow model into failing infrastructure are refused before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rollout_fakes import EchoHarness, FakeSandboxes

from north_lightning.errors import ConfigError
from north_lightning.harnesses import (
    MiniSWEAgentHarness,
    OpenCodeHarness,
    ReActTerminalHarness,
    SWEAgentHarness,
    Terminus2Harness,
)
from north_lightning.interfaces import Harness
from north_lightning.rollout import Timeouts
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.types import Task, TaskStep
from north_lightning.verifiers import Part, RewardSum, UnitTestVerifier

TASK = Task("task0", "terminal", "family", "do it", Path("task"), 4)
HARNESSES = (MiniSWEAgentHarness, OpenCodeHarness, ReActTerminalHarness, SWEAgentHarness, Terminus2Harness)


def settings(harness: Harness, timeouts: Timeouts | None = None, verifier_s: float = 60.0) -> AttemptSettings:
    verifier = RewardSum(Part(UnitTestVerifier(timeout_s=verifier_s)))
    return AttemptSettings(
        harnesses={"terminal": harness}, verifier=verifier, sandboxes=FakeSandboxes(), timeouts=timeouts
    )


@pytest.mark.parametrize("harness", HARNESSES)
def test_the_defaults_of_every_harness_go_together(harness: type[Harness]) -> None:
    assert harness().action_limit_s
    settings(harness()).prepare([TASK])


def test_a_command_that_may_outlast_its_stage_names_both() -> None:
    harness = ReActTerminalHarness(command_timeout_s=90)
    with pytest.raises(
        ConfigError,
        match=r"timeouts.act_s: expected more than the 90 s that harnesses.terminal \(ReActTerminalHarness\) .* got 90",
    ):
        settings(harness, Timeouts(act_s=90)).prepare([TASK])
    settings(harness, Timeouts(act_s=91)).prepare([TASK])
    settings(EchoHarness(), Timeouts(act_s=1)).prepare([TASK])


def test_tests_that_may_outlast_their_stage_name_both() -> None:
    with pytest.raises(
        ConfigError,
        match=r"timeouts.verify_s: expected more than the 300 s that verifier \(RewardSum\) gives the tests of task "
        r"'task0', got 300",
    ):
        settings(EchoHarness(), Timeouts(verify_s=300), verifier_s=300).prepare([TASK])
    # A limit that the task sets for its own tests is given beside the stage's.
    settings(EchoHarness(), Timeouts(verify_s=30)).prepare([replace(TASK, verifier_timeout_s=1800.0)])


def test_what_is_loaded_and_cannot_be_run_yet_is_named() -> None:
    task = replace(TASK, unsupported=("environment/docker-compose.yaml", "os 'windows'"))
    with pytest.raises(
        ConfigError, match=r"task0 asks for what cannot be had here: environment/docker-.*, os 'windows'"
    ):
        settings(EchoHarness()).prepare([task])


def test_the_limits_of_a_tasks_steps_are_checked_too() -> None:
    slow = TaskStep("one", Path("one"), replace(TASK, id="slow", verifier_timeout_s=None))
    with pytest.raises(ConfigError, match="gives the tests of task 'slow', got 300"):
        settings(EchoHarness(), Timeouts(verify_s=300), verifier_s=300).prepare([replace(TASK, steps=(slow,))])
