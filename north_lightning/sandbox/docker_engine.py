"""A container engine that speaks Docker's API over a unix socket: Docker, or Podman's service.

In: root file systems and containers to start. Out: image ids and attached sockets; engine errors as ``SandboxError``.
Every call blocks. Nothing is pulled: there are no images but the engine's own and what is given here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import socket
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from north_lightning.errors import ConfigError, SandboxError, SandboxUnavailableError
from north_lightning.sandbox.dockerfile import base_of, read_dockerfile
from north_lightning.sandbox.layers import unpack
from north_lightning.sandbox.scratch import LOCK, take_lock

LABEL = "north-lightning.scratch"
"""On every container: the scratch directory of the process that made it, whose lock tells whether that still lives."""

_SOCKETS = ("/var/run/docker.sock", "/run/podman/podman.sock")
_TIMEOUT_S = 120


class Engine:
    """One connection; may be used from several threads.

    Raises:
        SandboxUnavailableError: nothing answers at ``address``.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address or os.environ.get("DOCKER_HOST") or f"unix://{_first_socket()}"
        if not self.address.startswith("unix://"):
            raise SandboxUnavailableError(f"expected an engine of this machine, at unix://..., got {self.address}")
        try:
            self.api = docker.APIClient(base_url=self.address, timeout=_TIMEOUT_S)
            version = self.api.version()
            self.is_rootless = any("rootless" in option for option in self.api.info().get("SecurityOptions") or ())
        except (DockerException, OSError) as error:
            raise SandboxUnavailableError(
                f"no Docker API at {self.address}: {error}. Start Docker, or Podman's service "
                "(podman system service --time=0 unix://SOCKET), or set engine: or DOCKER_HOST"
            ) from error
        components = {part.get("Name", "") for part in version.get("Components") or ()}
        self.is_podman = any("Podman" in name for name in components)
        self.name = f"{'Podman' if self.is_podman else 'Docker'} {version.get('Version', '?')}"

    # ---- images

    def image(self, root_file_system: str) -> str:
        """The id of an image: its name, a directory, an image archive (OCI or docker save), or a Dockerfile."""
        path = Path(root_file_system)
        if path.is_dir():
            return self._import_directory(path)
        if path.is_file() and (path.name.endswith("Dockerfile") or path.name.startswith("Dockerfile")):
            return self.built(path)
        if path.is_file():
            return self._load(path)
        found = self._image_id(root_file_system)
        if found is None:
            raise SandboxUnavailableError(
                f"image: expected an image of {self.name}, a directory, an image archive or a Dockerfile, got "
                f"{root_file_system!r}; nothing is pulled"
            )
        return found

    def named(self, name: str) -> str:
        """The id of an image that the engine has, by its name alone: nothing of this machine's files."""
        found = self._image_id(name)
        if found is None:
            raise ConfigError(f"{self.name} has no image {name!r}; nothing is pulled")
        return found

    def _image_id(self, name: str) -> str | None:
        with _engine_errors(f"look for the image {name}"):
            try:
                return str(self.api.inspect_image(name)["Id"])
            except ImageNotFound:
                return None

    def _import_directory(self, path: Path) -> str:
        """The directory as an image; the same content is sent once."""
        with tempfile.TemporaryFile() as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
                archive.add(path, arcname=".", filter=_without_owner)
            name = f"north-lightning-{_digest(file)[:32]}"
            if found := self._image_id(name):
                return found
            with _engine_errors(f"import {path}"):
                answer = self.api.import_image_from_data(file, repository=name)
        last = [json.loads(line) for line in str(answer).splitlines() if line.strip()][-1]
        if "error" in last:
            raise SandboxError(f"{self.name} cannot import {path}: {last['error']}")
        return str(last["status"])

    def _load(self, path: Path) -> str:
        with _engine_errors(f"load {path}"), path.open("rb") as file:
            answer = "".join(str(message.get("stream", "")) for message in self.api.load_image(file))
        names = [line.split(": ", 1)[1].strip() for line in answer.splitlines() if line.startswith("Loaded image")]
        if not names:
            raise SandboxError(f"{self.name} cannot load {path} as an image archive: {answer.strip()[:200]}")
        found = self._image_id(names[-1].split(",")[0])
        if found is None:
            raise SandboxError(f"{self.name} loaded {names[-1]} from {path} and does not have it")
        return found

    def built(self, path: Path) -> str:
        """The Dockerfile built on local images, without a network; its directory is the context."""
        instructions = read_dockerfile(path)
        base = base_of(instructions)
        if base is not None and self._image_id(base) is None:
            raise ConfigError(f"{path}: FROM {base}: {self.name} has no such image; nothing is pulled")
        words, built = [], None
        with _engine_errors(f"build {path}"):
            for message in self.api.build(
                path=str(path.parent),
                dockerfile=path.name,
                network_mode="none",
                rm=True,
                forcerm=True,
                pull=False,
                decode=True,
            ):
                words.append(str(message.get("error") or message.get("stream") or ""))
                built = message.get("aux", {}).get("ID", built)
                if "error" in message:
                    raise SandboxError(f"{self.name} cannot build {path}: {''.join(words)[-2000:]}")
        text = "".join(words).split()
        built = built or (text[-1] if text else None)
        if built is None or self._image_id(built) is None:
            raise SandboxError(f"{self.name} did not say what it built from {path}: {' '.join(text)[-200:]}")
        return str(built)

    def environment(self, image: str) -> dict[str, str]:
        """What the image's ``ENV`` sets."""
        with _engine_errors("read the image's settings"):
            words = (self.api.inspect_image(image).get("Config") or {}).get("Env") or []
        return dict(word.split("=", 1) for word in words if "=" in word)

    def workdir(self, image: str) -> str:
        """The image's ``WORKDIR``; ``/work`` where it sets none, or ``/``, which nothing can be mounted over."""
        with _engine_errors("read the image's settings"):
            named = (self.api.inspect_image(image).get("Config") or {}).get("WorkingDir") or "/"
        return "/work" if str(named) == "/" else str(named)

    def copy_out(self, image: str, inside: str, destination: Path) -> bool:
        """Copy what the directory ``inside`` of an image holds, special files left out; whether there is one."""
        container = self.create(image, ["true"], {}, {"network_mode": "none"})
        try:
            with tempfile.TemporaryFile() as file:
                with _engine_errors(f"read {inside}"):
                    try:
                        chunks, _ = self.api.get_archive(container, inside)
                    except NotFound:
                        return False
                    for chunk in chunks:
                        file.write(chunk)
                file.seek(0)
                with tarfile.open(fileobj=file) as archive:
                    unpack(archive, destination, below=PurePosixPath(inside).name)
        finally:
            self.remove(container)
        return True

    # ---- containers

    def create(self, image: str, argv: Sequence[str], settings: Mapping[str, Any], host: Mapping[str, Any]) -> str:
        """A container that has not started, and its id."""
        with _engine_errors("create a container"):
            created = self.api.create_container(
                image, command=list(argv), host_config=self.api.create_host_config(**host), **settings
            )
        return str(created["Id"])

    def attach(self, container: str) -> socket.socket:
        """All three streams of a container, framed; the caller closes it. Attach before ``start``."""
        with _engine_errors("attach to a container"):
            stream = self.api.attach_socket(container, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            connection = socket.socket(fileno=os.dup(stream.fileno()))
            stream._response.close()
        return connection

    def start(self, container: str) -> None:
        with _engine_errors("start a container"):
            self.api.start(container)

    def remove(self, container: str) -> None:
        """Kill the container and delete it; one that is gone is no error."""
        with _engine_errors("remove a container"), contextlib.suppress(NotFound):
            with contextlib.suppress(APIError):  # it may have ended already
                self.api.kill(container)
            self.api.remove_container(container, force=True, v=True)

    def remove_ownerless(self) -> None:
        """Kill the containers of processes that were killed themselves."""
        with _engine_errors("list containers"):
            containers = self.api.containers(all=True, filters={"label": LABEL})
        for container in containers:
            if not _lives(Path(container["Labels"][LABEL])):
                self.remove(container["Id"])


def _first_socket() -> str:
    return next((path for path in _SOCKETS if os.path.exists(path)), _SOCKETS[0])


def _lives(scratch: Path) -> bool:
    if not (scratch / LOCK).exists():
        return False
    try:
        os.close(take_lock(scratch / LOCK))
    except BlockingIOError:
        return True
    return False


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Root's; and a directory's time says nothing of its content. Files keep theirs: compiled Python compares them."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mtime = 0 if entry.isdir() else entry.mtime
    return entry


def _digest(file: IO[bytes]) -> str:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0, io.SEEK_SET)
    return digest


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (DockerException, OSError) as error:
        raise SandboxError(f"the container engine cannot {what}: {error}") from error
