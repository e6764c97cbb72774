"""Sandboxes from Harbor's environments: Daytona, E2B, Modal, Runloop, Kubernetes and the others that Harbor speaks to.
Needs the ``harbor`` extra, and Python 3.12 as Harbor does.

In: the name of an environment type, an image or a task's Dockerfile, files. Out: ``Sandbox`` objects whose programs run
there. Isolation is the environment's: what it promises is Harbor's and the vendor's word, and nothing here can check
it. Files travel as archives; a mount is a copy, and what a program wrote into a writable one comes back when the
command has ended.

The conformance cases hold over Harbor 0.25's own Podman environment and over its interface in containers; no vendor's
service was at hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from north_lightning.errors import ConfigError, SandboxError, SandboxUnavailableError, TreeTooLargeError
from north_lightning.interfaces import SandboxProvider
from north_lightning.sandbox.command import ENVIRONMENT
from north_lightning.sandbox.executed import FOLDER, ExecutedProcess, start_executed
from north_lightning.sandbox.layers import BoundedEntry, unpack
from north_lightning.sandbox.programs import ProgramSandbox
from north_lightning.sandbox.scratch import Scratch
from north_lightning.types import CommandResult, Count, Positive, RootFileSystem

log = logging.getLogger(__name__)

MIB = 1 << 20
_VARIABLES = {name: value for name, value in ENVIRONMENT.items() if name != "PATH"}  # the image knows its own
_ROUND_TRIP_S = 120  # of a script that itself waits ten seconds at most
_FAILURES_HERE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.EACCES)
_MAX_MOUNT_BYTES = 64 * MIB  # of what comes back from a writable mount


class Environment(Protocol):
    """What is used of ``harbor.environments.base.BaseEnvironment``."""

    async def start(self, force_build: bool) -> None: ...
    async def stop(self, delete: bool) -> None: ...
    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None: ...
    async def upload_file(self, source_path: Path | str, target_path: str) -> None: ...
    async def download_file(self, source_path: str, target_path: Path | str) -> None: ...
    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: int | None = None,
        user: str | int | None = None,
    ) -> Any: ...


class HarborProvider(SandboxProvider):
    """Runs commands in environments that Harbor starts, one for each attempt and each verification.

    Args:
        environment: Harbor's name of the type (``daytona``, ``e2b``, ``modal``, ...), or ``module:Class`` of one's own.
            Credentials come from where Harbor looks for them, usually variables of the environment.
        image: what tasks without an image of their own run on; it needs bash, tar, setsid and, for terminals, tmux.
        settings: further arguments of Harbor's environment class.
        user: who runs the programs inside; by default the image's user, often root.
        network: whether programs may reach the network. Without, Harbor refuses a type that cannot cut it off.
        cpus: as Harbor takes them; so are ``memory_mib`` and ``storage_mib``. None: the environment's own default.
        max_work_bytes: largest ``/work`` that ``snapshot`` brings back.
        max_files: and the most files in it.
        max_file_bytes: size of one file that a program writes.
        max_output_bytes: output of ``run`` that is kept.
        build_timeout_s: limit for building an image; ``timeouts.open_s`` has to exceed it.
    """

    def __init__(
        self,
        environment: str,
        image: str | None = None,
        settings: dict[str, Any] | None = None,
        user: str | None = None,
        network: bool = False,
        cpus: Positive | None = None,
        memory_mib: Count | None = None,
        storage_mib: Count | None = None,
        max_work_bytes: Count = 512 * MIB,
        max_files: Count = 100_000,
        max_file_bytes: Count = 256 * MIB,
        max_output_bytes: Count = MIB,
        build_timeout_s: Positive = 600.0,
    ) -> None:
        self.environment = environment
        self.image = image
        self.settings = dict(settings or {})
        self.user = user
        self.network = network
        self.cpus, self.memory_mib, self.storage_mib = cpus, memory_mib, storage_mib
        self.max_work_bytes = max_work_bytes
        self.max_files = max_files
        self.max_file_bytes = max_file_bytes
        self.max_output_bytes = max_output_bytes
        self.build_timeout_s = build_timeout_s

    @property
    def open_limit_s(self) -> float:
        return self.build_timeout_s

    def check(self) -> None:
        """Ask Harbor whether the environment type can be used here (credentials, programs). Starts nothing."""
        try:
            from harbor.environments.factory import EnvironmentFactory
            from harbor.models.environment_type import EnvironmentType
        except (ImportError, SyntaxError) as error:
            raise SandboxUnavailableError(
                f"Harbor cannot be imported ({error}): pip install north_lightning[harbor], with Python 3.12 or later"
            ) from error
        own = ":" in self.environment
        if not own and self.environment not in {one.value for one in EnvironmentType}:
            known = ", ".join(one.value for one in EnvironmentType)
            raise ConfigError(f"environment: expected module:Class or one of {known}, got {self.environment!r}")
        try:
            EnvironmentFactory.run_preflight(
                None if own else EnvironmentType(self.environment), import_path=self.environment if own else None
            )
        except (Exception, SystemExit) as error:
            raise SandboxUnavailableError(f"{self.environment}: {error}") from error

    def describe(self) -> dict[str, str]:
        return {
            "isolation": f"Harbor's environment {self.environment}: its own word",
            "resource_control": "the environment's",
            "user": self.user or "the image's",
        }

    def check_root(self, root: RootFileSystem) -> None:
        """``ConfigError`` if a Dockerfile is not there; images are looked for when they are needed."""
        if isinstance(root.image, Path) and not root.image.is_file():
            raise ConfigError(f"{root.image}: there is no such Dockerfile")

    async def open(
        self,
        image: Path | None,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        root: RootFileSystem | None = None,
    ) -> HarborSandbox:
        """Start an environment and bring the files there; ``SandboxError`` with Harbor's words if it cannot."""
        scratch = Scratch("harbor")
        sandbox = None
        try:
            with _harbor_errors("make an environment"):
                environment = self._environment(scratch.path, root)
            sandbox = HarborSandbox(self, environment, scratch, dict(writable or {}))
            await sandbox.start(image, {**(read_only or {}), **(writable or {})}, root)
        except BaseException:
            if sandbox is None:
                scratch.delete()
                raise
            with contextlib.suppress(SandboxError):
                await sandbox.close()
            raise
        return sandbox

    def _environment(self, scratch: Path, root: RootFileSystem | None) -> Environment:
        from harbor.environments.factory import EnvironmentFactory
        from harbor.models.task.config import EnvironmentConfig, NetworkMode, NetworkPolicy
        from harbor.models.trial.config import EnvironmentConfig as TrialEnvironment
        from harbor.models.trial.paths import TrialPaths

        name = self.image if root is None else root.image
        if name is None:
            raise ConfigError("image: expected one for tasks that bring none, got nothing")
        folder = name.parent if isinstance(name, Path) else scratch / "environment"
        (scratch / "environment").mkdir()
        (scratch / "trial").mkdir()
        mode = NetworkMode.PUBLIC if self.network else NetworkMode.NO_NETWORK
        own = ":" in self.environment
        environment: Environment = EnvironmentFactory.create_environment_from_config(
            TrialEnvironment(
                type=None if own else self.environment,
                import_path=self.environment if own else None,
                kwargs=self.settings,
            ),
            environment_dir=folder,
            environment_name=folder.parent.name if isinstance(name, Path) else "north",
            session_id=f"north-{secrets.token_hex(8)}",
            trial_paths=TrialPaths(trial_dir=scratch / "trial"),
            task_env_config=EnvironmentConfig(
                docker_image=name if isinstance(name, str) else None,
                build_timeout_sec=self.build_timeout_s,
                cpus=self.cpus,
                memory_mb=self.memory_mib,
                storage_mb=self.storage_mib,
                workdir=None if root is None else root.workdir,
            ),
            network_policy=NetworkPolicy(network_mode=mode),
            enable_environment_dir_upload=False,
        )
        return environment


class HarborSandbox(ProgramSandbox):
    """Made by ``HarborProvider.open``."""

    def __init__(
        self, provider: HarborProvider, environment: Environment, scratch: Scratch, writable: Mapping[str, Path]
    ) -> None:
        super().__init__(provider.max_output_bytes)
        self._provider = provider
        self._environment = environment
        self._scratch = scratch
        self._writable = writable

    async def start(self, image: Path | None, mounts: Mapping[str, Path], root: RootFileSystem | None) -> None:
        """Start the environment; ``/work`` is its work directory, with the files of ``image`` or else its own."""
        with _harbor_errors("start"):
            await self._environment.start(force_build=False)
        workdir = "/work" if root is None else root.workdir or (await self._execute("pwd", cwd=None)).strip()
        if workdir not in ("/work", "/"):
            await self._execute(f"[ -e /work ] || ln -s {shlex.quote(workdir)} /work", cwd="/")
        clear = "" if image is None else "find /work/ -mindepth 1 -delete"
        made = f"mkdir -p /work /home/agent {FOLDER}; chmod 1777 /tmp /home/agent {FOLDER}"
        await self._execute(f"{made}; {clear}", cwd="/")
        if image is not None:
            await self._bring(image, "/work")
        for inside, here in mounts.items():
            if not inside.startswith("/"):
                raise ValueError(f"mounts: expected an absolute path inside the sandbox, got {inside!r}")
            await self._bring(here, inside)
            rights = "a+rwX" if inside in self._writable else "a-w,a+rX"
            await self._execute(f"chmod -R {rights} {shlex.quote(inside)}", cwd="/")
        if self._provider.user is not None:
            await self._execute(f"chown -R {shlex.quote(self._provider.user)} /work/", cwd="/")

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        result = await super().run(command, timeout_s)
        for inside, here in self._writable.items():
            try:
                await self._bring_back(inside, here)
            except TreeTooLargeError as error:
                log.warning("%s stays as it was: %s", inside, error)
        return result

    async def snapshot(self, destination: Path) -> None:
        """End every program, then bring ``/work`` back. What an escaped daemon writes afterwards is not in it.

        Raises:
            TreeTooLargeError: there is more than ``max_work_bytes`` or ``max_files``, or what nobody could unpack.
        """
        self._check_open()
        await self._end_processes()
        await self._fetch("/work/", destination, self._provider.max_work_bytes)

    async def _launch(self, argv: Sequence[str], *, with_stdin: bool) -> ExecutedProcess:
        async def execute(script: str) -> str:
            return await self._execute(script, user=self._provider.user)

        return await start_executed(execute, argv, _VARIABLES, self._provider.max_file_bytes, with_stdin=with_stdin)

    async def _delete(self) -> None:
        try:
            with _harbor_errors("stop"):
                await self._environment.stop(delete=True)
        finally:
            await asyncio.to_thread(self._scratch.delete)

    async def _execute(self, script: str, cwd: str | None = "/", user: str | None = None) -> str:
        with _harbor_errors("execute a command"):
            async with asyncio.timeout(_ROUND_TRIP_S):
                words = f"sh -c {shlex.quote(script)}"
                result = await self._environment.exec(words, cwd=cwd, timeout_sec=_ROUND_TRIP_S, user=user)
        if result.return_code != 0:
            raise SandboxError(
                f"inside, exit code {result.return_code}: {(result.stderr or result.stdout or '')[-500:]}"
            )
        return result.stdout or ""

    async def _bring(self, here: Path, inside: str) -> None:
        is_directory = await asyncio.to_thread(here.is_dir)
        with _harbor_errors(f"upload to {inside}"):
            if is_directory:
                await self._execute(f"mkdir -p {shlex.quote(inside)}", cwd="/")
                await self._environment.upload_dir(here, inside)
            else:
                await self._execute(f"mkdir -p {shlex.quote(os.path.dirname(inside))}", cwd="/")
                await self._environment.upload_file(here, inside)

    async def _bring_back(self, inside: str, here: Path) -> None:
        """Files of a writable mount keep their inodes here: whoever holds one open reads what was written inside."""
        with tempfile.TemporaryDirectory(dir=self._scratch.path) as folder:
            await self._fetch(f"{inside}/", Path(folder), _MAX_MOUNT_BYTES)
            await asyncio.to_thread(_lay_over, Path(folder), here)

    async def _fetch(self, inside: str, destination: Path, max_bytes: int) -> None:
        archive = f"{FOLDER}/{secrets.token_hex(8)}.tar"
        script = (
            f"cd {shlex.quote(inside)} && tar -cf - . 2>/dev/null | head -c {2 * max_bytes + 1} >{archive}; "
            f"wc -c <{archive}"
        )
        size = (await self._execute(script, cwd="/")).split()
        if size[:1] == [] or int(size[0]) > 2 * max_bytes:
            raise TreeTooLargeError(f"{inside} holds more than {max_bytes} bytes")
        with tempfile.TemporaryDirectory(dir=self._scratch.path) as folder:
            local = Path(folder, "archive.tar")
            with _harbor_errors(f"download {inside}"):
                await self._environment.download_file(archive, local)
            await self._execute(f"rm -f {archive}", cwd="/")
            await asyncio.to_thread(_unpack, local, destination, max_bytes, self._provider.max_files)


def _unpack(path: Path, destination: Path, max_bytes: int, max_files: int) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(path, tarinfo=BoundedEntry) as archive:
            members = archive.getmembers()
            sizes = {one.name: one.size for one in members}
            total = sum(sizes.get(one.linkname, 0) if one.islnk() else one.size for one in members)
            if len(members) > max_files or total > max_bytes:
                raise TreeTooLargeError("the attempt left more bytes or files than may be brought back")
            unpack(archive, destination)
    except (ConfigError, tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _FAILURES_HERE:
            raise SandboxError(f"cannot unpack what the attempt left: {error}") from error
        raise TreeTooLargeError(f"what the attempt left cannot be unpacked: {error}") from error


def _lay_over(fresh: Path, here: Path) -> None:
    """Make the directory ``here`` what ``fresh`` is: files written in place, those that are gone removed."""
    for old in here.iterdir():
        if not old.is_symlink() and old.is_file() and not (fresh / old.name).exists():
            old.unlink()
    for new in fresh.rglob("*"):
        place = here / new.relative_to(fresh)
        if new.is_symlink():
            continue
        if new.is_dir():
            place.mkdir(exist_ok=True)
        else:
            with new.open("rb") as source, place.open("wb") as target:
                shutil.copyfileobj(source, target)


@contextlib.contextmanager
def _harbor_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (SandboxError, ConfigError, TreeTooLargeError):
        raise
    except Exception as error:
        raise SandboxError(f"Harbor's environment cannot {what}: {type(error).__name__}: {error}") from error
