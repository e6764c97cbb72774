"""The same harness in other words: other wordings, tool names, orders, observation frames and cuts.

In: a harness and a seed. Out: ``VariedHarness``, a harness that really offers the renamed tools, and
``HarnessVariation``, which retells recorded trajectories as that harness would have told them. Because both use one
``Presentation``, a retold trajectory can be proved: play its calls through the varied harness, and the observations are
the retold ones and the verifier says what it said before. Between harnesses ``translation`` retells.

A model that has seen a tool under one name only replays that name; one that has seen many reads its prompt.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from north_lightning.data.openings import Opening, read_opening
from north_lightning.errors import InvalidActionError
from north_lightning.harnesses.actions import WORK
from north_lightning.harnesses.prompts import SWE_REVIEW
from north_lightning.harnesses.terminus2 import FIRST_SCREEN
from north_lightning.harnesses.turn import head, only_call
from north_lightning.interfaces import ConversationVariation, Harness, HarnessSession, Sandbox
from north_lightning.seeds import run_seed
from north_lightning.types import (
    AssistantAction,
    Conversation,
    Count,
    Message,
    Prompt,
    Step,
    Task,
    ToolCall,
    ToolResult,
    ToolSpec,
)

TOOL_NAMES: Mapping[str, Sequence[str]] = {
    "bash": ("bash", "execute_bash", "run_command", "sh"),
    "terminal": ("terminal", "console", "shell"),
    "str_replace_editor": ("str_replace_editor", "file_editor", "edit_file"),
    "submit": ("submit", "finish"),
}
PARAMETER_NAMES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "bash": {"command": ("command", "cmd", "script")},
    "terminal": {"keystrokes": ("keystrokes", "keys", "input")},
    "str_replace_editor": {
        "command": ("command", "action", "operation"),
        "path": ("path", "file_path", "filename"),
        "file_text": ("file_text", "content"),
        "old_str": ("old_str", "old_string", "search"),
        "new_str": ("new_str", "new_string", "replacement"),
        "insert_line": ("insert_line", "after_line"),
        "view_range": ("view_range", "line_range"),
    },
}
FRAMES = ("OBSERVATION:\n{output}", "{output}", "<output>\n{output}\n</output>", "Result:\n{output}")
CUTS = (100_000, 32_000, 16_000, 8_000)
"""Characters an observation keeps at most."""

_OWN_FRAME = "OBSERVATION:\n"  # SWE-agent's
_TASK = "\ue001"  # the same, inside that
_INSTRUCTION = "\ue000"  # stands for the task in a prompt, so that nothing in it is renamed


@dataclass(frozen=True)
class Presentation:
    """One way to present a harness's tools and observations; names that are not listed stay as they are."""

    tool_names: Mapping[str, str]
    parameter_names: Mapping[str, Mapping[str, str]]  # by the tool's own name
    order: Sequence[str]  # own names of the tools
    frame: str
    max_chars: int
    keep_end: bool  # of an observation that is cut: both ends, not only the beginning

    @classmethod
    def draw(cls, tools: Sequence[ToolSpec], seed: int) -> Presentation:
        """A random presentation of these tools, the same for the same seed."""
        rng = random.Random(seed)
        own = [tool.name for tool in tools]
        return cls(
            tool_names={name: rng.choice(TOOL_NAMES.get(name, (name,))) for name in own},
            parameter_names={
                name: {key: rng.choice(names) for key, names in PARAMETER_NAMES.get(name, {}).items()} for name in own
            },
            order=rng.sample(own, len(own)),
            frame=rng.choice(FRAMES),
            max_chars=rng.choice(CUTS),
            keep_end=rng.random() < 0.5,
        )

    def tools(self, tools: Sequence[ToolSpec]) -> tuple[ToolSpec, ...]:
        """The tools as they are offered."""
        return tuple(self._tool(tool) for tool in sorted(tools, key=lambda tool: self.order.index(tool.name)))

    def call(self, call: ToolCall) -> ToolCall:
        """A call of a tool under its own name, as a model makes it here."""
        names = self.parameter_names.get(call.name, {})
        arguments = {names.get(key, key): value for key, value in call.arguments.items()}
        return ToolCall(call.id, self.tool_names.get(call.name, call.name), arguments)

    def own_call(self, call: ToolCall) -> ToolCall:
        """The inverse of ``call``."""
        own = {shown: name for name, shown in self.tool_names.items()}.get(call.name, call.name)
        names = {shown: name for name, shown in self.parameter_names.get(own, {}).items()}
        return ToolCall(call.id, own, {names.get(key, key): value for key, value in call.arguments.items()})

    def observation(self, text: str, own_name: str) -> str:
        """A harness's observation of a call of the tool ``own_name``, cut and framed as it is shown."""
        output = text.removeprefix(_OWN_FRAME).replace(SWE_REVIEW, self.words(SWE_REVIEW))
        if output.startswith("Error: ") and len(self.parameter_names.get(own_name, {})) > 1:
            output = self._rename_parameters(output, own_name)
        return self.frame.replace("{output}", self._cut(output))

    def words(self, text: str) -> str:
        """A harness's own words with the tools' names as they are shown."""
        return _rename(text, self.tool_names)

    def mentions(self, text: str) -> str:
        """A model's words with the tools' names as they are shown (see ``mentioned``)."""
        return mentioned(text, self.tool_names)

    def _tool(self, tool: ToolSpec) -> ToolSpec:
        names = self.parameter_names.get(tool.name, {})
        schema: dict[str, Any] = dict(tool.parameters)
        if "properties" in schema:
            schema["properties"] = {names.get(key, key): value for key, value in schema["properties"].items()}
        if "required" in schema:
            schema["required"] = [names.get(key, key) for key in schema["required"]]
        description = self._rename_parameters(tool.description, tool.name)
        return ToolSpec(self.tool_names.get(tool.name, tool.name), description, schema)

    def _rename_parameters(self, text: str, own_name: str) -> str:
        names = self.parameter_names.get(own_name, {})
        return _rename(text, {name: shown for name, shown in names.items() if "_" in name})

    def _cut(self, text: str) -> str:
        if len(text) <= self.max_chars or not self.keep_end:
            return head(text, self.max_chars)
        half = self.max_chars // 2
        return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def _rename(text: str, names: Mapping[str, str]) -> str:
    if not names:
        return text
    any_name = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.sub(rf"(?<![\w.])(?:{any_name})(?!\w)", lambda found: names[found.group()], text)


class VariedHarness(Harness):
    """Another harness under one presentation: what a model sees and calls is renamed, what is carried out is not.

    Args:
        harness: The harness that acts.
        seed: Seed of the presentation; the run's by default.
    """

    def __init__(self, harness: Harness, seed: int | None = None) -> None:
        self.harness = harness
        self.seed = run_seed(seed)
        self.name = harness.name
        self.forgets_rejected_turns = harness.forgets_rejected_turns

    @property
    def action_limit_s(self) -> float | None:
        return self.harness.action_limit_s

    @property
    def attempt_limit_s(self) -> float | None:
        return self.harness.attempt_limit_s

    def presentation(self, task: Task) -> Presentation:
        return Presentation.draw(self.harness.prompt(task).tools, self.seed)

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        prompt = self.harness.prompt(replace(task, instruction=_INSTRUCTION), variation)
        shown = self.presentation(task)
        messages = (
            replace(message, content=shown.words(message.content).replace(_INSTRUCTION, task.instruction))
            for message in prompt.messages
        )
        return Prompt(tuple(messages), shown.tools(prompt.tools))

    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession:
        shown = self.presentation(task)
        tools = shown.tools(self.harness.prompt(task).tools)
        return VariedSession(await self.harness.open(task, sandbox), shown, tools)


class VariedSession(HarnessSession):
    """One attempt: calls translated on the way in, observations on the way out."""

    def __init__(self, session: HarnessSession, shown: Presentation, tools: Sequence[ToolSpec]) -> None:
        self.session = session
        self.shown = shown
        self.tools = tools

    async def act(self, action: AssistantAction) -> Step:
        for call in action.tool_calls:
            only_call(AssistantAction(tool_calls=(call,)), self.tools)
        own = tuple(self.shown.own_call(call) for call in action.tool_calls)
        names = {call.id: call.name for call in own}
        step = await self.session.act(replace(action, tool_calls=own))
        results = (
            ToolResult(result.tool_call_id, self.shown.observation(result.content, names[result.tool_call_id]))
            for result in step.results
        )
        return replace(step, results=tuple(results))

    async def close(self) -> None:
        await self.session.close()


class HarnessVariation(ConversationVariation):
    """Retells trajectories of one harness as ``VariedHarness(harness, seed)`` would have told them.

    Samples whose opening or tools are not this harness's are not its own, and not retold.

    Args:
        harness: The harness the trajectories were recorded with, with the same settings.
        num_wordings: Of the harness's prompts, among which a sample's is looked for.
    """

    def __init__(self, harness: Harness, num_wordings: Count = 3) -> None:
        self.harness = harness
        self.num_wordings = num_wordings

    def vary(self, sample: Conversation, seed: int) -> Conversation | None:
        found = find_opening(sample, self.harness, self.num_wordings)
        if found is None:
            return None
        task = Task(sample.task_id, sample.environment, "", _TASK, Path(), 1)
        varied = VariedHarness(self.harness, seed)
        shown = varied.presentation(task)
        prompt = varied.prompt(task, random.Random(seed).randrange(self.num_wordings))
        opening = [replace(one, content=_at_home(one.content, found, sample)) for one in prompt.messages]
        names = {call.id: call.name for message in sample.messages for call in message.tool_calls}
        told = (_retell(message, shown, names) for message in sample.messages[found.num_messages :])
        return replace(sample, messages=(*opening, *told), tools=prompt.tools)


def find_opening(sample: Conversation, harness: Harness, num_wordings: int = 3) -> Opening | None:
    """The opening of a sample of ``harness``, in this package's words or in the original program's; None for others.

    Under the original's prompt, the calls must be ones that the harness's tools take.
    """
    if sample.harness != harness.name:
        return None
    task = Task(sample.task_id, sample.environment, "", _INSTRUCTION, Path(), 1)
    for wording in range(num_wordings):
        prompt = harness.prompt(task, wording)
        pattern = "\x00".join(f"{m.role}\x01{re.escape(m.content)}" for m in prompt.messages)
        opening = "\x00".join(f"{m.role}\x01{m.content}" for m in sample.messages[: len(prompt.messages)])
        match = re.fullmatch(pattern.replace(_INSTRUCTION, "(.*)"), opening, re.DOTALL)
        if match and match.groups() and sample.tools == prompt.tools:
            return Opening(len(prompt.messages), match[1], is_framed=True, directory=WORK)
    foreign = read_opening(sample.messages)
    is_bare = prompt.messages[-1].content == _INSTRUCTION
    if foreign is None or not (foreign.is_framed or is_bare):
        return None
    return foreign if _fits(sample.messages[foreign.num_messages :], prompt.tools) else None


def _fits(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> bool:
    """Whether turns could have been made with these tools: calls of them where there are any, else none."""
    calls = [call for message in messages if message.trained for call in message.tool_calls]
    for call in calls:
        try:
            only_call(AssistantAction(tool_calls=(call,)), tools)
        except InvalidActionError:
            return False
    return bool(calls) == bool(tools)


def _at_home(text: str, opening: Opening, sample: Conversation) -> str:
    """A prompt that says what the task is, where the sample's files are and what its terminal shows."""
    directory = opening.directory or _directory_of(sample) or WORK
    text = text.replace(FIRST_SCREEN, opening.terminal or FIRST_SCREEN)
    return text.replace(WORK, directory).replace(_TASK, opening.task)


def _directory_of(sample: Conversation) -> str:
    """Below which directory most of the paths in a sample's calls are; empty where there are none."""
    values = (value for message in sample.messages for call in message.tool_calls for value in call.arguments.values())
    paths = (re.match(r"(/[\w.-]+)/[\w./-]+\Z", value) for value in values if isinstance(value, str))
    found = Counter(path[1] for path in paths if path and path[1] not in ("/tmp", "/usr", "/etc"))
    return found.most_common(1)[0][0] if found else ""


def mentioned(text: str, names: Mapping[str, str]) -> str:
    """A model's words; only what is no ordinary word (``a_b``, or in backticks) is taken for a tool's name."""
    plain = {name: shown for name, shown in names.items() if "_" not in name}
    quoted = {f"`{name}`": f"`{shown}`" for name, shown in plain.items()}
    unmistakable = {name: shown for name, shown in names.items() if "_" in name}
    return _rename(_rename(text, quoted), unmistakable)


def _retell(message: Message, shown: Presentation, names: Mapping[str, str]) -> Message:
    if message.role == "tool":
        assert message.tool_call_id is not None, "a tool's message names its call"
        return replace(message, content=shown.observation(message.content, names[message.tool_call_id]))
    if message.role != "assistant":
        return message
    return replace(
        message,
        content=shown.mentions(message.content),
        reasoning=shown.mentions(message.reasoning),
        tool_calls=tuple(shown.call(call) for call in message.tool_calls),
    )
