"""A small North that vLLM serves, with its tokenizer, as a stage would have left it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_runs import MODEL

from north_lightning.model import NorthConfig, NorthModel, save_checkpoint

SERVABLE = MODEL | {"hidden_size": 64, "head_dim": 32, "intermediate_size": 32, "num_experts": 8}
IN_BLOCKS = SERVABLE | {"hidden_size": 256, "intermediate_size": 128, "num_experts": 2}


def make_checkpoint(inputs: Path, folder: Path, shape: dict[str, object], seed: int = 0) -> Path:
    """Random bfloat16 weights with a license, sharp enough that rounding moves log-probabilities."""
    eos = json.loads((inputs / "model.json").read_text())["eos_token_id"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NorthModel(NorthConfig.from_hf(shape | {"eos_token_id": eos, "initializer_range": 0.15}))
    save_checkpoint(model, folder, dtype=torch.bfloat16, tokenizer_dir=inputs / "tokenizer")
    (folder / "LICENSE").write_text("Apache-2.0, as an example")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def recorded_checkpoint(inputs: Path, folder: Path) -> Path:
    """A checkpoint whose numbers are the same on every machine, with every kind of row: large, tiny, zero."""
    make_checkpoint(inputs, folder, IN_BLOCKS)
    tensors = tensors_of(folder)
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        index = torch.arange(tensor.numel(), dtype=torch.int64) + number
        numbers = (index * 2654435761 % 2**32).double().view_as(tensor) / 2**32 - 0.5
        sizes = torch.tensor([2.0**-20, 0.0, 0.1, 1.0, 37.0, 2.0**-6])
        if tensor.dim() == 2:
            numbers = numbers * sizes[torch.arange(len(tensor)) % len(sizes), None]
        tensors[name] = numbers.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
