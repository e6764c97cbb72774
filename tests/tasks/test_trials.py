"""Tasks of several steps and verifiers apart, solved in real sandboxes and graded as Harbor grades them.

The verdicts expected here are Harbor's own (0.25.0, its trial, verifier and oracle agent), recorded by
``record_harbor_trials.py`` for the same directories and the same solutions.
"""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from harbor_trials import TRIALS, write_trial

from north_lightning.errors import SandboxError, VerifierError
from north_lightning.harnesses import MiniSWEAgentHarness, ReActTerminalHarness
from north_lightning.rollout.attempt import record_scripted, script_of_calls
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of, load_task
from north_lightning.types import AssistantAction, ToolCall
from north_lightning.verifiers import UnitTestVerifier

HARBOR = json.loads((Path(__file__).parent / "harbor_trials.json").read_text())
# An attempt could break what its next step needs, and keep the mean of the steps before: strict grading counts it 0.
BROKEN_STEPS = {"a setup that fails": 0.5, "a healthcheck that fails": 0.5}
HAND_IN = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


def solver(task):
    """Runs every step's ``solve.sh``, then hands in."""
    directories = [step.directory for step in task.steps] or [task.directory]
    commands = []
    for directory in directories:
        commands += [(directory / "solution" / "solve.sh").read_text(), HAND_IN]
    return script_of_calls([("bash", {"command": command}) for command in commands])


def attempt(task, provider=None, script=None, grading="strict"):
    verifier = UnitTestVerifier(timeout_s=30, grading=grading)
    return record_scripted(
        task, MiniSWEAgentHarness(), script or solver(task),
        sandboxes=provider or BubblewrapProvider(), verifier=verifier, image_of=image_of,
    )  # fmt: skip


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """The solution of every trial, four at a time."""

    async def solve_all():
        provider, four = BubblewrapProvider(), asyncio.Semaphore(4)

        async def solve(name):
            async with four:
                task = load_task(write_trial(name, tmp_path_factory.mktemp("trial")))
                return await attempt(task, provider, grading="official")

        return await asyncio.gather(*map(solve, TRIALS), return_exceptions=True)

    return dict(zip(TRIALS, asyncio.run(solve_all()), strict=True))


def task_is_mean_of_steps(name):
    return "steps/one/instruction.md" in TRIALS[name] and '"final"' not in TRIALS[name]["task.toml"]


@pytest.mark.parametrize("name", TRIALS)
def test_the_reward_is_harbors(name, rollouts):
    rollout, harbor = rollouts[name], HARBOR[name]
    if isinstance(rollout, Exception):
        raise rollout
    assert rollout.reward.value == harbor["rewards"]["reward"]
    steps = rollout.reward.details.get("steps", {})
    assert {step: said["reward"] for step, said in steps.items()} == {
        step: numbers["reward"] for step, numbers in harbor["steps"].items() if numbers is not None
    }
    verdicts = harbor["steps"].values()
    if task_is_mean_of_steps(name):
        is_whole = len(verdicts) == 2 and None not in verdicts
        assert rollout.reward.solved == (is_whole and all(numbers["reward"] == 1 for numbers in verdicts))
    assert (rollout.reward.numbers or {"reward": rollout.reward.value}) == harbor["rewards"]


@pytest.mark.parametrize("name", BROKEN_STEPS)
def test_strict_grading_counts_a_step_that_an_attempt_can_have_broken(name, tmp_path):
    rollout = asyncio.run(attempt(load_task(write_trial(name, tmp_path))))
    assert rollout.reward.value == BROKEN_STEPS[name] != HARBOR[name]["rewards"]["reward"]


def write_steps(parent, one, two, **files):
    """A task of two steps with these tests."""
    task = {"task.toml": '[[steps]]\nname = "one"\n[[steps]]\nname = "two"\n', "environment/files/given": "", **files}
    for name, condition in (("one", one), ("two", two)):
        task[f"steps/{name}/instruction.md"] = f"Step {name}.\n"
        task[f"steps/{name}/tests/test.sh"] = f"({condition}) && echo 1 >$OUT || echo 0 >$OUT\n".replace(
            "$OUT", "/logs/verifier/reward.txt"
        )
    for path, text in task.items():
        (parent / path).parent.mkdir(parents=True, exist_ok=True)
        (parent / path).write_text(text)
    return load_task(parent)


def test_steps_are_one_conversation_and_every_call_is_answered(rollouts):
    messages = rollouts["mean of the steps"].messages
    said = [message.content for message in messages if message.role == "user"]
    assert said[-1] == "Go on."
    calls = [call.id for message in messages for call in message.tool_calls]
    answers = [message.tool_call_id for message in messages if message.role == "tool"]
    assert calls == ["0", "1", "2", "3"]
    assert answers == ["0", "1", "2"]  # nothing comes after the last


def test_a_process_of_one_step_does_not_see_the_next(tmp_path):
    task = write_steps(tmp_path, "test -e alive", "test ! -e alive")
    keys = [
        "(while :; do touch alive; sleep 0.02; done) & while [ ! -e alive ]; do sleep 0.02; done\n",
        None,
        "rm -f alive; sleep 0.5\n",
        None,
    ]

    async def script(messages):
        said = keys[sum(message.role == "assistant" for message in messages)]
        if said is None:
            return AssistantAction(content="Done.")
        return AssistantAction(tool_calls=(ToolCall("", "terminal", {"keystrokes": said}),))

    rollout = asyncio.run(
        record_scripted(
            task, ReActTerminalHarness(), script,
            sandboxes=BubblewrapProvider(), verifier=UnitTestVerifier(timeout_s=30), image_of=image_of,
        )
    )  # fmt: skip
    assert rollout.reward.value == 1.0, rollout.reward.details


def test_a_step_that_nobody_works_at_any_more_is_verified_as_it_stands(tmp_path):
    task = replace(write_steps(tmp_path, "test -e a", "test -e b"), max_turns=2)
    script = script_of_calls([("bash", {"command": command}) for command in ("touch a", HAND_IN, "touch b", HAND_IN)])
    rollout = asyncio.run(attempt(task, script=script))
    assert (rollout.reward.value, rollout.stop_reason) == (0.5, "finished")
    assert not rollout.reward.solved
    rollout = asyncio.run(attempt(replace(task, max_turns=3), script=script))
    assert (rollout.reward.value, rollout.stop_reason) == (1.0, "max_turns")
    assert rollout.reward.solved


def test_the_agents_time_is_of_each_step(tmp_path):
    task = write_steps(tmp_path, "test -e a", "test -e b")
    steps = tuple(replace(step, task=replace(step.task, agent_timeout_s=0.2)) for step in task.steps)
    commands = ("touch a; sleep 0.3", "touch b; sleep 0.3", "touch c")
    rollout = asyncio.run(
        attempt(replace(task, steps=steps), script=script_of_calls([("bash", {"command": one}) for one in commands]))
    )
    assert (rollout.reward.value, rollout.stop_reason) == (1.0, "timeout")
    assert [message.role for message in rollout.messages[-5:]] == ["assistant", "tool", "user", "assistant", "tool"]


def test_tests_that_say_no_reward_leave_the_attempt_ungraded(tmp_path):
    task = write_steps(tmp_path, "true", "true")
    (task.steps[1].directory / "tests" / "test.sh").write_text("true\n")
    with pytest.raises(VerifierError, match="neither reward.json nor reward.txt"):
        asyncio.run(attempt(task, script=script_of_calls([("bash", {"command": HAND_IN})] * 2)))


def test_a_step_whose_files_the_attempt_shuts_out_counts_nothing(tmp_path):
    task = write_steps(tmp_path, "true", "true", **{"steps/two/workdir/file": "x\n"})
    calls = [("bash", {"command": "mkdir -p file/file"}), ("bash", {"command": HAND_IN})]
    rollout = asyncio.run(attempt(task, script=script_of_calls(calls)))
    assert rollout.reward.value == 0.5
    assert "cannot be written" in rollout.reward.details["steps"]["two"]["reason"]


def test_a_first_step_that_cannot_begin_is_not_the_attempts_doing(tmp_path):
    task = write_steps(tmp_path, "true", "true", **{"steps/one/workdir/setup.sh": "exit 4\n"})
    with pytest.raises(SandboxError, match="setup.sh of step one ended with exit code 4"):
        asyncio.run(attempt(task, script=script_of_calls([])))


def test_links_left_as_artifacts_lead_nowhere_but_inside(tmp_path):
    """A link in place of a declared directory is handed over as a link, and nothing is read or written through it."""
    (tmp_path / "given").mkdir()
    task = write_steps(tmp_path / "given", "true", "true")
    toml = 'artifacts = ["/work/out", "/work/out/hostname", "/work/x"]\n[verifier]\nenvironment_mode = "separate"\n'
    (task.directory / "task.toml").write_text(toml)
    (task.directory / "instruction.md").write_text("Do it.\n")
    (task.directory / "environment" / "files" / "out").mkdir()
    (task.directory / "tests").mkdir()
    (task.directory / "tests" / "test.sh").write_text(
        '[ -L out ] && [ "$(readlink x)" = /etc/shadow ] && echo 0.5 >/logs/verifier/reward.txt\n'
    )
    cheat = "rm -r out; ln -s /etc out; ln -s /etc/shadow x"
    calls = [("bash", {"command": cheat}), ("bash", {"command": HAND_IN})]
    rollout = asyncio.run(attempt(load_task(task.directory), script=script_of_calls(calls)))
    assert rollout.reward.value == 0.5, rollout.reward.details
