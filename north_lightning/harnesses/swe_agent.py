"""SWE-agent's loop (version 1.1.0): bash, a file editor and a submit that asks once for a review.

In: a task and a sandbox whose ``/work`` is a git repository. Out: a session that runs each call and returns
``OBSERVATION:`` and its output. What is graded is the snapshot of ``/work``, not the patch shown at ``submit``.

Where it differs from SWE-agent: a turn without exactly one valid call ends the attempt (``InvalidActionError``,
reward 0) where SWE-agent would drop the turn and ask again up to three times, because a dropped turn breaks the token
prefix that training relies on. Sentences are shorter and our own.
"""

from __future__ import annotations

import time

from north_lightning.harnesses.editor import Editor
from north_lightning.harnesses.prompts import SWE_REVIEW, SWE_SYSTEM, SWE_USER, pick
from north_lightning.harnesses.turn import head, object_schema, only_call
from north_lightning.interfaces import Harness, HarnessSession, Sandbox
from north_lightning.sandbox import Shell
from north_lightning.types import (
    AssistantAction,
    Count,
    Message,
    Positive,
    Prompt,
    Step,
    Task,
    ToolCall,
    ToolResult,
    ToolSpec,
    Whole,
)

REPOSITORY = "/work"

BASH = ToolSpec(
    name="bash",
    description="Run a command in the shell; directory and variables stay for the next command.",
    parameters=object_schema(["command"], command={"type": "string"}),
)

EDITOR = ToolSpec(
    name="str_replace_editor",
    description=(
        "View and edit text files. str_replace needs old_str exactly once in the file; insert puts new_str after "
        "insert_line; undo_edit takes the last edit of path back."
    ),
    parameters=object_schema(
        ["command", "path"],
        command={"type": "string", "enum": ["view", "create", "str_replace", "insert", "undo_edit"]},
        path={"type": "string"},
        file_text={"type": "string"},
        old_str={"type": "string"},
        new_str={"type": "string"},
        insert_line={"type": "integer"},
        view_range={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    ),
)

SUBMIT = ToolSpec(name="submit", description="Hand in the changes.", parameters=object_schema([]))

TOOLS = (BASH, EDITOR, SUBMIT)

NO_OUTPUT = "(no output)"
# Without the line of blob ids: noise to a reader, and the patch applies all the same.
SHOW_PATCH = "(cd {repository} && git add -A && git --no-pager diff --cached -U{lines} | grep -v '^index ')"


class SWEAgentHarness(Harness):
    """``bash``, ``str_replace_editor`` and ``submit`` on a repository in ``/work``; one call per turn.

    Args:
        command_timeout_s: Limit of one command; it is stopped and the model is told.
        total_timeout_s: Limit of all commands together; when it is used up the attempt ends as it stands.
        max_consecutive_timeouts: So many timed-out commands in a row end the attempt.
        max_observation_chars: Longer observations are cut at the end.
        context_lines: Lines shown around an edit and around a change in the patch.
    """

    name = "swe_agent"

    def __init__(
        self,
        command_timeout_s: Positive = 30.0,
        total_timeout_s: Positive = 1800.0,
        max_consecutive_timeouts: Count = 3,
        max_observation_chars: Count = 100_000,
        context_lines: Whole = 4,
    ) -> None:
        self.command_timeout_s = command_timeout_s
        self.total_timeout_s = total_timeout_s
        self.max_consecutive_timeouts = max_consecutive_timeouts
        self.max_observation_chars = max_observation_chars
        self.context_lines = context_lines

    @property
    def action_limit_s(self) -> float:
        return self.command_timeout_s

    @property
    def attempt_limit_s(self) -> float:
        return self.total_timeout_s

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        user = pick(SWE_USER, variation).format(repository=REPOSITORY, issue=task.instruction)
        messages = (Message("system", pick(SWE_SYSTEM, variation)), Message("user", user))
        return Prompt(messages=messages, tools=TOOLS)

    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession:
        return SWEAgentSession(self, Shell(sandbox, max_output_bytes=4 * self.max_observation_chars))


class SWEAgentSession(HarnessSession):
    """One attempt: a shell that keeps its state, an editor with undo, and how often ``submit`` was called."""

    def __init__(self, settings: SWEAgentHarness, shell: Shell) -> None:
        self.settings = settings
        self.shell = shell
        self.editor = Editor(shell, REPOSITORY, settings.command_timeout_s, settings.context_lines)
        self._reviewed = False
        self._used_s = 0.0
        self._timeouts_in_a_row = 0

    async def act(self, action: AssistantAction) -> Step:
        call = only_call(action, TOOLS)
        if call.name == SUBMIT.name and self._reviewed:
            return Step(done=True)
        started = time.monotonic()
        output = await self._carry_out(call)
        self._used_s += time.monotonic() - started
        text = head(output, self.settings.max_observation_chars) if output.strip() else NO_OUTPUT
        return Step(results=(ToolResult(call.id, f"OBSERVATION:\n{text}"),), done=self._out_of_time())

    async def _carry_out(self, call: ToolCall) -> str:
        if call.name == BASH.name:
            return await self._run(call.arguments["command"])
        if call.name == EDITOR.name:
            return await self.editor.execute(call.arguments)
        self._reviewed = True
        show = SHOW_PATCH.format(repository=REPOSITORY, lines=self.settings.context_lines)
        patch = await self.shell.run(show, self.settings.command_timeout_s)
        return f"{patch.output.rstrip()}\n\n{SWE_REVIEW}".lstrip()

    async def _run(self, command: str) -> str:
        remaining_s = max(self.settings.total_timeout_s - self._used_s, 0.0)
        result = await self.shell.run(command, min(self.settings.command_timeout_s, remaining_s))
        self._timeouts_in_a_row = self._timeouts_in_a_row + 1 if result.timed_out else 0
        return result.output.rstrip("\n")

    def _out_of_time(self) -> bool:
        timed_out = self._timeouts_in_a_row >= self.settings.max_consecutive_timeouts
        return timed_out or self._used_s >= self.settings.total_timeout_s

    async def close(self) -> None:
        await self.shell.close()
