"""ReAct on a terminal: one tool, keystrokes in, new terminal output back; it ends when the model answers in words.

In: a task and a sandbox. Out: a session that types each call's keystrokes into a real tmux session. It does not decide
whether the task was solved, and it does not count turns: the runner does.
"""

from __future__ import annotations

from north_lightning.errors import InvalidActionError
from north_lightning.harnesses.prompts import REACT_SYSTEM, pick
from north_lightning.harnesses.turn import object_schema, only_call
from north_lightning.interfaces import Harness, HarnessSession, Sandbox
from north_lightning.sandbox import Terminal
from north_lightning.types import AssistantAction, Count, Message, Positive, Prompt, Step, Task, ToolResult, ToolSpec

TERMINAL = ToolSpec(
    name="terminal",
    description="Type a command line, or press a key such as C-c, in the terminal; returns the new output.",
    parameters=object_schema(["keystrokes"], keystrokes={"type": "string"}),
)

NO_OUTPUT = "(no output)"
STILL_RUNNING = "(still running)"
CLOSED = "(the shell has ended)"


class ReActTerminalHarness(Harness):
    """One ``terminal`` tool on a tmux session; an answer without a call ends the attempt.

    Two calls in one turn are an ``InvalidActionError``: the observation of the first could not have been read.

    Args:
        command_timeout_s: How long one call may run before the screen is returned; the command goes on.
        max_output_bytes: Longer output keeps its head and its tail, half each.
    """

    name = "react_terminal"

    def __init__(self, command_timeout_s: Positive = 30.0, max_output_bytes: Count = 10_000) -> None:
        self.command_timeout_s = command_timeout_s
        self.max_output_bytes = max_output_bytes

    @property
    def action_limit_s(self) -> float:
        return self.command_timeout_s

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        system = Message("system", pick(REACT_SYSTEM, variation))
        return Prompt(messages=(system, Message("user", task.instruction)), tools=(TERMINAL,))

    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession:
        terminal = Terminal(sandbox, max_output_bytes=self.max_output_bytes)
        await terminal.start()
        return ReActTerminalSession(terminal, self.command_timeout_s)


class ReActTerminalSession(HarnessSession):
    """One attempt; the terminal lives as long as its sandbox."""

    def __init__(self, terminal: Terminal, command_timeout_s: float) -> None:
        self.terminal = terminal
        self.command_timeout_s = command_timeout_s

    async def act(self, action: AssistantAction) -> Step:
        if not action.tool_calls:
            if not action.content.strip():
                raise InvalidActionError("expected a terminal call or an answer, got neither")
            return Step(done=True)
        call = only_call(action, (TERMINAL,))
        output = (await self.terminal.send(call.arguments["keystrokes"], self.command_timeout_s)).rstrip("\n")
        if self.terminal.closed:
            output = f"{output}\n{CLOSED}".lstrip("\n")
        elif self.terminal.timed_out:
            output = f"{output}\n{STILL_RUNNING}".lstrip("\n")
        return Step(results=(ToolResult(call.id, output or NO_OUTPUT),))

    async def close(self) -> None:
        await self.terminal.close()
