"""OpenCode (version 1.18): bash, files, search and a list of things to do; a turn without calls is the end.

In: a task and a sandbox. Out: a session that carries the calls of a turn out in order. A call that does not fit its
tool is answered by an error (the ``invalid`` tool), it is never the end; the same call three times in a row is.

Where it differs from OpenCode: prompts, descriptions and sentences are our own. ``task`` (a second agent), ``skill``
and ``webfetch`` are in the list of tools, as published, but answer that they are switched off: no second model and no
network in a sandbox. Of the lenient ways in which ``edit`` finds its text three are here (see ``replaced``). ``grep``
and ``glob`` list files by path, OpenCode as its search comes upon them. At three equal calls OpenCode asks its user;
with nobody to ask the attempt ends as it stands.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Awaitable, Callable, Mapping
from shlex import quote
from typing import Any

import jsonschema

from north_lightning.errors import InvalidActionError
from north_lightning.harnesses.editor import lines_of
from north_lightning.harnesses.opencode_tools import TOOLS
from north_lightning.harnesses.prompts import OPENCODE_SYSTEM, pick
from north_lightning.interfaces import Harness, HarnessSession, Sandbox
from north_lightning.sandbox import Shell
from north_lightning.types import AssistantAction, Count, Message, Positive, Prompt, Step, Task, ToolCall, ToolResult

ROOT = "/work"
SAVED = "/tmp/opencode/output"  # inside the sandbox: whole outputs that were too long to show
NO_OUTPUT = "(no output)"
WROTE, EDITED = "Wrote file successfully.", "Edit applied successfully."
DEFAULT_LIMIT = 2000  # lines of one read
MAX_LINE_CHARS = 2000
MAX_MATCHES = 100
DEFAULT_TIMEOUT_MS = 120_000
REFUSED = "{tool} is switched off here; use the other tools"

Handler = Callable[[Mapping[str, Any]], Awaitable[str]]


class ToolError(Exception):
    """A call that cannot be carried out; the message is what the model reads."""


class OpenCodeHarness(Harness):
    """Any number of calls a turn, answered in order; an answer without calls ends the attempt.

    Args:
        command_timeout_s: Upper limit of one command, whatever the model asks for.
        max_output_lines: Output of more lines is saved to a file; the model is told where, and sees the end.
        max_output_bytes: The same for bytes.
        max_equal_calls: So many equal calls in a row end the attempt; 0 is no limit.
    """

    name = "opencode"

    def __init__(
        self,
        command_timeout_s: Positive = 120.0,
        max_output_lines: Count = 2000,
        max_output_bytes: Count = 50 * 1024,
        max_equal_calls: Count = 3,
    ) -> None:
        self.command_timeout_s = command_timeout_s
        self.max_output_lines = max_output_lines
        self.max_output_bytes = max_output_bytes
        self.max_equal_calls = max_equal_calls

    @property
    def action_limit_s(self) -> float:
        return self.command_timeout_s

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        system = pick(OPENCODE_SYSTEM, variation).format(directory=ROOT)
        return Prompt((Message("system", system), Message("user", task.instruction)), TOOLS)

    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession:
        return OpenCodeSession(self, sandbox)


class OpenCodeSession(HarnessSession):
    """One attempt: which files were read, the list of things to do, and the last call with how often it was made."""

    def __init__(self, settings: OpenCodeHarness, sandbox: Sandbox) -> None:
        self.settings = settings
        self.sandbox = sandbox
        self.files = Shell(sandbox)  # reads and writes files; no command of the model runs in it
        self._num_saved = 0
        self._last_call = ""
        self._num_equal = 0
        self._handlers: dict[str, Handler] = {
            "bash": self._bash,
            "read": self._read,
            "write": self._write,
            "edit": self._edit,
            "glob": self._glob,
            "grep": self._grep,
            "todowrite": _todos,
        }

    async def act(self, action: AssistantAction) -> Step:
        if not action.tool_calls:
            return Step(done=True)
        results = []
        for call in action.tool_calls:
            if self._is_doom_loop(call):
                return Step(done=True)
            results.append(ToolResult(call.id, await self._answer(call)))
        return Step(tuple(results))

    async def reject(self, error: InvalidActionError) -> Step | None:
        """Without an id that could be read there is no call to answer: the error comes as a message."""
        return Step(message=f"The arguments provided to the tool are invalid: {error}")

    async def close(self) -> None:
        await self.files.close()

    def _is_doom_loop(self, call: ToolCall) -> bool:
        this = json.dumps([call.name, dict(call.arguments)], sort_keys=True)
        self._num_equal = self._num_equal + 1 if this == self._last_call else 1
        self._last_call = this
        return 0 < self.settings.max_equal_calls <= self._num_equal

    async def _answer(self, call: ToolCall) -> str:
        tool = next((tool for tool in TOOLS if tool.name == call.name), None)
        if tool is None:
            known = ", ".join(tool.name for tool in TOOLS)
            return f"The arguments provided to the tool are invalid: there is no tool '{call.name}', only {known}"
        validator = jsonschema.Draft202012Validator(tool.parameters)
        misfit = jsonschema.exceptions.best_match(validator.iter_errors(call.arguments))
        if misfit is not None or _holds_half_characters(call.arguments):
            reason = misfit.message if misfit is not None else "half a character"
            return f"The arguments provided to the tool are invalid: {call.name}: {reason}"
        if call.name not in self._handlers:
            return REFUSED.format(tool=call.name)
        try:
            return await self._handlers[call.name](call.arguments)
        except ToolError as error:
            return str(error)
        except OSError as error:
            return f"Error: {error}"

    # ---- commands

    async def _bash(self, arguments: Mapping[str, Any]) -> str:
        asked_s = arguments.get("timeout", DEFAULT_TIMEOUT_MS) / 1000
        timeout_s = min(asked_s, self.settings.command_timeout_s)
        directory = _absolute(arguments.get("workdir", ROOT))
        command = f"cd -- {quote(directory)} || exit 1\n{arguments['command']}"
        result = await self.sandbox.run(command, timeout_s)
        output = await self._capped(result.output)
        if result.timed_out:
            note = f"the command was ended: it took more than {round(timeout_s * 1000)} ms"
            output += f"\n\n<shell_metadata>\n{note}\n</shell_metadata>"
        return output or NO_OUTPUT

    async def _capped(self, output: str) -> str:
        """``output``, or where the whole of it is, and its end: so many lines and bytes as may be shown."""
        lines = output.split("\n")
        shown = "\n".join(lines[-self.settings.max_output_lines :])
        data = shown.encode(errors="replace")
        if len(data) > self.settings.max_output_bytes:
            shown = data[-self.settings.max_output_bytes :].decode(errors="ignore")
            shown = shown.partition("\n")[2] or shown
        if shown == output:
            return output
        self._num_saved += 1
        path = f"{SAVED}_{self._num_saved}"
        await self._save(path, output)
        return f"...output truncated...\n\nFull output saved to: {path}\n\n{shown}"

    async def _save(self, path: str, text: str) -> None:
        await self.sandbox.run(f"mkdir -p {quote(posixpath.dirname(path))}", self.settings.command_timeout_s)
        await self.files.write_file(path, text.encode(errors="replace"))

    # ---- files

    async def _text_of(self, path: str) -> str:
        content = await self.files.read_file(path)
        if b"\0" in content:
            raise ToolError(f"Cannot read binary file: {path}")
        return content.decode(errors="replace")

    async def _read(self, arguments: Mapping[str, Any]) -> str:
        path = _absolute(arguments["filePath"])
        try:
            lines = lines_of(await self._text_of(path))
        except FileNotFoundError:
            raise ToolError(f"File not found: {path}") from None
        except IsADirectoryError:
            return await self._listing(path)
        first = max(int(arguments.get("offset", 1)), 1)
        if first > max(len(lines), 1):
            raise ToolError(f"Offset {first} is out of range for this file ({len(lines)} lines)")
        shown = lines[first - 1 : first - 1 + int(arguments.get("limit", DEFAULT_LIMIT))]
        rows, size = [], 0
        for number, line in enumerate(shown, first):
            row = f"{number}: {_clipped(line)}"
            size += len(row.encode()) + 1
            if size > self.settings.max_output_bytes:
                break
            rows.append(row)
        last = first - 1 + len(rows)
        more = f"Showing lines {first}-{last} of {len(lines)}. Use offset={last + 1} to continue."
        end = f"End of file - total {len(lines)} lines" if last >= len(lines) else more
        body = "\n".join(rows)
        return f"<path>{path}</path>\n<type>file</type>\n<content>\n{body}\n\n({end})\n</content>"

    async def _listing(self, path: str) -> str:
        command = (
            f"cd -- {quote(path)} && find . -mindepth 1 -maxdepth 1 \\( -type d -printf '%f/\\n' -o -printf '%f\\n' \\)"
        )
        found = await self.sandbox.run(f"{command} | LC_ALL=C sort", self.settings.command_timeout_s)
        entries = found.output.splitlines()
        body = "\n".join(entries)
        return f"<path>{path}</path>\n<type>directory</type>\n<entries>\n{body}\n\n({len(entries)} entries)\n</entries>"

    async def _write(self, arguments: Mapping[str, Any]) -> str:
        await self._save(_absolute(arguments["filePath"]), arguments["content"])
        return WROTE

    async def _edit(self, arguments: Mapping[str, Any]) -> str:
        path, old, new = _absolute(arguments["filePath"]), arguments["oldString"], arguments["newString"]
        if old == new:
            raise ToolError("No changes to apply: oldString and newString are identical.")
        try:
            text = await self._text_of(path)
        except FileNotFoundError:
            if old:
                raise ToolError(f"File {path} not found") from None
            await self._save(path, new)
            return EDITED
        if not old:
            raise ToolError("oldString cannot be empty for a file that exists; use write to replace the whole file.")
        await self.files.write_file(path, replaced(text, old, new, bool(arguments.get("replaceAll"))).encode())
        return EDITED

    # ---- search

    async def _glob(self, arguments: Mapping[str, Any]) -> str:
        directory = _absolute(arguments.get("path", ROOT))
        pattern = arguments["pattern"]
        where = "-path" if "/" in pattern else "-name"
        wanted = posixpath.join(directory, pattern.replace("**/", "*")) if "/" in pattern else pattern
        command = f"find {quote(directory)} -name .git -prune -o -type f {where} {quote(wanted)} -print | LC_ALL=C sort"
        found = (await self.sandbox.run(command, self.settings.command_timeout_s)).output.splitlines()
        return _first(found) or "No files found"

    async def _grep(self, arguments: Mapping[str, Any]) -> str:
        directory = _absolute(arguments.get("path", ROOT))
        include = f"--include={quote(arguments['include'])} " if "include" in arguments else ""
        command = f"grep -rnIE --exclude-dir=.git {include}-e {quote(arguments['pattern'])} -- {quote(directory)}"
        found = await self.sandbox.run(f"{command} | LC_ALL=C sort -t: -k1,1 -k2,2n", self.settings.command_timeout_s)
        rows = [row for line in found.output.splitlines() if len(row := line.split(":", 2)) == 3]
        if not rows:
            return "No files found"
        lines, last = [f"Found {len(rows)} matches"], ""
        for path, number, text in rows[:MAX_MATCHES]:
            if path != last:
                lines += [""] * bool(last) + [f"{path}:"]
                last = path
            lines.append(f"  Line {number}: {_clipped(text)}\n")  # a blank line follows every match, as published
        if len(rows) > MAX_MATCHES:
            lines += ["", f"({len(rows) - MAX_MATCHES} more matches are not shown; search for something narrower)"]
        return "\n".join(lines)


def replaced(text: str, old: str, new: str, replace_all: bool) -> str:
    """``text`` with ``old`` replaced, as the first of three ways finds it: exactly; by lines, blanks at their ends left
    out; by words."""
    found = [old] if old in text else _by_lines(text, old) or _by_words(text, old)
    if not found:
        raise ToolError("Could not find oldString in the file. It must match exactly, blanks and line ends included.")
    if replace_all:
        return text.replace(found[0], new)
    if len(found) > 1 or text.count(found[0]) > 1:
        raise ToolError("Found multiple matches for oldString. Give more lines around it, so that it is found once.")
    return text.replace(found[0], new, 1)


def _by_lines(text: str, old: str) -> list[str]:
    wanted = [line.strip() for line in old.removesuffix("\n").split("\n")]
    return _blocks(text, len(wanted), lambda lines: [line.strip() for line in lines] == wanted) if any(wanted) else []


def _by_words(text: str, old: str) -> list[str]:
    """Whole lines (as many as ``old`` has) with the same words, or else the words within a line."""
    words = old.split()
    if not words:
        return []
    found = _blocks(text, 1, lambda lines: lines[0].split() == words)
    found += _blocks(text, old.count("\n") + 1, lambda lines: " ".join(lines).split() == words) if "\n" in old else []
    return found or re.findall(r"[^\S\n]+".join(map(re.escape, words)), text)


def _blocks(text: str, size: int, fits: Callable[[list[str]], bool]) -> list[str]:
    lines = text.split("\n")
    return ["\n".join(lines[i : i + size]) for i in range(len(lines) - size + 1) if fits(lines[i : i + size])]


async def _todos(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments["todos"], indent=2, ensure_ascii=False)


def _absolute(path: str) -> str:
    path = posixpath.normpath(posixpath.join(ROOT, path))
    if "\0" in path:
        raise ToolError("a path holds a zero byte")
    return path


def _clipped(line: str) -> str:
    return (
        line
        if len(line) <= MAX_LINE_CHARS
        else f"{line[:MAX_LINE_CHARS]}... (line truncated to {MAX_LINE_CHARS} chars)"
    )


def _first(paths: list[str]) -> str:
    more = f"\n\n({len(paths) - MAX_MATCHES} more are not shown)" if len(paths) > MAX_MATCHES else ""
    return "\n".join(paths[:MAX_MATCHES]) + more


def _holds_half_characters(arguments: Mapping[str, Any]) -> bool:
    try:
        json.dumps(dict(arguments), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
