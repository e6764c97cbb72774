"""A container engine for the tests: one that already answers, or a Podman service of their own. Never a download."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

_CONTAINERS = """[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
runtime = "runc"
"""
_STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
_START_TIMEOUT_S = 20


@contextlib.contextmanager
def container_engine(folder: Path):
    """The address of a Docker API; ``LookupError`` with the reason if this machine has none."""
    if os.environ.get("DOCKER_HOST", "").startswith("unix://"):
        yield os.environ["DOCKER_HOST"]
        return
    missing = [name for name in ("podman", "runc") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise LookupError(f"no Docker API: DOCKER_HOST is not set, and {' and '.join(missing) or 'root'} is missing")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "containers.conf").write_text(_CONTAINERS)
    (folder / "storage.conf").write_text(_STORAGE.format(folder=folder))
    socket = folder / "api.sock"
    environment = {
        **os.environ,
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "BUILDAH_ISOLATION": "chroot",
    }
    with (folder / "service.log").open("wb") as log:
        service = subprocess.Popen(
            ["podman", "system", "service", "--time=0", f"unix://{socket}"], env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not socket.exists():
            if service.poll() is not None or time.monotonic() > deadline:
                raise LookupError(f"Podman's service does not start: {(folder / 'service.log').read_text()[-300:]}")
            time.sleep(0.05)
        yield f"unix://{socket}"
    finally:
        service.send_signal(signal.SIGTERM)
        service.wait(10)
        subprocess.run(["umount", folder / "graph" / "overlay"], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["umount", folder / "graph"], stderr=subprocess.DEVNULL, check=False)
        shutil.rmtree(folder, ignore_errors=True)
