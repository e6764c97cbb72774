"""Temporary directories whose owner can be told dead: it holds a lock on each, which the kernel frees however it ends.

In: what a directory is for. Out: the directory; at the start of a run, nothing left of those whose owner was killed.
A directory without a lock file is nobody's business here: its owner may be about to lock it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from north_lightning.sandbox.trees import delete_tree, unmount
from north_lightning.signals import NUMBERS

LOCK = "lock"
Kind = Literal["attempt", "verify", "sidecar", "run", "task", "harbor", "ray"]


class Scratch:
    """A new directory of this process in the system's temporary directory, or in ``parent``, until ``delete``; or for
    a ``with`` block."""

    def __init__(self, kind: Kind, parent: Path | None = None) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)  # it is there with its lock, or not at all
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"north-{kind}-", dir=parent))
            self._lock = own(self.path)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def delete(self) -> None:
        """With all that is in it. May be called once."""
        try:
            _delete(self.path)
        finally:
            os.close(self._lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.delete()


def delete_stale_scratch() -> None:
    """Delete every ``Scratch`` whose process has ended without deleting it."""
    for kind in get_args(Kind):
        for parent in {Path(tempfile.gettempdir()), Path("/tmp")}:
            for path, lock in ownerless(parent, f"north-{kind}-"):
                try:
                    _delete(path)
                finally:
                    os.close(lock)


def _delete(path: Path) -> None:
    """With the file systems that are mounted in it."""
    unmount(inner for inner in path.iterdir() if inner.is_mount())
    delete_tree(path)


def own(directory: Path) -> int:
    """Mark ``directory`` as this process's; returns the lock, which is held until it is closed or the process ends."""
    lock = take_lock(directory / f"{LOCK}.new")
    (directory / f"{LOCK}.new").rename(directory / LOCK)  # never there unlocked while its owner lives
    return lock


def ownerless(parent: Path, prefix: str) -> Iterator[tuple[Path, int]]:
    """This user's directories in ``parent`` whose owner is gone, each with its lock, taken, for the caller to close."""
    for directory in parent.glob(f"{prefix}*"):
        try:
            if directory.is_symlink() or directory.lstat().st_uid != os.geteuid() or not (directory / LOCK).exists():
                continue
            lock = take_lock(directory / LOCK)
        except OSError:
            continue  # in use, or gone already
        yield directory, lock


def take_lock(path: Path) -> int:
    """``BlockingIOError`` if another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
