"""OpenHands' events: its own ``trajectory`` and ``history`` lists of actions and observations, and the events of its
SDK.

Where an event names the model's own call (``tool_call_metadata``, ``tool_call``), that is taken; else the call is what
the action did. Events that the model never saw (states, recalls, condensations, statistics) say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from north_lightning.data.documents import is_event
from north_lightning.data.formats.base import Format, Notes, below, holds, listed, words

_LISTS = ("history", "trajectory", "events")
_NAMES = {
    "run": "execute_bash",
    "run_ipython": "execute_ipython_cell",
    "edit": "str_replace_editor",
    "read": "read_file",
}
_NOT_ARGUMENTS = words(
    "thought images_urls image_urls wait_for_response hidden is_input blocking is_static cwd confirmation_state "
    "security_risk final_thought kernel_init_code include_extra translated_ipython_code impl_source cause final"
)
_SILENT = words(
    "change_agent_state agent_state_changed recall null condensation condensation_request loop_recovery "
    "ConversationStateUpdateEvent CondensationEvent Condensation CondensationRequest PauseEvent StreamingDeltaEvent "
    "LLMCompletionLogEvent TokenEvent HookExecutionEvent CondensationSummaryEvent"
)


class OpenHandsEvents(Format):
    """A list of events under ``history``, ``trajectory`` or ``events``: ``output.jsonl``, or a saved trajectory."""

    name = "openhands"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        _, events = listed(record, *_LISTS)
        flat = _flat(events)
        return holds(flat, "action", "observation", "kind") and any(map(is_event, flat[:20]))

    @classmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        key, events = listed(record, *_LISTS)
        tools: list[Any] = []
        messages = list(_messages(_flat(events), tools, notes))
        instance = below(record, "instance")
        rest = {name: value for name, value in record.items() if name not in (key, "instance", "metadata", "error")}
        labels = {name: instance[name] for name in ("instance_id", "repo") if instance.get(name)}
        return {"harness": "openhands", **labels, **rest, **({"tools": tools} if tools else {}), "messages": messages}


def _flat(events: list[Any]) -> list[Any]:
    """Events, also where they come as pairs of action and observation."""
    return [event for one in events for event in (one if isinstance(one, list) else [one])]


def _messages(events: Iterable[Any], tools: list[Any], notes: Notes) -> Iterator[dict[str, Any]]:
    turn: dict[str, Any] | None = None  # several calls of one response come as several events
    response = None
    waiting: list[dict[str, Any]] = []
    for event in events:
        if not isinstance(event, dict):
            continue
        said, of_response = _read(event, tools, notes)
        if said is None:
            continue
        if said["role"] == "assistant" and turn is not None and of_response is not None and of_response == response:
            turn["tool_calls"] += [call for call in said.get("tool_calls") or [] if call not in turn["tool_calls"]]
            continue
        if said["role"] == "tool" and turn is not None:
            waiting.append(said)
            continue
        yield from ([turn] if turn is not None else [])
        yield from waiting
        turn, waiting, response = None, [], of_response
        if said["role"] == "assistant":
            turn = said | {"tool_calls": list(said.get("tool_calls") or [])}
        else:
            yield said
    yield from ([turn] if turn is not None else [])
    yield from waiting


def _read(event: Mapping[str, Any], tools: list[Any], notes: Notes) -> tuple[dict[str, Any] | None, str | None]:
    """The message an event stands for, and the model's response that it is part of."""
    kind = event.get("kind") or event.get("action") or event.get("observation")
    if kind in _SILENT:
        return None, None
    if "kind" in event:
        return _read_sdk(event, str(kind), tools, notes)
    arguments = below(event, "args")
    metadata = below(event, "tool_call_metadata")
    if "observation" in event:
        role = "tool" if metadata or event.get("source") != "user" else "user"
        return {"role": role, "content": event.get("content"), "tool_call_id": metadata.get("tool_call_id")}, None
    if kind == "system":
        tools += arguments.get("tools") or []
        return {"role": "system", "content": arguments.get("content")}, None
    if kind == "message" and not metadata:
        role = "user" if event.get("source") == "user" else "assistant"
        return {"role": role, "content": arguments.get("content")}, None
    answer = metadata.get("model_response")
    if isinstance(answer, dict) and answer.get("choices"):
        return {**(answer["choices"][0].get("message") or {}), "role": "assistant"}, answer.get("id")
    given = {key: value for key, value in arguments.items() if key not in _NOT_ARGUMENTS and value not in (None, "")}
    call = {"id": metadata.get("tool_call_id"), "name": metadata.get("function_name") or _NAMES.get(str(kind), kind)}
    thought = arguments.get("thought") or arguments.get("final_thought")
    return {"role": "assistant", "content": thought, "tool_calls": [call | {"arguments": given}]}, None


def _read_sdk(
    event: Mapping[str, Any], kind: str, tools: list[Any], notes: Notes
) -> tuple[dict[str, Any] | None, str | None]:
    more = event.get("extended_content") or []
    if kind == "SystemPromptEvent":
        tools += [
            tool
            for tool in event.get("tools") or []
            if isinstance(tool, dict) and ("function" in tool or "name" in tool)
        ]
        parts = [event.get("system_prompt"), event.get("dynamic_context")]
        return {"role": "system", "content": [part for part in parts if part]}, None
    if kind == "MessageEvent":
        message = event.get("llm_message") or {}
        return {**message, "content": [*(message.get("content") or []), *more]}, event.get("llm_response_id")
    if kind == "ActionEvent":
        thoughts = {key: event.get(key) for key in ("reasoning_content", "thinking_blocks")}
        call = {key: (event.get("tool_call") or {}).get(key) for key in ("id", "name", "arguments", "function")}
        said = {"role": "assistant", "content": event.get("thought"), "tool_calls": [call], **thoughts}
        return said, event.get("llm_response_id")
    if "tool_call_id" in event:
        observation = below(event, "observation")
        content = observation.get("content") or observation.get("output") or event.get("error")
        content = content or (f"Action rejected: {event['rejection_reason']}" if "rejection_reason" in event else "")
        parts = content if isinstance(content, list) else [{"type": "text", "text": str(content)}]
        return {"role": "tool", "content": [*parts, *more], "tool_call_id": event["tool_call_id"]}, None
    notes.not_understood[f"$.events[].{kind}"] += 1
    return None, None
