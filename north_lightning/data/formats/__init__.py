"""Trajectories in the formats that agents, harnesses and data sets write: one file each, found by looking at a record.

``Trajectories`` reads any of them, and files of several; a format's own class reads that one and refuses others.
``base`` says what a new format provides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from north_lightning.data.formats.atif import ATIFTrajectories
from north_lightning.data.formats.base import MESSAGE_KEYS, Format, Notes, decoded
from north_lightning.data.formats.inspect_log import InspectSamples
from north_lightning.data.formats.mini_swe_agent import MiniSWEAgentTrajectory
from north_lightning.data.formats.openhands import OpenHandsEvents
from north_lightning.data.formats.plain import OpenAIMessages, ShareGPT
from north_lightning.data.formats.swe_agent import SWEAgentTrajectory, SWESmithTraces
from north_lightning.errors import DataError

FORMATS: tuple[type[Format], ...] = (
    ATIFTrajectories,
    MiniSWEAgentTrajectory,
    InspectSamples,
    SWEAgentTrajectory,
    SWESmithTraces,
    OpenHandsEvents,
    ShareGPT,
    OpenAIMessages,
)
"""Asked in this order: what is a special case of another comes first."""


class Trajectories(Format):
    """Trajectories of any format that is known here; each record is looked at.

    Args:
        tools: JSON file with the tools of records that carry none, in OpenAI's shape.
        source: label of records that carry none.
        harness: label of records that carry none.
        ignore: columns that may be left out, also where unknown keys are refused.
    """

    name = "detected"

    @classmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        return any(one.detects(record) for one in FORMATS)

    @classmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        record = _unwrapped(record)
        kind = next((one for one in FORMATS if one.detects(record)), None)
        if kind is None:
            known = ", ".join(one.name for one in FORMATS)
            raise DataError(
                f"$: expected messages, or a trajectory of one of the formats {known}; got the keys "
                f"{', '.join(sorted(record))[:200]}"
            )
        notes.formats[kind.name] += 1
        return kind.read(record, notes)


def _unwrapped(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record whose column holds a whole trajectory, with that trajectory's keys beside its own."""
    for key in MESSAGE_KEYS:
        value = record.get(key)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            value = decoded(value, f"$.{key}")
        if isinstance(value, dict):
            return {**{name: other for name, other in record.items() if name != key}, **value}
    return record
