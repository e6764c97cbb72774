"""Training checkpoints of one process: a single file, there whole or not at all, on disk when ``save`` returns.

In: Lightning's checkpoint, which holds weights, optimizer, schedule, data position, queue and every callback's state.
Out: one file, so everything in it is of the same step. Lightning's own writer goes through a temporary folder that may
lie on another disk, and flushes nothing.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from north_lightning.durable import flush, unfinished_name
from north_lightning.errors import CheckpointError
from north_lightning.run_folders import SHARDED_REST


def read_checkpoint(
    path: Path, weights_only: bool | None = True, is_sharded: bool = False, is_mapped: bool = False
) -> dict[str, Any]:
    """The content of a training checkpoint; of a sharded one, all but weights and moments.

    Args:
        path: file or folder.
        weights_only: run no code from the file's pickle.
        is_sharded: which kind is wanted.
        is_mapped: read tensors from the file only when they are used.

    Raises:
        CheckpointError: it is missing, torn, of the other kind, or something else than a training checkpoint.
    """
    export = f"or begin from its weights: python -m north_lightning export --checkpoint '{path}'"
    if not path.exists():
        raise CheckpointError(f"no checkpoint: expected a training checkpoint, found nothing at '{path}'")
    if is_sharded and path.is_file():
        raise CheckpointError(
            f"'{path}': expected a folder, as NorthStrategy writes it, got a file of a run without it: leave "
            f"trainer.strategy out, {export}"
        )
    if path.is_dir() and not (path / SHARDED_REST).is_file():
        hint = "; its weights are a beginning: model.checkpoint" if (path / "config.json").is_file() else ""
        raise CheckpointError(
            f"'{path}': expected a complete training checkpoint, got a folder without {SHARDED_REST}{hint}"
        )
    if path.is_dir() and not is_sharded:
        raise CheckpointError(
            f"'{path}': a checkpoint of NorthStrategy: set trainer.strategy: NorthStrategy (one process or "
            f"more), {export}"
        )
    try:
        file = path / SHARDED_REST if is_sharded else path
        content = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=is_mapped)
    except pickle.UnpicklingError as error:
        what = "Weights only load failed" in str(error) and "GLOBAL" in str(error)
        reason = "it would run code of its own" if what else "torn, or another kind of file"
        raise CheckpointError(
            f"'{path}': expected a training checkpoint, got one that cannot be read: {reason}"
        ) from error
    except Exception as error:  # torch's reader raises many kinds for a torn or foreign file
        line = (str(error).splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"'{path}': torn, or no training checkpoint ({line}); take an earlier one, or --resume auto, which finds it"
        ) from error
    if not isinstance(content, dict) or "global_step" not in content:
        raise CheckpointError(
            f"'{path}': expected a training checkpoint, got {type(content).__name__} without its state"
        )
    return content


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes, renames, flushes the folder. Remote paths are left to Lightning."""

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """``CheckpointError``: see ``read_checkpoint``."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(Path(path), weights_only)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """``CheckpointError`` if it cannot be written; what was there before is then still there."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        unfinished = unfinished_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            flush(path.parent)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            unfinished.unlink(missing_ok=True)
            raise CheckpointError(f"could not write '{path}': {error}") from error
