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
from north_lightning.untrusted import (
    DIRECTORY,
    MAX_DEPTH,
    NEW_FILE,
    BlockedPathError,
    check_depth,
    open_directory,
    resolve_below,
)

MAX_BYTES = 32 << 30
MAX_FILES = 2_000_000
MAX_RATIO = 250  # of what comes out to what went in; real layers stay below 20
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
_MAX_JSON_BYTES = 16 << 20


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
            manifest = _manifest(_json(file), blob)
        with _checked(blob, manifest["config"]) as file:
            config = _json(file).get("config") or {}
        for layer in manifest["layers"]:
            _unpack_layer(blob, layer, destination, limits)
        words = config.get("Env") or []
        return ImageSettings(
            str(config.get("WorkingDir") or ""), dict(word.split("=", 1) for word in words if "=" in word)
        )


def _json(file: IO[bytes]) -> dict[str, Any]:
    text = file.read(_MAX_JSON_BYTES + 1)
    if len(text) > _MAX_JSON_BYTES:
        raise ConfigError(f"expected at most {_MAX_JSON_BYTES} bytes of JSON, got more")
    value = json.loads(text)
    check_depth(value)
    if not isinstance(value, dict):
        raise ConfigError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _blobs(path: Path, stack: ExitStack) -> Callable[[str], IO[bytes]]:
    """Opens the files of an image layout by name."""
    if path.is_dir():
        return lambda name: stack.enter_context(_regular(path, path / name))
    outer = stack.enter_context(tarfile.open(path, "r:", tarinfo=BoundedEntry))  # noqa: SIM115

    def blob(name: str) -> IO[bytes]:
        for spelled in (name, f"./{name}"):
            with contextlib.suppress(KeyError):
                found = outer.extractfile(spelled)
                if found is not None:
                    return found
        raise ConfigError(f"there is no {name} in it: not an OCI image")

    return blob


def _regular(layout: Path, path: Path) -> IO[bytes]:
    """A file of a layout; a link leads nowhere but to the layout."""
    descriptor = os.open(resolve_below(path, layout, ConfigError), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path.name}: expected a regular file")
    return os.fdopen(descriptor, "rb")


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
            found = _json(file)
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
        size = file.seek(0, io.SEEK_END)  # not what the manifest says
        for step in (_hide, _add):
            file.seek(0)
            plain = gzip.GzipFile(fileobj=file) if kind.endswith("gzip") else file
            with tarfile.open(fileobj=Bounded(plain, size), mode="r|", tarinfo=BoundedEntry) as archive:
                for member in archive:
                    if (step is _hide) == _is_whiteout(member):
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
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
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
            below = os.open(name, DIRECTORY, dir_fd=folder)
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
    with os.fdopen(os.open(name, NEW_FILE, 0o600, dir_fd=folder), "wb") as file:
        shutil.copyfileobj(content, file, _CHUNK_BYTES)
        file.flush()
        os.fchmod(file.fileno(), member.mode & 0o777)
        os.utime(file.fileno(), (member.mtime, member.mtime))


def _is_whiteout(member: tarfile.TarInfo) -> bool:
    return "".join(_parts(member.name)[-1:]).startswith(_WHITEOUT)


def _parts(name: str) -> list[str]:
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", ".")]
    if ".." in parts or len(parts) > MAX_DEPTH or "\0" in name:
        raise ConfigError(f"expected a path inside the image, got {name[:100]!r}")
    return parts


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


class Bounded(io.RawIOBase):
    """Reads what a file of ``num_bytes`` may hold uncompressed, and no more."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, num_bytes: int) -> None:
        self._file = file
        self._left = _FREE_BYTES + MAX_RATIO * num_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._left -= len(data) or _CHUNK_BYTES  # tarfile goes on to ask where a member that is said to be huge ends
        if self._left < 0:
            raise ConfigError(f"an archive grows more than {MAX_RATIO} times while it is unpacked")
        return data


@contextlib.contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except Exception as error:  # a file that is missing or torn, a value of another type, a date that is none
        raise ConfigError(f"{path}: cannot be unpacked as an OCI image: {type(error).__name__}: {error}") from error
