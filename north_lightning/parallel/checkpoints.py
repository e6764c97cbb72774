"""Sharded training checkpoints: every process writes its part, in the background, and any layout can read them.

In: a state dictionary of ``DTensor``s under names that do not depend on the layout, and the rest as one object. Out: a
folder in torch.distributed.checkpoint's format with that object beside it, there whole or not at all: it is written
under another name, flushed to disk and renamed when the last process is done.

These folders are for resuming one's own runs: torch's format keeps its table of contents in a pickle. What is given
away is a Hugging Face checkpoint.
"""

from __future__ import annotations

import io
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from north_lightning.durable import flush, remove_folder, replace_folder, unfinished_name
from north_lightning.errors import CheckpointError
from north_lightning.parallel.process_zero import on_process_zero

REST = "trainer.pt"
_METADATA = ".metadata"  # torch writes it last


class ShardedCheckpoints:
    """Saves one checkpoint at a time. All methods but ``wait`` and ``remove`` are called by all processes together."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # of its own: the background thread must not cut into training's
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: dict[str, Any], rest: Any, folder: Path) -> None:
        """Copy ``state`` (tensors of any kind) to host memory and write it in the background.

        Args:
            state: may change as soon as this returns.
            rest: process 0's, anything ``torch.load(weights_only=True)`` reads.
            folder: replaced when the new one is complete.

        Raises:
            CheckpointError: the checkpoint before this one could not be written, or this one cannot be begun.
        """
        unfinished = unfinished_name(folder)
        buffer = io.BytesIO()
        on_process_zero(lambda: self._begin(unfinished), others=self._end_own_part)
        if dist.get_rank() == 0:
            torch.save(rest, buffer)
        written = dcp.async_save(state, checkpoint_id=unfinished, process_group=self._group)
        assert isinstance(written, Future)
        self._writing = self._thread.submit(_finish, written, buffer.getvalue(), unfinished, folder)

    def wait(self) -> None:
        """Until the last ``save`` is complete, as far as this process has a part in it; ``CheckpointError`` if it is
        not going to be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _begin(self, unfinished: Path) -> None:
        self.wait()
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(f"could not write '{unfinished}': {error}") from error

    def _end_own_part(self) -> None:
        with suppress(CheckpointError):  # process 0 has it too, and tells everyone
            self.wait()

    def remove(self, folder: Path) -> None:
        """Delete a checkpoint; if one is being written, after that is complete, and never if it fails."""
        if dist.get_rank() == 0:
            self._thread.submit(_remove_after, self._writing, folder)

    def load(self, state: dict[str, Any], folder: Path) -> Any:
        """Read ``state``'s tensors in place, in whatever layout they were saved.

        Returns:
            Where the rest is.

        Raises:
            CheckpointError: nothing complete is there, or it does not have what ``state`` asks for.
        """
        self.wait()
        dist.barrier(self._group)
        if not (folder / _METADATA).is_file() or not (folder / REST).is_file():
            raise CheckpointError(
                f"expected a sharded checkpoint, a folder with {_METADATA} and {REST}, got '{folder}'"
            )
        try:
            dcp.load(state, checkpoint_id=folder, process_group=self._group)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"'{folder}' does not fit the model or the optimizer: {error}") from error
        return folder / REST

    def close(self) -> None:
        """Wait for the last checkpoint and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def _finish(written: Future[Any], rest: bytes, unfinished: Path, folder: Path) -> None:
    try:
        written.result()
        if dist.get_rank() == 0:  # the last to know that all are done
            (unfinished / REST).write_bytes(rest)
            for path in [*unfinished.iterdir(), unfinished]:
                flush(path)
            if (old := replace_folder(unfinished, folder)) is not None:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, dcp.CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"could not write '{folder}': {error}") from error


def _remove_after(writing: Future[None] | None, folder: Path) -> None:
    if writing is None or writing.exception() is None:
        remove_folder(folder)
