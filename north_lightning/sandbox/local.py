"""What every sandbox on this machine has in common, whatever isolates its programs.

In: an image directory and mounts. Out: ``Sandbox`` objects whose ``/work``, ``/tmp`` and ``/home/agent`` are
directories of this machine (``slots``), bounded in memory where the caller may mount. Each ``spawn`` or ``run`` has a
process namespace of its own, and ends with all that it started. How a program is isolated is the subclasses' part.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from north_lightning.errors import AttemptError, SandboxError, SandboxUnavailableError
from north_lightning.interfaces import SandboxProvider
from north_lightning.sandbox.programs import ProgramSandbox
from north_lightning.sandbox.slots import UIDS_PER_PROCESS, Host, Slot
from north_lightning.sandbox.trees import Allowance, copy_tree
from north_lightning.types import Count, RootFileSystem

T = TypeVar("T")

MIB = 1 << 20
_PREPARING = threading.RLock()  # one host directory per provider and process, whichever threads ask


@dataclass(frozen=True)
class Base:
    """A root file system, ready to be used.

    ``image`` names it to the provider (empty: this machine's own system). ``/work`` is seen at ``workdir`` too;
    ``work`` holds what is in there at first (None: nothing).
    """

    image: str = ""
    workdir: str = "/work"
    work: Path | None = None
    variables: Mapping[str, str] = field(default_factory=dict)


class LocalProvider(SandboxProvider):
    """Sandboxes whose files are on this machine.

    Args:
        memory_bytes: memory of one program (bubblewrap: address space of one process).
        max_processes: processes and threads of one ``spawn`` or ``run``.
        max_file_bytes: size of one file.
        max_work_bytes: size of ``/work``, ``/tmp`` and home together; enforced where the caller may mount (root).
        max_files: number of files there; enforced where the caller may mount (root).
        max_output_bytes: output of ``run`` that is kept, half from the start and half from the end. A command that
            prints 256 times as much is killed.
        max_slots: sandboxes open at the same time in this process; one more raises ``SandboxError``.
        root: directory for scratch files; the system's temporary directory by default.
        first_uid: as root, sandboxes get user ids from here on; nothing else on the machine may use them.
    """

    without_effect = ("max_slots", "root", "first_uid", "engine")

    def __init__(
        self,
        memory_bytes: Count = 4096 * MIB,
        max_processes: Count = 256,
        max_file_bytes: Count = 256 * MIB,
        max_work_bytes: Count = 512 * MIB,
        max_files: Count = 100_000,
        max_output_bytes: Count = MIB,
        max_slots: Count = 256,
        root: Path | None = None,
        first_uid: Count = 700_000,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.max_processes = max_processes
        self.max_file_bytes = max_file_bytes
        self.max_work_bytes = max_work_bytes
        self.max_files = max_files
        self.max_output_bytes = max_output_bytes
        self.max_slots = max_slots
        self.root = root
        self.first_uid = first_uid
        for key, value in self.__dict__.items():
            least = MIB if key in ("memory_bytes", "max_file_bytes", "max_work_bytes") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{key}: expected at least {least}{' bytes' * (least > 1)}, got {value}")
        if max_slots > UIDS_PER_PROCESS:
            raise ValueError(f"max_slots: expected at most {UIDS_PER_PROCESS}, got {max_slots}")
        self._host: Host | None = None
        self._is_checked = False
        self._bases: dict[RootFileSystem | None, Base] = {}
        self._bases_of: Host | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_host": None, "_is_checked": False, "_bases": {}, "_bases_of": None}

    def check(self) -> None:
        """Start one sandbox and look from inside whether it is one. Blocks for a moment; repeated calls are free."""
        with _PREPARING:
            if not (self._is_checked and self._host is not None and self._host.pid == os.getpid()):
                self._check()
                self._is_checked = True

    def _check(self) -> None:
        self._check_programs()
        try:
            host = self._prepared()
        except OSError as error:
            where = "the temporary directory" if self.root is None else f"sandboxes.root: '{self.root}'"
            raise SandboxUnavailableError(f"{where}: expected a folder for sandboxes: {error.strerror}") from error
        slot = host.take(16 * MIB, 1000)
        try:
            make_directories(slot)
            self._probe(host, slot)
        finally:
            host.give_back(slot)

    @abstractmethod
    def _check_programs(self) -> None:
        """``SandboxUnavailableError`` if what isolates is not there."""

    @abstractmethod
    def _probe(self, host: Host, slot: Slot) -> None:
        """Run a program in ``slot`` that looks for what it must not see; ``SandboxUnavailableError`` if it does."""

    def check_root(self, root: RootFileSystem) -> None:
        """Make ready what sandboxes on ``root`` see; ``ConfigError`` if it cannot be had here. Blocks."""
        self.check()
        self._ready_base(self._prepared(), root)

    def _ready_base(self, host: Host, root: RootFileSystem | None) -> Base:
        """``_base``, made once."""
        with _PREPARING:
            if self._bases_of is not host:
                self._bases, self._bases_of = {}, host
            if root not in self._bases:
                self._bases[root] = self._base(host, root)
            return self._bases[root]

    @abstractmethod
    def _base(self, host: Host, root: RootFileSystem | None) -> Base:
        """What sandboxes see beside their own files; ``ConfigError`` if there is no such root file system here."""

    @abstractmethod
    def _sandbox(
        self, host: Host, slot: Slot, base: Base, read_only: Mapping[str, Path], writable: Mapping[str, Path]
    ) -> LocalSandbox:
        """The sandbox in a slot whose files are in place."""

    def describe(self) -> dict[str, str]:
        """Which limit is enforced, and by what, on this machine."""
        host = self._prepared()
        return {
            "user": "own user id per sandbox" if host.is_root else "the calling user",
            "max_file_bytes": "resource limit of each process",
            "max_work_bytes": "size of a file system in memory"
            if host.can_mount
            else "not enforced (mounting needs root): max_file_bytes bounds each file",
            "max_files": "inodes of a file system in memory"
            if host.can_mount
            else "not enforced (mounting needs root)",
        }

    async def open(
        self,
        image: Path | None,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        root: RootFileSystem | None = None,
    ) -> LocalSandbox:
        """A sandbox whose ``/work`` is a copy of ``image``; mounts map absolute paths inside to existing paths here.

        Without an ``image``, ``/work`` is a copy of what the root file system holds in its work directory.

        As root, mounted trees must be readable by all users, and a writable directory is given to the sandbox's user.
        Do not follow links in a writable mount: what is in there was made by the sandboxed program.
        """
        return await in_thread(
            lambda: self._open(image, dict(read_only or {}), dict(writable or {}), root),
            undo=lambda sandbox: sandbox._give_back(),
        )

    def _open(
        self,
        image: Path | None,
        read_only: dict[str, Path],
        writable: dict[str, Path],
        root: RootFileSystem | None,
    ) -> LocalSandbox:
        self.check()
        host = self._prepared()
        base = self._ready_base(host, root)
        for inside in (*read_only, *writable):
            if not inside.startswith("/"):
                raise ValueError(f"mounts: expected an absolute path inside the sandbox, got {inside!r}")
        slot = host.take(self.max_work_bytes, self.max_files)
        try:
            make_directories(slot)
            work = base.work if image is None else Path(image)
            if work is not None:
                copy_tree(work, slot.directory / "work", slot.uid)
            if slot.uid is not None:
                for here in writable.values():
                    os.chown(here, slot.uid, slot.uid)
            return self._sandbox(host, slot, base, read_only, writable)
        except OSError as error:
            host.give_back(slot)
            raise SandboxError(f"cannot open a sandbox from {image}: {error}") from error
        except BaseException:
            host.give_back(slot)
            raise

    def _prepared(self) -> Host:
        with _PREPARING:
            if self._host is None or self._host.pid != os.getpid():
                self._host = Host(self.root, self.max_slots, self.first_uid)
            return self._host


class LocalSandbox(ProgramSandbox):
    """Made by a ``LocalProvider``."""

    def __init__(self, provider: LocalProvider, host: Host, slot: Slot) -> None:
        super().__init__(provider.max_output_bytes)
        self.uid = slot.uid
        self._max_work_bytes, self._max_files = provider.max_work_bytes, provider.max_files
        self._host = host
        self._slot = slot

    async def snapshot(self, destination: Path) -> None:
        """End every process, then copy ``/work`` into the directory ``destination``.

        Raises:
            TreeTooLargeError: the copy, in which hard links are separate files, would exceed what a sandbox may hold.
        """
        self._check_open()
        await self._end_processes()
        self.check_intact()
        try:
            # The copy becomes the image of another sandbox, which needs some room and files of its own beside it.
            allowance = Allowance(self._max_work_bytes * 7 // 8, self._max_files * 7 // 8)
            work = self._slot.directory / "work"
            await in_thread(lambda: copy_tree(work, Path(destination), allowance=allowance))
        except OSError as error:
            kind = SandboxError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else AttemptError
            raise kind(f"cannot copy the sandbox's files to {destination}: {error}") from error

    def check_intact(self) -> None:
        """As root, where a sandbox has a control group."""
        if self._host.cgroups.machine_killed(self._slot.name):
            raise SandboxError(
                "the machine ran out of memory and killed a process of the sandbox, within its own limit"
            )

    async def _delete(self) -> None:
        await asyncio.to_thread(self._give_back)

    def _give_back(self) -> None:
        self._host.give_back(self._slot)


async def in_thread(call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    """The result of ``call``; a cancelled caller waits for it too, and has it undone."""
    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        result = await task
        if undo is not None:
            await asyncio.to_thread(undo, result)
        raise


def make_directories(slot: Slot) -> None:
    """``work``, ``tmp`` and ``home``, the slot's user's own."""
    for name, mode in (("work", 0o755), ("tmp", 0o1777), ("home", 0o755)):
        directory = slot.directory / name
        directory.mkdir()
        directory.chmod(mode)
        if slot.uid is not None:
            os.chown(directory, slot.uid, slot.uid)
