"""Sandboxes from Linux namespaces: no container engine, no daemon, a few milliseconds each.

In: an image directory and mounts. Out: ``Sandbox`` objects. Every program runs under bubblewrap with its own user, process,
network, mount, IPC and host-name namespace, no capabilities, a read-only system, resource limits and, when the caller is
root, under a user id that no other sandbox has. Where that cannot be had nothing is run: there is no weaker mode.

``/work``, ``/tmp`` and ``/home/agent`` belong to the sandbox and are seen by all of its programs; processes, ``/dev/shm``
and the (empty) network belong to one ``spawn`` or ``run`` each.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from north_lightning.errors import SandboxError, SandboxUnavailableError
from north_lightning.interfaces import Sandbox, SandboxProvider
from north_lightning.sandbox.processes import STARTED, CappedOutput, NamespaceProcess, start
from north_lightning.sandbox.slots import UIDS_PER_PROCESS, Host, Slot
from north_lightning.sandbox.trees import copy_tree, is_reachable_by_others, mount_bind
from north_lightning.types import CommandResult

T = TypeVar("T")

_MIB = 1 << 20
_PREPARING = threading.RLock()  # one host directory per provider and process, whichever threads ask
_KILL_TIMEOUT_S = 10.0
_MAX_OUTPUT_FACTOR = 256  # a run that prints this many times its cap is killed

# The namespace's init: limits, the start mark, then the program as its child. It reaps what the program orphans, and when
# it ends the kernel ends everything else in the namespace. Units of ulimit in a POSIX shell: -f 512 bytes, -v 1024 bytes.
_INIT = (
    "ulimit -c 0 && ulimit -n {num_files} && ulimit -f {file_blocks} && ulimit -v {memory_kib} &&"
    " {{ ulimit -p {num_processes} 2>/dev/null || ulimit -u {num_processes}; }} || exit 125;"
    " {{ echo 1000 >/proc/self/oom_score_adj; }} 2>/dev/null; printf '{started}'; \"$@\"; exit $?"
)
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/home/agent",
    "USER": "agent",
    "LOGNAME": "agent",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}
_NAMESPACES = (
    "--unshare-user --unshare-ipc --unshare-pid --unshare-net --unshare-uts --uid 1000 --gid 1000 --disable-userns"
    " --hostname sandbox --new-session --die-with-parent --as-pid-1 --clearenv --cap-drop ALL"
).split()


class BubblewrapProvider(SandboxProvider):
    """Runs commands under bubblewrap (0.8 or newer) on this machine.

    Args:
        memory_bytes: address space of one process.
        max_processes: processes and threads of one ``spawn`` or ``run``.
        max_file_bytes: size of one file.
        max_work_bytes: size of ``/work``, ``/tmp`` and home together; enforced where the caller may mount (root).
        max_files: number of files there; enforced where the caller may mount (root).
        max_output_bytes: output of ``run`` that is kept, half from the start and half from the end. A command that prints
            256 times as much is killed.
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
        limits = {
            "memory_bytes": memory_bytes,
            "max_processes": max_processes,
            "max_file_bytes": max_file_bytes,
            "max_work_bytes": max_work_bytes,
            "max_files": max_files,
            "max_output_bytes": max_output_bytes,
            "max_slots": max_slots,
        }
        for key, value in limits.items():
            if value < 1:
                raise ValueError(f"{key}: expected at least 1, got {value}")
        if max_slots > UIDS_PER_PROCESS:
            raise ValueError(f"max_slots: expected at most {UIDS_PER_PROCESS}, got {max_slots}")
        self.memory_bytes = memory_bytes
        self.max_processes = max_processes
        self.max_file_bytes = max_file_bytes
        self.max_work_bytes = max_work_bytes
        self.max_files = max_files
        self.max_output_bytes = max_output_bytes
        self.max_slots = max_slots
        self.root = root
        self.first_uid = first_uid
        self._host: Host | None = None
        self._is_checked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_host": None, "_is_checked": False}

    def describe(self) -> dict[str, str]:
        """Which limit is enforced, and by what, on this machine."""
        host = self._prepared()
        per_process = "resource limit of each process"
        on_disk = "not bounded as a whole (mounting needs root); max_file_bytes bounds each file"
        return {
            "isolation": "bubblewrap: user, process, network, mount, IPC and host-name namespaces; no capabilities",
            "user": "own user id per sandbox" if host.is_root else "the calling user, in a user namespace",
            "memory_bytes": f"{per_process} (address space); no bound on the sum, cgroups are not used",
            "max_processes": "resource limit of each process tree",
            "max_file_bytes": per_process,
            "max_work_bytes": "size of a file system in memory" if host.can_mount else on_disk,
            "max_files": "inodes of a file system in memory" if host.can_mount else "not bounded (mounting needs root)",
        }

    def check(self) -> None:
        """Start one sandbox and look from inside whether it is one. Blocks for some 20 ms; repeated calls are free."""
        with _PREPARING:
            if not (self._is_checked and self._host is not None and self._host.pid == os.getpid()):
                self._check()
                self._is_checked = True

    def _check(self) -> None:
        _check_programs()
        try:
            host = self._prepared()
        except OSError as error:
            raise SandboxUnavailableError(
                f"cannot prepare sandboxes under {self.root or 'the temporary directory'}: {error}"
            ) from error
        slot = host.take(16 * _MIB, 1000)
        try:
            _make_directories(slot)
            _probe(self._command_prefix(host, slot, []), slot)
        finally:
            host.give_back(slot)

    async def open(
        self,
        image: Path,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
    ) -> BubblewrapSandbox:
        """A sandbox whose ``/work`` is a copy of ``image``; mounts map absolute paths inside to existing paths here.

        As root, mounted trees must be readable by all users, and a writable directory is given to the sandbox's user. Do
        not open files in a writable mount by following links: what is in there was made by the sandboxed program.
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
            return BubblewrapSandbox(self, host, slot, self._command_prefix(host, slot, mounts))
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

    def _command_prefix(self, host: Host, slot: Slot, mounts: Sequence[str]) -> list[str]:
        """Everything before the program's own words."""
        prefix: list[str] = []
        if slot.uid is not None:
            prefix += [_program("setpriv"), f"--reuid={slot.uid}", f"--regid={slot.uid}", "--clear-groups", "--"]
        prefix += [_program("bwrap"), *_NAMESPACES]
        for name, value in _ENVIRONMENT.items():
            prefix += ["--setenv", name, value]
        prefix += ["--ro-bind", "/usr", "/usr", "--ro-bind", str(host.etc), "/etc"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            path = Path("/", name)
            if path.is_symlink():
                prefix += ["--symlink", f"usr/{name}", str(path)]
            elif path.is_dir():
                prefix += ["--ro-bind", str(path), str(path)]
        prefix += ["--proc", "/proc", "--dev", "/dev"]
        prefix += ["--size", str(64 * _MIB), "--perms", "1777", "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
        for inside, name in (("/work", "work"), ("/tmp", "tmp"), ("/home/agent", "home")):
            prefix += ["--bind", str(slot.directory / name), inside]
        prefix += [*mounts, "--dir", "/run", "--symlink", "/tmp", "/var/tmp", "--remount-ro", "/", "--chdir", "/work"]
        init = _INIT.format(
            num_files=1024,
            file_blocks=-(-self.max_file_bytes // 512),
            memory_kib=-(-self.memory_bytes // 1024),
            num_processes=self.max_processes,
            started="".join(f"\\{byte:03o}" for byte in STARTED),
        )
        return [*prefix, "--", "/bin/sh", "-c", init, "init"]


class BubblewrapSandbox(Sandbox):
    """Made by ``BubblewrapProvider.open``. ``/tmp`` lasts as long as the sandbox; ``/dev/shm`` as long as one program."""

    def __init__(self, provider: BubblewrapProvider, host: Host, slot: Slot, prefix: list[str]) -> None:
        self.uid = slot.uid
        self._max_output_bytes = provider.max_output_bytes
        self._host = host
        self._slot = slot
        self._prefix = prefix
        self._processes: set[NamespaceProcess] = set()
        self._closing: asyncio.Task[None] | None = None

    async def spawn(self, argv: Sequence[str]) -> NamespaceProcess:
        """Start ``argv`` in a process namespace of its own; the result's ``kill`` ends all that it started."""
        return await self._start(argv, with_stdin=True)

    async def _start(self, argv: Sequence[str], *, with_stdin: bool) -> NamespaceProcess:
        if self._closing is not None:
            raise SandboxError("the sandbox is closed")
        process = await start([*self._prefix, *argv], with_stdin=with_stdin)
        self._processes = {other for other in self._processes if other.returncode is None} | {process}
        if self._closing is not None:
            await self._end_processes()
            raise SandboxError("the sandbox was closed while a program started")
        return process

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        """``bash -c command`` without input, in ``/work``. Exit code 124 at the time-out, 137 if it printed far too much.

        Background processes end with the command. Output beyond the cap is left out of the middle, and a line says so.
        """
        process = await self._start(["bash", "-c", command], with_stdin=False)
        assert process.stdout is not None
        output = CappedOutput(self._max_output_bytes)
        timed_out = flooded = False
        try:
            async with asyncio.timeout(timeout_s):
                while chunk := await process.stdout.read(1 << 18):
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
        while chunk := await process.stdout.read(1 << 18):
            output.add(chunk)
        exit_code = await _ended(process)
        self._processes.discard(process)
        text = output.text()
        if flooded:
            text += f"\n[killed: more than {_MAX_OUTPUT_FACTOR * self._max_output_bytes} bytes of output]\n"
        return CommandResult(text, 124 if timed_out else exit_code, timed_out)

    async def snapshot(self, destination: Path) -> None:
        """End every process, then copy ``/work`` into the directory ``destination``."""
        if self._closing is not None:
            raise SandboxError("the sandbox is closed")
        await self._end_processes()
        try:
            await _in_thread(lambda: copy_tree(self._slot.directory / "work", Path(destination)))
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
        processes = [process for process in self._processes if process.returncode is None]
        for process in processes:
            process.kill()
        for process in processes:
            await _ended(process)
        self._processes.clear()


async def _ended(process: NamespaceProcess) -> int:
    try:
        async with asyncio.timeout(_KILL_TIMEOUT_S):
            return await process.wait()
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
        raise SandboxError(
            f"mounts: {path} lies below a directory that only root may search; chmod o+x it, or move {path}"
        )
    point = slot.directory / f"mount{number}"
    if path.is_dir():
        point.mkdir()
    else:
        point.touch()
    mount_bind(path.resolve(), point)
    return point


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        package = {"bwrap": "bubblewrap", "setpriv": "util-linux"}[name]
        raise SandboxUnavailableError(f"{name} is not installed: apt-get install {package}")
    return path


def _check_programs() -> None:
    if os.geteuid() == 0:
        _program("setpriv")
    words = subprocess.run([_program("bwrap"), "--version"], capture_output=True, text=True, check=False).stdout.split()
    version = tuple(int(part) for part in words[-1].split(".")[:2]) if words else (0, 0)
    if version < (0, 8):
        raise SandboxUnavailableError(
            f"bubblewrap {'.'.join(map(str, version))} is too old: expected 0.8 or newer (--disable-userns, --size)"
        )


# Run inside; every line that does not hold names itself. The first word of the environment is a file of the host.
_PROBE = r"""
[ "$(id -u):$(id -g)" = 1000:1000 ] || echo "the user is $(id), not 1000"
[ ! -e "$1" ] || echo "the host's $1 is visible"
[ ! -e /root ] || echo "the host's /root is visible"
[ "$(tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ')" = lo ] || echo "there are network interfaces"
[ -z "$(tail -n +2 /proc/net/route)" ] || echo "there are network routes"
ps=0; for p in /proc/[0-9]*; do ps=$((ps + 1)); done; [ $ps -le 8 ] || echo "other processes are visible"
! (: >/usr/probe) 2>/dev/null || echo "/usr is writable"
! (: >/probe) 2>/dev/null || echo "/ is writable"
! unshare -U true 2>/dev/null || echo "user namespaces can be nested"
grep -q '^CapEff:[[:space:]]*0*$' /proc/self/status || echo "there are capabilities"
: >/work/probe || echo "/work is not writable"
"""


def _probe(prefix: Sequence[str], slot: Slot) -> None:
    secret = slot.directory.parent / "lock"
    command = [*prefix, "/bin/bash", "-c", _PROBE, "probe", str(secret)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env={}, cwd="/", timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxUnavailableError(f"commands cannot be isolated here: {error}") from error
    if not done.stdout.startswith(STARTED):
        words = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise SandboxUnavailableError(f"commands cannot be isolated here: {words}\n{_remedy()}")
    leaks = (done.stdout[len(STARTED) :] + done.stderr).decode(errors="replace").split("\n")
    if slot.uid is not None and (slot.directory / "work" / "probe").lstat().st_uid != slot.uid:
        leaks.append(f"files do not belong to user id {slot.uid}")
    leaks = [leak for leak in leaks if leak]
    if leaks or done.returncode != 0:
        raise SandboxUnavailableError(
            f"bubblewrap does not isolate here: {'; '.join(leaks) or done.returncode}\n{_remedy()}"
        )


def _remedy() -> str:
    """What to change on this machine, from the kernel's own switches."""
    switches = {
        "/proc/sys/user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=15000"),
        "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (or an AppArmor profile for bwrap with 'userns,')",
        ),
    }
    remedies = []
    for path, (bad, remedy) in switches.items():
        try:
            if Path(path).read_text().strip() == bad:
                remedies.append(remedy)
        except OSError:
            continue
    if remedies:
        return "Unprivileged user namespaces are switched off; as root: " + "; ".join(remedies)
    return (
        "Unprivileged user namespaces must be allowed. In a container, start it with --security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined --security-opt systempaths=unconfined, or use the Docker sandbox instead."
    )
