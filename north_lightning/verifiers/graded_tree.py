"""What of an attempt is graded: the untouched repository with the attempt's own changes laid over it.

In: the pristine directory and the snapshot of an attempt's ``/work``. Out: a new directory. Nothing of the attempt is
run, its git state is not read, and no link in it is followed. Files that decide *how* tests run, and the tests
themselves, always come from the pristine side.
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

PROTECTED = (
    "test",
    "tests",
    "test_*.py",
    "*_test.py",
    "conftest.py",
    "sitecustomize.py",
    "usercustomize.py",
    "*.pth",
    "pytest.ini",
    "tox.ini",
    "setup.cfg",
    "pyproject.toml",
)
"""Names, at any depth, that an attempt cannot change, add or delete."""

LEFT_OUT = (".git", "__pycache__")
"""Names taken from neither side: history, and compiled code that need not fit its source."""


class UngradableTree(Exception):
    """The attempt left a tree nobody should copy: too large, too many files, too deep, or a bad name."""


@dataclass
class Allowance:
    """What one attempt may leave behind; used up while copying."""

    size_bytes: int
    num_entries: int = 20_000
    depth: int = 64

    def spend(self, status: os.stat_result, depth: int) -> None:
        self.num_entries -= 1
        self.size_bytes -= status.st_size if stat.S_ISREG(status.st_mode) else 0
        if self.size_bytes < 0 or self.num_entries < 0 or depth > self.depth:
            raise UngradableTree("the attempt left a tree that is too large, has too many entries or is too deep")


def build_graded_tree(pristine: Path, attempt: Path, destination: Path, allowance: Allowance) -> None:
    """Create ``destination``: ``attempt`` where it may decide, ``pristine`` for everything ``PROTECTED``.

    Additions, changes, deletions, links and file modes of the attempt are taken over; special files are left out.

    Raises:
        UngradableTree: the attempt exceeds ``allowance``.
    """
    destination.mkdir()
    _merge(pristine, attempt, destination, allowance, depth=0)


def _merge(pristine: Path | None, attempt: Path | None, destination: Path, allowance: Allowance, depth: int) -> None:
    """Fill ``destination``, an empty directory of ours, from two directories of which one may be missing."""
    ours, theirs = _entries(pristine), _entries(attempt)
    for name in sorted(ours.keys() | theirs.keys()):
        if name in LEFT_OUT:
            continue
        untouched, target = ours.get(name), destination / name
        if any(fnmatchcase(name, pattern) for pattern in PROTECTED):
            if untouched is not None:
                _copy_trusted(Path(untouched), target)
            continue
        changed = theirs.get(name)
        if changed is not None:
            allowance.spend(changed.stat(follow_symlinks=False), depth)
        if _is_directory(changed) or (changed is None and _is_directory(untouched)):
            target.mkdir()
            below_ours = Path(untouched) if untouched is not None and _is_directory(untouched) else None
            below_theirs = Path(changed) if changed is not None else None
            _merge(below_ours, below_theirs, target, allowance, depth + 1)
            if changed is None and not os.listdir(target):
                target.rmdir()
        elif changed is not None:
            _copy_entry(changed, target)


def _entries(directory: Path | None) -> dict[str, os.DirEntry[str]]:
    if directory is None:
        return {}
    with os.scandir(directory) as entries:
        return {entry.name: entry for entry in entries}


def _is_directory(entry: os.DirEntry[str] | None) -> bool:
    return entry is not None and entry.is_dir(follow_symlinks=False)


def _copy_trusted(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _copy_entry(entry: os.DirEntry[str], target: Path) -> None:
    if entry.is_symlink():
        os.symlink(os.readlink(entry.path), target)
    elif entry.is_file(follow_symlinks=False):
        shutil.copy2(entry.path, target, follow_symlinks=False)
