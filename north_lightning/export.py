"""The ``export`` command: a training checkpoint, of any layout, as a Hugging Face folder that vLLM serves and a stage
begins from.

In: what ``ModelCheckpoint`` or an interrupted run has written. Out: what ``HFCheckpoint`` would have written then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from north_lightning.errors import CheckpointError
from north_lightning.model import (
    LoRAConfig,
    NorthConfig,
    NorthModel,
    adapter_state_dict,
    add_adapters,
    fingerprint,
    load_checkpoint,
    save_adapter,
    save_checkpoint,
)
from north_lightning.model.files import stored_dtype
from north_lightning.modules.resuming import KEY, read_settings
from north_lightning.parallel.checkpoints import load_shards
from north_lightning.parallel.single_file import read_checkpoint

PREFIX = "model."  # of the model's parameters among a module's


def export_checkpoint(
    checkpoint: Path,
    directory: Path,
    base: Path | None = None,
    tokenizer: Path | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> None:
    """Write the weights of a training checkpoint as a Hugging Face checkpoint; adapters are merged, and written beside.

    Args:
        checkpoint: File or folder that training has written.
        directory: Where to; must not exist.
        base: Checkpoint that training began from, for licenses, and for the weights below adapters. Default: where it
            was then.
        tokenizer: Folder of the tokenizer. Default: where it was then.
        dtype: Dtype of the weights. Default: the base checkpoint's; without one, as they were trained.
    """
    if directory.exists():
        raise CheckpointError(f"directory: expected one that does not exist yet, got '{directory}'")
    content = read_checkpoint(checkpoint, is_sharded=checkpoint.is_dir())
    settings, origin = read_settings(content, checkpoint), content[KEY]["origin"]
    base = _found(base or origin["checkpoint"], "base", bool(origin["lora"]))
    tokenizer = _found(tokenizer or origin["tokenizer"], "tokenizer", True)
    released = dtype or (stored_dtype(base) if base is not None else None)
    lora = None
    if origin["lora"]:
        assert base is not None
        lora, model = LoRAConfig(**json.loads(origin["lora"])), load_checkpoint(base)
        base_fingerprint = fingerprint(model)
        if base_fingerprint != settings["model.facts.lora.base"]:
            raise CheckpointError(
                f"base: expected the weights that the adapters were trained on, got others in '{base}'"
            )
        add_adapters(model, lora)
    else:
        with torch.device("meta"):
            model = NorthModel(NorthConfig.from_hf(json.loads(origin["config"])))
        model.to(getattr(torch, released or "float32")).to_empty(device="cpu")
    _load(model, content, checkpoint)
    written = None if released is None else getattr(torch, released)
    save_checkpoint(model, directory, dtype=written, tokenizer_dir=tokenizer, base=base)
    if lora is not None:
        save_adapter(model, directory / "adapter", lora, base, base_fingerprint)
    print(f"{directory}: weights after step {content['global_step']} of '{checkpoint}'")


def _load(model: NorthModel, content: dict[str, Any], checkpoint: Path) -> None:
    """Give ``model`` the weights of a training checkpoint; of a sharded one, read from its shards."""
    if checkpoint.is_dir():
        load_shards({"model": {PREFIX + name: tensor for name, tensor in model.state_dict().items()}}, checkpoint)
        return
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in content["state_dict"].items()}
    expected = adapter_state_dict(model) or model.state_dict()
    different = sorted(stored.keys() ^ expected.keys()) or [n for n in stored if stored[n].shape != expected[n].shape]
    if different:
        raise CheckpointError(f"'{checkpoint}': expected this model's weights; {different[0]} is missing or another")
    model.load_state_dict(stored, strict=False)


def _found(folder: Path | str | None, key: str, is_needed: bool) -> Path | None:
    """The folder, if it is there; ``CheckpointError`` if it is not and nothing goes without it."""
    if folder is not None and Path(folder).is_dir():
        return Path(folder)
    if folder is None and not is_needed:
        return None
    raise CheckpointError(f"{key}: expected a folder, found none at '{folder}', where training had it: set --{key}")
