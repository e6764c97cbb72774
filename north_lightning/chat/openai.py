"""Our messages in the shape of OpenAI's chat API. The way back, from what others write, is ``data.formats``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from north_lightning.types import Message, ToolSpec


def to_openai(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a chat server takes them: arguments as JSON text, reasoning as ``reasoning_content``, and
    ``weight`` 0 where a turn is not learned."""
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
        if not message.trained:
            row["weight"] = 0
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
