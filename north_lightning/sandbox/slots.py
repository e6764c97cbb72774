"""Where sandboxes live on this machine: scratch directories, user ids, control groups, and the ``/etc`` they see.

One ``Host`` per process. As root every sandbox gets a user id that no other live sandbox on the machine has, and, where
mounting is permitted, a file system in memory with a size and a number of files it cannot exceed. Otherwise sandboxes
run as the calling user in plain directories.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

from north_lightning.errors import SandboxError, SandboxUnavailableError
from north_lightning.sandbox.cgroups import Cgroups, make_cgroups, note, noted
from north_lightning.sandbox.scratch import own, ownerless, take_lock
from north_lightning.sandbox.seccomp import seccomp_filter
from north_lightning.sandbox.trees import copy_tree, delete_tree, mount_tmpfs, unmount

log = logging.getLogger(__name__)

UIDS_PER_PROCESS = 1024
_PREFIX = "north-sandbox-"
_LOCKS = Path("/run/north_lightning")
_CGROUPS = "cgroups.json"
_ETC_FILES = (
    "ld.so.cache",
    "nsswitch.conf",
    "inputrc",
    "services",
    "protocols",
    "mime.types",
    "debian_version",
    "os-release",
)


@dataclass(frozen=True)
class Slot:
    """One sandbox's place: ``directory`` on the host, and the user id its processes have (None: the caller's)."""

    index: int
    directory: Path
    uid: int | None
    is_bounded: bool

    @property
    def name(self) -> str:
        return self.directory.name


class Host:
    """Scratch root, user ids and slots of this process."""

    def __init__(self, root: Path | None, max_slots: int, first_uid: int) -> None:
        parent = Path(root) if root is not None else Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        self.is_root = os.geteuid() == 0
        self.pid = os.getpid()
        self._first_uid: int | None = None
        locks = []
        for left, lock in ownerless(parent, _PREFIX):
            _remove(left, self.pid, [lock])
        if self.is_root:
            _check_reachable(parent)
            self._first_uid, uid_lock = _claim_uids(first_uid)
            locks.append(uid_lock)
        self.root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self.root.chmod(0o711)
        locks.append(own(self.root))
        self._finalizer = weakref.finalize(self, _remove, self.root, self.pid, locks)
        self.cgroups = make_cgroups(self.root.name) if self.is_root else Cgroups("rlimits only")
        note(self.cgroups, self.root / _CGROUPS)
        self._free = list(range(max_slots))[::-1]
        self._undeleted: list[Slot] = []
        self.can_mount = self._probe_mount()
        self.etc = _make_etc(self.root / "etc")
        self.seccomp = seccomp_filter()

    def _probe_mount(self) -> bool:
        if not self.is_root:
            return False
        probe = self.root / "probe"
        probe.mkdir()
        try:
            mount_tmpfs(probe, 1 << 16, 16)
        except OSError:
            return False
        finally:
            unmount([probe])
            probe.rmdir()
        return True

    def take(self, size_bytes: int, num_inodes: int) -> Slot:
        left, self._undeleted = self._undeleted, []
        for slot in left:
            self.give_back(slot, patience_s=0.0)
        if not self._free:
            raise SandboxError("every sandbox slot is in use: close sandboxes, or raise max_slots")
        index = self._free.pop()
        directory = self.root / f"slot{index}"
        try:
            directory.mkdir(0o700)
            if self.can_mount:
                mount_tmpfs(directory, size_bytes, num_inodes)
            if self._first_uid is not None:  # nobody else's, and root's
                os.chown(directory, self._first_uid + index, 0)
        except OSError as error:
            with contextlib.suppress(OSError):
                directory.rmdir()
            self._free.append(index)
            raise SandboxError(f"cannot make a sandbox directory: {error}") from error
        uid = None if self._first_uid is None else self._first_uid + index
        return Slot(index, directory, uid, is_bounded=self.can_mount)

    def give_back(self, slot: Slot, patience_s: float = 5.0) -> None:
        """Delete the slot's files, then let it be used again.

        What cannot be deleted yet (processes that were killed take their time on a busy machine) does not concern the
        attempt, whose work is done: it is tried again before the next sandbox is opened, and when this process ends.
        """
        try:
            self.cgroups.remove(slot.name, patience_s)
            if slot.is_bounded:
                unmount([slot.directory])
                with contextlib.suppress(FileNotFoundError):
                    slot.directory.rmdir()
            else:
                delete_tree(slot.directory)
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning("cannot delete the sandbox %s yet: %s", slot.directory, error)
            self._undeleted.append(slot)
            return
        self._free.append(slot.index)


def _check_reachable(parent: Path) -> None:
    for path in (parent.resolve(), *parent.resolve().parents):
        if not path.stat().st_mode & stat.S_IXOTH:
            raise SandboxUnavailableError(
                f"root: expected {parent} and every directory above it to be searchable by all users, but {path} "
                "is not; choose another root, or chmod o+x it"
            )


def _claim_uids(first_uid: int) -> tuple[int, int]:
    """The first of ``UIDS_PER_PROCESS`` user ids that no other live process of this machine uses, and their lock."""
    _check_mapped(first_uid)
    _LOCKS.mkdir(mode=0o700, exist_ok=True)
    for block in range(256):
        start = first_uid + block * UIDS_PER_PROCESS
        try:
            return start, take_lock(_LOCKS / f"uids-{start}")
        except BlockingIOError:
            continue
    raise SandboxError(f"every block of sandbox user ids from {first_uid} on is in use ({_LOCKS}/uids-*)")


def _check_mapped(first_uid: int) -> None:
    """Inside a container only some user ids may exist."""
    ranges = [[int(word) for word in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if not any(start <= first_uid and first_uid + UIDS_PER_PROCESS <= start + length for start, _, length in ranges):
        raise SandboxUnavailableError(
            f"first_uid: expected {UIDS_PER_PROCESS} user ids from {first_uid} on, but this user namespace has only "
            + ", ".join(f"{start} to {start + length - 1}" for start, _, length in ranges)
        )


def _make_etc(etc: Path) -> Path:
    etc.mkdir(0o755)
    for name in _ETC_FILES:
        with contextlib.suppress(OSError):
            shutil.copyfile(f"/etc/{name}", etc / name)
    if Path("/etc/alternatives").is_dir():
        copy_tree(Path("/etc/alternatives"), etc / "alternatives")
    (etc / "passwd").write_text(
        "root:x:0:0:root:/root:/bin/bash\nagent:x:1000:1000:agent:/home/agent:/bin/bash\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
    )
    (etc / "group").write_text("root:x:0:\nagent:x:1000:\nnogroup:x:65534:\n")
    (etc / "hosts").write_text("127.0.0.1\tlocalhost sandbox\n::1\tlocalhost\n")
    (etc / "hostname").write_text("sandbox\n")
    for path in etc.iterdir():
        path.chmod(0o755 if path.is_dir() else 0o644)
    return etc


def _remove(root: Path, pid: int, locks: list[int]) -> None:
    """Unmount and delete a scratch root, unless this is a forked child of the process that made it."""
    if os.getpid() != pid:
        return
    with open("/proc/self/mounts", "rb") as mounts:
        points = [line.split()[1].decode("unicode_escape") for line in mounts]
    unmount(Path(point) for point in points if point.startswith(f"{root}/"))
    noted(root / _CGROUPS).close()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        delete_tree(root)
    for lock in locks:
        os.close(lock)
