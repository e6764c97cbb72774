"""Reads a Terminus 2 reply: a JSON object of analysis, plan, commands and task_complete, in plain text.

In: what a model wrote. Out: commands, whether the task is called complete, and notes: one error, or any number of
warnings, each with a ``kind`` that does not depend on its wording. Lenient as published: text around the object,
missing closing braces and an object inside other text are read, with a warning. It runs nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal[
    "no_json", "bad_json", "not_object", "missing_fields", "commands_type", "command_type", "no_keystrokes",
    "keystrokes_type", "half_character", "text_before", "text_after", "field_type", "field_order", "duration_type",
    "no_duration", "unknown_fields", "no_newline", "closed_braces", "extracted",
]  # fmt: skip

FIELDS = ("analysis", "plan", "commands")
DEFAULT_DURATION_S = 1.0
MAX_DURATION_S = 60.0
TRUE_WORDS = ("true", "1", "yes")

_MARKS = re.compile(r'\\.|["{}]', re.DOTALL)
_SHALLOW_OBJECT = re.compile(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}")
_BRACES_MAY_HELP = ("no_json", "bad_json")


@dataclass(frozen=True, slots=True)
class Note:
    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Keystrokes:
    text: str
    duration_s: float


@dataclass(frozen=True, slots=True)
class Reply:
    """``commands`` are empty where ``error`` is set."""

    commands: tuple[Keystrokes, ...] = ()
    is_complete: bool = False
    error: Note | None = None
    warnings: tuple[Note, ...] = ()

    @property
    def feedback(self) -> str:
        """What the model is told about its own reply; empty if there is nothing to say."""
        warnings = "\n".join(f"- {note.text}" for note in self.warnings)
        parts = [f"ERROR: {self.error.text}"] if self.error is not None else []
        return "\n".join([*parts, *([f"WARNINGS: {warnings}"] if warnings else [])])


class _UnreadableError(Exception):
    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.note = Note(kind, text)


def read_reply(text: str) -> Reply:
    """The reply as it stands, or mended in the first of two ways that makes it readable."""
    reply = _read(text)
    if reply.error is None:
        return reply
    for note, mended in _mended(text, reply.error):
        again = _read(mended)
        if again.error is None:
            return replace(again, warnings=(note, *again.warnings))
    return reply


def _mended(text: str, error: Note) -> Iterator[tuple[Note, str]]:
    missing = text.count("{") - text.count("}")
    if error.kind in _BRACES_MAY_HELP and missing > 0:
        yield (
            Note("closed_braces", "AUTO-CORRECTED: closing braces were missing; write them next time"),
            text + "}" * missing,
        )
    for match in _SHALLOW_OBJECT.finditer(text):
        try:
            json.loads(match.group())
        except (ValueError, RecursionError):
            continue
        yield Note("extracted", "AUTO-CORRECTED: the JSON was taken out of other text; send it alone"), match.group()
        return


def _read(text: str) -> Reply:
    warnings: list[Note] = []
    try:
        data = _object_of(text, warnings)
    except _UnreadableError as error:
        return Reply(error=error.note, warnings=tuple(warnings))
    is_complete = data.get("task_complete", False)
    if isinstance(is_complete, str):
        is_complete = is_complete.lower() in TRUE_WORDS
    try:
        commands = _commands_of(data["commands"], warnings)
    except _UnreadableError as error:
        if not is_complete:
            return Reply(error=error.note, warnings=tuple(warnings))
        return Reply((), True, None, (*warnings, error.note))
    return Reply(commands, bool(is_complete), None, tuple(warnings))


def _object_of(text: str, warnings: list[Note]) -> dict[str, Any]:
    """The first object in ``text`` that closes, checked."""
    try:
        start, end = _span(text)
    except _UnreadableError:
        warnings.append(Note("no_json", "There is no JSON object that closes"))
        raise
    if text[:start].strip():
        warnings.append(Note("text_before", "There is text before the JSON object"))
    if text[end:].strip():
        warnings.append(Note("text_after", "There is text after the JSON object"))
    source = text[start:end]
    try:
        data = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise _UnreadableError("bad_json", f"Invalid JSON: {error}") from None
    if not isinstance(data, dict):
        raise _UnreadableError("not_object", "The reply must be a JSON object")
    missing = [name for name in FIELDS if name not in data]
    if missing:
        raise _UnreadableError("missing_fields", f"Missing required fields: {', '.join(missing)}")
    for name in ("analysis", "plan"):
        if not isinstance(data[name], str):
            warnings.append(Note("field_type", f"'{name}' should be a string"))
    if not isinstance(data["commands"], list):
        raise _UnreadableError("commands_type", "'commands' must be an array")
    _check_order(source, warnings)
    if not isinstance(data.get("task_complete"), bool | str | None):
        warnings.append(Note("field_type", "'task_complete' should be a boolean or a string"))
    return data


def _span(text: str) -> tuple[int, int]:
    """Where the first object that closes begins and ends; braces in strings do not count."""
    depth, start, in_string = 0, -1, False
    for match in _MARKS.finditer(text):
        mark = match.group()
        if mark == '"':
            in_string = not in_string
        elif in_string or len(mark) > 1:
            continue
        elif mark == "{":
            start = match.start() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0 and start >= 0:
                return start, match.end()
    raise _UnreadableError("no_json", "No valid JSON found in the reply")


def _check_order(source: str, warnings: list[Note]) -> None:
    places = {name: match.start() for name in FIELDS if (match := re.search(rf'"{name}"\s*:', source))}
    found = sorted(places, key=places.__getitem__)
    expected = [name for name in FIELDS if name in places]
    if found != expected:
        words = f"found {', '.join(found)}; expected {', '.join(expected)}"
        warnings.append(Note("field_order", f"The fields are in another order: {words}"))


def _commands_of(items: list[Any], warnings: list[Note]) -> tuple[Keystrokes, ...]:
    commands = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise _UnreadableError("command_type", f"Command {number} must be an object")
        if "keystrokes" not in item:
            raise _UnreadableError("no_keystrokes", f"Command {number} has no 'keystrokes'")
        text = item["keystrokes"]
        if not isinstance(text, str):
            raise _UnreadableError("keystrokes_type", f"Command {number}: 'keystrokes' must be a string")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _UnreadableError("half_character", f"Command {number}: 'keystrokes' hold half a character")
        duration_s = _duration_of(item, number, warnings)
        unknown = sorted(item.keys() - {"keystrokes", "duration"})
        if unknown:
            warnings.append(Note("unknown_fields", f"Command {number} has unknown fields: {', '.join(unknown)}"))
        if number < len(items) and text and not text.endswith("\n"):
            words = f"Command {number} does not end with a newline, so the next one continues its line"
            warnings.append(Note("no_newline", words))
        commands.append(Keystrokes(text, duration_s))
    return tuple(commands)


def _duration_of(item: dict[str, Any], number: int, warnings: list[Note]) -> float:
    """Seconds from 0 to ``MAX_DURATION_S``."""
    if "duration" not in item:
        warnings.append(Note("no_duration", f"Command {number} has no 'duration'; {DEFAULT_DURATION_S} is used"))
        return DEFAULT_DURATION_S
    value = item["duration"]
    if not isinstance(value, int | float) or (isinstance(value, float) and math.isnan(value)):
        words = f"Command {number}: 'duration' is not a number; {DEFAULT_DURATION_S} is used"
        warnings.append(Note("duration_type", words))
        return DEFAULT_DURATION_S
    return float(min(max(value, 0), MAX_DURATION_S))
