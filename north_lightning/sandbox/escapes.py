"""What a program wrote to a terminal, as plain text.

In: raw bytes. Out: text without escape sequences, carriage returns and backspaces applied within a line, or None where
only a terminal's screen can tell what is visible (cursor addressing, alternate screen). Does not wrap lines.
"""

from __future__ import annotations

import re

_ESCAPE = re.compile(
    r"\x1b\](?:[^\x07\x1b]*)(?:\x07|\x1b\\)"  # operating system command: title, link, shell integration
    r"|\x1b[PX^_].*?\x1b\\"  # device control and other strings
    r"|\x1b\[(?P<arguments>[0-?]*)[ -/]*(?P<final>[@-~])"
    r"|\x1b[ -/]*(?P<single>[0-~])",
    re.DOTALL,
)
_HARMLESS_FINALS = frozenset("mnchlqt")
_MOVING_SINGLES = frozenset("78DEMc")
_ALTERNATE_SCREENS = frozenset({"?47", "?1047", "?1049"})
_SILENT = dict.fromkeys((0, 5, 7, 14, 15, 127))
_ERASE = "\x1bK"  # stands for "erase to the end of the line" between the two passes


def plain_text(raw: bytes, columns: int) -> str | None:
    """The text that ``raw`` leaves on a terminal of endless height; None if the cursor is moved between lines."""
    text = raw.decode(errors="replace")
    if "\x1b" in text:
        moved = False

        def stripped(match: re.Match[str]) -> str:
            nonlocal moved
            final, single = match["final"], match["single"]
            if final == "K" and match["arguments"] in ("", "0"):
                return _ERASE
            if final:
                alternate = final in "hl" and not _ALTERNATE_SCREENS.isdisjoint(match["arguments"].split(";"))
                moved = moved or alternate or final not in _HARMLESS_FINALS
            elif single:
                moved = moved or single in _MOVING_SINGLES
            return ""

        text = _ESCAPE.sub(stripped, text)
        if moved:
            return None
    text = text.translate(_SILENT).replace("\x0b", "\n").replace("\x0c", "\n").replace("\r\n", "\n")
    if not ("\r" in text or "\b" in text or "\x1b" in text):
        return text
    lines = [_overwritten(line, columns) for line in text.split("\n")]
    return None if None in lines else "\n".join(line for line in lines if line is not None)


def _overwritten(line: str, columns: int) -> str | None:
    """One line after its carriage returns, backspaces and erasures; None if it wraps before one of them."""
    line = line.rstrip("\r")
    if not ("\r" in line or "\b" in line or "\x1b" in line):
        return line
    cells: list[str] = []
    column = 0
    for part in re.split(rf"({_ERASE}|[\r\b\t])", line):
        if part == "\r":
            column = 0
        elif part == "\b":
            column = max(column - 1, 0)
        elif part == _ERASE:
            del cells[column:]
        elif part == "\t":
            column += 8 - column % 8  # moves, and erases nothing
        else:
            shown = part.replace("\x1b", "")
            cells[len(cells) :] = " " * (column - len(cells))
            cells[column : column + len(shown)] = shown
            column += len(shown)
        if column > columns:
            return None
    return "".join(cells)


def capped(text: str, max_bytes: int, num_left_out: int = 0) -> str:
    """``text`` in ``max_bytes`` of UTF-8, half from the start and half from the end, and a line about the rest.

    ``num_left_out``: bytes already missing in its middle.
    """
    data = text.encode()
    if len(data) <= max_bytes:
        return text
    half = max_bytes // 2
    head, tail = data[:half].decode(errors="ignore"), data[len(data) - half :].decode(errors="ignore")
    return f"{head}\n[... {num_left_out + len(data) - 2 * half} bytes left out ...]\n{tail}"
