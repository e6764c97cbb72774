"""The weights of a checkpoint of any kind, one tensor at a time, so that no whole model is ever in memory.

In: a Hugging Face folder, quantized or not, or what ``ModelCheckpoint`` or an interrupted run has written; of a run
with adapters, the weights below them too. Out: tensors under Hugging Face's names, in the order of ``hf_parts``.
"""

from __future__ import annotations

import ctypes
import mmap
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from north_lightning.errors import CheckpointError
from north_lightning.export.quantization import Quantization
from north_lightning.model import LoRAConfig, NorthConfig, NorthModel, adapter_state_dict, add_adapters
from north_lightning.model.checkpoint import check_tensors, hf_parts, hf_shapes, hf_tensors
from north_lightning.model.files import open_shard, read_weight_map
from north_lightning.model.lora import update_of
from north_lightning.parallel.checkpoints import load_shards

READ_AHEAD_BYTES = 64 << 20
PREFIX = "model."  # of the model's parameters among a module's

NamedTensors = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True)
class Weights:
    """Tensors that can be gone through several times, each to be used before the next one is asked for."""

    config: NorthConfig
    tensors: Callable[[], NamedTensors]
    is_mapped: bool = False  # from files

    def forget(self, tensor: Tensor) -> None:
        """Take a tensor, or a part of one, that was only read out of this process's memory."""
        if self.is_mapped:
            _advise(tensor, mmap.MADV_DONTNEED)


def weights_of_folder(directory: Path, config: NorthConfig, quantization: Quantization | None = None) -> Weights:
    """The weights of a Hugging Face folder; quantized matrices come out dequantized, in float32.

    Raises:
        CheckpointError: the folder's tensors are not those of ``config``.
    """
    weight_map = read_weight_map(directory)
    shapes = hf_shapes(config)
    stored = shapes
    if quantization is not None:
        stored = {entry.name: entry.shape for entry in quantization.entries(shapes, torch.bfloat16)}
    check_tensors(directory, weight_map, stored)

    def tensors() -> NamedTensors:
        opened: tuple[str, Any] = ("", None)

        def read(name: str) -> Tensor:
            nonlocal opened
            if weight_map[name] != opened[0]:
                opened = weight_map[name], open_shard(directory / weight_map[name])
            tensor: Tensor = opened[1].get_tensor(name)
            return tensor

        for name in shapes:
            tensor = read(name)
            if quantization is not None and quantization.covers(name):
                tensor = quantization.dequantize(tensor, read(f"{name}_scale"))
            yield name, tensor

    if quantization is not None:
        return Weights(config, tensors)
    return Weights(config, lambda: _read_ahead(tensors()), is_mapped=True)


def weights_of_file(config: NorthConfig, stored: Mapping[str, Tensor], path: Path) -> Weights:
    """The weights of a training checkpoint of one process: ``stored``, mapped from ``path``.

    Raises:
        CheckpointError: ``stored`` is not the state of a module of ``config``.
    """
    with torch.device("meta"):
        own = _checked(stored, NorthModel(config).state_dict(), path)
    return Weights(config, lambda: _read_ahead(hf_tensors(config, own.__getitem__)), is_mapped=True)


def weights_of_shards(config: NorthConfig, folder: Path) -> Weights:
    """The weights of a training checkpoint of ``NorthStrategy``, in float32."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in NorthModel(config).state_dict().items()}

    def read(name: str) -> Tensor:
        whole = torch.empty(shapes[name])
        load_shards({"model": {PREFIX + name: whole}}, folder)
        return whole

    return Weights(config, lambda: hf_tensors(config, read))


def merged_weights(
    base: Weights, lora: LoRAConfig, stored: Mapping[str, Tensor], path: Path
) -> tuple[Weights, NorthModel]:
    """The sum of ``base`` and the adapters that were trained on it, and a model that holds these adapters only.

    Raises:
        CheckpointError: ``stored``, read from ``path``, is not the state of such adapters.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in NorthModel(base.config).state_dict().items()}
        model = NorthModel(base.config)
        add_adapters(model, lora)
    adapters = _checked(stored, adapter_state_dict(model), path)
    model.load_state_dict(adapters, strict=False, assign=True)

    @torch.no_grad()
    def tensors() -> NamedTensors:
        parts = zip(hf_parts(base.config), base.tensors(), strict=True)
        for parameter, group in groupby(parts, key=lambda part: part[0][1]):
            module, _, attribute = parameter.rpartition(".")
            update = update_of(model.get_submodule(module), attribute)
            if update is None:
                yield from (tensor for _, tensor in group)
                continue
            held = list(group)
            whole = torch.empty(shapes[parameter], dtype=held[0][1][1].dtype)
            for (_, _, index), (_, tensor) in held:
                whole[index] = tensor
                base.forget(tensor)
            whole = update(whole)
            yield from ((name, whole[index]) for (name, _, index), _ in held)

    return Weights(base.config, tensors), model


def _read_ahead(tensors: NamedTensors) -> NamedTensors:
    """The same of tensors that are mapped from files, while the disk reads those that are next."""
    window: deque[tuple[str, Tensor]] = deque()
    num_bytes = 0
    for name, tensor in tensors:
        _advise(tensor, mmap.MADV_WILLNEED)
        window.append((name, tensor))
        num_bytes += tensor.nbytes
        while num_bytes > READ_AHEAD_BYTES:
            num_bytes -= window[0][1].nbytes
            yield window.popleft()
    yield from window


def _advise(tensor: Tensor, advice: int) -> None:
    """Tell the kernel about the pages that lie within a tensor's memory."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and size > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


def _checked(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """``stored`` under the model's own names."""
    own = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    different = sorted(own.keys() ^ expected.keys()) or [n for n in own if own[n].shape != expected[n].shape]
    if different:
        raise CheckpointError(f"'{path}': expected this model's weights; {different[0]} is missing or another")
    return own
