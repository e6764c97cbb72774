"""Safetensors shards and their index, written piece by piece: the memory of one piece, whatever the size of the model.

In: names, dtypes and shapes of all tensors, in order; then their bytes, in the same order. Out: ``model.safetensors``,
or shards and an index. safetensors' own writer wants all tensors of a file at once. Not here: making the files last.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from north_lightning.errors import CheckpointError
from north_lightning.model.files import INDEX_NAME, WEIGHTS_NAME

PIECE_BYTES = 16 << 20
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


class Entry(NamedTuple):
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor in order, cut into pieces that are small in memory; views of it where it is contiguous."""
        assert tensor.shape == self.shape, f"{self.name}: expected {self.shape}, got {tuple(tensor.shape)}"
        yield from tensor.detach().reshape(-1).split(PIECE_BYTES // max(self.dtype.itemsize, tensor.dtype.itemsize))


def split_shards(entries: Iterable[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Which tensors share a file: as many as fit, in order."""
    shards: list[list[Entry]] = [[]]
    shard_bytes = 0
    for entry in entries:
        if shards[-1] and shard_bytes + entry.num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(entry)
        shard_bytes += entry.num_bytes
    return shards


def write_shards(
    shards: Sequence[Sequence[Entry]], pieces: Iterable[tuple[Entry, Tensor]], directory: Path
) -> dict[str, str]:
    """Write one file for each of ``shards``, and an index if there are several.

    Args:
        shards: which tensor goes where.
        pieces: flat parts of every tensor, in that order, on any device and of any dtype. A piece may change once the
            next one is asked for.
        directory: exists.

    Returns:
        The SHA-256 of every file, by name.
    """
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    names = names if len(shards) > 1 else [WEIGHTS_NAME]
    digests: dict[str, str] = {}
    stream = iter(pieces)
    with ThreadPoolExecutor(1, thread_name_prefix="sha256") as hasher:
        for name, entries in zip(names, shards, strict=True):
            header, left = _header(entries), sum(entry.num_bytes for entry in entries)
            digest = sha256(header)
            with (directory / name).open("wb", buffering=0) as file:
                _write(file.fileno(), memoryview(header))
                while left:
                    entry, piece = next(stream)
                    content = piece.to("cpu", entry.dtype).contiguous().view(torch.uint8).numpy().data
                    hashed = hasher.submit(digest.update, content)
                    _write(file.fileno(), content)
                    hashed.result()
                    left -= len(content)
                assert left == 0, f"{name}: a piece of {entry.name} belongs to two files"
            digests[name] = digest.hexdigest()
    assert next(stream, None) is None, "more pieces than tensors"
    if len(shards) > 1:
        everything = [entry for entries in shards for entry in entries]
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(entry.shape) for entry in everything),
                "total_size": sum(entry.num_bytes for entry in everything),
            },
            "weight_map": {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (directory / INDEX_NAME).write_text(text, encoding="utf-8")
        digests[INDEX_NAME] = sha256(text.encode()).hexdigest()
    return digests


def _write(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _header(entries: Sequence[Entry]) -> bytes:
    """A safetensors file up to its first tensor: the size of the table of contents, and the table."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        if start % entry.dtype.itemsize:
            raise CheckpointError(f"{entry.name}: expected to begin at a multiple of {entry.dtype.itemsize} bytes")
        stop = start + entry.num_bytes
        table[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
