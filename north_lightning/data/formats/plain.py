"""Messages with roles, as chat APIs and most data sets hold them; and ShareGPT's ``from`` and ``value``.

``OpenAIMessages`` covers the ``messages`` of OpenAI, Mistral, axolotl, TRL and LLaMA-Factory, SWE-smith's splits,
OpenThoughts-Agent's ``conversations``, nvidia's and nebius' ``trajectory``, Hermes and Anthropic messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from north_lightning.data.formats.base import MESSAGE_KEYS, Format, Notes, holds, listed


class OpenAIMessages(Format):
    """Messages of roles and contents, under any of the usual keys."""

    name = "messages"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        _, messages = listed(record, *MESSAGE_KEYS)
        return bool(messages)

    @classmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        return dict(record)


class ShareGPT(OpenAIMessages):
    """ShareGPT's ``conversations`` of ``{"from", "value"}``; ``function_call`` and ``observation`` are tool turns."""

    name = "sharegpt"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        _, messages = listed(record, *MESSAGE_KEYS)
        return holds(messages, "from") and not holds(messages, "role")
