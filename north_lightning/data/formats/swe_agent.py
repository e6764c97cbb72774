"""SWE-agent's ``.traj``: the whole ``history`` as messages, or what the steps of ``trajectory`` saw and said. And
SWE-smith's tables of such messages.

Version 1.1 keeps both; what SWE-agent itself says in the model's place ("Exit due to cost limit") is not learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from north_lightning.data.formats.base import Format, Notes, holds, listed
from north_lightning.data.formats.plain import OpenAIMessages
from north_lightning.errors import DataError

_OWN_WORDS = ("Exit due to ", "Exit because ", "exit_", "Repeated failed to ")


class SWEAgentTrajectory(Format):
    """One ``.traj`` file, or a record of its content."""

    name = "swe_agent"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        _, steps = listed(record, "trajectory")
        return holds(steps, "action") and holds(steps, "observation", "response") and not holds(steps, "source", "role")

    @classmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        _, steps = listed(record, "trajectory")
        _, messages = listed(record, "history")
        if not messages:
            *_, last = (step for step in steps if isinstance(step, dict)) if steps else ({},)
            messages = [*listed(last, "query", "messages")[1]]
            if last.get("response") and not last.get("messages"):  # earlier versions' messages hold the answer
                messages.append({"role": "assistant", "content": last["response"]})
        if not messages:
            raise DataError("$.history: expected messages, and found none under trajectory[-1].query either")
        described = {"harness": "swe_agent", **{key: record[key] for key in record if key not in _READ}}
        return described | {"messages": [_message(message) for message in messages]}


class SWESmithTraces(OpenAIMessages):
    """Messages with SWE-agent's own keys in them: SWE-smith's split ``tool``."""

    name = "swe_smith"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        _, messages = listed(record, "messages")
        return any(isinstance(one, dict) and ("message_type" in one or "tool_call_ids" in one) for one in messages)

    @classmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        return {"harness": "swe_agent", **record}


_READ = ("trajectory", "history", "replay_config", "environment")


def _message(message: Any) -> Any:
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return message
    content = message.get("content")
    if isinstance(content, str) and content.startswith(_OWN_WORDS) and not message.get("tool_calls"):
        return {**message, "weight": 0}
    return message
