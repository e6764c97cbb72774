"""Rollouts with nothing faked but the model: real sandboxes, harnesses, generated tasks and unit tests."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from rollout_fakes import RecordingSampler, load_chat, numbered

from north_lightning.chat import ChatFormat
from north_lightning.harnesses import ReActTerminalHarness, SWEAgentHarness
from north_lightning.rollout import (
    ProducerSpec,
    RolloutProducer,
    RolloutRunner,
    WindowedFIFOQueue,
    record_scripted,
    script_of_calls,
)
from north_lightning.sampling.scripted import ScriptedSampler
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of, load_task, solution_steps, write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import AssistantAction, Rollout, Task, ToolCall
from north_lightning.verifiers import UnitTestVerifier

GENERATORS = {"terminal": terminal_task, "swe": software_task}
ANSWER = AssistantAction(content="Done.")


def make_task(directory: Path, environment: str, index: int = 3) -> Task:
    return load_task(write_task(GENERATORS[environment](index, 0, "train"), directory))


def solution(task: Task) -> list[AssistantAction]:
    steps = [AssistantAction(tool_calls=(ToolCall("", *step),)) for step in solution_steps(task)]
    return [*steps, ANSWER] if task.environment == "terminal" else steps


def runner(chat: ChatFormat, sampler: RecordingSampler | ScriptedSampler) -> RolloutRunner:
    return RolloutRunner(
        chat,
        sampler,
        BubblewrapProvider(),
        {"terminal": ReActTerminalHarness(), "swe": SWEAgentHarness()},
        UnitTestVerifier(),
        image_of,
        max_turn_tokens=600,
        max_context_tokens=8000,
        max_attempts=1,
    )


@pytest.mark.parametrize("environment", ["terminal", "swe"])
def test_a_model_that_knows_the_solution_scores_one_and_one_that_gives_up_zero(
    chat: ChatFormat, tmp_path: Path, environment: str
) -> None:
    task = make_task(tmp_path, environment)
    actions = [numbered(action, turn) for turn, action in enumerate(solution(task))]
    sampler = ScriptedSampler([chat.encode_action(action) for action in actions], policy_version=3)
    rollout = asyncio.run(runner(chat, sampler).run(task, 0, 0, seed=0))
    assert rollout.reward is not None
    assert (rollout.stop_reason, rollout.reward.value) == ("finished", 1.0), rollout.messages
    assert len(rollout.turns) == len(actions) >= 2
    for prompt, turn, action in zip(sampler.prompts, rollout.turns, actions, strict=True):
        assert rollout.token_ids[: turn.start] == prompt
        assert rollout.token_ids[turn.start : turn.end] == chat.encode_action(action)
        assert set(rollout.policy_versions[turn.start : turn.end]) == {3}
    tool_results = [message.content for message in rollout.messages if message.role == "tool"]
    text = chat.tokenizer.decode(rollout.token_ids)
    for result in tool_results[: len(actions) - 1]:
        assert result.splitlines()[0] in text

    gives_up = [ANSWER] if environment == "terminal" else solution(task)[-2:]  # submit, and submit again
    lazy = RecordingSampler(chat, gives_up)
    rollout = asyncio.run(runner(chat, lazy).run(task, 0, 1, seed=0))
    assert rollout.reward is not None
    assert (rollout.stop_reason, rollout.reward.value) == ("finished", 0.0)


def test_a_used_up_budget_is_verified_in_the_state_it_left(chat: ChatFormat, tmp_path: Path) -> None:
    source = terminal_task(3, 0, "train")
    task = make_task(tmp_path, "terminal")
    short = Task(
        task.id, task.environment, task.family, task.instruction, task.directory, len(source.steps), task.metadata
    )
    rollout = asyncio.run(runner(chat, RecordingSampler(chat, solution(task))).run(short, 0, 0, seed=0))
    assert rollout.reward is not None
    assert (rollout.stop_reason, rollout.reward.value) == ("max_turns", 1.0)


def test_scripted_solutions_record_what_really_happened(tmp_path: Path) -> None:
    for environment, harness in (("terminal", ReActTerminalHarness()), ("swe", SWEAgentHarness())):
        task = make_task(tmp_path, environment)
        rollout = asyncio.run(
            record_scripted(
                task,
                harness,
                script_of_calls(solution_steps(task)),
                sandboxes=BubblewrapProvider(),
                verifier=UnitTestVerifier(),
                image_of=image_of,
            )
        )
        assert rollout.reward is not None
        assert rollout.reward.value == 1.0
        assert sum(message.role == "tool" for message in rollout.messages) >= len(solution_steps(task)) - 1


def typing_runner(tokenizer_dir: Path, texts: Sequence[str], delay_s: float = 0.0) -> RolloutRunner:
    """In the rollout process: types ``texts`` into the terminal, then answers."""
    chat = load_chat(tokenizer_dir)
    typed = [AssistantAction(tool_calls=(ToolCall("", "terminal", {"keystrokes": text}),)) for text in texts]
    made = runner(chat, RecordingSampler(chat, [*typed, ANSWER], delay_s))
    made.harnesses = {"terminal": ReActTerminalHarness(command_timeout_s=1.0)}
    return made


def produce(tokenizer_dir: Path, tmp_path: Path, texts: Sequence[str], delay_s: float = 0.0) -> RolloutProducer:
    make_runner = partial(typing_runner, tokenizer_dir, texts, delay_s)
    spec = ProducerSpec([make_task(tmp_path, "terminal")], make_runner, group_size=2, max_concurrent_groups=1)
    producer = RolloutProducer(WindowedFIFOQueue(1, 0), spec, rollouts_path=tmp_path / "rollouts.jsonl")
    producer.start()
    return producer


def processes_below(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in "ZX":
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ctrl_c_works_in_a_terminal_of_the_rollout_process(tokenizer_dir: Path, tmp_path: Path) -> None:
    texts = ["sleep 100", "C-c", "echo survived"]
    producer = produce(tokenizer_dir, tmp_path, texts)
    group = None
    deadline = time.monotonic() + 100
    while group is None and time.monotonic() < deadline:
        producer.check()
        group = producer._queue.take(1)
        time.sleep(0.02)
    producer.stop()
    assert group is not None
    for rollout in group[0].rollouts:
        assert isinstance(rollout, Rollout)
        assert "survived" in rollout.messages[-2].content, rollout.messages


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_sandboxed_program_outlives_the_rollout_process(
    tokenizer_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    producer = produce(tokenizer_dir, tmp_path, ["setsid sleep 1000 &", "sleep 1000"] * 20, delay_s=0.05)
    pid = producer.child_pid
    assert pid is not None
    deadline = time.monotonic() + 100
    while len(processes_below(pid)) < 6 and time.monotonic() < deadline:
        producer.check()
        time.sleep(0.05)
    programs = processes_below(pid)
    assert len(programs) >= 6
    os.kill(pid, number)
    producer.stop()
    deadline = time.monotonic() + 100
    while any(map(exists, programs)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in programs if exists(pid)]


@pytest.mark.parametrize("names", ["b1 b2 b3 b4", "b1"])
def test_hard_links_that_outgrow_a_sandbox_are_the_attempts_failure(names, tmp_path):
    task = load_task(write_task(terminal_task(0, 0, "train"), tmp_path))
    commands = ("head -c 20000000 /dev/zero > a", f"for b in {names}; do ln a $b; done")
    rollout = asyncio.run(
        record_scripted(
            task,
            ReActTerminalHarness(),
            script_of_calls([("terminal", {"keystrokes": command}) for command in commands]),
            sandboxes=BubblewrapProvider(max_work_bytes=64 * 2**20),
            verifier=UnitTestVerifier(),
            image_of=image_of,
        )
    )
    assert rollout.reward.value == 0.0
    assert ("more bytes" in str(rollout.reward.details)) == (names != "b1")
