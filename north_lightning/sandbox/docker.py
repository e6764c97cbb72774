"""Sandboxes from a container engine: Docker, or Podman through its Docker API. Needs the ``docker`` extra.

In: a root file system (see ``DockerProvider``), an image directory and mounts. Out: ``Sandbox`` objects, as from
``BubblewrapProvider``. Every program has a container of its own, which is what ends with the program: an ``exec`` in a
shared container would go on after its time-out. No network, no capabilities, a read-only root file system, a
system-call filter, limits on memory and processes by the engine's control groups, and as root a user id that no other
sandbox has.

The engine must run on this machine: ``/work``, ``/tmp`` and ``/home/agent`` are directories here. Containers of a
process that is killed go on until the next process with this provider starts.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from north_lightning.errors import SandboxError, SandboxUnavailableError
from north_lightning.sandbox.attached import INIT, ContainerProcess, attach
from north_lightning.sandbox.command import ENVIRONMENT, NUM_OPEN_FILES, SHM_BYTES
from north_lightning.sandbox.local import Base, LocalProvider, LocalSandbox, in_thread
from north_lightning.sandbox.probe import PROBE
from north_lightning.sandbox.processes import word_bytes
from north_lightning.sandbox.seccomp import container_profile
from north_lightning.sandbox.slots import Host, Slot
from north_lightning.types import RootFileSystem

if TYPE_CHECKING:
    from north_lightning.sandbox.docker_engine import Engine

_PROBE_TIMEOUT_S = 60


class DockerProvider(LocalProvider):
    """Runs commands in containers of an engine on this machine.

    Args:
        image: the root file system: the name of an image that the engine has, a directory, an image archive (OCI or
            ``docker save``), or a Dockerfile of the common subset (``sandbox.dockerfile``). It needs bash and, for
            terminals, tmux. ``/work`` comes from the task; the image's own ``WORKDIR`` and user are not used. A task
            that names an image or has a Dockerfile of its own runs on that; its ``WORKDIR`` is ``/work`` too.
        engine: address of the Docker API, ``unix://...``; by default ``DOCKER_HOST``, or else the usual socket.
        limits: as of every local sandbox: ``memory_bytes``, ``max_processes``, ``max_file_bytes``, ``max_work_bytes``,
            ``max_files``, ``max_output_bytes``, ``max_slots``, ``root``, ``first_uid``.
    """

    def __init__(self, image: str, engine: str | None = None, **limits: Any) -> None:
        super().__init__(**limits)
        self.image = image
        self.engine = engine
        self._engine: Engine | None = None
        self._image_id = ""
        self._environment: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_engine": None}

    def describe(self) -> dict[str, str]:
        self._check_programs()
        assert self._engine is not None
        return {
            "isolation": f"{self._engine.name}: a container for each program, no capabilities, no network",
            "system_calls": "seccomp profile",
            "resource_control": "control groups of the engine",
            "memory_bytes": "control group of each program",
            "max_processes": "control group of each program",
            **super().describe(),
        }

    def _check_programs(self) -> None:
        if self._engine is not None:
            return
        try:
            from north_lightning.sandbox.docker_engine import Engine
        except ImportError as error:
            raise SandboxUnavailableError("the docker package is not installed: pip install docker") from error
        engine = Engine(self.engine)
        if engine.is_rootless:
            raise SandboxUnavailableError(f"{engine.name} is rootless: its user ids are not this machine's")
        engine.remove_ownerless()
        self._image_id = engine.image(self.image)
        self._environment = engine.environment(self._image_id)
        self._engine = engine

    def _probe(self, host: Host, slot: Slot) -> None:
        sandbox = self._sandbox(host, slot, self._base(host, None), {}, {})
        user = str(os.geteuid() if slot.uid is None else slot.uid)
        container, connection = sandbox.create(["bash", "-c", PROBE, "probe", str(host.root / "lock"), user])
        assert self._engine is not None
        try:
            with connection:
                connection.settimeout(_PROBE_TIMEOUT_S)
                self._engine.start(container)
                said = b""
                while chunk := connection.recv(1 << 16):
                    said += chunk
        except OSError as error:
            raise SandboxUnavailableError(f"commands cannot be isolated by {self._engine.name}: {error}") from error
        finally:
            self._engine.remove(container)
        leaks = _unframed(said)
        file = slot.directory / "work" / "probe"
        if not file.is_file():
            leaks.append("/work is not this machine's: the engine must run here")
        elif slot.uid is not None and file.lstat().st_uid != slot.uid:
            leaks.append(f"files do not belong to user id {slot.uid}")
        if leaks:
            raise SandboxUnavailableError(f"{self._engine.name} does not isolate here: {'; '.join(leaks)}")

    def _base(self, host: Host, root: RootFileSystem | None) -> Base:
        if root is None:
            return Base(self._image_id, variables=self._environment)
        self._check_programs()
        assert self._engine is not None
        name = root.image
        image = self._engine.named(name) if isinstance(name, str) else self._engine.built(name)
        workdir = root.workdir or self._engine.workdir(image)
        folder = Path(tempfile.mkdtemp(prefix="root-", dir=host.root))
        has_work = self._engine.copy_out(image, workdir, folder)
        return Base(image, workdir, folder if has_work else None, self._engine.environment(image))

    def _sandbox(
        self, host: Host, slot: Slot, base: Base, read_only: Mapping[str, Path], writable: Mapping[str, Path]
    ) -> DockerSandbox:
        self._check_programs()
        assert self._engine is not None
        places = {"/work": "work", "/tmp": "tmp", "/var/tmp": "tmp", "/home/agent": "home"}
        places[base.workdir] = "work"
        binds = [f"{slot.directory / part}:{inside}:rw" for inside, part in places.items()]
        for mode, paths in (("ro", read_only), ("rw", writable)):
            binds += [f"{Path(here).resolve()}:{inside}:{mode}" for inside, here in paths.items()]
        if wrong := [bind for bind in binds if bind.count(":") != 2]:
            raise SandboxError(f"mounts: expected paths without a colon, got {wrong[0]}")
        return DockerSandbox(
            self, host, slot, self._engine, self._settings(host, slot, base), self._host_config(host, binds)
        )

    def _settings(self, host: Host, slot: Slot, base: Base) -> dict[str, Any]:
        user = os.geteuid() if slot.uid is None else slot.uid
        group = os.getegid() if slot.uid is None else slot.uid
        from north_lightning.sandbox.docker_engine import LABEL

        return {
            "image": base.image,
            "user": f"{user}:{group}",
            "working_dir": base.workdir,
            "entrypoint": ["/bin/sh"],  # Podman takes an empty one for the image's own
            "stdin_open": True,
            "detach": False,
            "hostname": "sandbox",
            "environment": {**ENVIRONMENT, **base.variables, "HOME": "/home/agent"},
            "labels": {LABEL: str(host.root)},
        }

    def _host_config(self, host: Host, binds: list[str]) -> dict[str, Any]:
        from docker.types import LogConfig, Ulimit

        assert self._engine is not None
        limits = {"core": 0, "nofile": NUM_OPEN_FILES, "fsize": self.max_file_bytes}
        if host.is_root:  # the kernel counts by user, and only then the user is the sandbox's own
            limits["nproc"] = self.max_processes
        return {
            "network_mode": "none",
            "ipc_mode": "private",
            "read_only": True,
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges", f"seccomp={_profile(host, as_file=self._engine.is_podman)}"],
            "mem_limit": self.memory_bytes,
            "memswap_limit": self.memory_bytes,
            "pids_limit": self.max_processes,
            "shm_size": SHM_BYTES,
            "tmpfs": {"/run": "size=65536,ro"},
            "ulimits": [Ulimit(name=name, soft=limit, hard=limit) for name, limit in limits.items()],
            "log_config": LogConfig(type="none"),
            "binds": binds,
        }


class DockerSandbox(LocalSandbox):
    """Made by ``DockerProvider.open``."""

    def __init__(
        self,
        provider: DockerProvider,
        host: Host,
        slot: Slot,
        engine: Engine,
        settings: dict[str, Any],
        host_config: dict[str, Any],
    ) -> None:
        super().__init__(provider, host, slot)
        self._engine = engine
        self._settings = settings
        self._host_config = host_config

    def create(self, argv: Sequence[str]) -> tuple[str, socket.socket]:
        """A container for ``argv``, not started, and the socket attached to it. Blocks."""
        words = [word_bytes(word).decode(errors="surrogateescape") for word in argv]
        settings = {key: value for key, value in self._settings.items() if key != "image"}
        command = ["-c", INIT, "init", *words]
        container = self._engine.create(self._settings["image"], command, settings, self._host_config)
        try:
            return container, self._engine.attach(container)
        except BaseException:
            self._engine.remove(container)
            raise

    async def _launch(self, argv: Sequence[str], *, with_stdin: bool) -> ContainerProcess:
        container, connection = await in_thread(lambda: self.create(argv), undo=self._discard)
        process = await attach(
            connection, lambda: self._engine.start(container), lambda: self._engine.remove(container)
        )
        if not with_stdin:
            process.stdin.close()
        return process

    def _discard(self, created: tuple[str, socket.socket]) -> None:
        container, connection = created
        connection.close()
        self._engine.remove(container)


def _unframed(said: bytes) -> list[str]:
    """The lines that a probe's init and program wrote, without the init's own."""
    text = b""
    while len(said) >= 8:
        length = int.from_bytes(said[4:8], "big")
        text += said[8 : 8 + length]
        said = said[8 + length :]
    lines = text.decode(errors="replace").splitlines()
    if "started" not in lines or "ended 0" not in lines:
        return [f"the probe did not run: {' '.join(lines) or 'no message'}"]
    return [line for line in lines if line not in ("started", "ended 0")]


def _profile(host: Host, *, as_file: bool) -> str:
    """Docker's API takes the profile itself, Podman's the path of a file."""
    text = json.dumps(container_profile())
    if not as_file:
        return text
    path = host.root / "seccomp.json"
    if not path.exists():
        path.write_text(text)
    return str(path)
