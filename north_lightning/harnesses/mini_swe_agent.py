"""mini-SWE-agent (version 2.4): one bash tool, every call in a fresh shell, a marker line hands the work in.

In: a task and a sandbox. Out: a session that runs the calls of a turn one after the other and returns each one's return
code and output, in the form of ``mini.yaml`` (JSON) or of the SWE-bench configuration (XML).

Where it differs from mini-SWE-agent: prompts and error sentences are our own. A command runs in ``bash`` and in a
process namespace of its own, so that background processes end with it. A turn that is rejected is dropped from what a
server is shown, as published, but stays in the context of a model in training, whose tokens were sampled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from north_lightning.errors import ConfigError, InvalidActionError
from north_lightning.harnesses.prompts import (
    MINI_FORMAT_ERROR,
    MINI_SYSTEM,
    MINI_TOO_LONG,
    MINI_USER,
    pick,
)
from north_lightning.interfaces import Harness, HarnessSession, Sandbox
from north_lightning.types import (
    AssistantAction,
    CommandResult,
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

BASH = ToolSpec(
    name="bash",
    description="Run a bash command.",
    parameters={
        "type": "object",
        "properties": {"command": {"type": "string", "description": "What to run."}},
        "required": ["command"],
    },
)

MARKER = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
ENVIRONMENT = {"PAGER": "cat", "MANPAGER": "cat", "LESS": "-R", "PIP_PROGRESS_BAR": "off", "TQDM_DISABLE": "1"}
TIMED_OUT = -1  # the return code shown
Form = Literal["json", "xml"]


class MiniSWEAgentHarness(Harness):
    """``bash``, one or more calls a turn; a first output line that is the marker, with return code 0, ends the attempt.

    A turn without calls, or with a call that does not fit, carries nothing out and is answered by an error; the
    attempt ends with reward 0 at ``max_format_errors`` of them in a row.

    Args:
        form: How an observation is written: ``json`` (``mini.yaml``) or ``xml`` (``swebench.yaml``).
        command_timeout_s: Limit of one command; it is killed with all it started.
        max_output_chars: Output of this length and more is cut to its head and its tail, half each.
        max_format_errors: So many in a row end the attempt; 0 is no limit.
    """

    name = "mini_swe_agent"
    forgets_rejected_turns = True

    def __init__(
        self,
        form: Form = "json",
        command_timeout_s: Positive = 30.0,
        max_output_chars: Count = 10_000,
        max_format_errors: Whole = 3,
    ) -> None:
        if max_output_chars < 2:
            raise ConfigError(f"max_output_chars: expected at least 2, got {max_output_chars}")
        self.form = form
        self.command_timeout_s = command_timeout_s
        self.max_output_chars = max_output_chars
        self.max_format_errors = max_format_errors

    @property
    def action_limit_s(self) -> float:
        return self.command_timeout_s

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        user = pick(MINI_USER, variation).format(task=task.instruction, marker=MARKER)
        return Prompt((Message("system", pick(MINI_SYSTEM, variation)), Message("user", user)), (BASH,))

    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession:
        return MiniSWEAgentSession(self, sandbox)

    def observation(self, result: CommandResult) -> str:
        """What the model reads of one command."""
        error = f"the command was stopped: it timed out after {self.command_timeout_s:g} seconds"
        return (_as_json if self.form == "json" else _as_xml)(
            result.output,
            TIMED_OUT if result.timed_out else result.exit_code,
            error if result.timed_out else "",
            self.max_output_chars,
        )


class MiniSWEAgentSession(HarnessSession):
    """One attempt: nothing but the files lives from call to call."""

    def __init__(self, settings: MiniSWEAgentHarness, sandbox: Sandbox) -> None:
        self.settings = settings
        self.sandbox = sandbox
        self._format_errors = 0

    async def act(self, action: AssistantAction) -> Step:
        commands = [_command_of(call) for call in action.tool_calls]
        if not commands:
            raise InvalidActionError("No tool call in this turn; every turn needs at least one.")
        self._format_errors = 0
        results = []
        for call, command in zip(action.tool_calls, commands, strict=True):
            result = await self.sandbox.run(_with_environment(command), self.settings.command_timeout_s)
            if hands_in(result):
                return Step(done=True)
            results.append(ToolResult(call.id, self.settings.observation(result)))
        return Step(tuple(results))

    async def reject(self, error: InvalidActionError) -> Step | None:
        self._format_errors += 1
        if 0 < self.settings.max_format_errors <= self._format_errors:
            return None
        return Step(message=MINI_FORMAT_ERROR.format(error=error, marker=MARKER))

    async def close(self) -> None: ...


def hands_in(result: CommandResult) -> bool:
    """Whether the first line that is not blank is the marker, of a command that succeeded."""
    first = result.output.lstrip().partition("\n")[0].strip()
    return first == MARKER and result.exit_code == 0 and not result.timed_out


def _command_of(call: ToolCall) -> str:
    if call.name != BASH.name:
        raise InvalidActionError(f"Unknown tool '{call.name}'.")
    command = call.arguments.get("command")
    if not isinstance(command, str):
        raise InvalidActionError("The bash call has no 'command' that is a text.")
    try:
        command.encode()
    except UnicodeEncodeError:
        raise InvalidActionError("The 'command' holds half a character.") from None
    return command


def _with_environment(command: str) -> str:
    return f"export {' '.join(f'{name}={value}' for name, value in ENVIRONMENT.items())}\n{command}"


def _as_json(output: str, return_code: int, error: str, max_chars: int) -> str:
    half = max_chars // 2
    rows: dict[str, Any] = {"returncode": return_code}
    if len(output) < max_chars:
        rows["output"] = output
    else:
        rows |= {"output_head": output[:half], "output_tail": output[-half:], "elided_chars": len(output) - max_chars}
        rows["warning"] = "Output too long."
    return _json_object(rows, error)


def _json_object(rows: Mapping[str, Any], error: str) -> str:
    lines = [f'  "{name}": {_json_value(value)}' for name, value in rows.items()]
    return "{\n" + ",\n".join(lines) + (f', "exception_info": {_json_value(error)}' if error else "") + "\n}"


def _json_value(value: str | int) -> str:
    """JSON with the characters of HTML escaped, and non-ASCII too."""
    text = json.dumps(value)
    for character in "<>&'":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _as_xml(output: str, return_code: int, error: str, max_chars: int) -> str:
    head = f"<exception>{error}</exception>\n" if error else ""
    head += f"<returncode>{return_code}</returncode>\n"
    if len(output) < max_chars:
        return f"{head}<output>\n{output}</output>"
    half = max_chars // 2
    return (
        f"{head}<warning>\n{MINI_TOO_LONG}\n</warning><output_head>\n{output[:half]}\n</output_head>\n"
        f"<elided_chars>\n{len(output) - max_chars} characters elided\n</elided_chars>\n"
        f"<output_tail>\n{output[-half:]}\n</output_tail>"
    )
