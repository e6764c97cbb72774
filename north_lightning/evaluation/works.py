"""What attempts leave behind, kept so that it can be graded again, exported and looked at.

In: an attempt's ``/work`` before it is verified, and its rollout once it has ended. Out: ``works/NAME.tar.gz``, which
holds what differs from the files the task starts from (all of it where those are in an image), ``NAME.removed.json``,
which names those that are gone, and ``NAME.json``, the rollout without token ids. All are there before the attempt is
recorded.
"""

from __future__ import annotations

import filecmp
import gzip
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from north_lightning.durable import replace_text
from north_lightning.errors import DataError
from north_lightning.rollout.records import rollout_of, rollout_record
from north_lightning.sandbox.layers import BoundedEntry, unpack
from north_lightning.sandbox.trees import copy_tree, delete_tree
from north_lightning.types import Rollout, Task

WORKS = "works"


class Works:
    """The kept works of one evaluation, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def name(key: tuple[object, ...]) -> str:
        """Name of the work of the attempt with this key; one that is made again replaces it."""
        return sha256(repr(key).encode()).hexdigest()[:24]

    def forget(self, name: str) -> None:
        """The attempt is made again."""
        self._archive(name).unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        return bool(name) and self._archive(name).is_file() and self._record(name).is_file()

    def keep_work(self, name: str, task: Task, workdir: Path) -> None:
        """Whole or not at all, however this process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        base = _base(task)
        removed = sorted(set(_entries(base)) - set(_entries(workdir))) if base is not None else []
        replace_text(self._removed(name), json.dumps(removed) + "\n")
        temporary = self.folder / f"{name}.new"
        with (
            temporary.open("wb") as file,
            gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=1, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w") as archive,
        ):
            for path in _entries(workdir):
                if base is None or not _is_same(base / path, workdir / path):
                    archive.add(workdir / path, path, recursive=False, filter=_anonymous)
        temporary.replace(self._archive(name))

    def keep_rollout(self, name: str, rollout: Rollout) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self._record(name), json.dumps(rollout_record(rollout), default=str) + "\n")

    def restore_work(self, name: str, task: Task, workdir: Path) -> None:
        """Make the new directory ``workdir`` what the attempt left."""
        base = _base(task)
        if base is None:
            workdir.mkdir()
        else:
            copy_tree(base, workdir)
        for path in json.loads(self._removed(name).read_text()):
            _remove(workdir / path)
        self.unpack_changed(name, workdir)

    def unpack_changed(self, name: str, folder: Path) -> None:
        """Put the files that the attempt changed or made into ``folder``."""
        with tarfile.open(self._archive(name), "r:gz", tarinfo=BoundedEntry) as archive:
            unpack(archive, folder)

    def read_rollout(self, name: str) -> Rollout:
        return rollout_of(self.read_record(name))

    def read_record(self, name: str) -> dict[str, Any]:
        """``DataError`` for what is no rollout's record."""
        try:
            record: dict[str, Any] = json.loads(self._record(name).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{self._record(name)}: expected the record of a rollout, got: {error}") from error
        return record

    def _archive(self, name: str) -> Path:
        return self.folder / f"{name}.tar.gz"

    def _removed(self, name: str) -> Path:
        return self.folder / f"{name}.removed.json"

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _base(task: Task) -> Path | None:
    files = task.directory / "environment" / "files"
    return files if task.root is None and files.is_dir() else None


def _entries(directory: Path) -> Iterator[str]:
    """Every path below ``directory``, a directory before what is in it; links are not followed."""
    for parent, names, files in os.walk(directory):
        names.sort()
        for name in sorted([*names, *files]):
            yield os.path.relpath(os.path.join(parent, name), directory)


def _is_same(first: Path, second: Path) -> bool:
    try:
        one, other = first.lstat(), second.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    if one.st_mode != other.st_mode:
        return False
    if stat.S_ISLNK(one.st_mode):
        return os.readlink(first) == os.readlink(second)
    return stat.S_ISDIR(one.st_mode) or (stat.S_ISREG(one.st_mode) and filecmp.cmp(first, second, shallow=False))


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if not (entry.isreg() or entry.isdir() or entry.issym() or entry.islnk()):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        delete_tree(path)
    else:
        path.unlink(missing_ok=True)
