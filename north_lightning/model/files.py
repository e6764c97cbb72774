"""What lies in the folder of a Hugging Face checkpoint: which file holds which tensor, in which dtype, and the
texts that a release needs beside its weights.

In: a folder, perhaps a stranger's. Out: names, dtypes, copies of small files; a ``CheckpointError`` for what is not a
checkpoint. No torch, so that the planner reads what training reads. Not here: the tensors' values.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from north_lightning.errors import CheckpointError
from north_lightning.untrusted import read_json, resolve_below

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_CARRIED = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYRIGHT*")
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the only file."""
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint: {directory} is not a directory")
    index_path = directory / INDEX_NAME
    if not index_path.exists():
        with open_shard(directory / WEIGHTS_NAME, "np") as file:
            return dict.fromkeys(file.keys(), WEIGHTS_NAME)
    weight_map = read_json(index_path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index_path}: expected a safetensors index with a weight_map")
    outside = [shard for shard in weight_map.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index_path}: expected file names in the same directory, got {outside[0]!r}")
    return weight_map


def open_shard(path: Path, framework: Literal["pt", "np"] = "pt") -> Any:
    """A safetensors file, opened; its tensors are read when they are asked for."""
    if not path.is_file():
        raise CheckpointError(f"missing weights: {path} (only safetensors are read)")
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"corrupt safetensors file {path}: {error}") from error


def by_shard(weight_map: Mapping[str, str]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        shards.setdefault(shard, []).append(name)
    return shards


def stored_dtype(directory: Path) -> str:
    """The name of the dtype that a checkpoint's weights have on disk: that of the embedding.

    Raises:
        CheckpointError: no checkpoint, or quantized weights, which cannot be trained.
    """
    weight_map = read_weight_map(directory)
    if EMBEDDING not in weight_map:
        raise CheckpointError(f"{directory}: weights do not fit config.json: {EMBEDDING} is missing")
    path = directory / weight_map[EMBEDDING]
    with open_shard(path, "np") as file:
        if EMBEDDING not in file.keys():  # noqa: SIM118 (no dictionary)
            raise CheckpointError(f"{path}: {EMBEDDING} is in the index but not in the file")
        dtype = file.get_slice(EMBEDDING).get_dtype()
    if dtype not in _DTYPES:
        raise CheckpointError(f"{directory}: {EMBEDDING} is stored as {dtype}; quantized weights cannot be trained")
    return _DTYPES[dtype]


def copy_tokenizer(source: Path, destination: Path) -> None:
    """The files of a tokenizer and its chat template."""
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"no tokenizer: expected {source / 'tokenizer.json'}")
    _copy([source / name for name in _TOKENIZER_FILES], destination)


def copy_texts(source: Path, destination: Path) -> None:
    """What a release carries from the checkpoint it was made from: licenses, and how to generate."""
    _copy(sorted(path for pattern in _CARRIED for path in source.glob(pattern)), destination)


def _copy(paths: list[Path], destination: Path) -> None:
    """Copy those that are files; links may lead to where Hugging Face's cache keeps files, and nowhere else."""
    for path in paths:
        root = path.parent.parent.parent if path.parent.parent.name == "snapshots" else path.parent
        if path.is_file():
            shutil.copyfile(resolve_below(path, root, CheckpointError), destination / path.name)
