"""Our harnesses against recordings of the agents themselves: the same turns, the same observations, the same end.

The recordings were made by ``peers/record_*.py`` with the published agents. What is worded by us (prompts, errors) is
compared by kind, everything else byte for byte.
"""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from peers import scenarios

from north_lightning.harnesses import MiniSWEAgentHarness, OpenCodeHarness
from north_lightning.interfaces import Harness, RewardVerifier
from north_lightning.rollout.attempt import AttemptLoop, Policy
from north_lightning.types import Reward, Rollout, Task

PEERS = Path(__file__).parent / "peers"


class Accepts(RewardVerifier):
    async def verify(self, task, rollout, workdir, sandboxes):
        return Reward(1.0)


class Played(Policy):
    """Says what a scenario says, in the way a chat server's answers are read."""

    can_forget = True

    def __init__(self, turns):
        self.turns = list(turns)

    def begin(self, prompt): ...

    def observe(self, step): ...

    async def act(self, messages, next_call_id):
        from north_lightning.rollout.chat_policy import action_from_answer

        turn = self.turns.pop(0)
        calls = [
            {"function": {"name": name, "arguments": text if isinstance(text, str) else json.dumps(text)}}
            for name, text in turn.get("tool_calls", ())
        ]
        return action_from_answer({"content": turn.get("content"), "tool_calls": calls}, next_call_id)


@pytest.fixture
def played(sandboxes, tmp_path) -> Callable[..., Rollout]:
    """The rollout of a scenario's turns through a harness, in a real sandbox, on the scenarios' files."""

    def play(harness: Harness, turns, instruction: str = "add must add") -> Rollout:
        image = tmp_path / "image"
        for name, text in scenarios.FILES.items():
            (image / name).parent.mkdir(parents=True, exist_ok=True)
            (image / name).write_text(text)
        (image / ".git").mkdir(exist_ok=True)
        task = Task("t", "swe", "f", instruction, tmp_path, max_turns=len(turns))
        rollout = Rollout("t", "swe", "f", 0, 0, 0)
        loop = AttemptLoop(sandboxes, Accepts(), lambda task: image)
        asyncio.run(loop.run(task, harness, Played(turns), rollout, 0))
        return rollout

    return play


def tools_of(harness: Harness) -> list[dict]:
    task = Task("t", "swe", "f", "i", Path("/nowhere"), 1)
    return [
        scenarios.without_descriptions({"name": tool.name, "parameters": dict(tool.parameters)})
        for tool in harness.prompt(task).tools
    ]


# ---- mini-SWE-agent ------------------------------------------------------------------------------------------------

MINI = json.loads((PEERS / "mini_swe_agent.json").read_text())
MINI_ENDS = {"Submitted": "finished", "RepeatedFormatError": "invalid_action"}


def test_the_tool_of_mini_swe_agent_has_the_published_schema():
    assert tools_of(MiniSWEAgentHarness()) == MINI["tools"]


@pytest.mark.parametrize("scenario", MINI["scenarios"])
def test_mini_swe_agents_observations_and_ends_are_those_of_the_agent(scenario, played):
    form, name = scenario.split(": ")
    theirs = MINI["scenarios"][scenario]
    harness = MiniSWEAgentHarness(form=form, command_timeout_s=2 if name == "time-out" else 30)
    rollout = played(harness, scenarios.MINI_SWE_AGENT[name])
    ours = [
        {"role": message.role} | ({"content": scenarios.kept(message.content)} if message.role == "tool" else {})
        for message in rollout.messages[2:]
    ]
    expected = theirs["messages"]
    if rollout.stop_reason == "invalid_action":
        expected, ours = expected[:-1], ours[:-1]  # the peer answers the last error before it gives up
    assert ours == expected
    assert rollout.stop_reason == MINI_ENDS[theirs["exit_status"]]


# ---- OpenCode ------------------------------------------------------------------------------------------------------

OPENCODE = json.loads((PEERS / "opencode.json").read_text())


def test_opencodes_tools_have_the_published_names_order_and_schemas():
    assert tools_of(OpenCodeHarness()) == OPENCODE["tools"]


def files_by_path(content: str) -> str:
    """A listing of files, or of matches by file, in the order of paths: the agent lists them as it comes upon them."""
    if content.startswith("Found "):
        head, _, matches = content.partition("\n")
        blocks = sorted(matches.removesuffix("\n").split("\n\n\n"))
        return "\n\n\n".join([head, *blocks]) + matches[-1:]
    lines = content.split("\n")
    return "\n".join(sorted(lines)) if all(line.startswith("/work/") for line in lines) else content


@pytest.mark.parametrize("scenario", [name for name in OPENCODE["scenarios"] if name != "circle"])
def test_opencodes_observations_are_those_of_the_agent(scenario, played):
    turns = json.loads(json.dumps(scenarios.OPENCODE[scenario]).replace("WORK", "/work"))
    rollout = played(OpenCodeHarness(), [*turns, {"content": "Done."}])
    ours = [scenarios.kept(message.content) for message in rollout.messages[2:] if message.role != "assistant"]
    theirs = [message["content"] for message in OPENCODE["scenarios"][scenario] if message["role"] != "assistant"]
    assert list(map(files_by_path, ours)) == list(map(files_by_path, theirs))
    assert rollout.stop_reason == "finished"


def test_the_third_equal_call_in_a_row_ends_the_attempt(played):
    rollout = played(OpenCodeHarness(), scenarios.OPENCODE["circle"])
    assert [message.role for message in rollout.messages[2:]] == ["assistant", "tool"] * 2 + ["assistant"]
