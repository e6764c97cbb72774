"""Files and folders that are there whole or not at all, however the process or the machine ends.

In: what was written under another name in the same folder. Out: the same under its own name. Not here: what is in them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_NOT_HERE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def unfinished_name(path: Path) -> Path:
    """Where to write what will be ``path``: hidden beside it, and found again after a crash."""
    return path.with_name(f".{path.name}.writing")


def flush(path: Path) -> None:
    """Have the kernel write a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file, in place of one that may be there."""
    replace_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file, in place of one that may be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(path)
    unfinished.write_bytes(content)
    flush(unfinished)
    unfinished.replace(path)


def replace_folder(written: Path, folder: Path) -> Path | None:
    """Give ``written``, whose files are flushed, the name ``folder``: at every moment the old or the new one has it.

    On a file system that cannot exchange two names (some network ones) neither has it for a moment; both are then
    beside it.

    Returns:
        Where the folder that had the name is now, for the caller to delete; None if there was none.
    """
    old = None
    if folder.exists():
        old = written
        if not _exchange(written, folder):
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            written.rename(folder)
    else:
        written.rename(folder)
    flush(folder.parent)
    return old


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write in, which has the name ``folder`` after the block, flushed, in place of one that was there;
    after an error nothing is left of it, and after a crash nothing under that name."""
    staging = unfinished_name(folder)
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in [*staging.rglob("*"), staging]:
            flush(path)
        if (old := replace_folder(staging, folder)) is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder, which may not exist; what a crash leaves of it does not have its name."""
    removed = folder.with_name(f".{folder.name}.removing")
    shutil.rmtree(removed, ignore_errors=True)
    if folder.exists():
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def _exchange(left: Path, right: Path) -> bool:
    """Whether the two names could be exchanged."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in _NOT_HERE:
        return False
    raise OSError(error, os.strerror(error), str(left))
