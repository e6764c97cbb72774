"""Harbor's Agent Trajectory Interchange Format (ATIF 1.x), as any of Harbor's converters writes it.

Steps of the system, the user and the agent; an agent's step may think, call tools and hold the observation that
followed. Copied context and steps that no model wrote are shown and not learned. Terminus 2 has no tools: where Harbor
split its replies into calls, they are put together again (``terminus``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from north_lightning.data.formats import terminus
from north_lightning.data.formats.base import Format, Notes, below, text_of_parts, words
from north_lightning.errors import DataError

_TRAJECTORY = words(
    "schema_version session_id trajectory_id agent steps notes final_metrics continued_trajectory_ref extra"
)
_STEP = words(
    "step_id timestamp source model_name reasoning_effort message reasoning_content tool_calls observation metrics "
    "is_copied_context llm_call_count extra"
)
_RESULT = frozenset(["source_call_id", "content", "extra"])
_CALL = frozenset(["tool_call_id", "function_name", "arguments", "extra"])


_PLACEHOLDER = re.compile(
    r"\(tool (?:use|calls?)\)|\[tool calls?(?:: [^\]]*)?\]|\[empty response\]|\[unparsed Copilot event\]|\[error\] .*"
    r"|Tool call|Executed \S+(?: \(no result\))?|\S+ result",
    re.DOTALL,
)
"""What Harbor's converters write where the model said nothing."""


class ATIFTrajectories(Format):
    """One trajectory a record: a ``trajectory.json``, or lines of them."""

    name = "atif"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        return str(record.get("schema_version", "")).startswith("ATIF")

    @classmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        if not str(record.get("schema_version", "")).startswith("ATIF-v1"):
            raise DataError(f"$.schema_version: expected ATIF-v1.x, got {record.get('schema_version')!r}"[:200])
        agent, steps = record.get("agent") or {}, record.get("steps")
        if not isinstance(steps, list) or not isinstance(agent, dict):
            raise DataError(f"$.steps: expected a list, got {type(steps).__name__}")
        is_terminus = terminus.wrote(agent, steps)
        messages: list[dict[str, Any]] = []
        for index, step in enumerate(steps):
            if not isinstance(step, dict) or step.get("source") not in ("system", "user", "agent"):
                raise DataError(f"$.steps[{index}].source: expected system, user or agent, got {step!r}"[:200])
            notes.skip("$.steps[].", step, _STEP)
            if is_terminus and step["source"] == "agent":
                messages += terminus.messages_of(step, terminus.is_xml(agent, steps), notes)
            else:
                messages += _messages(step, notes)
        extra = below(record, "extra")
        rest = {key: value for key, value in record.items() if key not in _TRAJECTORY}
        tools = {"tools": agent["tool_definitions"]} if agent.get("tool_definitions") else {}
        return {"harness": agent.get("name"), **extra, **rest, **tools, "messages": messages}


def _messages(step: Mapping[str, Any], notes: Notes) -> Iterator[dict[str, Any]]:
    calls = step.get("tool_calls") or []
    for call in calls:
        notes.skip("$.steps[].tool_calls[].", call, _CALL)
    role, message = "assistant" if step["source"] == "agent" else step["source"], step.get("message")
    is_invented = role == "assistant" and _PLACEHOLDER.fullmatch(str(message)) is not None
    if is_invented and (calls or str(message).startswith("[")):
        message = ""
        notes.changed["placeholders of Harbor's converters left out"] += 1
    if role == "assistant" and not calls and "source_call_id" in below(step, "extra"):
        role = "user"  # a result whose call Harbor did not find
    yield marked(step) | {
        "role": role,
        "content": message,
        "reasoning_content": step.get("reasoning_content"),
        "tool_calls": [
            {"id": call.get("tool_call_id"), "name": call.get("function_name"), "arguments": call.get("arguments")}
            for call in calls
        ],
    }
    for content, call_id in observed(step, notes):
        if calls:
            yield {"role": "tool", "content": content, "tool_call_id": call_id}
        else:  # of an agent that acts in plain text, or of the system
            yield {"role": "user" if role == "assistant" else role, "content": content}


def marked(step: Mapping[str, Any]) -> dict[str, Any]:
    """What a step says about whether it is learned."""
    return {key: step[key] for key in ("is_copied_context", "llm_call_count") if step.get(key) is not None}


def observed(step: Mapping[str, Any], notes: Notes) -> Iterator[tuple[str, str | None]]:
    """Content and call of every result of a step."""
    observation = step.get("observation")
    for result in (observation.get("results") or []) if isinstance(observation, dict) else []:
        notes.skip("$.steps[].observation.results[].", result, _RESULT)
        content = result.get("content")
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") != "text":
                notes.not_understood[f"$.steps[].observation.results[].content[].{part.get('type')}"] += 1
        if content or not result.get("subagent_trajectory_ref"):
            yield text_of_parts(content), result.get("source_call_id")
