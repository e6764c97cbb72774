"""Retold trajectories do the same: their calls, carried out under their own names, give their own observations."""

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from north_lightning.data.filters import SampleFilter
from north_lightning.data.formats import Trajectories
from north_lightning.data.sources import SampleReader, read_samples
from north_lightning.errors import InvalidActionError
from north_lightning.harnesses import (
    HarnessVariation,
    MiniSWEAgentHarness,
    OpenCodeHarness,
    ReActTerminalHarness,
    SWEAgentHarness,
    Terminus2Harness,
    VariedHarness,
)
from north_lightning.harnesses.variation import Presentation
from north_lightning.rollout.attempt import record_scripted
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.rollout.trajectories import record_trajectories
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of, load_tasks
from north_lightning.tasks.build import TaskSetSettings, build_task_sets
from north_lightning.types import AssistantAction, Conversation, Message, Task, ToolCall, ToolSpec
from north_lightning.verifiers import UnitTestVerifier

TASK = Task("t", "swe", "tiny", "add must add", Path(), 8)
HARNESSES = {"terminal": ReActTerminalHarness(), "swe": SWEAgentHarness()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Tasks by id, and their trajectories: every family of terminal tasks and every kind of bug once or twice."""
    directory = tmp_path_factory.mktemp("recorded")
    build_task_sets(
        directory, [TaskSetSettings("terminal", "terminal", "train", 6), TaskSetSettings("swe", "swe", "train", 6)]
    )
    sets = [directory / "terminal", directory / "swe"]
    rollouts = AttemptSettings(harnesses=HARNESSES, verifier=UnitTestVerifier(), sandboxes=BubblewrapProvider())
    record_trajectories(sets, directory / "data", rollouts, 0.5)
    tasks = {task.id: task for path in sets for task in load_tasks(path)}
    samples = [one for name in ("terminal", "swe") for one in read_samples(directory / "data" / f"{name}.jsonl")]
    return tasks, samples


def retell(sample: Conversation, seed: int) -> Conversation:
    told = HarnessVariation(HARNESSES[sample.environment]).vary(sample, seed)
    assert told is not None
    return told


async def play(task, sample: Conversation, seed: int):
    """Carry out a sample's turns, as they are, through the harness that offers its tools."""
    turns = iter([message for message in sample.messages if message.role == "assistant"])

    async def script(messages):
        turn = next(turns)
        return AssistantAction(turn.reasoning, turn.content, turn.tool_calls)

    harness = VariedHarness(HARNESSES[sample.environment], seed)
    return await record_scripted(
        task, harness, script, sandboxes=BubblewrapProvider(), verifier=UnitTestVerifier(), image_of=image_of
    )


def after_the_opening(messages) -> list[Message]:
    return list(itertools.dropwhile(lambda message: message.role in ("system", "user"), messages))


def test_retold_calls_do_the_same_when_they_are_executed(recorded):
    tasks, samples = recorded
    retold = [retell(sample, seed) for seed, sample in enumerate(samples)]

    async def play_all():
        slots = asyncio.Semaphore(4)

        async def one(seed, told):
            async with slots:
                return await play(tasks[told.task_id], told, seed)

        return await asyncio.gather(*(one(seed, told) for seed, told in enumerate(retold)))

    for told, rollout in zip(retold, asyncio.run(play_all()), strict=True):
        assert rollout.reward.value == 1.0
        assert after_the_opening(rollout.messages) == after_the_opening(told.messages)
    names = {call.name for told in retold for message in told.messages for call in message.tool_calls}
    assert len(names) >= 6, "the names were varied"


def test_an_argument_under_another_name_is_noticed_by_the_execution(recorded):
    """The proof can fail: with old and new text exchanged the edit is another one."""
    tasks, samples = recorded
    sample = next(one for one in samples if one.environment == "swe")
    seed = 0
    told = retell(sample, seed)
    renamed = VariedHarness(HARNESSES["swe"], seed).presentation(tasks[sample.task_id]).parameter_names
    old, new = (renamed["str_replace_editor"][key] for key in ("old_str", "new_str"))

    def exchange(call: ToolCall) -> ToolCall:
        swapped = {old: new, new: old}
        return replace(call, arguments={swapped.get(key, key): value for key, value in call.arguments.items()})

    broken = [replace(m, tool_calls=tuple(map(exchange, m.tool_calls))) for m in told.messages]
    rollout = asyncio.run(play(tasks[sample.task_id], replace(told, messages=tuple(broken)), seed))
    assert rollout.reward.value != 1.0


def test_retold_samples_are_sound_and_read_as_the_varied_harness_prompts(recorded):
    tasks, samples = recorded
    told = [retell(sample, seed) for seed, sample in enumerate(samples)]
    fit = SampleFilter()
    assert list(fit(told)) == told
    for seed, (sample, one) in enumerate(zip(samples, told, strict=True)):
        harness = VariedHarness(HARNESSES[sample.environment], seed)
        prompts = [harness.prompt(tasks[sample.task_id], wording) for wording in range(3)]
        assert one.messages[:2] in [prompt.messages for prompt in prompts]
        assert one.tools == prompts[0].tools
        assert retell(sample, seed) == one


def test_what_varies_is_names_orders_frames_cuts_and_wordings(recorded):
    _, samples = recorded
    sample = next(one for one in samples if one.environment == "swe")
    told = [retell(sample, seed) for seed in range(40)]
    assert len({one.messages[0].content for one in told}) == 3
    assert len({tuple(tool.name for tool in one.tools) for one in told}) > 20
    assert len({one.messages[3].content.splitlines()[0] for one in told}) == 4
    assert not any("submit" in one.messages[1].content for one in told if "submit" not in {t.name for t in one.tools})


def test_the_instruction_is_never_reworded():
    harness = SWEAgentHarness()
    opening = harness.prompt(replace(TASK, instruction="submit() of bash.py\nshould call str_replace_editor")).messages
    sample = Conversation((*opening, Message("assistant", "Done.")), harness.prompt(TASK).tools, harness="swe_agent")
    for seed in range(8):
        told = HarnessVariation(harness).vary(sample, seed)
        assert "submit() of bash.py\nshould call str_replace_editor" in told.messages[1].content


FOREIGN = Path(__file__).parents[1] / "fixtures" / "trajectories"


@pytest.mark.parametrize(
    ("file", "harness", "home"),
    [
        ("swe_agent.traj", SWEAgentHarness(), "/testbed"),
        ("swesmith_tool.jsonl", SWEAgentHarness(), "/testbed"),
        ("mini_calls.traj.json", MiniSWEAgentHarness(), None),
        ("mini_swebench.traj.json", MiniSWEAgentHarness(), None),
        ("atif_mini_calls.json", MiniSWEAgentHarness(), None),
        ("atif_terminus_json.json", Terminus2Harness(), "root@host:/app#"),
        ("atif_terminus_json_raw.json", Terminus2Harness(), "root@host:/app#"),
        ("atif_opencode.json", OpenCodeHarness(), None),
    ],
)
def test_trajectories_of_the_original_programs_are_retold(file, harness, home):
    (sample,) = SampleReader([FOREIGN / file], Trajectories())
    for seed in range(6):
        told = HarnessVariation(harness).vary(sample, seed)
        opening = told.messages[: len(harness.prompt(TASK).messages)]
        assert "add must add: fix calc.py." in opening[-1].content
        assert "pr_description" not in opening[-1].content
        if home:
            assert home in opening[-1].content
            assert "/work" not in opening[-1].content
        assert {call.name for m in told.messages for call in m.tool_calls} <= {tool.name for tool in told.tools}
        said = [[m for m in one.messages if m.role == "assistant"] for one in (sample, told)]
        assert [len(m.tool_calls) for m in said[0]] == [len(m.tool_calls) for m in said[1]]
        assert SampleFilter().passes(told)


@pytest.mark.parametrize(
    ("file", "harness"),
    [
        ("atif_terminus_xml.json", Terminus2Harness()),
        ("mini_text.traj.json", MiniSWEAgentHarness()),
        ("atif_swe_agent.json", SWEAgentHarness()),
        ("swesmith_xml.jsonl", SWEAgentHarness()),
    ],
)
def test_turns_that_the_harness_does_not_take_are_left_alone(file, harness):
    (sample,) = SampleReader([FOREIGN / file], Trajectories(harness=harness.name))
    assert sample.harness == harness.name
    assert HarnessVariation(harness).vary(sample, 0) is None


def test_foreign_samples_are_left_alone():
    variation = HarnessVariation(SWEAgentHarness())
    opening = SWEAgentHarness().prompt(TASK)
    assert variation.vary(Conversation(opening.messages, opening.tools, harness="react_terminal"), 0) is None
    assert variation.vary(Conversation(opening.messages, (), harness="swe_agent"), 0) is None
    assert variation.vary(Conversation((Message("user", "hi"),), opening.tools, harness="swe_agent"), 0) is None


def test_long_observations_are_cut_at_the_end_or_in_the_middle():
    text = "a" * 6_000 + "b" * 6_000
    begin = Presentation({}, {}, (), "{output}", 8_000, keep_end=False).observation(text, "bash")
    both = Presentation({}, {}, (), "{output}", 8_000, keep_end=True).observation(text, "bash")
    assert begin.startswith("a" * 6_000 + "b" * 2_000 + "\n[4000 more characters")
    assert both == "a" * 4_000 + "\n[4000 characters left out]\n" + "b" * 4_000


def test_a_tool_answers_to_the_name_it_is_offered_under_only(recorded):
    tasks, samples = recorded
    sample = next(one for one in samples if one.environment == "swe")
    task = tasks[sample.task_id]
    seed = next(
        s for s in range(20) if VariedHarness(HARNESSES["swe"], s).presentation(task).tool_names["bash"] != "bash"
    )

    async def attempt():
        sandbox = await BubblewrapProvider().open(image_of(task))
        try:
            session = await VariedHarness(HARNESSES["swe"], seed).open(task, sandbox)
            with pytest.raises(InvalidActionError, match="'bash'"):
                await session.act(AssistantAction(tool_calls=(ToolCall("0", "bash", {"command": "ls"}),)))
            await session.close()
        finally:
            await sandbox.close()

    asyncio.run(attempt())


def test_mentions_of_tools_follow_their_names_and_ordinary_words_do_not():
    tools = [ToolSpec(name, "", {}) for name in ("bash", "str_replace_editor", "submit")]
    shown = replace(
        Presentation.draw(tools, 0),
        tool_names={"bash": "sh", "str_replace_editor": "edit_file", "submit": "finish"},
    )
    said = "I submit a bash script: `bash` or str_replace_editor, then `submit`."
    assert shown.mentions(said) == "I submit a bash script: `sh` or edit_file, then `finish`."
