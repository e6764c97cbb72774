"""The ``export`` command: a checkpoint of any kind as a release, a Hugging Face folder that vLLM serves.

In: a Hugging Face checkpoint, or what ``ModelCheckpoint`` or an interrupted run has written. Out: a folder with weights
in shards, config, tokenizer and chat template, ``serve.sh``, ``release.json`` with what the check has measured, and
``SHA256SUMS``. It is there complete and checked, or not at all.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from north_lightning.chat.template import CHAT_TEMPLATE
from north_lightning.durable import whole_folder
from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.export.agreement import check_release
from north_lightning.export.quantization import PRESETS, Quantization
from north_lightning.export.samples import sample_rows
from north_lightning.export.serving import serve_script
from north_lightning.export.weights import (
    PREFIX,
    Weights,
    merged_weights,
    weights_of_file,
    weights_of_folder,
    weights_of_shards,
)
from north_lightning.model import LoRAConfig, NorthConfig, save_adapter
from north_lightning.model.checkpoint import MAX_SHARD_BYTES, fingerprint_of, hf_shapes, write_config
from north_lightning.model.files import copy_texts, copy_tokenizer, stored_dtype
from north_lightning.model.shards import Entry, split_shards, write_shards
from north_lightning.modules.resuming import KEY, read_settings
from north_lightning.parallel.single_file import read_checkpoint
from north_lightning.types import Positive

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MANIFEST, REPORT = "SHA256SUMS", "release.json"
PROGRESS_INTERVAL_S = 10.0


class Source(NamedTuple):
    """Where a release comes from."""

    weights: Weights
    dtype: torch.dtype
    step: int | None
    base: Path | None  # of texts
    tokenizer: Path
    save_adapters: Callable[[Path], None] | None = None


def export_checkpoint(
    checkpoint: Path,
    directory: Path,
    format: Literal["bf16", "fp32", "fp8", "fp8_block"] | None = None,
    base: Path | None = None,
    tokenizer: Path | None = None,
    samples: list[Path] | None = None,
    max_kl: Positive = 0.05,
    check: bool = True,
    dry_run: bool = False,
) -> None:
    """Write a checkpoint as a release, and check it against the checkpoint; adapters are merged, and written beside.

    Weights are read and written a piece at a time. Nothing is left of a release that could not be completed or that
    fails its check.

    Args:
        checkpoint: Hugging Face folder, or file or folder that training has written.
        directory: Where to; must not exist.
        format: Weights of the release. fp8: experts in float8 by output channel, as compressed-tensors' FP8_DYNAMIC,
            everything else in bfloat16; fp8_block: the same in blocks of 128x128, which need not divide under tensor
            parallelism. Default: the dtype of the base checkpoint; without one, that of training.
        base: Checkpoint that training began from, for licenses, and for the weights below adapters. Default: where it
            was then.
        tokenizer: Folder of the tokenizer. Default: where it was then.
        samples: Files of trajectories to compare on: rollouts.jsonl of a run, or conversations for SFT. Default: those
            of the run that the checkpoint lies in; without any, a built-in conversation.
        max_kl: Largest mean Kullback-Leibler divergence (nats per token) of the release from the checkpoint.
        check: Reload the release and compare it with the checkpoint; serve it too, where vLLM on this machine can.
        dry_run: Print what would be written, and write nothing.
    """
    if directory.exists():
        raise CheckpointError(f"directory: expected one that does not exist yet, got '{directory}'")
    source = _open(checkpoint, base, tokenizer)
    config = source.weights.config
    quantization = Quantization(config, format) if format in PRESETS else None  # type: ignore[arg-type]
    dtype = torch.bfloat16 if quantization else DTYPES.get(format or "", source.dtype)
    shapes = hf_shapes(config)
    entries = [Entry(name, dtype, shape) for name, shape in shapes.items()]
    if quantization:
        entries = list(quantization.entries(shapes, dtype))
    shards = split_shards(entries, MAX_SHARD_BYTES)
    num_bytes = sum(entry.num_bytes for entry in entries)
    kind: str = format or next((name for name, value in DTYPES.items() if value == dtype), str(dtype))
    plan = f"{len(entries):,} tensors ({kind}) in {len(shards)} files, {num_bytes / 1e9:.2f} GB"
    if dry_run:
        print(f"{directory}: {plan}; nothing was written")
        return
    _check_room(directory, num_bytes)
    rows = sample_rows(samples, checkpoint, source.tokenizer) if check else []
    try:
        with whole_folder(directory) as staging:
            _write_texts(staging, source, directory.name)
            more = {} if quantization is None else {"quantization_config": quantization.config()}
            write_config(staging, config, dtype, **more)
            pieces = _told(_pieces(source.weights, entries, quantization), num_bytes)
            digests = write_shards(shards, pieces, staging)
            if source.save_adapters is not None:
                source.save_adapters(staging / "adapter")
            report: dict[str, Any] = {"format": kind, "step": source.step, "check": None}
            if check:
                report["check"] = check_release(source.weights, staging, dtype, quantization, rows, max_kl)
            (staging / REPORT).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _write_manifest(staging, digests)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not write '{directory}': {error}") from error
    after = "" if source.step is None else f" after step {source.step}"
    print(f"{directory}: weights{after} of '{checkpoint}': {plan}{'' if check else '; NOT checked'}")


# ---- in --------------------------------------------------------------------------------------------------------------


def _open(checkpoint: Path, base: Path | None, tokenizer: Path | None) -> Source:
    if (checkpoint / "config.json").is_file():
        weights = weights_of_folder(checkpoint, NorthConfig.load(checkpoint))
        return Source(weights, _dtype_of(checkpoint), None, base or checkpoint, tokenizer or checkpoint)
    content = read_checkpoint(checkpoint, is_sharded=checkpoint.is_dir(), is_mapped=True)
    settings, origin = read_settings(content, checkpoint), content[KEY]["origin"]
    base = _found(base or origin["checkpoint"], "base", bool(origin["lora"]))
    tokenizer = _found(tokenizer or origin["tokenizer"], "tokenizer", True)
    assert tokenizer is not None
    dtype = torch.float32 if base is None else _dtype_of(base)
    adapters = None
    if origin["lora"]:
        assert base is not None
        below = weights_of_folder(base, NorthConfig.load(base))
        base_fingerprint = fingerprint_of(below.config, below.tensors())
        if base_fingerprint != settings["model.facts.lora.base"]:
            raise CheckpointError(
                f"base: expected the weights that the adapters were trained on, got others in '{base}'"
            )
        lora = LoRAConfig(**json.loads(origin["lora"]))
        weights, model = merged_weights(below, lora, content["state_dict"], checkpoint)
        adapters = partial(save_adapter, model, config=lora, base=base, base_fingerprint=base_fingerprint)
    elif checkpoint.is_dir():
        weights = weights_of_shards(NorthConfig.from_hf(json.loads(origin["config"])), checkpoint)
    else:
        stored = content["state_dict"]
        weights = weights_of_file(NorthConfig.from_hf(json.loads(origin["config"])), stored, checkpoint)
        dtype = dtype if base is not None else stored[f"{PREFIX}norm.weight"].dtype
    return Source(weights, dtype, content["global_step"], base, tokenizer, adapters)


def _dtype_of(folder: Path) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, stored_dtype(folder))
    return dtype


def _found(folder: Path | str | None, key: str, is_needed: bool) -> Path | None:
    """The folder, if it is there; ``CheckpointError`` if it is not and nothing goes without it."""
    if folder is not None and Path(folder).is_dir():
        return Path(folder)
    if folder is None and not is_needed:
        return None
    raise CheckpointError(f"{key}: expected a folder, found none at '{folder}', where training had it: set --{key}")


# ---- out -------------------------------------------------------------------------------------------------------------


def _check_room(directory: Path, num_bytes: int) -> None:
    there = next(parent for parent in directory.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < num_bytes:
        raise ConfigError(
            f"directory: expected {num_bytes / 1e9:.2f} GB of free disk, got {free / 1e9:.2f} GB at '{there}'"
        )


def _pieces(
    weights: Weights, entries: list[Entry], quantization: Quantization | None
) -> Iterator[tuple[Entry, Tensor]]:
    """The release's tensors, in the order of ``entries`` and in parts, from the checkpoint's."""
    wanted = iter(entries)
    for name, tensor in weights.tensors():
        if quantization is not None and quantization.covers(name):
            for part in quantization.quantize(tensor.to(torch.bfloat16)):
                entry = next(wanted)
                yield from ((entry, piece) for piece in entry.pieces(part))
            weights.forget(tensor)
            continue
        entry = next(wanted)
        for piece in entry.pieces(tensor):
            yield entry, piece
            weights.forget(piece)


def _told(pieces: Iterator[tuple[Entry, Tensor]], num_bytes: int) -> Iterator[tuple[Entry, Tensor]]:
    """The same; says how far it is, every ten seconds."""
    started = spoken = time.monotonic()
    done = 0
    for entry, piece in pieces:
        yield entry, piece
        done += piece.numel() * entry.dtype.itemsize
        now = time.monotonic()
        if now - spoken > PROGRESS_INTERVAL_S:
            spoken = now
            left_s = (now - started) * (num_bytes - done) / done
            print(f"export: {done / 1e9:.1f} of {num_bytes / 1e9:.1f} GB, {left_s:.0f} s left", file=sys.stderr)


def _write_texts(staging: Path, source: Source, name: str) -> None:
    """Tokenizer, chat template, licenses, how to generate and how to serve."""
    copy_tokenizer(source.tokenizer, staging)
    if source.base is not None:
        copy_texts(source.base, staging)
    template, settings = staging / "chat_template.jinja", staging / "tokenizer_config.json"
    if not template.is_file() and not (settings.is_file() and "chat_template" in settings.read_text()):
        template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    generation = staging / "generation_config.json"
    if not generation.is_file():
        config = source.weights.config.to_hf()
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = json.dumps(ids | {"do_sample": True, "temperature": 1.0, "top_p": 0.95}, indent=2, sort_keys=True)
        generation.write_text(text + "\n", encoding="utf-8")
    script = staging / "serve.sh"
    script.write_text(serve_script(name), encoding="utf-8")
    script.chmod(0o755)


def _write_manifest(staging: Path, digests: dict[str, str]) -> None:
    """``SHA256SUMS``, which ``sha256sum --check`` reads; of weights, what was handed to the disk."""
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    names = [(path.relative_to(staging).as_posix(), path) for path in files]
    lines = [f"{digests.get(name) or sha256(path.read_bytes()).hexdigest()}  {name}\n" for name, path in names]
    (staging / MANIFEST).write_text("".join(lines), encoding="utf-8")
