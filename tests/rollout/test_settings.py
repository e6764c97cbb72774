"""Time limits that would turn a slow model into failing infrastructure are refused before anything runs."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
from rollout_fakes import EchoHarness, FakeSandboxes

from north_lightning.chat import train_tokenizer
from north_lightning.errors import ConfigError
from north_lightning.evaluation.command import evaluate
from north_lightning.harnesses import (
    MiniSWEAgentHarness,
    OpenCodeHarness,
    ReActTerminalHarness,
    SWEAgentHarness,
    Terminus2Harness,
    VariedHarness,
)
from north_lightning.interfaces import Harness
from north_lightning.rollout import ChatServer, Timeouts
from north_lightning.rollout.settings import AttemptSettings, RolloutSettings
from north_lightning.sandbox import HarborProvider
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


def test_a_stage_longer_than_the_attempt_names_both() -> None:
    with pytest.raises(ConfigError, match=r"timeouts.sample_s: expected at most timeouts.attempt_s, 3600, got 7200"):
        Timeouts(sample_s=7200)
    assert Timeouts(sample_s=7200, attempt_s=7200).sample_s == 7200


def test_commands_that_may_outlast_their_attempt_name_both() -> None:
    """They end an attempt as it stands; the attempt's own limit would drop it."""
    harness = SWEAgentHarness(total_timeout_s=1800)
    for varied in (harness, VariedHarness(harness)):
        with pytest.raises(ConfigError, match=r"timeouts.attempt_s: expected more than the 1800 s that harnesses.term"):
            settings(varied, Timeouts(attempt_s=1800)).prepare([TASK])
        with pytest.raises(ConfigError, match=r"timeouts.act_s: expected more than the 30 s that harnesses.terminal"):
            settings(varied, Timeouts(act_s=30)).prepare([TASK])


def test_an_image_that_may_be_built_longer_than_a_sandbox_opens_names_both() -> None:
    assert HarborProvider("docker").open_limit_s == 600
    sandboxes = FakeSandboxes()
    type(sandboxes).open_limit_s, before = 60.0, type(sandboxes).open_limit_s
    try:
        with pytest.raises(ConfigError, match=r"timeouts.open_s: expected more than the 60 s that sandboxes \(Fake"):
            AttemptSettings(
                harnesses={"terminal": EchoHarness()}, verifier=UnitTestVerifier(), sandboxes=sandboxes
            ).prepare([TASK])
    finally:
        type(sandboxes).open_limit_s = before


def test_sample_s_reaches_the_client_of_every_server(tmp_path: Path) -> None:
    train_tokenizer(["some words to train on"], [], 400, tmp_path)
    rollouts = RolloutSettings(
        harnesses={"terminal": EchoHarness()}, verifier=UnitTestVerifier(), sandboxes=FakeSandboxes(),
        max_turn_tokens=8, max_context_tokens=64, timeouts=Timeouts(sample_s=3600),
    )  # fmt: skip
    runner = rollouts.make_runner(tmp_path, ["http://127.0.0.1:1", "http://127.0.0.1:2"])
    assert [one.sampler.timeout_s for one in runner.sampler.samplers] == [3600, 3600]


def test_what_a_chat_server_does_not_do_is_refused(tmp_path: Path) -> None:
    rollouts = RolloutSettings(
        harnesses={"terminal": EchoHarness()}, verifier=UnitTestVerifier(), sandboxes=FakeSandboxes(),
        max_turn_tokens=8, max_context_tokens=64, reasoning=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="rollouts.reasoning: expected false for a chat server"):
        rollouts.check_without_checkpoint()
    replace(rollouts, reasoning=False).check_without_checkpoint()
    servers, sidecar = {"one": ChatServer("http://127.0.0.1:1/v1", "m")}, functools.partial(print)
    with pytest.raises(ConfigError, match="rollouts.reasoning: expected false for a chat server"):
        evaluate([tmp_path], tmp_path, rollouts, servers=servers)
    with pytest.raises(ConfigError, match="sidecar: expected checkpoints for it to serve"):
        evaluate([tmp_path], tmp_path, replace(rollouts, reasoning=False), sidecar=sidecar, servers=servers)
