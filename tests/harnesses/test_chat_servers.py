"""Attempts by a model behind a chat server: a real HTTP server with known answers, real sandboxes."""

import asyncio
import time

import pytest
from peers.scripted_server import ScriptedServer

from north_lightning.errors import InfrastructureError, SamplerError
from north_lightning.harnesses import MiniSWEAgentHarness
from north_lightning.interfaces import RewardVerifier
from north_lightning.rollout import ChatServer, Timeouts
from north_lightning.rollout.chat_policy import ChatRunner
from north_lightning.types import Reward, SamplingParams

SUBMIT = {"tool_calls": [("bash", {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"})]}


class Accepts(RewardVerifier):
    async def verify(self, task, rollout, workdir, sandboxes):
        return Reward(float((workdir / "calc.py").read_text().endswith("a + b\n")))


class Patient(ScriptedServer):
    def turn_for(self, body, number):
        turn = super().turn_for(body, number)
        time.sleep(turn.get("after_s", 0))
        return turn


@pytest.fixture
def attempt(sandboxes, task):
    """The rollout of a server's turns, and the requests it got."""

    def run(turns, max_context_tokens=1000, **settings):
        async def one(server):
            runner = ChatRunner(
                ChatServer(server.url, "scripted", num_retries=0), SamplingParams(100), max_context_tokens,
                sandboxes=sandboxes, harnesses={"swe": MiniSWEAgentHarness()}, verifier=Accepts(),
                image_of=lambda task: task.directory / "environment" / "files", max_attempts=1, **settings,
            )  # fmt: skip
            try:
                return await runner.run(task, 0, 0, seed=0)
            finally:
                await runner.close()

        with Patient(turns) as server:
            return asyncio.run(one(server)), server.requests

    return run


def test_a_server_is_asked_turn_by_turn_and_its_work_is_verified(attempt):
    edit = {"content": "I fix it.", "tool_calls": [("bash", {"command": "sed -i 's/a - b/a + b/' calc.py"})]}
    rollout, requests = attempt([edit, SUBMIT])
    assert (rollout.stop_reason, rollout.reward.value) == ("finished", 1.0)
    assert [tool["function"]["name"] for tool in requests[0]["tools"]] == ["bash"]
    assert [message["role"] for message in requests[1]["messages"]] == ["system", "user", "assistant", "tool"]
    called, answered = requests[1]["messages"][2:]
    assert called["tool_calls"][0]["id"] == answered["tool_call_id"]
    assert called["reasoning_content"] == "I fix it."
    assert rollout.token_ids == []
    assert [turn.end - turn.start for turn in rollout.turns] == [5, 5]


def test_a_rejected_turn_is_not_shown_again_and_is_counted(attempt):
    rollout, requests = attempt([{"tool_calls": [("bash", "{broken")]}, SUBMIT])
    assert rollout.stop_reason == "finished"
    assert [message["role"] for message in requests[1]["messages"]] == ["system", "user", "user"]
    assert [turn.error is not None for turn in rollout.turns] == [True, False]


def test_a_conversation_too_long_for_the_server_ends_as_it_stands(attempt):
    refusal = {"status": 400, "error": "This model's maximum context length is 10 tokens"}
    assert attempt([refusal])[0].stop_reason == "context"
    look = {"tool_calls": [("bash", {"command": "ls"})]}
    assert attempt([look, look], max_context_tokens=15)[0].stop_reason == "context"


@pytest.mark.parametrize("answer", [{"status": 500, "error": "oh"}, {"status": 401, "error": "key"}])
def test_a_server_that_fails_is_no_reward(answer, attempt):
    with pytest.raises(InfrastructureError, match=str(answer["status"])):
        attempt([answer])


def test_sample_s_is_what_limits_a_turn(attempt):
    slow = {"content": "Done.", "after_s": 0.6}
    with pytest.raises(
        SamplerError, match=r"no answer within 0.3 s \(timeouts.sample_s\), for a turn of at most 100 t"
    ):
        attempt([slow], timeouts=Timeouts(sample_s=0.3))
    assert attempt([slow, SUBMIT], timeouts=Timeouts(sample_s=30))[0].stop_reason == "finished"


def test_the_same_turn_ten_times_ends_the_attempt(attempt, task):
    look = {"tool_calls": [("bash", {"command": "ls"})]}
    from north_lightning.rollout.circles import CircleDetector
    from north_lightning.types import Message

    rollout, _ = attempt([look] * 3 + [SUBMIT])
    circle = CircleDetector(3)
    ends = [i for i, message in enumerate(rollout.messages) if message.role == "tool"]
    assert [circle.closes(rollout.messages[: end + 1]) for end in ends] == [False, False, True]
    assert not circle.closes([*rollout.messages, Message("assistant", "else")])
