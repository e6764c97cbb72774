"""tmux's control mode: its lines, its quoting, and bash's marks in a pane's output.

In: lines that tmux wrote. Out: replies to commands, and a pane's bytes with prompts and the echo of typing taken out.
Starts nothing and waits for nothing.
"""

from __future__ import annotations

import re
from typing import Literal

from north_lightning.sandbox.processes import CappedOutput, word_bytes


def quoted(text: str) -> str:
    """A word for tmux's command parser: everything but letters and digits in octal."""
    return '"' + "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\{b:03o}" for b in word_bytes(text)) + '"'


class ControlStream:
    """Sorts tmux's lines into replies to commands, output of one pane, and words outside the protocol."""

    def __init__(self, pane: str) -> None:
        self.reply: list[bytes] = []
        self._block: bytes | None = None  # what follows "%begin" in the open block
        self._output = f"%output {pane} ".encode()

    def feed(self, line: bytes) -> tuple[Literal["output", "reply", "stray", "none"], bytes]:
        if self._block is not None:
            if line == b"%end " + self._block or line == b"%error " + self._block:
                is_ours = self._block.endswith(b" 1")  # the commands of the command line are flagged 0
                self._block = None
                return ("reply" if is_ours else "none"), b""
            self.reply.append(line)
            return "none", b""
        if line.startswith(self._output):
            return "output", _unescaped(line[len(self._output) :])
        if line.startswith(b"%begin "):
            self._block = line[len(b"%begin ") :]
            self.reply = []
            return "none", b""
        return ("none" if line.startswith(b"%") or not line else "stray"), line


def _unescaped(data: bytes) -> bytes:
    data = data.replace(rb"\015\012", b"\r\n").replace(rb"\033", b"\x1b")
    if b"\\" in data:
        data = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), data)
    return data


class PaneOutput:
    """Splits a pane's bytes at bash's marks into output (kept), and prompts and echo of typing (dropped)."""

    def __init__(self, nonce: str, max_bytes: int) -> None:
        self.nonce = nonce
        self.num_prompts = 0
        self.num_marks = 0
        self.is_at_prompt = False
        self.is_continuation = False  # the prompt is "> ", not "$ "
        self.last_exit_code: int | None = None
        self._max_bytes = max_bytes
        self._output = CappedOutput(max_bytes)
        self._rest = b""  # may be the start of a mark
        self._is_typing = False
        self._is_submitted = False
        self._says_when_reading = False  # readline has announced, once at least, that it begins to read a line
        self._began_reading = False  # it has since the last prompt: the next prompt is new, not the same drawn again
        self._prompt_rest = b""  # the part of the prompt's own text that has not come yet
        self._since_prompt = bytearray()  # printed by background jobs; or the echo of what was typed ahead
        mark = rf"\x1b\]133;(?:(?P<mark>[ACP])|D;(?P<code>\d+));k={nonce}\x07"
        line_begun = r"(?P<begun>\x1b\[\?2004h)"  # readline begins its bracketed-paste mode
        line_accepted = r"\x1b\[\?2004l\r"  # and ends it
        self._marks = re.compile(f"{mark}|{line_begun}|{line_accepted}".encode())

    def feed(self, data: bytes) -> None:
        data = self._rest + data
        position = 0
        for match in self._marks.finditer(data):
            self._keep(data[position : match.start()])
            position = match.end()
            self._pass(match)
        data = data[position:]
        escape = data.rfind(b"\x1b", max(len(data) - 40, 0))
        cut = escape if escape >= 0 and _may_be_mark(data[escape:]) else len(data)
        self._rest = data[cut:]
        self._keep(data[:cut])

    def _pass(self, match: re.Match[bytes]) -> None:
        if match["begun"]:
            self._says_when_reading = self._began_reading = True
            return
        if self._is_drawn_again(match):
            return
        self.num_marks += 1
        if match["code"] is not None:
            self.last_exit_code = int(match["code"])
            return
        self._since_prompt.clear()
        self.is_at_prompt = match["mark"] in (b"A", b"P")
        if self.is_at_prompt:
            self.num_prompts += 1
            self._began_reading = False
            self.is_continuation = match["mark"] == b"P"
            self._is_typing = self._is_submitted = False
            self._prompt_rest = b"> " if self.is_continuation else b"$ "

    def _is_drawn_again(self, match: re.Match[bytes]) -> bool:
        """Whether readline draws the prompt of a line that is being typed again, as it does for pasted newlines."""
        is_of_prompt = match["code"] is not None or match["mark"] in (b"A", b"P")
        return is_of_prompt and self.is_at_prompt and self._says_when_reading and not self._began_reading

    def _keep(self, data: bytes) -> None:
        if not self.is_at_prompt:
            self._output.add(data)
            return
        while data and self._prompt_rest[:1] == data[:1]:
            self._prompt_rest, data = self._prompt_rest[1:], data[1:]
        if not self._is_typing and len(self._since_prompt) < self._max_bytes:
            self._since_prompt += data

    @property
    def is_ready(self) -> bool:
        """Whether bash waits at a prompt, and no line is on its way to it."""
        return self.is_at_prompt and not self._is_submitted

    def begin_typing(self, *, submits: bool) -> None:
        """What comes now at a prompt is echo, until bash accepts the line; ``submits``: it is being sent one."""
        self._is_typing = True
        self._is_submitted = self._is_submitted or submits

    def take(self) -> CappedOutput:
        """What was printed since the last call."""
        output, self._output = self._output, CappedOutput(self._max_bytes)
        if self.is_at_prompt:
            output.add(bytes(self._since_prompt))
            self._since_prompt.clear()
        return output


def _may_be_mark(tail: bytes) -> bool:
    starts = (b"\x1b]133;", b"\x1b[?2004l\r", b"\x1b[?2004h")
    return any(start.startswith(tail) or (start == starts[0] and tail.startswith(start)) for start in starts)
