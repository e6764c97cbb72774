"""Conversations on disk: canonical samples, or a foreign format through an importer, read one at a time.

In: files of records (``records``). A canonical record is ``{"messages": [...], "tools": [...], "source", "harness",
"environment", "repo", "task_id", "verified"}`` with OpenAI's message and tool objects (``reasoning_content`` for
thinking, ``weight`` 0 for what is not learned). Out: ``Conversation`` objects; and the way back, as JSON Lines.
Anything that is not this is a ``DataError`` that names file, line and JSON path. Whether a conversation is *good* is
for ``filters``; what it looks like in tokens for ``chat``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from north_lightning.chat import to_openai, tools_to_openai
from north_lightning.data.records import Shard, decode, read_records
from north_lightning.durable import unfinished_name
from north_lightning.errors import DataError
from north_lightning.interfaces import ConversationImporter
from north_lightning.types import Conversation, Message, Role, ToolCall, ToolSpec
from north_lightning.untrusted import load_json

_LABELS = ("source", "harness", "environment", "repo", "task_id")
_ROLES = get_args(Role)


class SampleReader:
    """The conversations of files, in order, one at a time; iterate once.

    Args:
        files: local paths or URLs of ``.jsonl``, ``.json`` or ``.parquet`` files, compressed or not.
        importer: what the records are; None for canonical samples, strictly read.
        max_broken: so many records that cannot be read are skipped and listed in ``broken``; one more is an error.
        shard: which part of the records.
    """

    def __init__(
        self,
        files: Sequence[Path | str],
        importer: ConversationImporter | None = None,
        max_broken: int = 0,
        shard: Shard | None = None,
    ) -> None:
        self.files = files
        self.max_broken = max_broken
        self.num_read = 0
        self.broken: list[str] = []
        self._convert = sample_from_json if importer is None else importer.convert
        self._shard = shard or Shard()

    def __iter__(self) -> Iterator[Conversation]:
        """Raises ``DataError``, with ``file:line``, the JSON path, what was expected and what came."""
        for where, content in read_records(self.files, self._shard):
            try:
                sample = self._convert(decode(content))
            except DataError as error:
                self.broken.append(f"{where}: {error}")
                if len(self.broken) > self.max_broken:
                    budget = f" (broken record {len(self.broken)} of at most {self.max_broken})"
                    raise DataError(self.broken[-1] + (budget if self.max_broken else "")) from error
                continue
            self.num_read += 1
            yield sample


def read_samples(path: Path | str) -> Iterator[Conversation]:
    """Every conversation of a file of canonical samples, in order; ``DataError`` at the first that is none."""
    return iter(SampleReader([path]))


def write_samples(path: Path | str, samples: Iterable[Conversation]) -> int:
    """Write conversations so that ``read_samples`` gives them back equal; the number written.

    The file appears complete or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = unfinished_name(path)
    count = 0
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half characters: JSON's escapes
            for sample in samples:
                file.write(json.dumps(sample_to_json(sample), ensure_ascii=False) + "\n")
                count += 1
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def append_sample(path: Path, sample: Conversation) -> None:
    """Add a conversation to a file that grows while a run lives; a kill can tear its last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(sample_to_json(sample), ensure_ascii=False) + "\n")


# ---- JSON in -------------------------------------------------------------------------------------------------------


def sample_from_json(record: Any) -> Conversation:
    """The conversation in a decoded line; ``DataError`` names the key, what was expected and what came."""
    record = _object(record, "$", {"messages", "tools", "verified", *_LABELS})
    messages = _list(record.get("messages"), "$.messages")
    if not messages:
        raise DataError("$.messages: expected at least one, got none")
    verified = record.get("verified")
    if verified is not None and not isinstance(verified, bool):
        raise DataError(f"$.verified: expected true or false, got {verified!r}"[:200])
    return Conversation(
        messages=tuple(_message(message, f"$.messages[{index}]") for index, message in enumerate(messages)),
        tools=tools_from_json(record.get("tools")),
        verified=verified,
        **{label: _string(record.get(label), f"$.{label}") for label in _LABELS},
    )


def tools_from_json(tools: Any) -> tuple[ToolSpec, ...]:
    """Tools in OpenAI's shape, at ``$.tools`` of a record; None is no tools."""
    return tuple(_tool(tool, f"$.tools[{index}]") for index, tool in enumerate(_list(tools or [], "$.tools")))


def _message(record: Any, where: str) -> Message:
    record = _object(record, where, {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "weight"})
    role = record.get("role")
    if role not in _ROLES:
        raise DataError(f"{where}.role: expected one of {', '.join(_ROLES)}, got {role!r}")
    calls = _list(record.get("tool_calls") or [], f"{where}.tool_calls")
    reasoning = _string(record.get("reasoning_content"), f"{where}.reasoning_content")
    if role != "assistant" and (calls or reasoning):
        raise DataError(f"{where}: expected tool_calls and reasoning_content of an assistant only, got role {role!r}")
    if (weight := record.get("weight", 1)) not in (0, 1):
        raise DataError(f"{where}.weight: expected 0 or 1, got {weight!r}"[:200])
    answered = record.get("tool_call_id")
    if (role == "tool") != isinstance(answered, str):
        raise DataError(f"{where}.tool_call_id: expected a string for a tool's message only, got {answered!r} ({role})")
    return Message(
        role=role,
        content=_string(record.get("content"), f"{where}.content"),
        reasoning=reasoning,
        tool_calls=tuple(_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)),
        tool_call_id=answered,
        trained=bool(weight),
    )


def _call(record: Any, where: str) -> ToolCall:
    record = _object(record, where, {"id", "type", "function", "index"})
    function = _object(record.get("function"), f"{where}.function", {"name", "arguments"})
    arguments = function.get("arguments")
    if isinstance(arguments, str):  # OpenAI's API sends a string of JSON
        try:
            arguments = load_json(arguments)
        except DataError as error:
            raise DataError(f"{where}.function.arguments: {error}") from error
    if not isinstance(arguments, dict):
        raise DataError(f"{where}.function.arguments: expected an object, got {arguments!r}"[:200])
    return ToolCall(
        id=_string(record.get("id"), f"{where}.id", required=True),
        name=_string(function.get("name"), f"{where}.function.name", required=True),
        arguments=arguments,
    )


def _tool(record: Any, where: str) -> ToolSpec:
    record = _object(record, where, {"type", "function"})
    function = _object(record.get("function"), f"{where}.function", {"name", "description", "parameters", "strict"})
    parameters = function.get("parameters", {})
    if not isinstance(parameters, dict):
        raise DataError(f"{where}.function.parameters: expected a JSON schema, got {parameters!r}"[:200])
    return ToolSpec(
        name=_string(function.get("name"), f"{where}.function.name", required=True),
        description=_string(function.get("description"), f"{where}.function.description"),
        parameters=parameters,
    )


def _object(value: Any, where: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, got {type(value).__name__}")
    if unknown := sorted(set(value) - known):
        raise DataError(f"{where}: expected only the keys {', '.join(sorted(known))}; got {', '.join(unknown)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list, got {type(value).__name__}")
    return value


def _string(value: Any, where: str, required: bool = False) -> str:
    if value is None and not required:
        return ""
    if not isinstance(value, str) or (required and not value):
        raise DataError(f"{where}: expected a {'non-empty ' if required else ''}string, got {value!r}"[:200])
    return value


# ---- JSON out ------------------------------------------------------------------------------------------------------


def sample_to_json(sample: Conversation) -> dict[str, Any]:
    """The canonical object of one line; labels that are empty are left out."""
    record: dict[str, Any] = {"messages": to_openai(sample.messages)}
    if sample.tools:
        record["tools"] = tools_to_openai(sample.tools)
    if sample.verified is not None:
        record["verified"] = sample.verified
    return record | {label: getattr(sample, label) for label in _LABELS if getattr(sample, label)}
