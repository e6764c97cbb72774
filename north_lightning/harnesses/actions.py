"""What a tool call means, whatever the harness: run a command, look at a file, make one, replace text, finish.

In: an assistant's turn in one harness's words. Out: actions; and the way back, actions in another harness's words. And
what an observation says, without the frame that a harness puts around it, so that two harnesses can be compared. It
runs nothing and decides nothing: whether a call in other words does the same is for ``translation`` to prove.

What has no counterpart (undoing an edit, searching, keys of a terminal) is a ``RetellingError`` that says so.
"""

from __future__ import annotations

import posixpath
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from north_lightning.errors import RetellingError
from north_lightning.sandbox.terminal import is_key
from north_lightning.types import AssistantAction, Message, ToolCall

WORK = "/work"
DONE = "Done."  # said at the end where a harness wants words and the model had none


@dataclass(frozen=True, slots=True)
class Run:
    command: str
    directory: str = WORK  # where it runs


@dataclass(frozen=True, slots=True)
class View:
    """Lines ``first`` to ``last`` of a file, from 1; to its end for None."""

    path: str
    first: int = 1
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Create:
    path: str
    text: str


@dataclass(frozen=True, slots=True)
class Replace:
    """``old``, which is in the file exactly once, becomes ``new``."""

    path: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Finish:
    words: str = ""


Action = Run | View | Create | Replace | Finish


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call gave: lines of a file, done, failed, or any other text."""

    kind: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class ReadTurn:
    """One assistant turn: what was thought, what was done, and the calls that did it, one action each."""

    reasoning: str
    actions: tuple[Action, ...]
    calls: tuple[AssistantAction, ...]


class Dialect(ABC):
    """One harness's words.

    ``keeps_state``: directory and variables live from command to command. ``names_directory``: a call can say where a
    command runs. ``many_calls``: one turn may hold several.
    ``is_screen``: observations come off a terminal, which wraps lines and sets ``ls`` in columns, so that blanks say
    nothing. ``shell`` and ``editor`` are the tools' names, for what the model says about them.
    """

    keeps_state: ClassVar[bool] = False
    names_directory: ClassVar[bool] = False
    many_calls: ClassVar[bool] = False
    is_screen: ClassVar[bool] = False
    shell: ClassVar[str] = "bash"
    editor: ClassVar[str] = "bash"

    def read(self, turn: Message) -> ReadTurn:
        """The meaning of a turn; ``RetellingError`` where it has none here."""
        if not turn.tool_calls:
            return ReadTurn(turn.reasoning, (Finish(turn.content),), (AssistantAction(content=turn.content),))
        calls = tuple(AssistantAction(tool_calls=(call,)) for call in turn.tool_calls)
        return ReadTurn(turn.reasoning, tuple(map(self.read_call, turn.tool_calls)), calls)

    @abstractmethod
    def read_call(self, call: ToolCall) -> Action:
        """The meaning of one call."""

    @abstractmethod
    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        """A turn with one call that does it; the ids of calls are left empty."""

    @abstractmethod
    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        """The turns that end an attempt."""

    @abstractmethod
    def outcome(self, action: Action, observation: str) -> Outcome:
        """What an observation of this action says."""


# ---- pieces of several harnesses -------------------------------------------------------------------------------------

_PLACE_IN_SCRIPT = re.compile(r"^(?:\S*/)?bash: line \d+: ", re.MULTILINE)
_NEVER_TWICE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b\d+\.\d+ ?s(?:ec(?:onds?)?)?\b"), "#s"),
    (re.compile(r"\b0x[0-9a-f]{6,}\b"), "0x#"),
    (re.compile(r"\b\d\d:\d\d(?::\d\d(?:\.\d+)?)?\b"), "##:##"),
)
"""Durations, addresses and times of day: no second run of the same command prints the same."""


def text_outcome(output: str) -> Outcome:
    """A command's output without what belongs to the harness or to the moment."""
    output = lasting(_PLACE_IN_SCRIPT.sub("bash: ", output))
    return Outcome("text", "\n".join(line.rstrip() for line in output.split("\n")).strip("\n"))


def lasting(output: str) -> str:
    for pattern, word in _NEVER_TWICE:
        output = pattern.sub(word, output)
    return output


def rows_outcome(text: str, separator: str) -> Outcome:
    """Numbered lines as ``number, tab, line``; any other text as it is."""
    rows = [re.fullmatch(rf" *(\d+){separator}(.*)", line) for line in text.removesuffix("\n").split("\n") if text]
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        return text_outcome(text)
    return Outcome("text", "\n".join(f"{row[1]}\t{row[2]}" for row in found))


def typed(keystrokes: str, needs_newline: bool = False) -> Run:
    if not keystrokes.strip() or is_key(keystrokes) or (needs_newline and not keystrokes.endswith("\n")):
        raise no_counterpart(f"the keys {keystrokes!r}")
    return Run(keystrokes.removesuffix("\n"))


def tool_call(name: str, reasoning: str, **arguments: object) -> AssistantAction:
    return AssistantAction(reasoning, tool_calls=(ToolCall("", name, arguments),))


def absolute(path: str) -> str:
    return posixpath.normpath(posixpath.join(WORK, path))


def no_counterpart(what: str) -> RetellingError:
    return RetellingError("no_counterpart", f"{what} has no counterpart in other harnesses")
