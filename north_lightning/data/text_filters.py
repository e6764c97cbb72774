"""What is wrong with the words of a conversation: blanks, control markers, citations, repetition.

Only what is learned is judged, except for control markers, which would end a turn wherever they stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np

from north_lightning.chat.controls import CONTROL_TOKENS, RESERVED_TOKENS
from north_lightning.data.tool_call_filter import calls_of
from north_lightning.interfaces import ConversationFilter
from north_lightning.types import Conversation, Count, Message

_BAD_WHITESPACE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f\x85\u2028\u2029\u200b\ufeff]"  # control characters and what nobody sees
    r"|\n{5,}"
    r"|[ \t]{120,}"
    r"|\A\s|\s\Z"
)


class ErroneousWhitespace(ConversationFilter):
    """In what the assistant wrote as text: control characters, blanks without width, blanks at either end, long runs of
    them. Arguments are exempt: a terminal is sent control characters, a file may hold anything. No-break spaces, and
    the joiners of emoji and scripts, are writing."""

    reason = "erroneous_whitespace"

    def find_fault(self, sample: Conversation) -> str | None:
        for place, text in _assistant_texts(sample):
            if found := _BAD_WHITESPACE.search(text):
                return f"{place}: {found.group()[:20]!r} at character {found.start()}"
        return None


_NAMES = "|".join(sorted({name.strip("<|>") for name in CONTROL_TOKENS if "|" in name}, key=len, reverse=True))
_MARKER = re.compile(
    "|".join(map(re.escape, (*CONTROL_TOKENS, *RESERVED_TOKENS)))
    + r"|<\|[A-Za-z][A-Za-z0-9_]+\|>"  # of another model's template too
    + rf"|(?i:<[|\s]*(?:{_NAMES})\b|\b(?:{_NAMES})[|\s]*>)"  # ours, with a delimiter missing or misspelled
)


class ControlMarker(ConversationFilter):
    """A control token spelled out in text, whole or malformed, as when a template was rendered into the data or a user
    forges a turn. Tool results are exempt: they show the world as it is, and are encoded so that no control id arises.
    """

    reason = "control_marker"

    def find_fault(self, sample: Conversation) -> str | None:
        for index, message in enumerate(sample.messages):
            if message.role == "tool":
                continue
            for name, text in _texts(message):
                if ("<" in text or ">" in text) and (found := _MARKER.search(text)):
                    return f"messages[{index}].{name}: {found.group()!r} at character {found.start()}"
        return None


_CITATION = re.compile(
    r"</?co(?:\s*:[^<>]{0,40})?>"  # Command's grounded spans
    r"|【[^】\n]{0,40}†[^】\n]{0,60}】"
    r"|\[citation(?:\s*:\s*\d+|[ _]needed)\]"
    r"|\[\^\d+(?:\^)?\](?!:)",
    re.IGNORECASE,
)
_FOOTNOTE = re.compile(r"^\[\^(\d+)\]:", re.MULTILINE)


class HallucinatedCitation(ConversationFilter):
    """Citation marks by the assistant: nothing here is grounded in documents, so they point nowhere. A footnote that is
    written out in the same message is none."""

    reason = "hallucinated_citation"

    def find_fault(self, sample: Conversation) -> str | None:
        for place, text in _assistant_texts(sample):
            footnotes = {f"[^{number}]" for number in _FOOTNOTE.findall(text)}
            for found in _CITATION.finditer(text):
                if found.group() not in footnotes:
                    return f"{place}: {found.group()!r} at character {found.start()}"
        return None


class RepetitionLoop(ConversationFilter):
    """The assistant is stuck: one call with one and the same result over and over, or words that go round in circles.

    Args:
        max_calls: the same call, with the same result, so often in a row is still sound.
        min_words: circling words are counted from this many on, once they have gone round ten times.
    """

    reason = "repetition_loop"
    max_period = 64
    rounds = 10

    def __init__(self, max_calls: Count = 3, min_words: Count = 40) -> None:
        self.max_calls = max_calls
        self.min_words = min_words

    def find_fault(self, sample: Conversation) -> str | None:
        results = {m.tool_call_id: m.content for m in sample.messages if m.role == "tool"}
        previous, times = None, 0
        for place, call, is_learned in calls_of(sample):
            if not is_learned:
                continue
            step = (call.name, dict(call.arguments), results.get(call.id))
            times = times + 1 if step == previous else 1
            previous = step
            if times > self.max_calls:
                return f"{place}: {call.name}, {times} times in a row with the same result"
        for place, text in _assistant_texts(sample):
            if (period := self._circling(text)) is not None:
                return f"{place}: the same {period} words over and over"
        return None

    def _circling(self, text: str) -> int | None:
        """The period of a run of words that repeats itself, or None."""
        words = text.split()
        if len(words) < self.min_words:
            return None
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        ids = np.array([numbers[word] for word in words])
        for period in range(1, min(self.max_period, len(ids) // self.rounds) + 1):
            needed = max(self.min_words, period * self.rounds) - period
            breaks = np.flatnonzero(ids[period:] != ids[:-period])
            longest = np.diff(breaks, prepend=-1, append=len(ids) - period).max() - 1
            if longest >= needed:
                return period
        return None


def _assistant_texts(sample: Conversation) -> Iterator[tuple[str, str]]:
    """What the assistant wrote in words and is learned, with its place."""
    for index, message in enumerate(sample.messages):
        if message.role == "assistant" and message.trained:
            for name, text in (("reasoning", message.reasoning), ("content", message.content)):
                if text:
                    yield f"messages[{index}].{name}", text


def _texts(message: Message) -> list[tuple[str, str]]:
    arguments = [
        (f"tool_calls[{number}]", json.dumps(dict(call.arguments), ensure_ascii=False, default=repr))
        for number, call in enumerate(message.tool_calls)
    ]
    return [("content", message.content), ("reasoning", message.reasoning), *arguments]
