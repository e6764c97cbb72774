"""Terminus 2: no tools; every turn is a JSON object of keystrokes, every answer is what the terminal newly shows.

In: a task and a sandbox. Out: a session that types each command into a real tmux session, waits, and returns the new
lines of the pane, or its screen if there are none. The attempt ends when a task is called complete twice in a row.

Where it differs from Terminus 2: prompts and sentences are our own; a wait ends as soon as the prompt is back and
nothing more is printed, which changes no observation but the time it takes; a conversation that outgrows the context
ends the attempt where Terminus would summarise it, because a summary breaks the token prefix that training relies on.
"""

from __future__ import annotations

from north_lightning.errors import InvalidActionError
from north_lightning.harnesses.prompts import (
    TERMINUS_CONFIRM,
    TERMINUS_PARSE_ERROR,
    TERMINUS_USER,
    TERMINUS_WARNINGS,
    pick,
)
from north_lightning.harnesses.terminus_reply import MAX_DURATION_S, Keystrokes, read_reply
from north_lightning.interfaces import Harness, HarnessSession, Sandbox
from north_lightning.sandbox import Terminal, TerminalClosedError
from north_lightning.types import AssistantAction, Count, Message, Prompt, Step, Task

ROWS = 40
HISTORY_ROWS = 10_000  # what the terminal keeps; beyond it nobody knows what is new
SCREEN = "Current Terminal Screen:\n"
NEW_OUTPUT = "New Terminal Output:\n"
FIRST_SCREEN = SCREEN + "$" + "\n" * ROWS
"""A terminal that has just been opened."""


class Terminus2Harness(Harness):
    """Plain-text JSON replies typed into a tmux session; complete twice in a row is the end.

    A reply that cannot be read is answered by what is wrong with it, without a limit of their number.

    Args:
        max_output_bytes: Longer observations keep their head and their tail, half each.
    """

    name = "terminus2"

    def __init__(self, max_output_bytes: Count = 10_000) -> None:
        self.max_output_bytes = max_output_bytes

    @property
    def action_limit_s(self) -> float:
        return MAX_DURATION_S

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        text = pick(TERMINUS_USER, variation).format(task=task.instruction, terminal=FIRST_SCREEN)
        return Prompt((Message("user", text),))

    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession:
        terminal = Terminal(sandbox, rows=ROWS)
        await terminal.start()
        session = Terminus2Session(terminal, self.max_output_bytes)
        await session.observation()
        return session


class Terminus2Session(HarnessSession):
    """One attempt: a terminal, what it showed last, and whether completion waits to be confirmed."""

    def __init__(self, terminal: Terminal, max_output_bytes: int) -> None:
        self.terminal = terminal
        self.max_output_bytes = max_output_bytes
        self._shown: str | None = None
        self._is_confirming = False

    async def act(self, action: AssistantAction) -> Step:
        if action.tool_calls:
            raise InvalidActionError("ERROR: There are no tools; reply with a JSON object")
        reply = read_reply(action.content)
        if reply.error is not None:
            raise InvalidActionError(reply.feedback)
        output = await self._type(reply.commands)
        if self.terminal.closed:
            return Step(done=True)
        if reply.is_complete:
            if self._is_confirming:
                return Step(done=True)
            self._is_confirming = True
            return Step(message=TERMINUS_CONFIRM.format(terminal=output))
        self._is_confirming = False
        if reply.feedback:
            return Step(message=TERMINUS_WARNINGS.format(feedback=reply.feedback, terminal=output))
        return Step(message=output)

    async def reject(self, error: InvalidActionError) -> Step | None:
        text = str(error)
        feedback = text if text.startswith("ERROR: ") else f"ERROR: {text}"
        return Step(message=TERMINUS_PARSE_ERROR.format(feedback=feedback))

    async def _type(self, commands: tuple[Keystrokes, ...]) -> str:
        try:
            for command in commands:
                await self.terminal.press(command.text, command.duration_s)
        except TerminalClosedError:
            return ""
        return await self.observation()

    async def observation(self) -> str:
        """What is new since the last call, from the last line shown before on; the screen if nothing is, or if the
        earlier text is gone (a cleared or full-screen terminal)."""
        lines = await self.terminal.lines(history=True)
        whole = "".join(f"{line}\n" for line in lines)
        shown, self._shown = self._shown, whole
        new = None if shown is None or len(lines) >= HISTORY_ROWS else new_part(whole, shown)
        if new is not None and new.strip():
            text = NEW_OUTPUT + new
        else:
            text = SCREEN + "".join(f"{line}\n" for line in await self.terminal.lines(history=False))
        return head_and_tail(text, self.max_output_bytes)

    async def close(self) -> None:
        await self.terminal.close()


def new_part(whole: str, shown: str) -> str | None:
    """``whole`` from the last line of ``shown`` on; None if ``shown`` is not in it any more."""
    known = shown.strip()
    if known not in whole:
        return None
    return whole[known.rfind("\n") if "\n" in known else whole.index(known) :]


def head_and_tail(text: str, max_bytes: int) -> str:
    """``text``, or its two ends, half of ``max_bytes`` each, around a line that says how much is missing."""
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return text
    half = max_bytes // 2
    head, tail = (part.decode(errors="ignore") for part in (data[:half], data[-half:]))
    missing = len(data) - len(head.encode()) - len(tail.encode())
    return f"{head}\n[... output limited to {max_bytes} bytes; {missing} interior bytes omitted ...]\n{tail}"
