"""What every harness does at the two ends of a turn: take the one call out of an action, cut a long observation.

In: a parsed ``AssistantAction`` or raw output. Out: its only call, checked against the tool's schema, or text of
bounded length. It knows nothing of sandboxes and runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import jsonschema

from north_lightning.errors import InvalidActionError
from north_lightning.types import AssistantAction, ToolCall, ToolSpec


def only_call(action: AssistantAction, tools: Sequence[ToolSpec]) -> ToolCall:
    """The single call of ``action``; ``InvalidActionError`` for none, several, an unknown tool or wrong arguments."""
    if len(action.tool_calls) != 1:
        raise InvalidActionError(f"expected exactly one tool call in a turn, got {len(action.tool_calls)}")
    call = action.tool_calls[0]
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        raise InvalidActionError(f"expected a call of one of {[tool.name for tool in tools]}, got {call.name!r}")
    try:
        json.dumps(dict(call.arguments), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidActionError(f"arguments of {call.name!r} hold half a character: {error.reason}") from error
    misfit = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(tool.parameters).iter_errors(call.arguments)
    )
    if misfit is not None:
        raise InvalidActionError(f"arguments of {call.name!r} do not fit its schema: {misfit.message}")
    return call


def head(text: str, max_chars: int) -> str:
    """``text``, or its first ``max_chars`` characters and a line that says how much is missing."""
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}\n[{len(text) - max_chars} more characters left out; ask for less output]"


def object_schema(required: Sequence[str], **properties: object) -> dict[str, object]:
    """JSON schema of an object that allows nothing but ``properties``."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
