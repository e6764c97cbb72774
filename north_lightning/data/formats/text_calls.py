"""Calls that stand in the text, as Hermes, Qwen and others write them, to calls; and their results.

``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, also with a Python dictionary inside, or with
``<function=NAME><parameter=KEY>``; results as ``<tool_response>``; tools in ``<tools>`` of the first message. An agent
whose calls are text on purpose (SWE-agent's XML, blocks of bash) writes no ``<tool_call>`` and keeps its text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from north_lightning.data.formats.base import Notes, below
from north_lightning.data.formats.pairing import Said
from north_lightning.data.formats.tools import read_tool
from north_lightning.errors import DataError
from north_lightning.types import Message, ToolSpec
from north_lightning.untrusted import load_json

RESPONSE = "<tool_response>"
_FUNCTION = re.compile(r"\s*<function=([\w.-]+)>")
_PARAMETER = "<parameter="


def read_calls(said: Said, notes: Notes) -> None:
    """Make calls of the text calls of a turn; one that cannot be read stays text and is not learned."""
    before, *blocks = said.content.split("<tool_call>")
    words, calls = [before], []
    for block in blocks:
        inside, _, after = block.partition("</tool_call>")
        found = _read(inside.strip())
        if not found:
            said.trained = False
            notes.changed["turns with an unreadable call, not trained"] += 1
            return
        calls += found
        words.append(after)
    said.content = "\n".join(word.strip() for word in words if word.strip())
    said.calls += [(None, name, arguments) for name, arguments in calls]
    said.calls_are_text = True
    notes.changed["turns whose calls were text"] += 1


def read_responses(said: Said) -> Iterator[Said]:
    """The results in one message: as many as it frames, else the whole of it."""
    before, *blocks = said.content.split(RESPONSE)
    if not blocks or before.strip():
        yield said
        return
    for block in blocks:
        yield Said("tool", block.partition("</tool_response>")[0].strip("\n"), answers=said.answers)


def tools_in_text(messages: Iterable[Message]) -> tuple[ToolSpec, ...]:
    """The tools that the first message lists between ``<tools>`` and ``</tools>``; none if it does not."""
    first = next(iter(messages)).content
    for part in first.split("<tools>")[1:]:  # the first may be a mention
        listed = _objects(part.partition("</tools>")[0].strip())
        try:
            tools = tuple(read_tool(tool, "$.messages[0].content", Notes()) for tool in listed)
        except DataError:
            continue
        if tools:
            return tools
    return ()


def _read(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of the calls in a text; empty if it cannot be read."""
    if found := _FUNCTION.match(text):
        body = text[found.end() :].partition("</function>")[0]
        return [(found[1], dict(map(_parameter, body.split(_PARAMETER)[1:])))]
    calls = []
    for call in _objects(text):
        call = below(call, "function") or call
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = next(iter(_objects(arguments)), None)
        if not isinstance(call.get("name"), str) or not isinstance(arguments, Mapping):
            return []
        calls.append((call["name"], dict(arguments)))
    return calls


def _parameter(text: str) -> tuple[str, str]:
    key, _, value = text.partition(">")
    value = value.rpartition("</parameter>")[0] or value
    return key, value.removeprefix("\n").removesuffix("\n")


def _objects(text: str) -> list[Mapping[str, Any]]:
    """The objects in a text: one, a list, or one a line; as JSON or as Python writes dictionaries."""
    for texts in ([text], [line for line in text.split("\n") if line.strip()]):
        try:
            values = [_object(one) for one in texts]
        except (DataError, ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
        return flat if all(isinstance(item, dict) for item in flat) else []
    return []


def _object(text: str) -> Any:
    try:
        return load_json(text)
    except DataError:
        if len(text) > 100_000:
            raise
        value = ast.literal_eval(text.strip())
        return json.loads(json.dumps(value))
