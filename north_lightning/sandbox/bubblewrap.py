"""Sandboxes from Linux namespaces: no container engine, no daemon, a few milliseconds each.

In: an image directory and mounts. Out: ``Sandbox`` objects. Every program runs under bubblewrap with its own user,
process, network, mount, IPC and host-name namespace, no capabilities, a read-only system, a system-call filter,
resource limits and, when the caller is root, under a user id that no other sandbox has. Where that cannot be had
nothing is run: there is no weaker mode.

``/work``, ``/tmp`` and ``/home/agent`` belong to the sandbox and are seen by all of its programs; processes,
``/dev/shm`` and the (empty) network belong to one ``spawn`` or ``run`` each. As root, a control group (v2 or v1,
whichever this machine lets us make) bounds what all programs of a sandbox take together.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from north_lightning.errors import SandboxError
from north_lightning.sandbox.cgroups import Kind
from north_lightning.sandbox.command import Launcher, Limits, make_launcher
from north_lightning.sandbox.local import Base, LocalProvider, LocalSandbox
from north_lightning.sandbox.probe import check_programs, probe, program
from north_lightning.sandbox.processes import SandboxProcess, start
from north_lightning.sandbox.root_files import make_root, take_work
from north_lightning.sandbox.slots import Host, Slot
from north_lightning.sandbox.trees import is_reachable_by_others, mount_bind
from north_lightning.types import RootFileSystem

_GROUP_FACTOR = 4  # a sandbox has several programs: a terminal, a shell, a tool that reads files


class BubblewrapProvider(LocalProvider):
    """Runs commands under bubblewrap (0.8 or newer) on this machine.

    Args:
        images: What tasks that bring an image run on, by the image's name: a root file system in a directory, or an OCI
            image, in a directory or an archive (``skopeo copy docker://NAME oci-archive:FILE`` makes one). A task's
            Dockerfile is built on the one that ``FROM`` names (``dockerfile_build``). Without an entry for it, such a
            task is refused. Every other task sees this machine's own system.
        limits: as of every local sandbox: ``memory_bytes``, ``max_processes``, ``max_file_bytes``, ``max_work_bytes``,
            ``max_files``, ``max_output_bytes``, ``max_slots``, ``root``, ``first_uid``.
    """

    def __init__(self, images: dict[str, Path] | None = None, **limits: Any) -> None:
        super().__init__(**limits)
        self.images = images or {}

    @property
    def resource_control(self) -> Kind:
        """What bounds a whole sandbox here, beside the resource limits of its processes."""
        return self._prepared().cgroups.kind

    def describe(self) -> dict[str, str]:
        host = self._prepared()
        kind = self.resource_control
        whole = f"{kind}: the sandbox's sum with its files" if host.cgroups.directories else "the sum is not bounded"
        return {
            "isolation": "bubblewrap: user, process, network, mount, IPC and host-name namespaces; no capabilities",
            "system_calls": "seccomp filter" if host.seccomp else "no filter: no call table for this architecture",
            "resource_control": kind,
            "memory_bytes": f"resource limit of each process (address space); {whole}; when memory runs out the kernel"
            " kills sandboxed processes first",
            "max_processes": "resource limit of each process tree"
            + (f"; {kind}: {_GROUP_FACTOR} times as many in the sandbox" if host.cgroups.directories else ""),
            **super().describe(),
        }

    def _check_programs(self) -> None:
        check_programs()

    def _probe(self, host: Host, slot: Slot) -> None:
        probe(self._launcher(host, slot, [], Base()), slot)

    def _base(self, host: Host, root: RootFileSystem | None) -> Base:
        if root is None:
            return Base()
        folder = Path(tempfile.mkdtemp(prefix="root-", dir=host.root))
        folder.chmod(0o755)
        settings = make_root(folder / "system", root.image, self.images, host)
        (folder / "system").chmod(0o755)
        workdir = root.workdir or settings.workdir or "/"
        workdir = "/work" if workdir == "/" else workdir
        work = take_work(folder / "system", workdir, folder / "work")
        return Base(str(folder / "system"), workdir, work, settings.variables)

    def _sandbox(
        self, host: Host, slot: Slot, base: Base, read_only: Mapping[str, Path], writable: Mapping[str, Path]
    ) -> BubblewrapSandbox:
        mounts: list[str] = []
        for option, paths in (("--ro-bind", read_only), ("--bind", writable)):
            for inside, here in paths.items():
                mounts += [option, str(_reachable(Path(here), slot, len(mounts))), inside]
        return BubblewrapSandbox(self, host, slot, self._launcher(host, slot, mounts, base))

    def _launcher(self, host: Host, slot: Slot, mounts: Sequence[str], base: Base) -> Launcher:
        memory_bytes = self.memory_bytes + self.max_work_bytes
        return make_launcher(
            bwrap=program("bwrap"),
            setpriv="" if slot.uid is None else program("setpriv"),
            uid=slot.uid,
            directory=slot.directory,
            etc=host.etc,
            seccomp=host.seccomp,
            mounts=mounts,
            limits=Limits(self.memory_bytes, self.max_processes, self.max_file_bytes),
            cgroups=host.cgroups.make(slot.name, memory_bytes, _GROUP_FACTOR * self.max_processes),
            root=Path(base.image) if base.image else None,
            workdir=base.workdir,
            variables=base.variables,
        )


class BubblewrapSandbox(LocalSandbox):
    """Made by ``BubblewrapProvider.open``."""

    def __init__(self, provider: BubblewrapProvider, host: Host, slot: Slot, launcher: Launcher) -> None:
        super().__init__(provider, host, slot)
        self._launcher = launcher

    async def _launch(self, argv: Sequence[str], *, with_stdin: bool) -> SandboxProcess:
        filter_fd = self._launcher.open_filter()
        try:
            return await start(
                self._launcher.argv(argv, filter_fd),
                with_stdin=with_stdin,
                pass_fds=() if filter_fd is None else (filter_fd,),
            )
        finally:
            if filter_fd is not None:
                os.close(filter_fd)


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
