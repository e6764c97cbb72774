"""Messages in the shape of OpenAI's chat API to ours, with a count of what had to be changed, and back.

In: dictionaries from a JSON file or a server. Out: ``Message`` values that the renderer accepts, or ``DataError`` with
the index of the message. It does not render and does not renumber call ids (``render`` does).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from north_lightning.errors import DataError
from north_lightning.types import Message, Role, ToolCall, ToolSpec
from north_lightning.untrusted import load_json

_ROLES: dict[str, Role] = {
    "assistant": "assistant",
    "developer": "system",
    "system": "system",
    "tool": "tool",
    "user": "user",
}


@dataclass(frozen=True, slots=True)
class OpenAIConversion:
    """Converted messages, and how often something the format cannot hold was moved or decoded."""

    messages: tuple[Message, ...]
    num_moved_contents: int = 0
    """Assistant contents beside tool calls, moved behind the reasoning: Command-4 templates drop them silently."""
    num_decoded_arguments: int = 0
    """Tool calls whose arguments came as a JSON string."""


def from_openai(messages: Sequence[Any], path: str = "$.messages") -> OpenAIConversion:
    """Convert a conversation found at ``path``; ``DataError`` names the JSON path, what was expected and what came."""
    moved = decoded = 0
    converted = []
    for index, message in enumerate(messages):
        where = f"{path}[{index}]"
        message = _object(message, where)
        role = _ROLES.get(message.get("role", ""))
        if role is None:
            raise DataError(f"{where}.role: expected one of {sorted(_ROLES)}, got {message.get('role')!r}")
        content = _text(message.get("content"), f"{where}.content")
        if role != "assistant":
            answered = message.get("tool_call_id") if role == "tool" else None
            if role == "tool" and not isinstance(answered, str):
                raise DataError(f"{where}.tool_call_id: expected the id of a call, got {answered!r}")
            converted.append(Message(role, content, tool_call_id=answered))
            continue
        reasoning = _text(message.get("reasoning_content") or message.get("reasoning"), f"{where}.reasoning_content")
        raw_calls = message.get("tool_calls") or ()
        calls = tuple(_call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(raw_calls))
        decoded += sum(isinstance(call["function"]["arguments"], str) for call in raw_calls)
        if calls and content:
            moved += 1
            reasoning, content = "\n\n".join(part for part in (reasoning, content) if part), ""
        converted.append(Message("assistant", content, reasoning, calls))
    return OpenAIConversion(tuple(converted), moved, decoded)


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: expected an object, got {value!r}"[:200])
    return value


def to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a chat server takes them: arguments as JSON text, reasoning as ``reasoning_content``."""
    converted = []
    for message in messages:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            row["reasoning_content"] = message.reasoning
        if message.tool_calls:
            row["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            row["tool_call_id"] = message.tool_call_id
        converted.append(row)
    return converted


def tools_to_openai(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """Tools as a chat server takes them."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
        }
        for tool in tools
    ]


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise DataError(f"{where}: expected a string or a list of text parts, got {content!r}"[:300])


def _call(call: Any, where: str) -> ToolCall:
    call = _object(call, where)
    function = _object(call.get("function"), f"{where}.function")
    for key, value in (("id", call.get("id")), ("function.name", function.get("name"))):
        if not isinstance(value, str) or not value:
            raise DataError(f"{where}.{key}: expected a string, got {value!r}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = load_json(arguments or "{}")
        except DataError as error:
            raise DataError(f"{where}.function.arguments: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}.function.arguments: expected an object, got {arguments!r}"[:300])
    return ToolCall(call["id"], function["name"], arguments)
