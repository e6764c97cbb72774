"""Results to calls: one walk over what was said, which gives every call an id of its own and every result its call.

Where results name no call, or one that is not open: by order if there are as many as open calls, else together as one
result of the last. A call without a result, followed by somebody else's words, gets an empty one. What follows the last
assistant's turn is dropped: nothing learns from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from north_lightning.data.formats.base import Notes
from north_lightning.types import Message, Role, ToolCall

_MARKS = re.compile(r"```|</?(?:think|thinking)>")


@dataclass
class Said:
    """One message while it is read."""

    role: Role
    content: str = ""
    thoughts: list[str] = field(default_factory=list)
    calls: list[tuple[str | None, str, dict[str, Any]]] = field(default_factory=list)  # id, name, arguments
    answers: str | None = None  # the id of a call
    trained: bool = True
    calls_are_text: bool = False

    @property
    def reasoning(self) -> str:
        return "\n\n".join(thought.strip() for thought in self.thoughts if thought.strip())

    def think_once(self, thoughts: list[str]) -> None:
        """Add thoughts, unless they are there already: some programs write the same under several keys."""
        known, new = "".join(self.reasoning.split()), "".join("".join(thoughts).split())
        if known and known in new:
            self.thoughts = thoughts
        elif new not in known:
            self.thoughts += thoughts

    def garble(self, text: str, notes: Notes) -> None:
        """Show what the model wrote where a call should be, and do not learn it."""
        self.content = "\n\n".join(part for part in (self.content, text) if part)
        self.trained = False
        notes.changed["turns with an unreadable call, not trained"] += 1

    def tidy(self, notes: Notes) -> None:
        """Split thoughts off the content; move what stands beside calls behind them; cut blanks at the ends."""
        if "think" in self.content:
            self._split_thoughts(notes)
        elif self.content != self.content.strip():
            notes.changed["assistant texts cut at the ends"] += 1
        self.content = self.content.strip()
        if self.calls and self.content:
            self.think_once([self.content])
            self.content = ""
            notes.changed["contents beside calls moved behind the reasoning"] += 1
        elif self.content == self.reasoning:
            self.thoughts = []
        if not (self.content or self.calls) and self.trained:
            self.trained = False
            notes.changed["empty turns, not trained"] += 1

    def _split_thoughts(self, notes: Notes) -> None:
        """Make thoughts of ``<think>`` blocks that begin a line, outside of code."""
        text, kept, opened = self.content, "", ""
        thoughts: list[str] = []
        start, in_code, is_first = 0, False, True
        for mark in _MARKS.finditer(text):
            word = mark.group()
            before = text[max(start, mark.start() - 80) : mark.start()].rstrip(" \t")
            if opened:
                if word == f"</{opened}>":
                    thoughts.append(text[start : mark.start()])
                    start, opened = mark.end(), ""
                continue
            if word == "```":
                in_code = not in_code
                continue
            if word[1] == "/" and is_first and not in_code:  # the template had opened it before the model wrote
                thoughts.append(text[: mark.start()])
                start = mark.end()
            elif word[1] != "/" and not in_code and before[-1:] in ("", "\n"):
                kept += text[start : mark.start()]
                start, opened = mark.end(), word[1:-1]
            is_first = False
        if opened:
            thoughts.append(text[start:])
            self.trained = False
            notes.changed["turns whose thought never ends, not trained"] += 1
        self.think_once(thoughts)
        self.content = kept if opened else kept + text[start:]


class Pairing:
    """Messages in order, and the calls that wait for results."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.messages: list[Message] = []
        self._ids: set[str] = set()
        self._open: dict[str, str] = {}  # id as written -> id of its own
        self._loose: list[str] = []  # results that named no open call
        self._has_calls = False  # the last turn
        self._calls_are_text = False

    def add(self, said: Said) -> None:
        if self._calls_are_text and said.role == "user" and self._open and not self._loose:
            self._loose.append(said.content)  # Harbor's tables have results as what the user says
        elif said.role != "tool":
            self._close()
            calls = tuple(ToolCall(self._own_id(id), name, arguments) for id, name, arguments in said.calls)
            if said.role == "assistant":
                self._has_calls, self._calls_are_text = bool(calls), said.calls_are_text
            trained = said.trained or said.role != "assistant"
            self.messages.append(Message(said.role, said.content, said.reasoning, calls, trained=trained))
        elif said.answers in self._open:
            self._answer(self._open.pop(said.answers), said.content)
        elif self._open:
            self._loose.append(said.content)
        elif not self._has_calls:  # the calls of this agent are text
            self.messages.append(Message("user", said.content))
        else:
            self._answer(said.answers or "", said.content)

    def finish(self) -> tuple[Message, ...]:
        last = max((i for i, message in enumerate(self.messages) if message.role == "assistant"), default=None)
        if last is None:
            return tuple(self.messages)
        if len(self.messages) > last + 1 or self._loose:
            self.notes.changed["records whose last observation is left out"] += 1
        return tuple(self.messages[: last + 1])

    def _own_id(self, id: str | None) -> str:
        own, number = id or "call", 2
        if id is None or id in self._ids:
            number = len(self._ids)
            while (own := f"{id or 'call'}_{number}") in self._ids:
                number += 1
        self._ids.add(own)
        self._open[id if id is not None and id not in self._open else own] = own
        return own

    def _answer(self, id: str, content: str) -> None:
        self.messages.append(Message("tool", content, tool_call_id=id))

    def _close(self) -> None:
        """Give what is open its results, before somebody else speaks."""
        waiting, loose = list(self._open.values()), self._loose
        if len(loose) != len(waiting):
            if loose:
                self.notes.changed["observations shared by several calls"] += 1
            elif waiting:
                self.notes.changed["calls without a result, given an empty one"] += len(waiting)
            loose = [*[""] * (len(waiting) - 1), "\n".join(loose)] if waiting else []
        for id, content in zip(waiting, loose, strict=True):
            self._answer(id, content)
        self._open, self._loose = {}, []
