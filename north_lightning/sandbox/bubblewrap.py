"""Sandboxes from Linux namespaces: no container engine, no daemon, a few milliseconds each.

In: an image directory and mounts. Out: ``Sandbox`` objects. Every program runs under bubblewrap with its own user,
process, network, mount, IPC and host-name namespace, no capabilities, a read-only system, a system-call filter,
resource limits and, when the caller is root, under a user id that no other sandbox has. Where that cannot be had
nothing is run: there is no weaker mode.

``/work``, ``/tmp`` and ``/home/agent`` belong to the sandbox and are seen by all of its programs; processes,
``/dev/shm`` and the (empty) network belong to one ``spawn`` or ``run`` each.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from north_lightning.errors import SandboxError, SandboxUnavailableError
from north_lightning.interfaces import Sandbox, SandboxProvider
from north_lightning.sandbox.command import Launcher, Limits, make_launcher
from north_lightning.sandbox.probe import check_programs, probe, program
from north_lightning.sandbox.processes import CappedOutput, NamespaceProcess, start, word_bytes
from north_lightning.sandbox.slots import UIDS_PER_PROCESS, Host, Slot
from north_lightning.sandbox.trees import Allowance, copy_tree, is_reachable_by_others, mount_bind
from north_lightning.types import CommandResult

T = TypeVar("T")

_MIB = 1 << 20
_CHUNK_BYTES = 1 << 18
_MAX_WORD_BYTES = 100_000  # the kernel takes 128 KiB as one word of a command line
_KILL_TIMEOUT_S = 10.0
_MAX_OUTPUT_FACTOR = 256  # a run that prints this many times its cap is killed
_PREPARING = threading.RLock()  # one host directory per provider and process, whichever threads ask


class BubblewrapProvider(SandboxProvider):
    """Runs commands under bubblewrap (0.8 or newer) on this machine.

    Args:
        memory_bytes: address space of one process.
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

    def __init__(
        self,
        memory_bytes: int = 4096 * _MIB,
        max_processes: int = 256,
        max_file_bytes: int = 256 * _MIB,
        max_work_bytes: int = 512 * _MIB,
        max_files: int = 100_000,
        max_output_bytes: int = _MIB,
        max_slots: int = 256,
        root: Path | None = None,
        first_uid: int = 700_000,
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
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{key}: expected at least 1, got {value}")
        if max_slots > UIDS_PER_PROCESS:
            raise ValueError(f"max_slots: expected at most {UIDS_PER_PROCESS}, got {max_slots}")
        self._host: Host | None = None
        self._is_checked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_host": None, "_is_checked": False}

    def describe(self) -> dict[str, str]:
        """Which limit is enforced, and by what, on this machine."""
        host = self._prepared()
        per_process = "resource limit of each process"
        return {
            "isolation": "bubblewrap: user, process, network, mount, IPC and host-name namespaces; no capabilities",
            "system_calls": "seccomp filter" if host.seccomp else "no filter: no call table for this architecture",
            "user": "own user id per sandbox" if host.is_root else "the calling user, in a user namespace",
            "memory_bytes": f"{per_process} (address space); the sum is not bounded, cgroups are not used; when memory"
            " runs out the kernel kills sandboxed processes first",
            "max_processes": "resource limit of each process tree",
            "max_file_bytes": per_process,
            "max_work_bytes": "size of a file system in memory"
            if host.can_mount
            else "not enforced (mounting needs root): max_file_bytes bounds each file",
            "max_files": "inodes of a file system in memory"
            if host.can_mount
            else "not enforced (mounting needs root)",
        }

    def check(self) -> None:
        """Start one sandbox and look from inside whether it is one. Blocks for some 50 ms; repeated calls are free."""
        with _PREPARING:
            if not (self._is_checked and self._host is not None and self._host.pid == os.getpid()):
                self._check()
                self._is_checked = True

    def _check(self) -> None:
        check_programs()
        try:
            host = self._prepared()
        except OSError as error:
            where = self.root or "the temporary directory"
            raise SandboxUnavailableError(f"cannot prepare sandboxes under {where}: {error}") from error
        slot = host.take(16 * _MIB, 1000)
        try:
            _make_directories(slot)
            probe(self._launcher(host, slot, []), slot)
        finally:
            host.give_back(slot)

    async def open(
        self,
        image: Path,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
    ) -> BubblewrapSandbox:
        """A sandbox whose ``/work`` is a copy of ``image``; mounts map absolute paths inside to existing paths here.

        As root, mounted trees must be readable by all users, and a writable directory is given to the sandbox's user.
        Do not follow links in a writable mount: what is in there was made by the sandboxed program.
        """
        return await _in_thread(
            lambda: self._open(Path(image), dict(read_only or {}), dict(writable or {})),
            undo=lambda sandbox: sandbox._give_back(),
        )

    def _open(self, image: Path, read_only: dict[str, Path], writable: dict[str, Path]) -> BubblewrapSandbox:
        self.check()
        host = self._prepared()
        slot = host.take(self.max_work_bytes, self.max_files)
        try:
            _make_directories(slot)
            copy_tree(image, slot.directory / "work", slot.uid)
            mounts: list[str] = []
            for option, paths in (("--ro-bind", read_only), ("--bind", writable)):
                for inside, here in paths.items():
                    if not inside.startswith("/"):
                        raise ValueError(f"mounts: expected an absolute path inside the sandbox, got {inside!r}")
                    if slot.uid is not None and option == "--bind":
                        os.chown(here, slot.uid, slot.uid)
                    mounts += [option, str(_reachable(Path(here), slot, len(mounts))), inside]
            return BubblewrapSandbox(self, host, slot, self._launcher(host, slot, mounts))
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

    def _launcher(self, host: Host, slot: Slot, mounts: Sequence[str]) -> Launcher:
        return make_launcher(
            bwrap=program("bwrap"),
            setpriv="" if slot.uid is None else program("setpriv"),
            uid=slot.uid,
            directory=slot.directory,
            etc=host.etc,
            seccomp=host.seccomp,
            mounts=mounts,
            limits=Limits(self.memory_bytes, self.max_processes, self.max_file_bytes),
        )


class BubblewrapSandbox(Sandbox):
    """Made by ``BubblewrapProvider.open``."""

    def __init__(self, provider: BubblewrapProvider, host: Host, slot: Slot, launcher: Launcher) -> None:
        self.uid = slot.uid
        self._max_output_bytes = provider.max_output_bytes
        self._max_work_bytes, self._max_files = provider.max_work_bytes, provider.max_files
        self._host = host
        self._slot = slot
        self._launcher = launcher
        self._processes: set[NamespaceProcess] = set()
        self._closing: asyncio.Task[None] | None = None

    async def spawn(self, argv: Sequence[str]) -> NamespaceProcess:
        """Start ``argv`` in a process namespace of its own; the result's ``kill`` ends all that it started."""
        return await self._start(argv, with_stdin=True)

    async def _start(self, argv: Sequence[str], *, with_stdin: bool) -> NamespaceProcess:
        if self._closing is not None:
            raise SandboxError("the sandbox is closed")
        filter_fd = self._launcher.open_filter()
        try:
            process = await start(
                self._launcher.argv(argv, filter_fd),
                with_stdin=with_stdin,
                pass_fds=() if filter_fd is None else (filter_fd,),
            )
        finally:
            if filter_fd is not None:
                os.close(filter_fd)
        self._processes = {other for other in self._processes if not other.is_finished} | {process}
        if self._closing is not None:
            await self._end_processes()
            raise SandboxError("the sandbox was closed while a program started")
        return process

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        """``bash -c command`` without input, in ``/work``; the exit code is 124 at the time-out, 137 if killed.

        Background processes end with the command. Output beyond the cap is left out of the middle, and a line says so.
        """
        script = word_bytes(command)
        if len(script) <= _MAX_WORD_BYTES:
            process = await self._start(["bash", "-c", command], with_stdin=False)
        else:
            process = await self._start(["bash", "-c", 'eval "$(cat)" </dev/null'], with_stdin=True)
            assert process.stdin is not None
            process.stdin.write(script)
            process.stdin.close()
        assert process.stdout is not None
        output = CappedOutput(self._max_output_bytes)
        timed_out = flooded = False
        try:
            async with asyncio.timeout(timeout_s):
                while chunk := await process.stdout.read(_CHUNK_BYTES):
                    output.add(chunk)
                    if output.num_bytes > _MAX_OUTPUT_FACTOR * self._max_output_bytes:
                        flooded = True
                        break
                else:
                    await process.wait()
        except TimeoutError:
            timed_out = True
        finally:
            process.kill()
        while chunk := await process.stdout.read(_CHUNK_BYTES):
            output.add(chunk)
        exit_code = await _end(process)
        self._processes.discard(process)
        text = output.text()
        if flooded:
            text += f"\n[killed: more than {_MAX_OUTPUT_FACTOR * self._max_output_bytes} bytes of output]\n"
        return CommandResult(text, 124 if timed_out else exit_code, timed_out)

    async def snapshot(self, destination: Path) -> None:
        """End every process, then copy ``/work`` into the directory ``destination``.

        Raises:
            TreeTooLargeError: the copy, in which hard links are separate files, would exceed what a sandbox may hold.
        """
        if self._closing is not None:
            raise SandboxError("the sandbox is closed")
        await self._end_processes()
        try:
            # The copy becomes the image of another sandbox, which needs some room and files of its own beside it.
            allowance = Allowance(self._max_work_bytes * 7 // 8, self._max_files * 7 // 8)
            work = self._slot.directory / "work"
            await _in_thread(lambda: copy_tree(work, Path(destination), allowance=allowance))
        except OSError as error:
            raise SandboxError(f"cannot copy the sandbox's files to {destination}: {error}") from error

    async def close(self) -> None:
        """End every process and delete everything, even if the caller is cancelled meanwhile."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self._end_processes()
        await asyncio.to_thread(self._give_back)

    def _give_back(self) -> None:
        self._host.give_back(self._slot)

    async def _end_processes(self) -> None:
        for process in self._processes:
            process.kill()
        while self._processes:
            await _end(self._processes.pop())


async def _end(process: NamespaceProcess) -> int:
    try:
        async with asyncio.timeout(_KILL_TIMEOUT_S):
            return await process.end()
    except TimeoutError:
        raise SandboxError(f"a sandboxed process (pid {process.pid}) cannot be killed") from None


async def _in_thread(call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    """The result of ``call``; a cancelled caller waits for it too, and has it undone."""
    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        result = await task
        if undo is not None:
            await asyncio.to_thread(undo, result)
        raise


def _make_directories(slot: Slot) -> None:
    for name, mode in (("work", 0o755), ("tmp", 0o1777), ("home", 0o755)):
        directory = slot.directory / name
        directory.mkdir()
        directory.chmod(mode)
        if slot.uid is not None:
            os.chown(directory, slot.uid, slot.uid)


def _reachable(path: Path, slot: Slot, number: int) -> Path:
    """``path``, or another name for it below the slot's directory if the sandbox's user cannot walk to it."""
    if slot.uid is None or is_reachable_by_others(path):
        return path.resolve()
    if not slot.is_bounded:
        raise SandboxError(f"mounts: {path} lies below a directory that only root may search; chmod o+x it, or move it")
    point = slot.directory / f"mount{number}"
    if path.is_dir():
        point.mkdir()
    else:
        point.touch()
    mount_bind(path.resolve(), point)
    return point
