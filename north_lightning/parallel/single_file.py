"""Training checkpoints of one process: a single file, there whole or not at all, on disk when ``save`` returns.

In: Lightning's checkpoint, which holds weights, optimizer, schedule, data position, queue and every callback's state.
Out: one file, so everything in it is of the same step. Lightning's own writer goes through a temporary folder that may
lie on another disk, and flushes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from north_lightning.durable import flush, unfinished_name
from north_lightning.errors import CheckpointError


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes, renames, flushes the folder. Remote paths are left to Lightning."""

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
