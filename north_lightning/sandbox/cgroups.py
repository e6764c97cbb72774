"""Control groups around each sandbox: what all of its programs together may take, on whichever kind this machine has.

In: a name. Out: a group of groups of that name, and in it one per sandbox with a bound on memory and on processes.
cgroup v2 and v1 are supported; without either, or the right to make groups, there are none, and ``kind`` says so.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["cgroup v2", "cgroup v1", "rlimits only"]

_CONTROLLERS = ("memory", "pids")
_REMOVE_TIMEOUT_S = 5.0
_LIMIT_FILES = {"cgroup v2": "memory.max", "cgroup v1": "memory.limit_in_bytes"}


@dataclass(frozen=True)
class Cgroups:
    """``directories`` hold the sandboxes' groups: one with cgroup v2, one per controller with v1, else none."""

    kind: Kind
    directories: tuple[Path, ...] = ()

    def make(self, name: str, memory_bytes: int, max_processes: int) -> list[Path]:
        """A new group; a process joins it by writing 0 to every file returned. ``OSError`` if it cannot be made."""
        limits = {"pids.max": max_processes, _LIMIT_FILES.get(self.kind, ""): memory_bytes}
        try:
            for directory in self.directories:
                group = directory / name
                group.mkdir()
                for file, limit in limits.items():
                    if (group / file).exists():
                        (group / file).write_text(str(limit))
        except OSError:
            self.remove(name)
            raise
        return [directory / name / "cgroup.procs" for directory in self.directories]

    def machine_killed(self, name: str) -> bool:
        """Whether the kernel killed a process of the group for want of memory, though the group kept its own limit."""
        for directory in self.directories:
            counts: dict[str, int] = {}
            for file in ("memory.events", "memory.oom_control", "memory.failcnt"):  # v2, v1, v1
                with contextlib.suppress(OSError):
                    for line in (directory / name / file).read_text().splitlines():
                        *key, count = line.split()
                        counts["".join(key)] = int(count)
            if counts.get("oom_kill") and not counts.get("oom") and not counts.get(""):
                return True
        return False

    def remove(self, name: str, timeout_s: float = _REMOVE_TIMEOUT_S) -> None:
        """Remove a group whose processes have been killed; the kernel may need a moment until it is empty."""
        for directory in self.directories:
            _remove(directory / name, timeout_s)

    def close(self) -> None:
        """Remove everything, sandboxes' groups too."""
        for directory in self.directories:
            with contextlib.suppress(OSError):
                for group in [path for path in directory.iterdir() if path.is_dir()]:
                    _remove(group)
                _remove(directory)


def make_cgroups(name: str) -> Cgroups:
    """Groups called ``name`` below this process's own; ``rlimits only`` where this process may not make any."""
    for kind, parents in _parents():
        directories = tuple(parent / name for parent in parents)
        groups = Cgroups(kind, directories)
        try:
            for directory in directories:
                directory.mkdir()
                if kind == "cgroup v2":
                    _delegate(directory)
            groups.make("probe", 1 << 26, 16)
            groups.remove("probe")
        except OSError:
            groups.close()
            continue
        return groups
    return Cgroups("rlimits only")


def note(groups: Cgroups, file: Path) -> None:
    """Write down where the groups are: whoever cleans up after this process may be in another group itself."""
    file.write_text(json.dumps([groups.kind, *map(str, groups.directories)]))


def noted(file: Path) -> Cgroups:
    """The groups that ``note`` wrote down; none if it did not come to that."""
    try:
        kind, *directories = json.loads(file.read_text())
    except (OSError, ValueError):
        return Cgroups("rlimits only")
    return Cgroups(kind, tuple(map(Path, directories)))


def _delegate(directory: Path) -> None:
    """Let the groups below ``directory`` have limits. A group with processes of its own cannot: then its parent may."""
    wanted = " ".join(f"+{controller}" for controller in _CONTROLLERS)
    if not set(_CONTROLLERS) <= set((directory / "cgroup.controllers").read_text().split()):
        (directory.parent / "cgroup.subtree_control").write_text(wanted)
    (directory / "cgroup.subtree_control").write_text(wanted)


def _parents(proc: Path = Path("/proc/self")) -> list[tuple[Kind, list[Path]]]:
    """Where groups may be made, best first: below this process's own group, or with v2 beside it."""
    own = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    unified: Path | None = None
    mounted: dict[str, Path] = {}
    for line in (proc / "mountinfo").read_text().splitlines():
        words = line.split()
        kind, options = words[words.index("-") + 1], words[-1].split(",")
        if kind == "cgroup2":
            unified = Path(words[4])
        elif kind == "cgroup":
            mounted.update({option: Path(words[4]) for option in options if option in _CONTROLLERS})
    found: list[tuple[Kind, list[Path]]] = []
    if unified is not None:
        here = _below(unified, own.get("", "/"))
        found += [("cgroup v2", [parent]) for parent in _distinct([here, here if here == unified else here.parent])]
    if set(_CONTROLLERS) <= mounted.keys():
        paths = [_below(mounted[name], own.get(name, "/")) for name in _CONTROLLERS]
        found.append(("cgroup v1", _distinct(paths)))
    return found


def _below(mount: Path, path: str) -> Path:
    """Inside a container ``path`` may be the host's, which is not visible; the mount is then this process's group."""
    here = mount / path.lstrip("/")
    return here if here.is_dir() else mount


def _distinct(paths: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))


def _remove(group: Path, timeout_s: float = _REMOVE_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return group.rmdir()
        except FileNotFoundError:
            return None
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
