"""Which conversations are fit to train on, and why the others are not.

In: conversations. Out: those without a fault, and a count for each reason and source. A check looks at one conversation
and repairs nothing. Length is checked where lengths are known, after tokenising (``sft``).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from north_lightning.chat.controls import CONTROL_TOKENS, RESERVED_TOKENS
from north_lightning.data.sources import Conversation
from north_lightning.types import Message, ToolCall

NUM_EXAMPLES = 5

Check = Callable[[Conversation], bool]
"""Whether a conversation has the fault."""

_MARKER = re.compile(r"<\|[A-Z0-9_]+\|>|" + "|".join(map(re.escape, (*CONTROL_TOKENS, *RESERVED_TOKENS))))
_BAD_WHITESPACE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f\x85\u00a0\u2028\u2029\u200b-\u200f\ufeff]"  # control characters and look-alikes of blanks
    r"|\n{5,}"
    r"|[ \t]{120,}"
    r"|\A\s|\s\Z"
)


def has_nothing_to_train(sample: Conversation) -> bool:
    """No message by the assistant says or does anything."""
    return not any(m.content or m.reasoning or m.tool_calls for m in sample.messages if m.role == "assistant")


def has_invalid_tool_call(sample: Conversation) -> bool:
    """A call to an unknown tool, arguments outside its schema, or calls and results that do not pair up.

    Each result follows the call it answers, each call is answered once; only the last message's calls may stay open.
    """
    validators = {tool.name: _validator(json.dumps(dict(tool.parameters))) for tool in sample.tools}
    if None in validators.values():
        return True
    open_calls: set[str] = set()
    seen: set[str] = set()
    for message in sample.messages:
        if message.role == "tool":
            if message.tool_call_id not in open_calls:
                return True
            open_calls.discard(message.tool_call_id)
        elif open_calls:
            return True
        for call in message.tool_calls:
            if call.id in seen or not _is_valid(call, validators):
                return True
            seen.add(call.id)
            open_calls.add(call.id)
    return bool(open_calls) and not sample.messages[-1].tool_calls


@cache
def _validator(schema: str) -> Draft202012Validator | None:
    """Of a JSON schema as text, or None if it is none. Cached, because checking a schema takes milliseconds."""
    parameters = json.loads(schema)
    try:
        Draft202012Validator.check_schema(parameters)
    except SchemaError:
        return None
    return Draft202012Validator(parameters)


def _is_valid(call: ToolCall, validators: dict[str, Any]) -> bool:
    return call.name in validators and validators[call.name].is_valid(dict(call.arguments))


def has_content_beside_tool_calls(sample: Conversation) -> bool:
    """An assistant's message with both: the chat format has no place for the content."""
    return any(message.tool_calls and message.content for message in sample.messages)


def has_erroneous_whitespace(sample: Conversation) -> bool:
    """In what the assistant wrote as text: control characters, look-alikes of the blank, blanks at either end, or long
    runs of them. Arguments are exempt: a terminal is sent control characters, a file may hold anything."""
    texts = [text for m in sample.messages if m.role == "assistant" for text in (m.content, m.reasoning)]
    return any(text and _BAD_WHITESPACE.search(text) for text in texts)


def has_control_marker(sample: Conversation) -> bool:
    """A control token spelled out in text, as when a template was rendered into the data. Tool results are exempt: they
    show the world as it is, and are encoded so that no control id arises."""
    return any(
        _MARKER.search(text) for message in sample.messages if message.role != "tool" for text in _texts(message)
    )


def _texts(message: Message) -> list[str]:
    arguments = [json.dumps(dict(call.arguments), ensure_ascii=False) for call in message.tool_calls]
    return [message.content, message.reasoning, *arguments]


CHECKS: dict[str, Check] = {
    "nothing_to_train": has_nothing_to_train,
    "invalid_tool_call": has_invalid_tool_call,
    "content_beside_tool_calls": has_content_beside_tool_calls,
    "erroneous_whitespace": has_erroneous_whitespace,
    "control_marker": has_control_marker,
}
"""Reason to check, in the order they are tried; the first that applies is counted."""


class SampleFilter:
    """Passes conversations on or counts why not.

    >>> kept = SampleFilter()
    >>> list(kept([])), kept.dropped
    ([], Counter())
    """

    def __init__(self, reasons: Sequence[str] | None = None) -> None:
        """``reasons``: names from ``CHECKS`` to apply; all by default."""
        self._checks = {reason: CHECKS[reason] for reason in (CHECKS if reasons is None else reasons)}
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}

    def __call__(self, samples: Iterable[Conversation]) -> Iterator[Conversation]:
        for sample in samples:
            reason = next((reason for reason, check in self._checks.items() if check(sample)), None)
            if reason is None:
                self.kept += 1
                yield sample
            else:
                self.count(sample, reason, (self._checks[reason].__doc__ or "").partition("\n")[0])

    def count(self, sample: Conversation, reason: str, detail: str) -> None:
        """Count ``sample`` as dropped; the first few of every reason are kept as examples."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append({"source": sample.source, "task_id": sample.task_id, "detail": detail[:300]})
