"""Records in whole documents: lists, logs of many samples, and lists that are one conversation.

In: a decoded ``.json`` document or the members of an Inspect ``.eval`` archive. Out: records. It knows which documents
hold many records; what a record means is for the formats.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

from north_lightning.errors import DataError
from north_lightning.untrusted import load_json

_ZSTANDARD = 93  # which zipfile reads from Python 3.14 on


def is_event(value: Any) -> bool:
    """Whether an object is one of OpenHands' events."""
    if not isinstance(value, dict) or "role" in value or "source" not in value:
        return False
    return "action" in value or "observation" in value or str(value.get("kind", "")).endswith("Event")


def records_of(document: Any) -> list[Any]:
    """The records in a document: its elements, an Inspect log's samples, or the document itself."""
    if isinstance(document, list):
        said = [one for one in document if isinstance(one, dict) and ("role" in one or "from" in one)]
        if document and len(said) == len(document):
            return [{"messages": document}]
        return [{"events": document}] if any(map(is_event, document[:20])) else document
    samples, log = (document.get("samples"), document.get("eval")) if isinstance(document, dict) else (None, None)
    if isinstance(samples, list) and isinstance(log, dict):
        return [{**sample, "eval": log} for sample in samples if isinstance(sample, dict)]
    return [document]


def records_of_archive(data: bytes, max_bytes: int) -> Iterator[tuple[str, Any]]:
    """Name and record of every sample in an Inspect ``.eval`` archive; at most ``max_bytes`` come out of it."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = {info.filename: info for info in archive.infolist()}
        left = max_bytes
        header: Any = {}
        if "header.json" in members:
            header = load_json(_read(archive, data, members["header.json"], left))
        for name, info in members.items():
            if name.startswith("samples/") and name.endswith(".json"):
                text = _read(archive, data, info, left)
                left -= len(text)
                sample = load_json(text)
                yield name, {**sample, "eval": header.get("eval") or {}} if isinstance(sample, dict) else sample
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error, EOFError) as error:
        raise DataError(f"expected an Inspect log, got: {error}") from error


def _read(archive: zipfile.ZipFile, data: bytes, info: zipfile.ZipInfo, limit: int) -> bytes:
    """A member, which is not believed about its size."""
    if info.compress_type == _ZSTANDARD:
        import pyarrow  # which everything else here does without

        name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
        start = info.header_offset + 30 + name_length + extra_length
        packed = io.BytesIO(data[start : start + info.compress_size])
        try:
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd") as stream:
                text = bytes(stream.read(limit + 1))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{info.filename}: expected zstandard, got: {error}") from error
    else:
        with archive.open(info) as member:
            text = member.read(limit + 1)
    if len(text) > limit:
        raise DataError(f"{info.filename}: expected at most {limit} bytes, got more")
    return text
