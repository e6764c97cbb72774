"""What every format shares: settings, the account of what was met, and how a record is recognized.

A format turns a record into a *plain record*: ``messages`` in OpenAI's shape, loosely, ``tools``, and every other
column as it was. ``messages.conversation_of`` makes the conversation of it, so that calls are paired, thoughts are
found and weights are honored in one place. A new format is one file with one class.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from north_lightning.data.sources import tools_from_json
from north_lightning.errors import ConfigError, DataError
from north_lightning.interfaces import ConversationImporter
from north_lightning.types import Conversation, ToolSpec
from north_lightning.untrusted import load_json

MAX_SHOWN = 200
MESSAGE_KEYS = (
    "messages",
    "conversations",
    "conversation",
    "trajectory",
    "history",
    "traj",
    "events",
    "dialogue",
    "turns",
)
"""Under which a record holds what was said."""


@dataclass
class Notes:
    """Counts of one record, or of many."""

    formats: Counter[str] = field(default_factory=Counter)
    not_understood: Counter[str] = field(default_factory=Counter)  # keys that hold something and were not read
    changed: Counter[str] = field(default_factory=Counter)  # what was done to a record, in words

    def __iadd__(self, other: Notes) -> Notes:
        self.formats += other.formats
        self.not_understood += other.not_understood
        self.changed += other.changed
        return self

    def skip(self, place: str, record: Mapping[str, Any], understood: frozenset[str]) -> None:
        """Count the keys of ``record`` that hold something and are not ``understood``."""
        for key, value in record.items():
            if key not in understood and value not in (None, "", [], {}, False):
                self.not_understood[f"{place}{key}"[:120]] += 1


class Format(ConversationImporter):
    """One published shape of trajectories.

    Args:
        tools: JSON file with the tools of records that carry none, in OpenAI's shape.
        source: label of records that carry none.
        harness: label of records that carry none.
        ignore: columns that may be left out, also where unknown keys are refused.
    """

    name: ClassVar[str]
    """What filter.json calls it."""

    def __init__(
        self, tools: Path | None = None, source: str = "", harness: str = "", ignore: list[str] | None = None
    ) -> None:
        self.tools = tools
        self.source = source
        self.harness = harness
        self.ignore = frozenset(ignore or ())
        self.notes = Notes()

    @classmethod
    @abstractmethod
    def detects(cls, record: Mapping[str, Any]) -> bool:
        """Whether a record has this shape."""

    @classmethod
    @abstractmethod
    def read(cls, record: Mapping[str, Any], notes: Notes) -> dict[str, Any]:
        """The plain record; ``DataError`` names the JSON path, expected and got."""

    def convert(self, record: Mapping[str, Any]) -> Conversation:
        from north_lightning.data.formats.messages import conversation_of  # which reads plain records by this module

        notes = Notes()
        try:
            plain = self.read(record, notes)
            notes.formats[self.name] += not notes.formats
            sample = conversation_of(plain, self, notes)
        except (AttributeError, KeyError, TypeError, IndexError) as error:  # a stranger's value of another kind
            raise DataError(f"$: expected a record of the format {self.name}, got: {error}"[:300]) from error
        if self.strict and notes.not_understood:
            raise DataError(
                f"$: expected only keys that are understood, got {', '.join(sorted(notes.not_understood))}; list them "
                "under ignore of the importer, or leave out strict"
            )
        self.notes += notes
        return sample

    def account(self) -> dict[str, dict[str, int]]:
        notes = self.notes
        return {
            "formats": dict(notes.formats),
            "not_understood": dict(notes.not_understood.most_common(MAX_SHOWN)),
            "changed": dict(notes.changed.most_common()),
        }

    @cached_property
    def tools_of_file(self) -> tuple[ToolSpec, ...]:
        if self.tools is None:
            return ()
        try:
            return tools_from_json(json.loads(self.tools.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ConfigError(f"tools: expected a JSON list of tools in '{self.tools}', got: {error}") from error


def words(text: str) -> frozenset[str]:
    """The words of a text: a set that reads like a list."""
    return frozenset(text.split())


def decoded(value: Any, where: str) -> Any:
    """``value``, decoded if it is a string of JSON, as parquet tables hold lists of different things."""
    if not isinstance(value, str):
        return value
    try:
        return load_json(value)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def listed(record: Mapping[str, Any], *keys: str) -> tuple[str, list[Any]]:
    """The first of ``keys`` that holds a list with something in it, decoded; empty where none does."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            value = decoded(value, f"$.{key}")
        if isinstance(value, list) and value:
            return key, value
    return "", []


def below(record: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under a key; an empty one where there is none."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def holds(items: list[Any], *keys: str) -> bool:
    """Whether the first object of a list has one of ``keys``."""
    first = next((item for item in items if isinstance(item, dict)), {})
    return any(key in first for key in keys)


def text_of_parts(value: Any) -> str:
    """The text of a string, or of a list of strings and text parts."""
    if isinstance(value, list):
        return "".join(text_of_parts(part.get("text") if isinstance(part, dict) else part) for part in value)
    return value if isinstance(value, str) else ""
