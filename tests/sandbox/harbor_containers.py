"""An environment of Harbor's interface in a container on this machine: stands where a vendor's would."""

import asyncio
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import docker

from north_lightning.sandbox.harbor import HarborProvider


@dataclass
class Executed:
    stdout: str
    stderr: str
    return_code: int


class ContainerEnvironment:
    """The methods of ``BaseEnvironment``, over the engine's ``exec`` and archives."""

    def __init__(self, engine: str, image: str) -> None:
        self.api = docker.APIClient(base_url=engine, timeout=120)
        self.image = image
        self.container = None

    async def start(self, force_build):
        await asyncio.to_thread(self._start)

    def _start(self):
        host = self.api.create_host_config(network_mode="none", init=False)
        self.container = self.api.create_container(self.image, ["sleep", "2147483647"], host_config=host)["Id"]
        self.api.start(self.container)

    async def stop(self, delete):
        if self.container is not None:
            await asyncio.to_thread(self.api.remove_container, self.container, force=True, v=True)

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None):
        return await asyncio.to_thread(self._exec, command, cwd, user)

    def _exec(self, command, cwd, user):
        made = self.api.exec_create(self.container, ["bash", "-c", command], workdir=cwd, user=user or "")
        stdout, stderr = self.api.exec_start(made["Id"], demux=True)
        code = self.api.exec_inspect(made["Id"])["ExitCode"]
        return Executed((stdout or b"").decode(), (stderr or b"").decode(), code)

    async def upload_dir(self, source_dir, target_dir):
        await asyncio.to_thread(self._put, source_dir, ".", target_dir)

    async def upload_file(self, source_path, target_path):
        target = Path(target_path)
        await asyncio.to_thread(self._put, source_path, target.name, str(target.parent))

    def _put(self, source, name, folder):
        with io.BytesIO() as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                archive.add(source, arcname=name)
            self.api.put_archive(self.container, folder, file.getvalue())

    async def download_file(self, source_path, target_path):
        await asyncio.to_thread(self._get, source_path, target_path)

    def _get(self, source_path, target_path):
        chunks, _ = self.api.get_archive(self.container, source_path)
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            Path(target_path).write_bytes(archive.extractfile(archive.getmembers()[0]).read())


class ContainerProvider(HarborProvider):
    """Harbor's provider without Harbor, which this Python may be too old for."""

    def __init__(self, engine: str, image: str, **settings) -> None:
        super().__init__("containers", image=image, **settings)
        self.engine = engine

    def check(self):
        pass

    def _environment(self, scratch, root):
        return ContainerEnvironment(self.engine, self.image if root is None else root.image)
