"""Records of data files, one at a time, undecoded: JSON Lines, JSON, agents' logs and parquet, local or remote,
compressed or not.

In: paths or URLs (anything fsspec opens) and which part of the records is wanted. Out: each record with its place,
``file:line``. Nothing is held in memory but one line or one parquet batch. What a record means is for ``sources`` and
``formats``.

pyarrow reads parquet and fsspec opens files; ``datasets`` would do both, but takes six times as long to import and
infers one schema over all JSON lines, which refuses tool arguments of different types and loses line numbers.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import fsspec

from north_lightning.data.documents import records_of, records_of_archive
from north_lightning.errors import ConfigError, DataError
from north_lightning.untrusted import check_depth

PARQUET_BATCH = 64  # rows decoded at a time: trajectories are long
MAX_RECORD_BYTES = 64 << 20
"""Largest size of a line, and of 64 parquet rows in memory."""
_EVENT = re.compile(r"(?<=/)event-\d+-[^/]*\.json$")  # a file's name in OpenHands' folders
MAX_DOCUMENT_BYTES = 2 << 30
MAX_RATIO = 250  # of what comes out of a compressed file to what is in it; logs of agents stay below 60

Record = tuple[str, bytes | Mapping[str, Any]]
"""Where it stands, and its JSON text or its decoded parquet row."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count`` equal parts: every ``count``-th record, counted over all files.

    Parts are disjoint and together everything, and taking turns among them gives back the order of the whole.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"shard: expected an index from 0 to {self.count - 1}, got {self.index}")

    @classmethod
    def of_worker(cls, rank: int, world_size: int, worker: int = 0, num_workers: int = 1) -> Shard:
        """The part of one data-loading worker of one rank."""
        return cls(worker * world_size + rank, num_workers * world_size)

    def holds(self, number: int) -> bool:
        return number % self.count == self.index


def list_files(patterns: Sequence[Path | str]) -> list[str]:
    """Files behind paths, URLs and patterns with ``*``, sorted within a pattern; ``DataError`` where there are none."""
    found: list[str] = []
    for pattern in patterns:
        try:
            system, path = fsspec.core.url_to_fs(str(pattern))
            matches = sorted(system.glob(path)) if "*" in path else [path] * system.isfile(path)
        except Exception as error:  # an unknown kind, a package that it needs, its server
            raise DataError(f"{pattern}: expected a file of conversations, got: {error}") from error
        if not matches:
            is_content = str(pattern).startswith("{")  # jsonargparse reads a list that is the name of a file from it
            raise DataError(
                f"files: expected a list of files, such as [FILE.jsonl], got the content of one: {str(pattern)[:60]}"
                if is_content
                else f"{pattern}: expected a file of conversations, found none"
            )
        local = "file" in system.protocol
        found += [str(pattern)] if "*" not in path else matches if local else map(system.unstrip_protocol, matches)
    return found


def read_records(
    files: Sequence[Path | str], shard: Shard | None = None, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[Record]:
    """The records of ``files`` that belong to ``shard``; empty lines count for nothing.

    Raises:
        DataError: a file is missing or damaged, or is no parquet file though its name says so.
    """
    shard = shard or Shard()
    number = 0
    for file, events in groupby(list_files(files), lambda name: _EVENT.sub("", name)):
        try:
            reading = _read_parquet if file.endswith(".parquet") else _read_json
            records = _read_events(file, events) if file.endswith("/") else reading(file, max_record_bytes)
            for record in records:
                if shard.holds(number):
                    yield record
                number += 1
        except (OSError, EOFError, zlib.error) as error:  # of the disk, the server or what is compressed
            raise DataError(f"{file}: expected to read on after {number} records, got: {error}") from error


def decode(content: bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    """A record as an object; ``DataError`` for text that is not strict JSON (NaN is not) or no object."""
    if isinstance(content, bytes):
        try:
            content = json.loads(content, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise DataError(f"$: expected JSON, got {error.msg} at character {error.pos + 1}") from error
        except DataError:
            raise
        except (ValueError, RecursionError) as error:  # no UTF-8, an integer of thousands of digits, too deep
            raise DataError(f"$: expected JSON, got: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"$: expected an object, got {type(content).__name__}")
    check_depth(content)
    return content


def text_of(record: Mapping[str, Any], column: str) -> str:
    """A text in a record; ``DataError`` if it is missing or blank."""
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{column}: expected text, got {value!r}"[:300])
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise DataError(f"$: expected strict JSON, got {name}")


def _read_json(file: str, max_record_bytes: int) -> Iterator[Record]:
    opened = fsspec.open(file, "rb", compression="infer")
    left = max_record_bytes + MAX_RATIO * (opened.fs.size(opened.path) or MAX_DOCUMENT_BYTES)
    with opened as compressed:
        lines = io.BufferedReader(compressed, 1 << 20)
        suffixes = Path(file).suffixes
        if ".json" in suffixes or ".traj" in suffixes or ".eval" in suffixes:
            text = lines.read(min(left, MAX_DOCUMENT_BYTES) + 1)
            if len(text) > min(left, MAX_DOCUMENT_BYTES):
                raise DataError(f"{file}: expected a document of at most {len(text) - 1} bytes, got more")
            if ".eval" in suffixes:
                found = records_of_archive(text, min(left, MAX_DOCUMENT_BYTES))
                yield from ((f"{file}/{name}", record) for name, record in found)
            else:
                yield from _split_document(file, text)
            return
        number = 0
        while line := lines.readline(max_record_bytes + 1):
            number += 1
            left -= max(len(line), 64)  # short lines take time, if no memory
            if len(line) > max_record_bytes:
                raise DataError(f"{file}:{number}: expected a record of at most {max_record_bytes} bytes, got more")
            if left < 0:
                raise DataError(f"{file}:{number}: expected a file that grows at most {MAX_RATIO} times, got more")
            if line.strip():
                yield f"{file}:{number}", line


def _read_events(folder: str, files: Iterable[str]) -> Iterator[Record]:
    """OpenHands keeps a conversation as a folder with a file for each event."""
    yield folder, {"events": [decode(content) for file in files for _, content in _read_json(file, MAX_RECORD_BYTES)]}


def _split_document(file: str, text: bytes) -> Iterator[Record]:
    """A ``.json`` file is one record, or many (``documents``); or lines of them, by a wrong name."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        is_lines = error.msg == "Extra data" and text[: error.pos].rstrip(b" \r").endswith(b"\n")
        lines = text.split(b"\n") if is_lines else []
        yield from ((f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
        if not is_lines:
            yield file, text  # whoever decodes the text says what is wrong with it
        return
    except (ValueError, RecursionError):
        yield file, text
        return
    records = records_of(document)
    if len(records) == 1 and records[0] is document:
        yield file, document if isinstance(document, dict) else text
    else:
        yield from ((f"{file}[{index}]", record) for index, record in enumerate(records))


def _read_parquet(file: str, max_record_bytes: int) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet  # slow to import, and most data is JSON Lines

    number = 0
    with fsspec.open(file, "rb") as opened:
        try:
            for batch in parquet.ParquetFile(opened).iter_batches(PARQUET_BATCH):
                if batch.nbytes > PARQUET_BATCH * max_record_bytes:
                    raise DataError(f"{file}:{number + 1}: expected rows of at most {max_record_bytes} bytes, got more")
                kinds = dict(zip(batch.schema.names, batch.schema.types, strict=True))
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield f"{file}:{number}", {key: _as_json(value, kinds[key]) for key, value in row.items()}
        except (pyarrow.ArrowException, ValueError, OverflowError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file}: expected a parquet file, got after {number} rows: {error}") from error


def _as_json(value: Any, kind: Any) -> Any:
    """``value`` of an Arrow type, with texts for what parquet has and JSON has not: times, bytes, decimals.

    All structs of a column have the same keys, so one that is null was missing in JSON, and is left out; a map has the
    keys it was given.
    """
    from pyarrow import types

    if isinstance(value, dict) and types.is_struct(kind):
        below = {field.name: field.type for field in kind}
        return {key: _as_json(one, below[key]) for key, one in value.items() if one is not None}
    if isinstance(value, dict):
        return {str(key): _as_json(one, kind.item_type) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one, kind.value_type) for one in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value) if isinstance(value, date | time | timedelta | Decimal) else value
