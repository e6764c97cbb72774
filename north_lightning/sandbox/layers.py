"""Root file systems from image archives, without an engine.

In: tar files, or an OCI image as an archive or directory (``skopeo copy ... oci-archive:``, ``podman save --format
oci-archive``). Out: directories. An archive is not trusted: nothing is written outside of the destination, no link is
followed, set-id bits and special files are left out, and size, number of files and ratio of compression are limited.
Every blob must have the digest that names it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from north_lightning.errors import ConfigError

MAX_BYTES = 32 << 30
MAX_FILES = 2_000_000
MAX_RATIO = 250  # of what comes out to what went in; real layers stay below 20
MAX_DEPTH = 128
_FREE_BYTES = 64 << 20  # whatever the ratio
_MAX_HEADER_BYTES = 1 << 20
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_CHUNK_BYTES = 1 << 20
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class BlockedPathError(ConfigError):
    """A link or a file where a directory was expected."""


@dataclass
class Limits:
    """What is left for all layers of an image together."""

    num_bytes: int = MAX_BYTES
    num_files: int = MAX_FILES

    def spend(self, num_bytes: int, num_files: int) -> None:
        self.num_bytes -= num_bytes
        self.num_files -= num_files
        if self.num_bytes < 0 or self.num_files < 0:
            raise ConfigError("the image holds more bytes or files than a root file system may")


@dataclass(frozen=True)
class ImageSettings:
    """What an image's configuration says to whoever runs it."""

    workdir: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


# ---- images --------------------------------------------------------------------------------------------------------


def unpack_image(path: Path, destination: Path) -> ImageSettings:
    """Unpack an OCI image, an archive or a directory, into the new directory ``destination``.

    Raises:
        ConfigError: it is none, it is of another machine's architecture, or it does what a layer must not.
    """
    destination.mkdir(parents=True)
    limits = Limits()
    with ExitStack() as stack, _image_errors(path):
        blob = _blobs(path, stack)
        with blob("index.json") as file:
            manifest = _manifest(json.load(file), blob)
        with _checked(blob, manifest["config"]) as file:
            config = json.load(file).get("config") or {}
        for layer in manifest["layers"]:
            _unpack_layer(blob, layer, destination, limits)
    words = config.get("Env") or []
    return ImageSettings(config.get("WorkingDir") or "", dict(word.split("=", 1) for word in words if "=" in word))


def _blobs(path: Path, stack: ExitStack) -> Callable[[str], IO[bytes]]:
    """Opens the files of an image layout by name."""
    if path.is_dir():
        return lambda name: stack.enter_context(open(path / name, "rb"))
    outer = stack.enter_context(tarfile.open(path, "r:"))  # noqa: SIM115

    def blob(name: str) -> IO[bytes]:
        for spelled in (name, f"./{name}"):
            with contextlib.suppress(KeyError):
                found = outer.extractfile(spelled)
                if found is not None:
                    return found
        raise ConfigError(f"there is no {name} in it: not an OCI image")

    return blob


def _checked(blob: Callable[[str], IO[bytes]], descriptor: Mapping[str, Any]) -> IO[bytes]:
    """The blob of a descriptor, at its beginning, once its digest has been found right."""
    algorithm, _, digest = str(descriptor["digest"]).partition(":")
    if algorithm != "sha256" or len(digest) != 64 or not digest.isalnum():
        raise ConfigError(f"expected a sha256 digest, got {descriptor['digest']!r}")
    file = blob(f"blobs/sha256/{digest}")
    if hashlib.file_digest(file, "sha256").hexdigest() != digest:  # type: ignore[arg-type]
        raise ConfigError(f"the blob {digest} has another digest")
    file.seek(0)
    return file


def _manifest(index: Mapping[str, Any], blob: Callable[[str], IO[bytes]]) -> dict[str, Any]:
    """The manifest for this machine, through indexes of indexes."""
    here = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    for _ in range(4):
        fitting = [
            one
            for one in index["manifests"]
            if (one.get("platform") or {}).get("architecture", here) == here
            and (one.get("platform") or {}).get("os", "linux") == "linux"
        ]
        if not fitting:
            raise ConfigError(f"there is no image for linux/{here} in it")
        with _checked(blob, fitting[0]) as file:
            found: dict[str, Any] = json.load(file)
        if "layers" in found:
            return found
        index = found
    raise ConfigError("its indexes are nested too deeply")


# ---- layers --------------------------------------------------------------------------------------------------------


def _unpack_layer(
    blob: Callable[[str], IO[bytes]], layer: Mapping[str, Any], destination: Path, limits: Limits
) -> None:
    """Whiteouts first: they are of the layers below, wherever in the archive they come."""
    kind = str(layer.get("mediaType", ""))
    if not kind.endswith(("tar", "tar+gzip", "tar.gzip")):
        raise ConfigError(f"expected layers that are tar or gzip, got {kind!r}")
    with _checked(blob, layer) as file:
        for step in (_hide, _add):
            file.seek(0)
            plain = gzip.GzipFile(fileobj=file) if kind.endswith("gzip") else file
            bounded = _Bounded(plain, _FREE_BYTES + MAX_RATIO * int(layer["size"]))
            with tarfile.open(fileobj=bounded, mode="r|", tarinfo=BoundedEntry) as archive:
                for member in archive:
                    step(archive, member, destination, limits)


def unpack(archive: tarfile.TarFile, destination: Path, below: str = "") -> None:
    """Unpack an archive into the directory ``destination``; ``below`` is a first directory to leave out of names."""
    limits = Limits()
    for member in archive:
        parts = _parts(member.name)
        if below:
            if parts[:1] != [below]:
                raise ConfigError(f"expected members below {below}, got {member.name!r}")
            member.name = "/".join(parts[1:])
            if member.islnk():
                member.linkname = "/".join(_parts(member.linkname)[1:])
        _add(archive, member, destination, limits)


def _hide(archive: tarfile.TarFile, member: tarfile.TarInfo, destination: Path, limits: Limits) -> None:
    """Remove what a whiteout names; a place that is no directory in the layers below holds nothing to remove."""
    parts = _parts(member.name)
    if not parts or not parts[-1].startswith(_WHITEOUT):
        return
    try:
        folder = open_directory(destination, parts[:-1], make=False)
    except (FileNotFoundError, BlockedPathError):
        return
    try:
        for name in os.listdir(folder) if parts[-1] == _OPAQUE else [parts[-1].removeprefix(_WHITEOUT)]:
            if name not in ("", ".", ".."):
                remove(folder, name)
    finally:
        os.close(folder)


def _add(archive: tarfile.TarFile, member: tarfile.TarInfo, destination: Path, limits: Limits) -> None:
    parts = _parts(member.name)
    if (parts and parts[-1].startswith(_WHITEOUT)) or not (
        member.isreg() or member.isdir() or member.issym() or member.islnk()
    ):
        return
    if member.issparse():
        raise ConfigError(f"expected files without holes, got {member.name[:100]!r}")
    limits.spend(member.size if member.isreg() else 0, 1)
    if not parts:
        return
    folder, name = open_directory(destination, parts[:-1]), parts[-1]
    try:
        if member.isdir():
            if not _is_directory(folder, name):
                remove(folder, name)
                os.mkdir(name, 0o755, dir_fd=folder)
            below = os.open(name, _DIRECTORY, dir_fd=folder)
            os.fchmod(below, member.mode & 0o777 | 0o700)
            os.close(below)
            return
        remove(folder, name)
        if member.issym():
            os.symlink(member.linkname, name, dir_fd=folder)
        elif member.islnk():
            source = _parts(member.linkname)
            there = open_directory(destination, source[:-1], make=False)
            try:
                os.link(source[-1], name, src_dir_fd=there, dst_dir_fd=folder, follow_symlinks=False)
            finally:
                os.close(there)
        else:
            _write(archive, member, folder, name)
    finally:
        os.close(folder)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: int, name: str) -> None:
    content = archive.extractfile(member)
    assert content is not None
    with os.fdopen(os.open(name, _NEW_FILE, 0o600, dir_fd=folder), "wb") as file:
        shutil.copyfileobj(content, file, _CHUNK_BYTES)
        file.flush()
        os.fchmod(file.fileno(), member.mode & 0o777)
        os.utime(file.fileno(), (member.mtime, member.mtime))


def _parts(name: str) -> list[str]:
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", ".")]
    if ".." in parts or len(parts) > MAX_DEPTH or "\0" in name:
        raise ConfigError(f"expected a path inside the image, got {name[:100]!r}")
    return parts


def open_directory(root: Path, parts: list[str], make: bool = True) -> int:
    """A descriptor of the directory ``parts`` below ``root``, made where it is missing; no link is followed."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in parts:
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=folder)
            below = os.open(part, _DIRECTORY, dir_fd=folder)
        except NotADirectoryError:
            where = "/".join(parts)
            raise BlockedPathError(f"expected {where} to be reached without links or files on the way") from None
        finally:
            os.close(folder)
        folder = below
    return folder


def _is_directory(folder: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def remove(folder: int, name: str) -> None:
    """Delete ``name`` in an open directory, whatever it is; links are removed, not followed."""
    if _is_directory(folder, name):
        shutil.rmtree(name, dir_fd=folder)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


class BoundedEntry(tarfile.TarInfo):
    """A member whose long names and extended headers, which are read into memory, are of a bounded size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedEntry:
        entry = super().frombuf(buf, encoding, errors)
        if entry.type in _HEADERS and entry.size > _MAX_HEADER_BYTES:
            raise ConfigError(f"expected headers of at most {_MAX_HEADER_BYTES} bytes, got one of {entry.size}")
        return entry


class _Bounded(io.RawIOBase):
    """Reads no more than ``limit`` bytes."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limit: int) -> None:
        self._file = file
        self._left = limit

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ConfigError(f"a layer grows more than {MAX_RATIO} times while it is unpacked")
        return data


@contextlib.contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, tarfile.TarError) as error:
        raise ConfigError(f"{path}: cannot be unpacked as an OCI image: {type(error).__name__}: {error}") from error
