"""Records of data files, one at a time, undecoded: JSON Lines, JSON and parquet, local or remote, compressed or not.

In: paths or URLs (anything fsspec opens) and which part of the records is wanted. Out: each record with its place,
``file:line``. Nothing is held in memory but one line or one parquet batch. What a record means is for ``sources`` and
``importers``.

pyarrow reads parquet and fsspec opens files; ``datasets`` would do both, but takes six times as long to import and
infers one schema over all JSON lines, which refuses tool arguments of different types and loses line numbers.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import fsspec

from north_lightning.errors import ConfigError, DataError

PARQUET_BATCH = 64  # rows decoded at a time: trajectories are long

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
            raise DataError(f"{pattern}: expected a file of conversations, found none")
        local = "file" in system.protocol
        found += [str(pattern)] if "*" not in path else matches if local else map(system.unstrip_protocol, matches)
    return found


def read_records(files: Sequence[Path | str], shard: Shard | None = None) -> Iterator[Record]:
    """The records of ``files`` that belong to ``shard``; empty lines count for nothing.

    Raises:
        DataError: a file is missing or damaged, or is no parquet file though its name says so.
    """
    shard = shard or Shard()
    number = 0
    for file in list_files(files):
        try:
            for record in _read_parquet(file) if file.endswith(".parquet") else _read_json(file):
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
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise DataError(f"$: expected strict JSON, got {name}")


def _read_json(file: str) -> Iterator[Record]:
    with fsspec.open(file, "rb", compression="infer") as lines:
        if ".json" in Path(file).suffixes:
            yield from _split_document(file, lines.read())
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{file}:{number}", line


def _split_document(file: str, text: bytes) -> Iterator[Record]:
    """A ``.json`` file is one record, or a list of them."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        document = None  # whoever decodes the text says what is wrong with it
    if isinstance(document, list):
        yield from ((f"{file}[{index}]", record) for index, record in enumerate(document))
    else:
        yield file, text


def _read_parquet(file: str) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet  # slow to import, and most data is JSON Lines

    with fsspec.open(file, "rb") as opened:
        try:
            table = parquet.ParquetFile(opened)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{file}: expected a parquet file, got: {error}") from error
        number = 0
        for batch in table.iter_batches(PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
