"""Root file systems on this machine, for sandboxes that no engine makes one for.

In: an image that a task names, and where on this machine there is one of that name. Out: a directory that sandboxes can
be shown read-only, with the places in it that something of theirs is mounted at.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from north_lightning.errors import ConfigError
from north_lightning.sandbox.dockerfile import base_of, read_dockerfile
from north_lightning.sandbox.dockerfile_build import built_root
from north_lightning.sandbox.layers import ImageSettings, remove, unpack_image
from north_lightning.sandbox.slots import Host
from north_lightning.sandbox.trees import copy_tree
from north_lightning.untrusted import open_directory

BUILD_TIMEOUT_S = 600.0  # of one instruction


def make_root(destination: Path, image: str | Path, images: Mapping[str, Path], host: Host) -> ImageSettings:
    """Put the root file system of ``image``, a name or a Dockerfile, into the new directory ``destination``.

    ``images`` says by name where it is: a directory, an OCI image in a directory, or an OCI archive. ``ConfigError`` if
    there is none, or the Dockerfile cannot be built on it.
    """
    if isinstance(image, str):
        settings = _named(destination, image, images)
    else:
        instructions = read_dockerfile(image)
        name = base_of(instructions)
        if name is None:
            raise ConfigError(f"{image}: FROM scratch: expected an image with a shell, under bubblewrap")
        base = _named(destination, name, images)
        destination.chmod(0o755)
        settings = built_root(image, instructions, destination, base, host, BUILD_TIMEOUT_S)
    _make_places(destination)
    return settings


def _named(destination: Path, name: str, images: Mapping[str, Path]) -> ImageSettings:
    if name not in images:
        known = ", ".join(sorted(images)) or "none"
        raise ConfigError(f"images: expected an entry for {name!r}, which a task names, got {known}")
    path = Path(images[name])
    if not path.exists():
        raise ConfigError(f"images: {name!r}: {path} not found")
    if path.is_file() or (path / "index.json").is_file():
        return unpack_image(path, destination)
    copy_tree(path, destination)
    return ImageSettings()


def _make_places(root: Path) -> None:
    """Directories that sandboxes mount something at; ``/var/tmp`` is their ``/tmp``."""
    for place in ("home/agent", "logs/verifier", "tests"):
        os.close(open_directory(root, place.split("/")))
    var = open_directory(root, ["var"])
    try:
        remove(var, "tmp")
        os.symlink("/tmp", "tmp", dir_fd=var)
    finally:
        os.close(var)


def take_work(root: Path, workdir: str, destination: Path) -> Path:
    """Copy what ``root`` holds at ``workdir``, made if it is missing, to the new directory ``destination``."""
    parts = [part for part in PurePosixPath(workdir).parts if part != "/"]
    if not parts or ".." in parts or parts[0] in ("proc", "dev", "run", "tmp", "sys"):
        raise ConfigError(f"workdir: expected a directory of the image's own, got {workdir!r}")
    os.close(open_directory(root, parts))
    copy_tree(root.joinpath(*parts), destination)
    return destination
