"""The tools of a record, in any shape in which functions are described, or as its calls show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from north_lightning.data.formats.base import Notes, below, decoded
from north_lightning.errors import DataError
from north_lightning.types import Message, ToolSpec

TOOL_KEYS = ("tools", "functions", "tool_definitions", "available_tools")
_SCHEMA = ("parameters", "input_schema", "inputSchema", "params")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
_TOOL = frozenset(["type", "function", "name", "description", *_SCHEMA])
_SILENT = frozenset(["strict", "cache_control", "responses", "annotations", "options", "id", "title"])


def read_tools(record: Mapping[str, Any], notes: Notes) -> tuple[ToolSpec, ...]:
    """The tools a record lists: OpenAI's, bare functions, Anthropic's, MCP's or Inspect's, or JSON text of them."""
    key = next((key for key in TOOL_KEYS if record.get(key)), TOOL_KEYS[0])
    listed = decoded(record.get(key) or [], f"$.{key}")
    if isinstance(listed, Mapping):
        listed = [listed] if "name" in listed or "function" in listed else list(listed.values())
    if not isinstance(listed, list):
        raise DataError(f"$.{key}: expected a list of tools, got {listed!r}"[:200])
    return tuple(read_tool(tool, f"$.{key}[{index}]", notes) for index, tool in enumerate(listed))


def read_tool(tool: Any, where: str, notes: Notes) -> ToolSpec:
    tool = decoded(tool, where)
    function = (below(tool, "function") or tool) if isinstance(tool, Mapping) else tool
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where}: expected a tool with a name, got {tool!r}"[:200])
    notes.skip("$.tools[].", {**tool, **function}, _TOOL | _SILENT)
    schema = decoded(next((function[key] for key in _SCHEMA if function.get(key)), {}), f"{where}.parameters")
    if not isinstance(schema, Mapping):
        raise DataError(f"{where}.parameters: expected a JSON schema, got {schema!r}"[:200])
    description = function.get("description")
    return ToolSpec(function["name"], description if isinstance(description, str) else "", dict(schema))


def infer_tools(messages: Iterable[Message], notes: Notes) -> tuple[ToolSpec, ...]:
    """Tools as the calls of a record use them: names, and the types of the arguments that were seen."""
    seen: dict[str, list[Mapping[str, Any]]] = {}
    for message in messages:
        for call in message.tool_calls:
            seen.setdefault(call.name, []).append(call.arguments)
    notes.changed["records without tools, listed as their calls use them"] += 1
    return tuple(ToolSpec(name, "", _schema(calls)) for name, calls in seen.items())


def _schema(calls: list[Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for arguments in calls for key in arguments)
    properties = {key: _type([arguments[key] for arguments in calls if key in arguments]) for key in keys}
    required = [key for key in keys if all(key in arguments for arguments in calls)]
    return {"type": "object", "properties": properties, "required": required}


def _type(values: list[Any]) -> dict[str, Any]:
    kinds = {_TYPES.get(type(value)) for value in values}
    return {"type": kinds.pop()} if len(kinds) == 1 and None not in kinds else {}
