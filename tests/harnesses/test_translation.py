"""A trajectory told by another harness does the same: every call of every pair of harnesses, executed."""

import asyncio
import hashlib
import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fuzz import make_chat
from translation_scripts import FILES, SCRIPTS, bash, edit, keys, reply

from north_lightning.data.filters import default_filters
from north_lightning.data.formats import Trajectories
from north_lightning.data.sources import SampleReader
from north_lightning.errors import ConfigError, RetellingError, SandboxError
from north_lightning.harnesses import (
    HarnessTranslation,
    MiniSWEAgentHarness,
    OpenCodeHarness,
    ReActTerminalHarness,
    SWEAgentHarness,
    Terminus2Harness,
)
from north_lightning.harnesses.actions import Replace
from north_lightning.harnesses.dialects import DIALECTS, OpenCode
from north_lightning.harnesses.translation import translate
from north_lightning.interfaces import RewardVerifier
from north_lightning.rollout.attempt import record_scripted
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of
from north_lightning.types import AssistantAction, Conversation, Reward, Task, ToolCall

HARNESSES = {
    harness.name: harness
    for harness in (
        SWEAgentHarness(),
        MiniSWEAgentHarness(),
        OpenCodeHarness(),
        ReActTerminalHarness(),
        Terminus2Harness(),
    )
}
PAIRS = list(itertools.permutations(HARNESSES, 2))


@dataclass
class KeepsTrees(RewardVerifier):
    """Remembers what was in ``/work`` at the end, as read on this side of the sandbox."""

    trees: dict[int, dict[str, str]] = field(default_factory=dict)

    async def verify(self, task, rollout, workdir, sandboxes):
        files = (path for path in workdir.rglob("*") if path.is_file() and ".git" not in path.parts)
        self.trees[id(rollout)] = {
            str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }
        return Reward(1.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    directory = tmp_path_factory.mktemp("task")
    for name, text in FILES.items():
        path = directory / "environment" / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (directory / "environment" / "files" / ".git").mkdir()
    return Task("calc", "swe", "tiny", "add must add", directory, 40)


async def record(task, harness, turns, sandboxes, verifier=None, wording=0):
    """The rollout of turns, as they are, through a harness."""
    said = iter(turns)

    async def script(messages):
        reasoning, rest = next(said)
        if isinstance(rest, str):
            return AssistantAction(reasoning, rest)
        return AssistantAction(reasoning, tool_calls=tuple(ToolCall("", name, args) for name, args in rest))

    return await record_scripted(
        task, harness, script, sandboxes=sandboxes, verifier=verifier or KeepsTrees(), image_of=image_of,
        variation=wording,
    )  # fmt: skip


def sample_of(rollout, task, harness) -> Conversation:
    return Conversation(tuple(rollout.messages), harness.prompt(task).tools, harness=harness.name, task_id=task.id)


def turns_of(sample: Conversation):
    return [
        (m.reasoning, [(call.name, dict(call.arguments)) for call in m.tool_calls] or m.content)
        for m in sample.messages
        if m.role == "assistant"
    ]


def translated(sample, task, target, sandboxes, wording=0) -> Conversation:
    source = HARNESSES[sample.harness]
    opening = len(source.prompt(task).messages)
    return asyncio.run(translate(sample, opening, task, source, HARNESSES[target], sandboxes, wording))


@pytest.fixture(scope="module")
def told(task, sandboxes):
    """Every script recorded by its harness and told by each other one, and what each left in ``/work``."""

    async def all_pairs():
        slots = asyncio.Semaphore(8)

        async def first(name):
            async with slots:
                verifier = KeepsTrees()
                rollout = await record(task, HARNESSES[name], SCRIPTS[name], sandboxes, verifier)
                return sample_of(rollout, task, HARNESSES[name]), verifier.trees[id(rollout)]

        originals = dict(zip(HARNESSES, await asyncio.gather(*map(first, HARNESSES)), strict=True))

        async def pair(source, target):
            async with slots:
                sample = originals[source][0]
                opening = len(HARNESSES[source].prompt(task).messages)
                return await translate(sample, opening, task, HARNESSES[source], HARNESSES[target], sandboxes, 1)

        return originals, dict(zip(PAIRS, await asyncio.gather(*(pair(*names) for names in PAIRS)), strict=True))

    return asyncio.run(all_pairs())


def test_told_calls_played_by_the_agent_loop_give_their_own_observations_and_the_same_files(told, task, sandboxes):
    originals, pairs = told

    async def play_all():
        slots = asyncio.Semaphore(8)

        async def one(names, sample):
            async with slots:
                verifier = KeepsTrees()
                harness = HARNESSES[names[1]]
                rollout = await record(task, harness, turns_of(sample), sandboxes, verifier, wording=1)
                return rollout, verifier.trees[id(rollout)]

        return await asyncio.gather(*(one(names, sample) for names, sample in pairs.items()))

    for (names, sample), (rollout, tree) in zip(pairs.items(), asyncio.run(play_all()), strict=True):
        assert rollout.stop_reason == "finished", names
        assert tuple(rollout.messages) == sample.messages, names
        assert tree == originals[names[0]][1], names


def test_what_was_thought_and_done_is_told_in_the_targets_own_words(told, task):
    originals, pairs = told
    for (source, target), sample in pairs.items():
        assert sample.harness == target
        assert sample.tools == HARNESSES[target].prompt(task).tools
        first = next(m for m in originals[source][0].messages if m.role == "assistant")
        assert next(m for m in sample.messages if m.role == "assistant").reasoning.startswith(first.reasoning)
        ids = [call.id for message in sample.messages for call in message.tool_calls]
        assert ids == [str(number) for number in range(len(ids))]
        for check in default_filters():
            assert check.find_fault(sample) is None, (source, target, check.reason)
    to_opencode = [call for m in pairs["swe_agent", "opencode"].messages for call in m.tool_calls]
    assert [call.name for call in to_opencode][:5] == ["bash", "read", "read", "read", "read"]
    assert {"write", "edit"} <= {call.name for call in to_opencode}
    assert "I look with edit." in [m.reasoning for m in pairs["swe_agent", "opencode"].messages]


def test_exactly_the_assistants_turns_are_trained_after_telling(told, tmp_path):
    chat = replace_reasoning(make_chat(tmp_path / "tokenizer"))
    for sample in told[1].values():
        encoded = chat.encode_conversation(sample.messages, sample.tools, "told")
        trained = [token for token, mask in zip(encoded.token_ids, encoded.loss_mask, strict=True) if mask]
        turns = [m for m in sample.messages if m.role == "assistant"]
        expected = [t for m in turns for t in chat.encode_action(AssistantAction(m.reasoning, m.content, m.tool_calls))]
        assert trained == expected


def replace_reasoning(chat):
    return type(chat)(chat.tokenizer, reasoning=True)


# ---- what is not told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "turns", "target", "reason"),
    [
        ("swe_agent", [("", [edit("undo_edit", "/work/calc.py")])], "opencode", "no_counterpart"),
        ("swe_agent", [("", [("submit", {})]), ("", [bash("ls")])], "opencode", "no_counterpart"),
        ("opencode", [("", [("glob", {"pattern": "*.py"})])], "swe_agent", "no_counterpart"),
        ("react_terminal", [("", keys("Up"))], "mini_swe_agent", "no_counterpart"),
        ("terminus2", [("", reply())], "mini_swe_agent", "no_counterpart"),
        ("terminus2", [("", "hm")], "mini_swe_agent", "unreadable_turn"),
        ("opencode", [("", [("read", {"path": "calc.py"})])], "swe_agent", "unreadable_turn"),
        ("swe_agent", [("", [edit("view", "/work")])], "opencode", "other_result"),
        ("swe_agent", [("", [edit("create", "/work/calc.py", file_text="")])], "opencode", "other_result"),
        ("swe_agent", [("", [bash("x=1")]), ("", [bash("echo [$x]")])], "mini_swe_agent", "other_result"),
        ("swe_agent", [("", [bash("x=1")]), ("", [bash("touch made$x")])], "opencode", "other_files"),
        ("mini_swe_agent", [("", [bash("cat > tab <<'EOF'\n\tx\nEOF")])], "terminus2", "other_files"),
    ],
)
def test_what_would_not_do_the_same_is_refused_with_its_reason(source, turns, target, reason, task, sandboxes):
    short = replace(task, max_turns=len(turns))
    rollout = asyncio.run(record(short, HARNESSES[source], turns, sandboxes))
    with pytest.raises(RetellingError) as refused:
        translated(sample_of(rollout, short, HARNESSES[source]), short, target, sandboxes)
    assert refused.value.reason == reason


def test_a_recording_that_its_own_harness_does_not_reproduce_is_refused(told, task, sandboxes):
    sample = told[0]["swe_agent"][0]
    last = max(i for i, message in enumerate(sample.messages) if "a - b" in message.content and message.role == "tool")
    messages = list(sample.messages)
    messages[last] = replace(messages[last], content=messages[last].content.replace("a - b", "a * b"))
    with pytest.raises(RetellingError) as refused:
        translated(replace(sample, messages=tuple(messages)), task, "opencode", sandboxes)
    assert refused.value.reason == "not_reproduced"


class Failing(BubblewrapProvider):
    async def open(self, image, read_only=None, writable=None):
        raise SandboxError("no sandbox today")


def test_a_sandbox_that_fails_is_a_reason_and_no_proof(told, task):
    with pytest.raises(RetellingError, match="no sandbox today") as refused:
        translated(told[0]["swe_agent"][0], task, "opencode", Failing())
    assert refused.value.reason == "not_executed"


def test_a_table_with_a_mistake_is_noticed_by_the_execution(told, task, sandboxes, monkeypatch):
    class Mistaken(OpenCode):
        def write(self, action, reasoning=""):
            if isinstance(action, Replace) and "fixed" in action.new:
                action = replace(action, new=action.new.replace("fixed", "fIxed"))
            return super().write(action, reasoning)

    monkeypatch.setitem(DIALECTS, "opencode", Mistaken())
    with pytest.raises(RetellingError, match=r"calc\.py") as refused:
        translated(told[0]["swe_agent"][0], task, "opencode", sandboxes)
    assert refused.value.reason == "other_files"


# ---- in a config ---------------------------------------------------------------------------------------------------


@pytest.fixture
def task_sets(task, tmp_path):
    listing = tmp_path / "tasks.jsonl"
    (task.directory / "instruction.md").write_text(task.instruction)
    (task.directory / "task.toml").write_text(
        '[task]\nname = "north/calc"\n[metadata]\nenvironment = "swe"\nfamily = "tiny"\nmax_turns = 40\n'
    )
    (task.directory / "tests").mkdir(exist_ok=True)
    (task.directory / "tests" / "test.sh").write_text("true\n")
    listing.write_text(json.dumps({"directory": str(task.directory)}) + "\n")
    return [listing]


def variation(task_sets, sandboxes, **more) -> HarnessTranslation:
    return HarnessTranslation(SWEAgentHarness(), [OpenCodeHarness()], task_sets, sandboxes, **more)


def test_a_variation_tells_a_share_of_its_sources_samples_and_the_same_for_the_same_seed(
    told, task, task_sets, sandboxes
):
    sample = told[0]["swe_agent"][0]
    known = next(iter(variation(task_sets, sandboxes).tasks))
    sample = replace(sample, task_id=known)
    half = variation(task_sets, sandboxes, share=0.5)
    sample = replace(sample, messages=sample.messages[:3])
    seeds = [seed for seed in range(6) if half.vary(sample, seed) is not None]
    assert 0 < len(seeds) < 6
    assert half.vary(sample, seeds[0]) == half.vary(sample, seeds[0])
    assert half.vary(replace(sample, harness="opencode"), seeds[0]) is None
    with pytest.raises(RetellingError) as refused:
        half.vary(replace(sample, task_id="another"), seeds[0])
    assert refused.value.reason == "task_unknown"


def test_a_trajectory_under_the_original_programs_prompt_is_told_too(told, task, task_sets, sandboxes):
    """SWE-agent's own prompt and no list of tools, as SWE-smith publishes trajectories."""
    file = Path(__file__).parents[1] / "fixtures" / "trajectories" / "swe_agent.traj"
    (foreign,) = SampleReader([file], Trajectories())
    opening = [replace(one, content=one.content.replace("/testbed", "/work")) for one in foreign.messages[:2]]
    sample = told[0]["swe_agent"][0]
    own = next(iter(variation(task_sets, sandboxes).tasks))
    foreign = replace(sample, messages=(*opening, *sample.messages[2:]), tools=foreign.tools, task_id=own)
    one, other = (variation(task_sets, sandboxes).vary(replace(s, task_id=own), 3) for s in (sample, foreign))
    assert other.harness == "opencode"
    assert one.messages[2:] == other.messages[2:]
    assert "add must add: fix calc.py." in other.messages[1].content


def test_a_share_of_nothing_and_an_unknown_harness_are_refused(task_sets, sandboxes):
    with pytest.raises(ConfigError, match="share"):
        variation(task_sets, sandboxes, share=0.0)
