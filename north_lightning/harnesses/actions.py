"""What a tool call means, whatever the harness: run a command, look at a file, make one, replace text, finish.

In: an assistant's turn in one harness's words. Out: actions; and the way back, actions in another harness's words. And
what an observation says, without the frame that a harness puts around it, so that two harnesses can be compared. It
runs nothing and decides nothing: whether a call in other words does the same is for ``translation`` to prove.

What has no counterpart (undoing an edit, searching, keys of a terminal) is a ``RetellingError`` that says so.
"""

from __future__ import annotations

import json
import posixpath
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from shlex import quote
from typing import ClassVar

from north_lightning.errors import RetellingError
from north_lightning.harnesses import mini_swe_agent, opencode, react_terminal, swe_agent, terminus2
from north_lightning.harnesses.terminus_reply import read_reply
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


def dialect_of(harness_name: str) -> Dialect:
    """The words of a harness, by its name; ``RetellingError`` for one that is not known."""
    if harness_name not in DIALECTS:
        raise RetellingError("unknown_harness", f"expected one of {', '.join(DIALECTS)}, got {harness_name!r}")
    return DIALECTS[harness_name]


# ---- harnesses with an editor --------------------------------------------------------------------------------------


class SWEAgent(Dialect):
    keeps_state = True
    editor = "str_replace_editor"

    def read_call(self, call: ToolCall) -> Action:
        arguments = call.arguments
        if call.name == "submit":
            return Finish()
        if call.name == "bash":
            return Run(arguments["command"])
        path = _absolute(arguments.get("path", ""))
        match arguments.get("command"):
            case "view":
                first, last = arguments.get("view_range", (1, -1))
                return View(path, first, None if last == -1 else last)
            case "create":
                return Create(path, arguments["file_text"])
            case "str_replace":
                return Replace(path, arguments["old_str"], arguments.get("new_str", ""))
            case other:
                raise _no_counterpart(f"{call.name} {other}")

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        match action:
            case Run(command):
                return _call("bash", reasoning, command=command)
            case View(path, 1, None):
                return _call("str_replace_editor", reasoning, command="view", path=path)
            case View(path, first, last):
                lines = [first, -1 if last is None else last]
                return _call("str_replace_editor", reasoning, command="view", path=path, view_range=lines)
            case Create(path, text):
                return _call("str_replace_editor", reasoning, command="create", path=path, file_text=text)
            case Replace(path, old, new):
                return _call(
                    "str_replace_editor", reasoning, command="str_replace", path=path, old_str=old, new_str=new
                )
        raise _no_counterpart(type(action).__name__)

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        return [_call("submit", reasoning), _call("submit", "")]

    def outcome(self, action: Action, observation: str) -> Outcome:
        text = observation.removeprefix("OBSERVATION:\n")
        text = "" if text == swe_agent.NO_OUTPUT else text
        if isinstance(action, Run):
            return _text(text)
        if text.startswith("Error: "):
            return Outcome("failed")
        return _rows(text, "\t") if isinstance(action, View) else Outcome("done")


class OpenCode(Dialect):
    names_directory = True
    many_calls = True
    editor = "edit"

    def read_call(self, call: ToolCall) -> Action:
        arguments = call.arguments
        path = _absolute(arguments.get("filePath", ""))
        match call.name:
            case "bash":
                return Run(arguments["command"], _absolute(arguments.get("workdir", WORK)))
            case "read":
                first, limit = arguments.get("offset", 1), arguments.get("limit")
                return View(path, first, None if limit is None else first + limit - 1)
            case "write":
                return Create(path, arguments["content"])
            case "edit" if not arguments["oldString"]:
                return Create(path, arguments["newString"])
            case "edit" if not arguments.get("replaceAll"):
                return Replace(path, arguments["oldString"], arguments["newString"])
        raise _no_counterpart(call.name)

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        match action:
            case Run(command, directory):
                return _call(
                    "bash", reasoning, command=command, **({} if directory == WORK else {"workdir": directory})
                )
            case View(path, 1, None):
                return _call("read", reasoning, filePath=path)
            case View(path, first, None):
                return _call("read", reasoning, filePath=path, offset=first)
            case View(path, first, int(last)):
                return _call("read", reasoning, filePath=path, offset=first, limit=last - first + 1)
            case Create(path, text):
                return _call("write", reasoning, content=text, filePath=path)
            case Replace(path, old, new):
                return _call("edit", reasoning, filePath=path, oldString=old, newString=new)
        raise _no_counterpart(type(action).__name__)

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        return [AssistantAction(reasoning, words or DONE)]

    def outcome(self, action: Action, observation: str) -> Outcome:
        if isinstance(action, Run):
            return _text("" if observation == opencode.NO_OUTPUT else observation)
        if not isinstance(action, View):
            return Outcome("done" if observation in (opencode.EDITED, opencode.WROTE) else "failed")
        body = re.search(r"<type>file</type>\n<content>\n(.*)\n\n\([^\n]*\)\n</content>$", observation, re.DOTALL)
        if body is None:
            return _text(observation) if observation.startswith("<path>") else Outcome("failed")
        return _rows(body[1], ": ")


# ---- harnesses with nothing but a shell ----------------------------------------------------------------------------


class ShellOnly(Dialect):
    """Files are looked at and changed by commands: ``cat -n``, ``cat >`` and a line of Python."""

    def command(self, action: Action) -> str:
        """The command that does it, in a shell that stands anywhere."""
        quoted = self.quoted
        match action:
            case Run(command):
                return command
            case View(path, 1, None):
                return f"cat -n {quote(path)}"
            case View(path, first, last):
                return f"cat -n {quote(path)} | sed -n '{first},{'$' if last is None else last}p'"
            case Create(path, text):
                parent = posixpath.dirname(path)
                make = "" if parent == WORK else f"mkdir -p {quote(parent)} && "
                return make + self.writing(path, text)
            case Replace(path, old, new):
                return f"python3 -c {quote(_REPLACE)} {quote(path)} {quoted(old)} {quoted(new)}"
        raise _no_counterpart(type(action).__name__)

    def quoted(self, text: str) -> str:
        """``text`` as one word of bash."""
        return quote(text)

    def writing(self, path: str, text: str) -> str:
        """The command that makes a file of ``text``."""
        return f"printf %s {self.quoted(text)} > {quote(path)}"

    def outcome(self, action: Action, observation: str) -> Outcome:
        output = self.output(action, observation)
        if isinstance(action, Run):
            return _text(output)
        if isinstance(action, View):
            return Outcome("failed") if output.startswith("cat: ") else _rows(output, "\t")
        return Outcome("failed" if output.strip() else "done")

    @abstractmethod
    def output(self, action: Action, observation: str) -> str:
        """What the action's command printed."""


_REPLACE = (
    'import sys; p, a, b = sys.argv[1:]; t = open(p, newline="").read(); assert t.count(a) == 1; '
    'open(p, "w", newline="").write(t.replace(a, b))'
)


class MiniSWEAgent(ShellOnly):
    many_calls = True

    def read_call(self, call: ToolCall) -> Action:
        command = call.arguments["command"]
        if mini_swe_agent.MARKER not in command:
            return Run(command)
        if not re.fullmatch(rf"\s*echo (['\"]?){mini_swe_agent.MARKER}\1\s*", command):
            raise _no_counterpart("a command that hands in and does more")
        return Finish()

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        return _call("bash", reasoning, command=self.command(action))

    def writing(self, path: str, text: str) -> str:
        if not text.endswith("\n"):
            return super().writing(path, text)
        lines = text.split("\n")
        end = next(word for word in ("EOF", *(f"EOF{number}" for number in range(len(lines)))) if word not in lines)
        return f"cat > {quote(path)} <<'{end}'\n{text}{end}"

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        return [_call("bash", reasoning, command=f"echo {mini_swe_agent.MARKER}")]

    def output(self, action: Action, observation: str) -> str:
        """As far as it was not cut; of an output that was, the whole observation."""
        if observation.startswith("{"):
            return str(json.loads(observation).get("output", observation))
        match = re.fullmatch(r".*?<output>\n(.*)</output>", observation, re.DOTALL)
        return match[1] if match else observation


class OnScreen(ShellOnly):
    """A shell in a terminal: what is typed stands on one line, or bash would show how it goes on reading."""

    keeps_state = True
    is_screen = True
    shell = editor = "terminal"

    def quoted(self, text: str) -> str:
        if not any(character < " " for character in text):
            return quote(text)
        return "$'" + "".join(_ESCAPES.get(character, character) for character in text) + "'"


_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"} | {
    chr(code): f"\\x{code:02x}" for code in range(1, 32) if chr(code) not in "\n\t"
}


class ReActTerminal(OnScreen):
    def read_call(self, call: ToolCall) -> Action:
        return _typed(call.arguments["keystrokes"])

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        return _call("terminal", reasoning, keystrokes=self.command(action))

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        return [AssistantAction(reasoning, words or DONE)]

    def output(self, action: Action, observation: str) -> str:
        return "" if observation == react_terminal.NO_OUTPUT else observation


class Terminus2(OnScreen):
    """Analysis and plan are thoughts: read, they go behind the reasoning; written, they are taken from it."""

    def read(self, turn: Message) -> ReadTurn:
        reply = read_reply(turn.content)
        if turn.tool_calls or reply.error is not None or reply.warnings:
            raise RetellingError("unreadable_turn", f"expected a sound reply of Terminus 2, got {turn.content[:80]!r}")
        fields = json.loads(turn.content)
        thoughts = (turn.reasoning, fields["analysis"], fields["plan"])
        actions: list[Action] = [_typed(command.text, needs_newline=True) for command in reply.commands]
        if not actions and not reply.is_complete:
            raise _no_counterpart("a turn that only waits")
        if reply.is_complete:
            actions.append(Finish(fields["analysis"]))
        whole = AssistantAction(content=turn.content)
        calls = [whole] if len(actions) == 1 else [self._alone(action) for action in actions]
        return ReadTurn("\n\n".join(thought for thought in thoughts if thought), tuple(actions), tuple(calls))

    def _alone(self, action: Action) -> AssistantAction:
        """One action of a batch as a reply of its own."""
        return self.finish("")[0] if isinstance(action, Finish) else self.write(action)

    def read_call(self, call: ToolCall) -> Action:
        raise _no_counterpart(call.name)

    def write(self, action: Action, reasoning: str = "") -> AssistantAction:
        command = self.command(action)
        is_quick = re.match(r"(ls|cat|cd|head|tail|echo|pwd|grep|sed|printf|mkdir|mv|cp|rm)\b", command) is not None
        keys = {"keystrokes": command + "\n", "duration": 1.0 if is_quick else 15.0}
        return self._reply(reasoning, f"Run: {command.splitlines()[0] if command else ''}", [keys], is_complete=False)

    def finish(self, words: str, reasoning: str = "") -> list[AssistantAction]:
        done = self._reply(reasoning or words, "Nothing is left to do.", [], is_complete=True)
        return [done, self._reply("", "Confirm that the task is complete.", [], is_complete=True)]

    def output(self, action: Action, observation: str) -> str:
        """What stands between the echo of the command and the next prompt, its blanks left out where it wraps."""
        screen = observation.removeprefix(terminus2.NEW_OUTPUT).removeprefix(terminus2.SCREEN)
        shown = "".join(_lasting(screen).split())
        echo = "".join(_lasting(f"$ {self.command(action)}".replace("\n", "\n> ")).split())
        if not (shown.startswith(echo) and shown.endswith("$")):
            return observation
        return shown[len(echo) :].removesuffix("$")

    def outcome(self, action: Action, observation: str) -> Outcome:
        output = self.output(action, observation)
        if isinstance(action, View):
            return Outcome("failed") if output.startswith("cat:") else Outcome("text", output)
        return super().outcome(action, observation)

    @staticmethod
    def _reply(reasoning: str, plan: str, commands: list[dict[str, object]], *, is_complete: bool) -> AssistantAction:
        analysis = reasoning.rpartition("\n\n")[2] or "The work goes on."
        reply = {"analysis": analysis, "plan": plan, "commands": commands, "task_complete": is_complete}
        return AssistantAction(reasoning, json.dumps(reply, indent=2, ensure_ascii=False))


DIALECTS: dict[str, Dialect] = {
    swe_agent.SWEAgentHarness.name: SWEAgent(),
    opencode.OpenCodeHarness.name: OpenCode(),
    mini_swe_agent.MiniSWEAgentHarness.name: MiniSWEAgent(),
    react_terminal.ReActTerminalHarness.name: ReActTerminal(),
    terminus2.Terminus2Harness.name: Terminus2(),
}


# ---- pieces --------------------------------------------------------------------------------------------------------

_PLACE_IN_SCRIPT = re.compile(r"^(?:\S*/)?bash: line \d+: ", re.MULTILINE)
_NEVER_TWICE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b\d+\.\d+ ?s(?:ec(?:onds?)?)?\b"), "#s"),
    (re.compile(r"\b0x[0-9a-f]{6,}\b"), "0x#"),
    (re.compile(r"\b\d\d:\d\d(?::\d\d(?:\.\d+)?)?\b"), "##:##"),
)
"""Durations, addresses and times of day: no second run of the same command prints the same."""


def _text(output: str) -> Outcome:
    """A command's output without what belongs to the harness or to the moment."""
    output = _lasting(_PLACE_IN_SCRIPT.sub("bash: ", output))
    return Outcome("text", "\n".join(line.rstrip() for line in output.split("\n")).strip("\n"))


def _lasting(output: str) -> str:
    for pattern, word in _NEVER_TWICE:
        output = pattern.sub(word, output)
    return output


def _rows(text: str, separator: str) -> Outcome:
    """Numbered lines as ``number, tab, line``; any other text as it is."""
    rows = [re.fullmatch(rf" *(\d+){separator}(.*)", line) for line in text.removesuffix("\n").split("\n") if text]
    found = [row for row in rows if row is not None]
    return (
        Outcome("text", "\n".join(f"{row[1]}\t{row[2]}" for row in found)) if len(found) == len(rows) else _text(text)
    )


def _typed(keystrokes: str, needs_newline: bool = False) -> Run:
    if not keystrokes.strip() or is_key(keystrokes) or (needs_newline and not keystrokes.endswith("\n")):
        raise _no_counterpart(f"the keys {keystrokes!r}")
    return Run(keystrokes.removesuffix("\n"))


def _call(name: str, reasoning: str, **arguments: object) -> AssistantAction:
    return AssistantAction(reasoning, tool_calls=(ToolCall("", name, arguments),))


def _absolute(path: str) -> str:
    return posixpath.normpath(posixpath.join(WORK, path))


def _no_counterpart(what: str) -> RetellingError:
    return RetellingError("no_counterpart", f"{what} has no counterpart in other harnesses")
