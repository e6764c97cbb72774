"""What a model handed in for an item: an answer, changes, files, and how it got there.

In: a folder of attempts, of any harness, or an evaluation folder of ``test``. Out: ``Submission`` by item. A folder of
attempts holds one folder for each item, whose name is the item's:

    ITEM/attempt.json   {"format": 1, "functionality": ..., "instruction": ..., "transcript": [messages]}
    ITEM/session.json   in place of the transcript: what OpenCode's `opencode export SESSION` prints
    ITEM/changes.diff   optional: what the attempt changed, a unified diff
    ITEM/files/         optional: files that it produced

Messages are those of the OpenAI chat format. Files are not trusted: no link is followed, sizes are limited.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from north_lightning.errors import ConfigError, DataError, NorthError
from north_lightning.evaluation.attempts import ATTEMPTS, read_attempts
from north_lightning.evaluation.interchange import latest, patch_of
from north_lightning.evaluation.works import WORKS, Works
from north_lightning.types import Task
from north_lightning.untrusted import check_name, read_file, read_json

Functionality = Literal["code_explanation", "code_editing", "data_visualization", "implementation_from_scratch"]
FUNCTIONALITIES: tuple[str, ...] = get_args(Functionality)
MAX_FILES, MAX_FILE_BYTES, MAX_TOTAL_BYTES = 500, 8 << 20, 32 << 20
"""Of one attempt; the rest is left out, and the rater reads that it is."""


class Call(BaseModel):
    """A tool call, flat or as in the OpenAI format."""

    name: str
    arguments: dict[str, Any] | str = ""

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        return value["function"] if isinstance(value, dict) and isinstance(value.get("function"), dict) else value


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    reasoning: str = ""
    tool_calls: list[Call] = []

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if isinstance(value, list):
            return "\n".join(str(part.get("text", "")) for part in value if isinstance(part, dict))
        return "" if value is None else value


class AttemptFile(BaseModel):
    """``attempt.json``."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1]
    functionality: Functionality
    instruction: str | None = None
    transcript: list[Message] = []


@dataclass(frozen=True, slots=True)
class Submission:
    """``instruction`` is empty where only the transcript has it; ``left_out`` names files that are not in ``files``."""

    functionality: str
    instruction: str
    transcript: Sequence[Message]
    diff: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: Sequence[str] = ()

    @property
    def answer(self) -> str:
        """The last thing that the assistant said."""
        said = [one.content for one in self.transcript if one.role == "assistant" and one.content.strip()]
        return said[-1] if said else ""

    @property
    def asked(self) -> str:
        return self.instruction or next((one.content for one in self.transcript if one.role == "user"), "")


def read_side(
    folder: Path, checkpoint: str, tasks: Mapping[str, Task], functionality: Mapping[str, str]
) -> dict[str, Submission]:
    """Item -> what one model handed in. ``checkpoint``, ``tasks`` and ``functionality`` (family -> its functionality)
    are for evaluation folders."""
    if (folder / ATTEMPTS).is_file():
        return _read_evaluation(folder, checkpoint, tasks, functionality)
    if checkpoint:
        raise ConfigError(f"sides: expected {ATTEMPTS} of `test` in '{folder}', as a checkpoint is named; found none")
    places = sorted(path.parent for path in folder.glob("*/attempt.json"))
    if not places:
        raise DataError(f"sides: expected ITEM/attempt.json or {ATTEMPTS} in '{folder}', found none")
    return {check_name(place.name, "sides: item", DataError): read_submission(place) for place in places}


def read_submission(place: Path) -> Submission:
    """An item's folder."""
    path = place / "attempt.json"
    try:
        given = AttemptFile.model_validate(read_json(path, DataError))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg']}, got {str(first['input'])[:80]!r}") from error
    transcript, session = given.transcript, place / "session.json"
    if session.exists():
        if transcript:
            raise DataError(f"{path}: expected a transcript or session.json, got both: remove one")
        transcript = opencode_messages(read_json(session, DataError), session)
    diff = place / "changes.diff"
    text = read_file(diff, place, error=DataError).decode(errors="replace") if diff.exists() else ""
    files, left_out = read_files(place / "files")
    one = Submission(given.functionality, given.instruction or "", transcript, text, files, left_out)
    if not one.asked.strip():
        raise DataError(f"{path}: instruction: expected it here or as the first user message, got neither")
    return one


def opencode_messages(session: Mapping[str, Any], path: Path) -> list[Message]:
    """The messages of an exported session of OpenCode (version 1.18); a finished tool is a call and its result."""
    messages = []
    try:
        for entry in session["messages"]:
            said: dict[str, list[str]] = {"text": [], "reasoning": []}
            calls, results = [], []
            for part in entry["parts"]:
                if part["type"] in said and not part.get("synthetic"):
                    said[part["type"]].append(part["text"])
                elif part["type"] == "tool":
                    state = part["state"]
                    calls.append(Call(name=part["tool"], arguments=state.get("input") or {}))
                    results.append(Message(role="tool", content=state.get("output") or state.get("error") or ""))
            text, reasoning = ("\n\n".join(said[kind]) for kind in ("text", "reasoning"))
            if text or reasoning or calls:
                role = entry["info"]["role"]
                messages.append(Message(role=role, content=text, reasoning=reasoning, tool_calls=calls))
            messages += results
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path}: expected what `opencode export` prints, got: {type(error).__name__} {error}"
        ) from error
    return messages


def read_files(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Regular files below ``folder``, by path; and what is left out, with the reason."""
    files: dict[str, bytes] = {}
    left_out = []
    for path, shown in _walk(folder):
        try:
            if path.is_symlink():
                raise DataError("a link")
            room = MAX_TOTAL_BYTES - sum(map(len, files.values()))
            if len(files) >= MAX_FILES or not room:
                left_out.append("more files")
                break
            files[shown] = read_file(path, folder, min(MAX_FILE_BYTES, room), DataError)
        except (OSError, NorthError) as error:
            left_out.append(f"{shown}: {str(error).removeprefix(f'{path.name}: ')}")
    return files, left_out


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    for parent, names, found in os.walk(folder):
        names.sort()
        for name in sorted([*found, *(one for one in names if os.path.islink(os.path.join(parent, one)))]):
            path = Path(parent, name)
            yield path, os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace")


# ---- evaluations of our own ------------------------------------------------------------------------------------------


def _read_evaluation(
    folder: Path, checkpoint: str, tasks: Mapping[str, Task], functionality: Mapping[str, str]
) -> dict[str, Submission]:
    attempts = latest(read_attempts(folder / ATTEMPTS))
    names = sorted({one.checkpoint for one in attempts})
    if (checkpoint and checkpoint not in names) or (not checkpoint and len(names) != 1):
        raise ConfigError(
            f"sides: '{folder}' holds {', '.join(names) or 'no attempts'}, "
            f"expected {checkpoint or 'one checkpoint'}: name one of them as FOLDER:CHECKPOINT"
        )
    works, found = Works(folder / WORKS), {}
    for one in attempts:
        if one.checkpoint != (checkpoint or names[0]) or one.reward is None or not works.has(one.kept):
            continue
        kind = functionality.get(one.family, functionality.get("*", ""))
        if kind not in FUNCTIONALITIES:
            raise ConfigError(
                f"functionality: expected one of {', '.join(FUNCTIONALITIES)} for the family {one.family!r}, got "
                f"{kind or 'none'!r}: --functionality.{one.family} NAME"
            )
        if one.task_id not in found:  # of several samples the first one
            found[check_name(one.task_id, "sides: item", DataError)] = _of_work(
                works, one.kept, kind, tasks.get(one.task_id)
            )
    if not found:
        raise DataError(f"sides: expected attempts with their kept {WORKS}/ in '{folder}', found none")
    return found


def _of_work(works: Works, name: str, functionality: str, task: Task | None) -> Submission:
    record = works.read_record(name)
    transcript = [Message.model_validate(message) for message in record["messages"]]
    with TemporaryDirectory(prefix="north-human-evaluation-") as scratch:
        works.unpack_changed(name, Path(scratch))
        files, left_out = read_files(Path(scratch))
    diff = patch_of(name, works, task).encode(errors="surrogateescape").decode(errors="replace") if task else ""
    return Submission(functionality, task.instruction if task else "", transcript, diff, files, left_out)
