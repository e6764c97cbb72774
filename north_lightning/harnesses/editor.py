"""A file editor for a model: view, create, str_replace, insert, undo_edit on text files inside a sandbox.

In: the arguments of one call. Out: the text the model reads, be it a listing, a snippet around the edit or an error
that says what to change. Files are read and written through the sandbox's shell, so the machine that trains never
opens a path that a model chose.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from shlex import quote
from typing import Any

from north_lightning.sandbox import Shell

LISTING_DEPTH = 2
MAX_PATH_CHARS = 1000
MAX_LINES_NAMED = 10


class EditError(Exception):
    """A call the editor cannot carry out; the message is the model's observation."""


def lines_of(text: str) -> list[str]:
    """Lines without newlines, as ``cat -n`` and ``grep -n`` count them (``str.splitlines`` counts form feeds too)."""
    return text.removesuffix("\n").split("\n") if text else []


def numbered(lines: list[str], first: int = 1) -> str:
    """Lines as ``cat -n`` prints them, counted from ``first``."""
    return "\n".join(f"{number:6}\t{line}" for number, line in enumerate(lines, first))


def occurrences(text: str, part: str) -> list[int]:
    """Line numbers, from 1, where ``part`` begins in ``text``; matches may not overlap."""
    found, start = [], text.find(part)
    while start != -1:
        found.append(text.count("\n", 0, start) + 1)
        start = text.find(part, start + len(part))
    return found


def similar_lines(text: str, part: str) -> list[int]:
    """Line numbers that hold the first non-blank line of ``part`` but for spaces: where a failed edit was meant."""
    wanted = next(("".join(line.split()) for line in lines_of(part) if line.strip()), None)
    if wanted is None:
        return []
    return [number for number, line in enumerate(lines_of(text), 1) if wanted in "".join(line.split())]


def named(numbers: list[int]) -> str:
    """``3, 7, 12``, the first few of them."""
    more = ", ..." if len(numbers) > MAX_LINES_NAMED else ""
    return ", ".join(str(number) for number in numbers[:MAX_LINES_NAMED]) + more


class Editor:
    """Edits files of one sandbox and remembers every file's earlier texts for ``undo_edit``.

    Args:
        shell: Where the files are.
        root: What relative paths are relative to.
        timeout_s: For the small commands the editor runs itself.
        context_lines: Lines shown around an edit.
    """

    def __init__(self, shell: Shell, root: str = "/work", timeout_s: float = 30.0, context_lines: int = 4) -> None:
        self.shell = shell
        self.root = root
        self.timeout_s = timeout_s
        self.context_lines = context_lines
        self._earlier: dict[str, list[str | None]] = {}

    async def execute(self, arguments: Mapping[str, Any]) -> str:
        """The observation of one call whose arguments fit the tool's schema; errors are observations too."""
        command = arguments["command"]
        path = posixpath.normpath(posixpath.join(self.root, arguments["path"]))
        if "\0" in path or len(path) > MAX_PATH_CHARS:
            return "Error: path is not one that a file could have"
        try:
            match command:
                case "view":
                    return await self._view(path, arguments.get("view_range"))
                case "create":
                    return await self._create(path, self._need(arguments, "file_text"))
                case "str_replace":
                    return await self._replace(path, self._need(arguments, "old_str"), arguments.get("new_str", ""))
                case "insert":
                    line, text = self._need(arguments, "insert_line"), self._need(arguments, "new_str")
                    return await self._insert(path, line, text)
                case "undo_edit":
                    return await self._undo(path)
                case _:
                    raise EditError(f"there is no command {command!r}")
        except (EditError, OSError) as error:
            return f"Error: {error}"

    async def _view(self, path: str, view_range: list[int] | None) -> str:
        try:
            lines = lines_of(await self._read(path))
        except IsADirectoryError:
            return await self._list(path)
        if view_range is None:
            return numbered(lines)
        first, last = map(int, view_range)  # a JSON integer may be 1.0
        last = len(lines) if last == -1 else last
        if not 1 <= first <= last <= len(lines):
            raise EditError(f"view_range {view_range} is not within lines 1 to {len(lines)} of {path}")
        return numbered(lines[first - 1 : last], first)

    async def _list(self, path: str) -> str:
        listing = f"find {quote(path)} -mindepth 1 -maxdepth {LISTING_DEPTH} -name '.*' -prune -o -mindepth 1 -print"
        found = await self.shell.run(f"{listing} | sort", self.timeout_s)
        return f"{path}\n{found.output}".rstrip()

    async def _create(self, path: str, text: str) -> str:
        try:
            await self.shell.read_file(path)
        except FileNotFoundError:
            await self._write(path, text, None)
            return f"Created {path}"
        except OSError:
            pass  # there is something, if nothing readable
        raise EditError(f"{path} exists already; change it with str_replace or insert")

    async def _replace(self, path: str, old: str, new: str) -> str:
        text = await self._read(path)
        if not old:
            raise EditError("old_str is empty; use insert to add lines")
        if old == new:
            raise EditError("old_str and new_str are the same: nothing to change")
        lines = occurrences(text, old)
        if not lines:
            near = similar_lines(text, old)
            hint = f"; close to it, but for spaces or what follows: line {named(near)}" if near else ""
            raise EditError(f"old_str is not in {path}{hint}")
        if len(lines) > 1:
            raise EditError(f"old_str is {len(lines)} times in {path}, at lines {named(lines)}: add lines around it")
        edited = text.replace(old, new)
        await self._write(path, edited, text)
        return self._snippet(path, edited, lines[0], new.count("\n") + 1)

    async def _insert(self, path: str, after: int, new: str) -> str:
        text = await self._read(path)
        lines = lines_of(text)
        if not 0 <= after <= len(lines):
            raise EditError(f"insert_line {after} is not within 0 to {len(lines)}, the lines of {path}")
        added = lines_of(new) or [""]
        edited = "\n".join([*lines[:after], *added, *lines[after:]]) + "\n"
        await self._write(path, edited, text)
        return self._snippet(path, edited, after + 1, len(added))

    async def _undo(self, path: str) -> str:
        history = self._earlier.get(path)
        if not history:
            raise EditError(f"there is no edit of {path} to undo")
        earlier = history[-1]
        if earlier is None:
            removed = await self.shell.run(f"rm -f -- {quote(path)}", self.timeout_s)
            if removed.exit_code:
                raise EditError(removed.output.strip())
            history.pop()
            return f"Removed {path}"
        await self._store(path, earlier)
        history.pop()
        return f"Undid the last edit of {path}"

    def _snippet(self, path: str, text: str, first: int, num_lines: int) -> str:
        """The edited lines with a few around them."""
        lines = lines_of(text)
        start = max(first - self.context_lines, 1)
        stop = min(first + num_lines - 1 + self.context_lines, len(lines))
        return f"Edited {path}\n{numbered(lines[start - 1 : stop], start)}"

    async def _read(self, path: str) -> str:
        """The text of a file, or the ``OSError`` that fits: ``IsADirectoryError`` for whatever is no file."""
        content = await self.shell.read_file(path)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise EditError(f"{path} is not UTF-8 text") from error

    async def _write(self, path: str, text: str, earlier: str | None) -> None:
        await self._store(path, text)
        self._earlier.setdefault(path, []).append(earlier)

    async def _store(self, path: str, text: str) -> None:
        await self.shell.write_file(path, text.encode())

    @staticmethod
    def _need(arguments: Mapping[str, Any], name: str) -> Any:
        if name not in arguments:
            raise EditError(f"{arguments['command']} needs {name}")
        return arguments[name]
