"""Hugging Face checkpoints, in and out: sharded safetensors with one tensor per expert, for transformers and vLLM.

In: a directory with ``config.json`` and safetensors. Out: a ``NorthModel``, or such a directory. In memory the experts'
gate and up matrices are fused, and so are queries, keys and values; ``hf_parts`` is the one place that knows which part
of which parameter is which tensor on disk, and loading, saving and weight pushes all go through it.

Only safetensors: nothing here unpickles. The tied head is not stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from north_lightning.durable import whole_folder
from north_lightning.errors import CheckpointError
from north_lightning.model.compute import ComputeConfig
from north_lightning.model.config import NorthConfig
from north_lightning.model.decoder import NorthModel
from north_lightning.model.files import (
    EMBEDDING,
    by_shard,
    copy_texts,
    copy_tokenizer,
    open_shard,
    read_weight_map,
    stored_dtype,
)
from north_lightning.model.shards import Entry, split_shards, write_shards

MAX_SHARD_BYTES = 5 * 10**9

_TIED_HEAD = "lm_head.weight"


# ---- names ---------------------------------------------------------------------------------------------------------


Index = tuple[int | slice, ...]


def hf_parts(config: NorthConfig) -> Iterator[tuple[str, str, Index]]:
    """Hugging Face's name, our parameter's name, and which part of that parameter it is; in the order of the layers.

    18,730 for the released shape; the tied head is not among them. The parts of one parameter follow each other.
    """
    head_dim, num_heads, num_kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    dense_width = config.prefix_dense_intermediate_size
    assert dense_width is not None
    yield EMBEDDING, "embedding.weight", ()
    for index in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{index}", f"layers.{index}"
        yield f"{theirs}.input_layernorm.weight", f"{ours}.norm.weight", ()
        start = 0
        for name, heads in (("q_proj", num_heads), ("k_proj", num_kv_heads), ("v_proj", num_kv_heads)):
            stop = start + heads * head_dim
            yield f"{theirs}.self_attn.{name}.weight", f"{ours}.attention.qkv_proj.weight", (slice(start, stop),)
            start = stop
        yield f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.o_proj.weight", ()
        if config.is_dense(index):
            gate_up, down = f"{ours}.mlp.gate_up_proj.weight", f"{ours}.mlp.down_proj.weight"
            yield f"{theirs}.mlp.gate_proj.weight", gate_up, (slice(0, dense_width),)
            yield f"{theirs}.mlp.up_proj.weight", gate_up, (slice(dense_width, 2 * dense_width),)
            yield f"{theirs}.mlp.down_proj.weight", down, ()
        else:
            yield f"{theirs}.mlp.gate.weight", f"{ours}.mlp.router.weight", ()
            width = config.intermediate_size
            for expert in range(config.num_experts):
                prefix, gate_up = f"{theirs}.mlp.experts.{expert}", f"{ours}.mlp.gate_up_proj"
                yield f"{prefix}.gate_proj.weight", gate_up, (expert, slice(0, width))
                yield f"{prefix}.up_proj.weight", gate_up, (expert, slice(width, 2 * width))
            for expert in range(config.num_experts):
                yield f"{theirs}.mlp.experts.{expert}.down_proj.weight", f"{ours}.mlp.down_proj", (expert,)
    yield "model.norm.weight", "norm.weight", ()


def hf_tensors(config: NorthConfig, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, as a view into the parameters that ``read`` gives, each read once."""
    gathered, whole = "", torch.empty(0)
    for name, parameter, index in hf_parts(config):
        if parameter != gathered:
            gathered, whole = parameter, read(parameter)
        yield name, whole[index]


def hf_shapes(config: NorthConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor under its Hugging Face name, in the order of the layers."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in named_hf_tensors(NorthModel(config))}


def named_hf_tensors(model: NorthModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model under its Hugging Face name.

    The tensors are detached views: writing to them writes the model, and nothing is copied. Where parameters are
    distributed over processes they are copies instead, gathered one parameter at a time, and *every* process has to
    take all of them. Of a model with adapters they are the merged weights, computed when their turn comes.
    """

    def read(parameter: str) -> Tensor:
        whole = attrgetter(parameter)(model).detach()
        return whole.full_tensor() if isinstance(whole, DTensor) else whole

    return hf_tensors(model.config, read)


def fingerprint(model: NorthModel) -> str:
    """Tells models apart by what they compute; a model with adapters has the merged model's fingerprint."""
    return fingerprint_of(model.config, named_hf_tensors(model))


def fingerprint_of(config: NorthConfig, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of the config and up to 1,024 evenly spaced numbers of every tensor; the same for the same numbers in
    another dtype."""
    hf_config = {key: value for key, value in config.to_hf().items() if key != "initializer_range"}
    digest = sha256(json.dumps(hf_config, sort_keys=True).encode())
    for name, tensor in tensors:
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // 1024)].float().cpu().contiguous()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]


# ---- in ------------------------------------------------------------------------------------------------------------


def load_checkpoint(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    sliding_window_includes_current: bool = False,
    compute: ComputeConfig | None = None,
) -> NorthModel:
    """A model with the weights of a Hugging Face checkpoint directory; its ``config`` is the checkpoint's.

    Args:
        directory: ``config.json`` and ``model.safetensors``, or shards and their index.
        dtype: of the parameters; None: the embedding's on disk.
        device: where the parameters go.
        sliding_window_includes_current: see ``NorthConfig``.
        compute: how the model is computed.

    Raises:
        CheckpointError: no such directory or shard, a corrupt file, or tensors that are missing, unexpected or of
            another shape.
        ConfigError: a config that this implementation does not do.
    """
    directory = Path(directory)
    config = NorthConfig.load(directory, sliding_window_includes_current=sliding_window_includes_current)
    with torch.device("meta"):
        model = NorthModel(config, compute)
    model.to(dtype=dtype or getattr(torch, stored_dtype(directory)))
    model.to_empty(device=device)
    load_weights(model, directory)
    return model


@torch.no_grad()
def load_weights(model: NorthModel, directory: str | Path) -> None:
    """Give a model the weights of a checkpoint; of parameters distributed over processes, only this process's parts
    are read.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    directory = Path(directory)
    weight_map = read_weight_map(directory)
    check_tensors(directory, weight_map, hf_shapes(model.config))
    parts = {name: (parameter, index) for name, parameter, index in hf_parts(model.config)}
    for shard, names in by_shard(weight_map).items():
        with open_shard(directory / shard) as file:
            for name in names:
                if name != _TIED_HEAD:
                    parameter, index = parts[name]
                    _copy_held(file.get_slice(name), attrgetter(parameter)(model), index)
    if _TIED_HEAD in weight_map:
        _check_tied_head(directory, weight_map)


def held_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this process holds of a parameter, a block, and where in the whole it begins."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), (0,) * parameter.dim()
    (chunk,) = parameter.__create_chunk_list__()  # how torch's own checkpoints ask
    with torch.no_grad():
        return parameter.to_local(), tuple(chunk.offsets)


def _copy_held(stored: Any, parameter: Tensor, index: Index) -> None:
    """Copy from disk what this process holds of ``parameter[index]``."""
    local, offsets = held_part(parameter)
    target: list[int | slice] = []
    source: list[slice] = []
    for dim, offset in enumerate(offsets):
        part = index[dim] if dim < len(index) else slice(0, parameter.shape[dim])
        first, last = (part, part + 1) if isinstance(part, int) else (part.start, part.stop)
        start, stop = max(first, offset), min(last, offset + local.shape[dim])
        if start >= stop:
            return
        if isinstance(part, int):
            target.append(start - offset)
        else:
            target.append(slice(start - offset, stop - offset))
            source.append(slice(start - first, stop - first))
    local[tuple(target)].copy_(stored[tuple(source)])


def check_tensors(directory: Path, weight_map: Mapping[str, str], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes of everything on disk with the model's, before any memory is spent."""
    missing = [name for name in expected if name not in weight_map]
    unexpected = [name for name in weight_map if name not in expected and name != _TIED_HEAD]
    if missing or unexpected:
        raise CheckpointError(
            f"{directory}: weights do not fit config.json: {_some(missing)} missing, {_some(unexpected)} unexpected"
        )
    for shard, names in by_shard(weight_map).items():
        with open_shard(directory / shard) as file:
            stored = set(file.keys())
            for name in names:
                if name not in stored:
                    raise CheckpointError(f"{directory / shard}: {name} is in the index but not in the file")
                shape = tuple(file.get_slice(name).get_shape())
                if name in expected and shape != expected[name]:
                    raise CheckpointError(
                        f"{directory / shard}: {name} has another shape: expected {list(expected[name])}, "
                        f"got {list(shape)}"
                    )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})" if names else "none"


def _check_tied_head(directory: Path, weight_map: Mapping[str, str]) -> None:
    def read(name: str) -> Tensor:
        with open_shard(directory / weight_map[name]) as file:
            return file.get_tensor(name)

    head, embedding = read(_TIED_HEAD), read(EMBEDDING)
    if not torch.equal(head.to(embedding), embedding):
        raise CheckpointError(f"{_TIED_HEAD} differs from {EMBEDDING}: only tied embeddings are supported")


# ---- out -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    model: NorthModel,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_dir: str | Path | None = None,
    base: str | Path | None = None,
) -> None:
    """Write a checkpoint that ``load_checkpoint``, transformers and vLLM read.

    Everything is written beside the destination, flushed to disk and renamed into place: the directory exists
    complete or not at all. An existing checkpoint there is replaced.

    Args:
        directory: to be made, or an existing checkpoint.
        dtype: of the tensors on disk; None: as in memory.
        max_shard_bytes: largest file, up to one tensor.
        tokenizer_dir: where to copy tokenizer and chat template files from.
        base: checkpoint that the model was made from: its licenses and its ``generation_config.json`` are carried on.

    Raises:
        CheckpointError: the destination is something else than a checkpoint, ``tokenizer_dir`` has no tokenizer, or
            nothing more can be written.
    """
    directory = Path(directory)
    check_replaceable(directory)
    dtype = dtype or model.embedding.weight.dtype
    entries = [Entry(name, dtype, shape) for name, shape in hf_shapes(model.config).items()]
    tensors = zip(entries, named_hf_tensors(model), strict=True)
    pieces = ((entry, piece) for entry, (_, tensor) in tensors for piece in entry.pieces(tensor))
    try:
        with whole_folder(directory) as staging:
            if tokenizer_dir is not None:
                copy_tokenizer(Path(tokenizer_dir), staging)
            if base is not None:
                copy_texts(Path(base), staging)
            write_shards(split_shards(entries, max_shard_bytes), pieces, staging)
            write_config(staging, model.config, dtype)
    except OSError as error:
        raise CheckpointError(f"could not write '{directory}': {error}") from error


def write_config(directory: Path, config: NorthConfig, dtype: torch.dtype, **more: Any) -> None:
    """Write ``config.json`` for weights of ``dtype``, with ``more`` keys."""
    hf_config = config.to_hf() | {"dtype": str(dtype).removeprefix("torch.")} | more
    text = json.dumps(hf_config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def check_replaceable(directory: Path) -> None:
    """``CheckpointError`` for a directory that holds more than a checkpoint, its adapters and earlier steps."""
    inside = list(directory.iterdir()) if directory.exists() else []
    folders = [path for path in inside if path.is_dir() and not path.name.startswith(("step-", "adapter"))]
    if folders or (inside and not (directory / "config.json").is_file() and not all(map(Path.is_dir, inside))):
        raise CheckpointError(f"will not replace {directory}: it is not empty and not a checkpoint")
