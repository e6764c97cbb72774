"""Directory trees that a sandboxed program may have written, handled from outside without trusting them.

In: directories on the host. Out: copies, mounts and deletions. No function here ever follows a symbolic link it finds
in a tree, opens a special file (a FIFO would block, a device would answer), or keeps a set-user-id bit. Trees are
walked by directory file descriptors, so no tree is too deep for a path name.
"""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from north_lightning.errors import TreeTooLargeError

_libc = ctypes.CDLL(None, use_errno=True)
_MS_BIND, _MNT_DETACH, _UMOUNT_NOFOLLOW = 4096, 2, 8
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_DEPTH = 128


@dataclass
class Allowance:
    """What one tree may hold; used up while it is copied. A file counts once for every name it has."""

    size_bytes: int
    num_entries: int

    def spend(self, status: os.stat_result) -> None:
        self.num_entries -= 1
        self.size_bytes -= status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
        if self.size_bytes < 0 or self.num_entries < 0:
            raise TreeTooLargeError("the attempt left more bytes or files than a sandbox may hold")


def copy_tree(source: Path, destination: Path, owner: int | None = None, allowance: Allowance | None = None) -> None:
    """Copy the content of ``source`` into the directory ``destination``, created if missing.

    Links are copied as links, modes (without set-id bits) and modification times kept, holes stay holes, special files
    left out, hard links become separate files; directories deeper than 128 levels are cut off. ``owner`` becomes user
    and group of everything. ``source`` itself may be a link; nothing below it is followed.

    Raises:
        TreeTooLargeError: ``source`` exceeds ``allowance``; nothing more is copied then.
    """
    os.makedirs(destination, exist_ok=True)
    source_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        destination_fd = os.open(destination, _DIRECTORY)
        try:
            _copy_directory(source_fd, destination_fd, owner, allowance, _MAX_DEPTH)
        finally:
            os.close(destination_fd)
    finally:
        os.close(source_fd)


def _copy_directory(
    source_fd: int, destination_fd: int, owner: int | None, allowance: Allowance | None, depth: int
) -> None:
    with os.scandir(source_fd) as entries:
        for entry in entries:
            name = entry.name
            if allowance is not None:
                allowance.spend(entry.stat(follow_symlinks=False))
            if entry.is_symlink():
                os.symlink(os.readlink(name, dir_fd=source_fd), name, dir_fd=destination_fd)
                if owner is not None:
                    os.chown(name, owner, owner, dir_fd=destination_fd, follow_symlinks=False)
            elif entry.is_dir(follow_symlinks=False):
                if depth:
                    os.mkdir(name, 0o700, dir_fd=destination_fd)
                    with (
                        _Opened(_open_readable(name, _DIRECTORY, source_fd)) as below,
                        _Opened(os.open(name, _DIRECTORY, dir_fd=destination_fd)) as copy,
                    ):
                        _copy_directory(below, copy, owner, allowance, depth - 1)
                        _copy_metadata(os.fstat(below), copy, owner)
            elif entry.is_file(follow_symlinks=False):
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                with _Opened(_open_readable(name, flags, source_fd)) as original:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                    with _Opened(os.open(name, flags, 0o600, dir_fd=destination_fd)) as copy:
                        status = os.fstat(original)
                        _copy_content(original, copy, status)
                        _copy_metadata(status, copy, owner)


def _open_readable(name: str, flags: int, directory: int) -> int:
    """Open for reading; an unprivileged owner may first have to give itself the right."""
    try:
        return os.open(name, flags, dir_fd=directory)
    except PermissionError:
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if status.st_uid != os.geteuid():
            raise
        os.chmod(name, stat.S_IMODE(status.st_mode) | stat.S_IRWXU, dir_fd=directory)
        return os.open(name, flags, dir_fd=directory)


def _copy_metadata(status: os.stat_result, copy: int, owner: int | None) -> None:
    if owner is not None:
        os.fchown(copy, owner, owner)
    os.fchmod(copy, status.st_mode & 0o777)
    os.utime(copy, ns=(status.st_mtime_ns, status.st_mtime_ns))


def _copy_content(original: int, copy: int, status: os.stat_result) -> None:
    size = status.st_size
    if size == 0:
        return
    if status.st_blocks * 512 >= size:
        _copy_range(original, copy, 0, size)
        return
    position = 0
    while position < size:
        try:
            start = os.lseek(original, position, os.SEEK_DATA)
        except OSError:
            break  # only a hole is left
        position = os.lseek(original, start, os.SEEK_HOLE)
        _copy_range(original, copy, start, position)
    os.ftruncate(copy, size)


def _copy_range(original: int, copy: int, start: int, end: int) -> None:
    os.lseek(copy, start, os.SEEK_SET)
    while start < end:
        sent = os.sendfile(copy, original, start, end - start)
        if sent == 0:
            return
        start += sent


class _Opened:
    """Closes a file descriptor at the end of a ``with`` block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *exception: object) -> None:
        os.close(self.fd)


def delete_tree(path: Path) -> None:
    """Delete ``path`` and all below it, whatever its modes and depth; links are removed, not followed."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return
    command = ["rm", "-rf", "--one-file-system", "--", str(path)]
    if subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode:
        # An unprivileged owner cannot look into a directory without rights; chmod -R does not follow links below.
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(path)], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(command, check=True)


def mount_tmpfs(path: Path, size_bytes: int, num_inodes: int) -> None:
    """A bounded file system in memory at ``path``. ``OSError`` without the privilege."""
    options = f"size={size_bytes},nr_inodes={num_inodes},mode=0700".encode()
    _mount(b"tmpfs", path, b"tmpfs", 0, options)


def mount_bind(source: Path, path: Path) -> None:
    """Make ``source`` visible at ``path`` too. ``OSError`` without the privilege."""
    _mount(os.fsencode(source), path, None, _MS_BIND, None)


def _mount(source: bytes, path: Path, kind: bytes | None, flags: int, options: bytes | None) -> None:
    if _libc.mount(source, os.fsencode(path), kind, ctypes.c_ulong(flags), options) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))


def unmount(paths: Iterable[Path]) -> None:
    """Detach mounts, last first; whoever still uses one keeps it until it is gone. Missing mounts are no error."""
    for path in reversed(list(paths)):
        _libc.umount2(os.fsencode(path), _MNT_DETACH | _UMOUNT_NOFOLLOW)


def is_reachable_by_others(path: Path) -> bool:
    """Whether any user may walk down to ``path``: search permission on every directory above it."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in path.resolve().parents)
