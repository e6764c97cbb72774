"""Foreign data formats to canonical conversations: OpenHands, SWE-agent (SWE-smith), Open-SWE-Traces, ATIF, ShareGPT.

In: one decoded record. Out: a ``Conversation``; ``DataError`` names the JSON path. What Command-4 has no place for is
moved, never dropped: text beside tool calls goes behind the reasoning. Records that do not carry their tools take them
from a file that is named beside them: without schemas no call can be checked. A new format is one class.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from north_lightning.chat import from_openai
from north_lightning.data.sources import tools_from_json
from north_lightning.errors import ConfigError, DataError
from north_lightning.interfaces import ConversationImporter
from north_lightning.types import Conversation, ToolSpec
from north_lightning.untrusted import load_json

MAX_ID_CHARS = 300
_INSTANCE = re.compile(
    r"(?:instance_)?(?P<owner>[\w.-]+?)__(?P<name>[\w.-]+?)(?:-\d+|-[0-9a-f]{40}.*|\.[0-9a-f]{7,}.*)?$"
)


class OpenAIMessages(ConversationImporter):
    """Plain messages in the shape of OpenAI's chat API under ``messages``; other keys are labels or ignored.

    Labels: ``source`` or ``dataset``; ``repo``, else from ``instance_id``; ``task_id``, else ``instance_id``;
    ``resolved`` is the verifier's verdict. Messages, and tools, may be a string of JSON, as parquet tables hold them.

    Args:
        tools: JSON file with the tools of records that carry none, in OpenAI's shape.
        source: label of records that carry none.
        harness: label of records that carry none.
    """

    messages_key = "messages"

    def __init__(self, tools: Path | None = None, source: str = "", harness: str = "") -> None:
        self.tools = tools
        self.source = source
        self.harness = harness

    def convert(self, record: Mapping[str, Any]) -> Conversation:
        path = f"$.{self.messages_key}"
        messages = _decoded(record.get(self.messages_key), path)
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{path}: expected a list of messages, got {messages!r}"[:200])
        messages = [self.openai_message(message, f"{path}[{index}]") for index, message in enumerate(messages)]
        task_id = _label(record, "task_id", "instance_id")
        verdict = record.get("resolved")
        return Conversation(
            from_openai(messages, path).messages,
            tools_from_json(_decoded(record.get("tools"), "$.tools")) or self._tools_of_file,
            source=_label(record, "source", "dataset") or self.source,
            harness=_label(record, "harness", "agent") or self.harness,
            environment=_label(record, "environment"),
            repo=_label(record, "repo") or repository_of(task_id),
            task_id=task_id,
            verified=None if verdict is None else bool(verdict),
        )

    def openai_message(self, message: Any, where: str) -> Any:
        """One message in OpenAI's shape; subclasses translate."""
        return message

    @cached_property
    def _tools_of_file(self) -> tuple[ToolSpec, ...]:
        if self.tools is None:
            return ()
        try:
            return tools_from_json(json.loads(self.tools.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"tools: expected a JSON list of tools in '{self.tools}', got: {error}") from error


class OpenHandsTraces(OpenAIMessages):
    """Traces of the OpenHands agent under ``trajectory``: nvidia's SWE-Zero and SWE-Hero, nebius' SWE-rebench.

    Columns: ``trajectory`` (role, content, name, tool_calls, tool_call_id), ``instance_id``, ``repo``, ``dataset``,
    ``resolved`` where it was graded, ``tools`` where it was kept (SWE-Zero leaves it out: name a file).
    """

    messages_key = "trajectory"

    def __init__(self, tools: Path | None = None, source: str = "", harness: str = "openhands") -> None:
        super().__init__(tools, source, harness)


class OpenSWETraces(OpenAIMessages):
    """nvidia's Open-SWE-Traces: OpenAI messages under ``trajectory``, the harness of each row under ``agent``."""

    messages_key = "trajectory"


class SWESmithTraces(OpenAIMessages):
    """Trajectories of SWE-smith, the ``tool`` split of SWE-agent's: messages as a string of JSON.

    A tool's message names the calls it answers in a list, ``tool_call_ids``, of one; contents are lists of text parts.
    """

    def __init__(self, tools: Path | None = None, source: str = "", harness: str = "swe_agent") -> None:
        super().__init__(tools, source, harness)

    def openai_message(self, message: Any, where: str) -> Any:
        if not isinstance(message, dict) or not message.get("tool_call_ids"):
            return message
        answered = message["tool_call_ids"]
        if len(answered) != 1:
            raise DataError(f"{where}.tool_call_ids: expected one, got {answered!r}")
        return {**message, "tool_call_id": answered[0]}


class ATIFTrajectories(OpenAIMessages):
    """Harbor's Agent Trajectory Interchange Format, one trajectory a record (a ``trajectory.json``, or lines of them).

    Steps of the system, the user and the agent; an agent's step may think, call tools and hold the observation that
    followed. Tools are the agent's ``tool_definitions``, else the file's.
    """

    def convert(self, record: Mapping[str, Any]) -> Conversation:
        if not str(record.get("schema_version", "")).startswith("ATIF-v1"):
            raise DataError(f"$.schema_version: expected ATIF-v1.x, got {record.get('schema_version')!r}")
        agent = record.get("agent") or {}
        steps = record.get("steps")
        if not isinstance(steps, list):
            raise DataError(f"$.steps: expected a list, got {type(steps).__name__}")
        messages = [
            message for index, step in enumerate(steps) for message in _step_messages(step, f"$.steps[{index}]")
        ]
        labels = {"harness": agent.get("name"), **(record.get("extra") or {})}
        return super().convert({**labels, "messages": messages, "tools": agent.get("tool_definitions")})


class ShareGPT(OpenAIMessages):
    """ShareGPT's ``conversations`` of ``{"from", "value"}``; ``function_call`` and ``observation`` are tool turns.

    A ``system`` key beside them opens the conversation; ``tools`` is a list, or a string of JSON, of OpenAI's tools or
    of bare functions.
    """

    def convert(self, record: Mapping[str, Any]) -> Conversation:
        turns = record.get("conversations")
        if not isinstance(turns, list):
            raise DataError(f"$.conversations: expected a list of turns, got {type(turns).__name__}")
        messages: list[dict[str, Any]] = []
        if record.get("system"):
            messages.append({"role": "system", "content": record["system"]})
        for index, turn in enumerate(turns):
            messages.append(_sharegpt_message(turn, f"$.conversations[{index}]", len(messages)))
        tools = _decoded(record.get("tools") or [], "$.tools")
        wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        return super().convert({**record, "messages": messages, "tools": wrapped})


def repository_of(task_id: str) -> str:
    """``owner/name`` of an id like ``owner__name-123``, ``owner__name.1a2b3c4d.bug__x`` or Pro's ``instance_...``."""
    match = _INSTANCE.match(task_id) if len(task_id) <= MAX_ID_CHARS else None
    return f"{match['owner']}/{match['name']}" if match else ""


def _step_messages(step: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(step, dict) or step.get("source") not in ("system", "user", "agent"):
        raise DataError(f"{where}.source: expected system, user or agent, got {step!r}"[:200])
    if step["source"] != "agent":
        return [{"role": step["source"], "content": step.get("message")}]
    calls = [
        {
            "id": call.get("tool_call_id"),
            "function": {"name": call.get("function_name"), "arguments": call.get("arguments")},
        }
        for call in step.get("tool_calls") or []
    ]
    turn = {
        "role": "assistant",
        "content": step.get("message"),
        "reasoning_content": step.get("reasoning_content"),
        "tool_calls": calls,
    }
    observed = (step.get("observation") or {}).get("results") or []
    return [turn, *(_atif_result(result, calls) for result in observed)]


def _atif_result(result: Mapping[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    """What followed a step: a tool's message, or a user's where the agent acts in plain text (Terminus 2)."""
    if not calls:
        return {"role": "user", "content": result.get("content")}
    only = calls[0]["id"] if len(calls) == 1 else None  # a single call's result need not name it
    return {"role": "tool", "content": result.get("content"), "tool_call_id": result.get("source_call_id") or only}


_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _sharegpt_message(turn: Any, where: str, index: int) -> dict[str, Any]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise DataError(f"{where}.value: expected a string, got {turn!r}"[:200])
    sender, value = turn.get("from"), turn["value"]
    if sender == "function_call":
        function = _decoded(value, f"{where}.value")
        return {"role": "assistant", "tool_calls": [{"id": f"call_{index}", "function": function}]}
    if sender in ("observation", "tool"):  # answers the call just before it
        return {"role": "tool", "content": value, "tool_call_id": f"call_{index - 1}"}
    if sender not in _SHAREGPT_ROLES:
        known = ", ".join([*_SHAREGPT_ROLES, "function_call", "observation"])
        raise DataError(f"{where}.from: expected one of {known}, got {sender!r}")
    return {"role": _SHAREGPT_ROLES[sender], "content": value}


def _decoded(value: Any, where: str) -> Any:
    """``value``, decoded if it is a string of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _label(record: Mapping[str, Any], *keys: str) -> str:
    for key in keys:
        value = record.get(key)
        if value is not None and not isinstance(value, str):
            raise DataError(f"$.{key}: expected a string, got {value!r}"[:200])
        if value:
            return str(value)
    return ""
