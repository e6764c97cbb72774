"""Harnesses with nothing but a shell: files are looked at and changed by commands."""

from __future__ import annotations

import posixpath
from abc import abstractmethod
from shlex import quote

from north_lightning.harnesses.actions import (
    WORK,
    Action,
    Create,
    Dialect,
    Outcome,
    Replace,
    Run,
    View,
    no_counterpart,
    rows_outcome,
    text_outcome,
)

_REPLACE = (
    'import sys; p, a, b = sys.argv[1:]; t = open(p, newline="").read(); assert t.count(a) == 1; '
    'open(p, "w", newline="").write(t.replace(a, b))'
)


_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"} | {
    chr(code): f"\\x{code:02x}" for code in range(1, 32) if chr(code) not in "\n\t"
}


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
        raise no_counterpart(type(action).__name__)

    def quoted(self, text: str) -> str:
        """``text`` as one word of bash."""
        return quote(text)

    def writing(self, path: str, text: str) -> str:
        """The command that makes a file of ``text``."""
        return f"printf %s {self.quoted(text)} > {quote(path)}"

    def outcome(self, action: Action, observation: str) -> Outcome:
        output = self.output(action, observation)
        if isinstance(action, Run):
            return text_outcome(output)
        if isinstance(action, View):
            return Outcome("failed") if output.startswith("cat: ") else rows_outcome(output, "\t")
        return Outcome("failed" if output.strip() else "done")

    @abstractmethod
    def output(self, action: Action, observation: str) -> str:
        """What the action's command printed."""


class OnScreen(ShellOnly):
    """A shell in a terminal: what is typed stands on one line, or bash would show how it goes on reading."""

    keeps_state = True
    is_screen = True
    shell = editor = "terminal"

    def quoted(self, text: str) -> str:
        if not any(character < " " for character in text):
            return quote(text)
        return "$'" + "".join(_ESCAPES.get(character, character) for character in text) + "'"
