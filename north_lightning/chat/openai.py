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
from north_lightning.types import Message, Role, ToolCall

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


def from_openai(messages: Sequence[Mapping[str, Any]]) -> OpenAIConversion:
    """Convert a conversation; ``DataError`` names the message and what was expected."""
    moved = decoded = 0
    converted = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = _ROLES.get(message.get("role", ""))
        if role is None:
            raise DataError(f"{where}: expected a role of {sorted(_ROLES)}, got {message.get('role')!r}")
        content = _text(message.get("content"), where)
        if role != "assistant":
            converted.append(Message(role, content, tool_call_id=message.get("tool_call_id")))
            continue
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        raw_calls = message.get("tool_calls") or ()
        decoded += sum(isinstance(call["function"]["arguments"], str) for call in raw_calls)
        if raw_calls and content:
            moved += 1
            reasoning, content = "\n\n".join(part for part in (reasoning, content) if part), ""
        calls = tuple(_call(call, where) for call in raw_calls)
        converted.append(Message("assistant", content, reasoning, calls))
    return OpenAIConversion(tuple(converted), moved, decoded)


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


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise DataError(f"{where}: expected content to be a string or a list of text parts, got {content!r}")


def _call(call: Mapping[str, Any], where: str) -> ToolCall:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise DataError(f"{where}: expected the arguments of {function['name']} as JSON, got: {error}") from error
    if not isinstance(arguments, Mapping):
        raise DataError(f"{where}: expected the arguments of {function['name']} as an object, got {arguments!r}")
    return ToolCall(str(call.get("id")), function["name"], arguments)
