"""Samples of Inspect's logs, ``.json`` or ``.eval``: ``documents`` gives each with its log's ``eval`` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from north_lightning.data.formats.base import Format, Notes, below, words

_ATTACHMENT = "attachment://"
_READ = words(
    "id epoch input choices target sandbox files setup messages output store events timelines attachments events_data "
    "eval uuid error limit error_retries role_usage model_usage total_time working_time started_at completed_at "
    "turn_count invalidation description model_fallbacks message_count"
)


class InspectSamples(Format):
    """One sample of a log a record."""

    name = "inspect"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        is_sample = "epoch" in record and "target" in record and "id" in record
        return isinstance(record.get("messages"), list) and (is_sample or isinstance(record.get("eval"), dict))

    @classmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        attachments = below(record, "attachments")
        events = [event for event in record.get("events") or [] if isinstance(event, dict)]
        offered = {
            tool["name"]: tool
            for event in events
            for tool in event.get("tools") or []
            if isinstance(tool, dict) and isinstance(tool.get("name"), str)
        }
        evaluation = below(record, "eval")
        metadata = below(record, "metadata")
        labels = {"task_id": str(record.get("id", "")), "harness": below(evaluation, "metadata").get("harness")}
        rest = {key: value for key, value in record.items() if key not in (*_READ, "metadata")}
        labels |= {key: metadata[key] for key in ("repo", "environment") if isinstance(metadata.get(key), str)}
        tools = {"tools": list(offered.values())} if offered else {}
        asked = record.get("input")
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        messages = [_resolved(message, attachments) for message in record["messages"] or asked or []]
        return {**labels, **rest, **tools, "messages": messages}


def _resolved(value: Any, attachments: Mapping[str, Any]) -> Any:
    """``value`` with what the log keeps beside it put in its place, and a tool's error as the model saw it; ``source``
    of a message is no role."""
    if isinstance(value, dict) and value.get("role") == "tool" and below(value, "error"):
        value = value | {"content": f"Error: {value['error'].get('message')}", "error": None}
    if isinstance(value, str) and value.startswith(_ATTACHMENT):
        return attachments.get(value.removeprefix(_ATTACHMENT), value)
    if isinstance(value, dict):
        return {key: _resolved(below, attachments) for key, below in value.items() if key != "source"}
    return [_resolved(below, attachments) for below in value] if isinstance(value, list) else value
