"""The command line that isolates a program: user id, bubblewrap's options, and the shell that sets limits inside.

Nothing here starts anything. ``Launcher.argv`` is rebuilt for every start because each needs its own descriptor of the
system-call filter, which bubblewrap reads to its end.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from north_lightning.sandbox.processes import STARTED, word_bytes

_MIB = 1 << 20
SHM_BYTES = 64 * _MIB
NUM_OPEN_FILES = 1024

# The namespace's init: limits, the start mark, then the program as its child. It reaps what the program orphans; when
# it ends, the kernel ends the rest of the namespace. Units of ulimit in a POSIX shell: -f 512 bytes, -v 1024 bytes. The
# kernel takes these processes first when memory runs out (oom_score_adj).
_INIT = (
    "ulimit -c 0 && ulimit -n {num_files} && ulimit -f {file_blocks} && ulimit -v {memory_kib} &&"
    " {{ ulimit -p {num_processes} 2>/dev/null || ulimit -u {num_processes}; }} || exit 125;"
    " {{ echo 1000 >/proc/self/oom_score_adj; }} 2>/dev/null; printf '{started}'; \"$@\"; exit $?"
)
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/home/agent",
    "USER": "agent",
    "LOGNAME": "agent",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
}
_NAMESPACES = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
_IDENTITY = ["--uid", "1000", "--gid", "1000", "--disable-userns", "--hostname", "sandbox", "--cap-drop", "ALL"]
# bubblewrap's own /dev and / are file systems in memory without a limit, so they become read-only.
_DEVICES = ["--proc", "/proc", "--dev", "/dev", "--size", str(SHM_BYTES), "--perms", "1777", "--tmpfs", "/dev/shm"]
_DEVICES += ["--remount-ro", "/dev"]
_LIFE = ["--new-session", "--die-with-parent", "--as-pid-1", "--clearenv"]


@dataclass(frozen=True)
class Limits:
    memory_bytes: int
    max_processes: int
    max_file_bytes: int


@dataclass(frozen=True)
class Launcher:
    """The words before (``outer``) and after (``inner``) the filter's descriptor; ``seccomp`` is the filter."""

    outer: tuple[str, ...]
    inner: tuple[str, ...]
    seccomp: bytes | None

    def open_filter(self) -> int | None:
        """A new descriptor of the filter, to be closed by the caller once the program runs."""
        if self.seccomp is None:
            return None
        fd = os.memfd_create("seccomp")  # no file: what cleans temporary directories cannot take it away
        os.write(fd, self.seccomp)
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def argv(self, program: Sequence[str], filter_fd: int | None) -> list[str | bytes]:
        seccomp = [] if filter_fd is None else ["--seccomp", str(filter_fd)]
        return [*self.outer, *seccomp, *self.inner, *map(word_bytes, program)]


def make_launcher(
    *,
    bwrap: str,
    setpriv: str,
    uid: int | None,
    directory: Path,
    etc: Path,
    seccomp: bytes | None,
    mounts: Sequence[str],
    limits: Limits,
    cgroups: Sequence[Path] = (),
    root: Path | None = None,
    workdir: str = "/work",
    variables: Mapping[str, str] | None = None,
) -> Launcher:
    """How to run programs, as ``uid`` (None: the caller), on the files in ``directory/{work,tmp,home}``.

    ``root`` is the root file system, this machine's own system without one; ``workdir`` is another name of ``/work``.
    ``cgroups`` are the files through which a process joins its control groups.
    """
    outer = []
    if cgroups:
        joins = "".join(f"echo 0 >{shlex.quote(str(path))} && " for path in cgroups)
        outer += ["/bin/sh", "-c", f'{joins}exec "$@"', "join"]
    if uid is not None:
        outer += [setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    outer += [bwrap, *_NAMESPACES, *_IDENTITY, *_LIFE]
    for name, value in {**ENVIRONMENT, **(variables or {}), "HOME": ENVIRONMENT["HOME"]}.items():
        outer += ["--setenv", name, value]

    inner = _system_of_this_machine(etc) if root is None else _system_of(root)
    inner += _DEVICES
    places = {"/work": "work", workdir: "work", "/tmp": "tmp", "/home/agent": "home"}
    for inside, part in places.items():
        inner += ["--bind", str(directory / part), inside]
    if root is None:
        inner += ["--symlink", "/tmp", "/var/tmp"]
    inner += [*mounts, "--dir", "/run", "--remount-ro", "/", "--chdir", workdir]
    return Launcher(tuple(outer), (*inner, "--", "/bin/sh", "-c", _init(limits), "init"), seccomp)


def build_launcher(
    *,
    bwrap: str,
    setpriv: str,
    uid: int | None,
    system: Path,
    context: Path,
    seccomp: bytes | None,
    workdir: str,
    variables: Mapping[str, str],
    limits: Limits,
) -> Launcher:
    """How to run a command of an image that is being built, as ``uid`` (None: the caller), root inside.

    ``system`` is its root file system, which belongs to ``uid`` and is changed; ``context`` is read.
    """
    outer = [] if uid is None else [setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    outer += [bwrap, *_NAMESPACES, "--uid", "0", "--gid", "0", "--disable-userns", "--cap-drop", "ALL"]
    outer += ["--hostname", "build", *_LIFE]
    for name, value in {"PATH": ENVIRONMENT["PATH"], "HOME": "/root", **variables}.items():
        outer += ["--setenv", name, value]
    inner = ["--bind", str(system), "/", *_DEVICES, "--size", str(SHM_BYTES), "--tmpfs", "/run"]
    inner += ["--ro-bind", str(context), "/run/context", "--remount-ro", "/run", "--chdir", workdir]
    return Launcher(tuple(outer), (*inner, "--", "/bin/sh", "-c", _init(limits), "init"), seccomp)


def _init(limits: Limits) -> str:
    return _INIT.format(
        num_files=NUM_OPEN_FILES,
        file_blocks=-(-limits.max_file_bytes // 512),
        memory_kib=-(-limits.memory_bytes // 1024),
        num_processes=limits.max_processes,
        started="".join(f"\\{byte:03o}" for byte in STARTED),
    )


def _system_of_this_machine(etc: Path) -> list[str]:
    words = ["--ro-bind", "/usr", "/usr", "--ro-bind", str(etc), "/etc"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            words += ["--symlink", f"usr/{name}", str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    return words


def _system_of(root: Path) -> list[str]:
    """Everything in ``root`` but what each sandbox has its own of."""
    words: list[str] = []
    for path in sorted(root.iterdir()):
        if path.name in ("dev", "proc", "run", "sys", "tmp", "work"):
            continue
        words += ["--symlink", os.readlink(path)] if path.is_symlink() else ["--ro-bind", str(path)]
        words.append(f"/{path.name}")
    return words
