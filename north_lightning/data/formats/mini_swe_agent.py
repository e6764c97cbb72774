"""mini-SWE-agent's ``.traj.json``, versions 1 (blocks of bash in the text) and 2 (calls, or OpenAI's responses).

The message with role ``exit`` is the program's last word and nobody's turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from north_lightning.data.formats.base import Format, Notes, listed


class MiniSWEAgentTrajectory(Format):
    """One ``.traj.json`` file, or a record of its content."""

    name = "mini_swe_agent"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        info = record.get("info")
        is_named = str(record.get("trajectory_format", "")).startswith("mini-swe-agent")
        return is_named or ("messages" in record and isinstance(info, dict) and "mini_version" in info)

    @classmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        _, messages = listed(record, "messages")
        said = [_message(one) for one in messages if not (isinstance(one, dict) and one.get("role") == "exit")]
        rest = {key: value for key, value in record.items() if key != "trajectory_format"}
        return {"harness": "mini_swe_agent", **rest, "messages": said}


def _message(message: Any) -> Any:
    """A message with the thought that only the response beside it holds (version 1)."""
    if not isinstance(message, dict) or message.get("role") != "assistant" or message.get("reasoning_content"):
        return message
    response = (message.get("extra") or {}).get("response")
    choices = response.get("choices") if isinstance(response, dict) else None
    answered = choices[0].get("message") if isinstance(choices, list) and choices else None
    thought = answered.get("reasoning_content") if isinstance(answered, dict) else None
    return {**message, "reasoning_content": thought} if thought else message
