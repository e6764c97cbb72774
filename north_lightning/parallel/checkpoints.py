"""Sharded training checkpoints: every process writes its part, in the background, and any layout can read them.

In: a state dictionary of ``DTensor``s under names that do not depend on the layout, and the rest as one object. Out: a
folder in torch.distributed.checkpoint's format with that object beside it, there whole or not at all: it is written
under another name, flushed to disk and renamed when the last process is done.

torch's format keeps its table of contents, and numbers such as learning rates, in pickles. Those are read without
running code from them: a class that the format does not consist of is refused.
"""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from north_lightning.durable import flush, remove_folder, replace_folder, unfinished_name
from north_lightning.errors import CheckpointError
from north_lightning.parallel.process_zero import on_process_zero
from north_lightning.run_folders import SHARDED_METADATA, SHARDED_REST

_METADATA_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


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

    def load(self, state: dict[str, Any], folder: Path) -> None:
        """Read ``state``'s tensors in place, in whatever layout they were saved.

        Raises:
            CheckpointError: nothing complete is there, or it does not have what ``state`` asks for.
        """
        self.wait()
        dist.barrier(self._group)
        if not (folder / SHARDED_METADATA).is_file() or not (folder / SHARDED_REST).is_file():
            raise CheckpointError(
                f"expected a sharded checkpoint, a folder with {SHARDED_METADATA} and {SHARDED_REST}, got '{folder}'"
            )
        load_shards(state, folder, self._group)

    def close(self) -> None:
        """Wait for the last checkpoint and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def load_shards(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Read ``state``'s tensors in place, by all processes of ``group``; without one, by this process alone.

    Raises:
        CheckpointError: the shards are torn, or do not have what ``state`` asks for.
    """
    reader, planner = _Reader(folder), _Planner()
    try:
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as wanted
        dcp.load(state, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        line = (str(causes[0]).splitlines() or [""])[0][:300] if causes else str(error)[:300]
        raise CheckpointError(f"'{folder}': torn, or not of this model and optimizer: {line}") from error


class _Reader(dcp.FileSystemReader):
    """Runs no code from the table of contents, and reads no file outside of the folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / SHARDED_METADATA).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{SHARDED_METADATA}: expected torch's table of contents")
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != str(place.relative_path):
                raise pickle.UnpicklingError(
                    f"{SHARDED_METADATA}: a file outside of the folder: {place.relative_path!r}"
                )
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{SHARDED_METADATA}: refused, because it asks for {module}.{name}")


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: dcp.ReadItem, value: io.BytesIO) -> None:
        """As torch does, once it is known to be plain values."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def _finish(written: Future[Any], rest: bytes, unfinished: Path, folder: Path) -> None:
    try:
        written.result()
        if dist.get_rank() == 0:  # the last to know that all are done
            (unfinished / SHARDED_REST).write_bytes(rest)
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
