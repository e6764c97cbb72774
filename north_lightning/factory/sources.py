"""Where task repositories come from: a source distribution on PyPI, a directory, or a git repository.

In: what a config names. Out: the files of a repository as text, laid out flat (what is under ``src/`` moves up, so that
it can be imported from the repository's root). No code of a package is run here: a source distribution is
downloaded and unpacked, not built.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO

import httpx

from north_lightning.errors import ConfigError, NorthError, TaskError
from north_lightning.sandbox.layers import Bounded, BoundedEntry
from north_lightning.tasks.git import git, head_of, objects_of
from north_lightning.untrusted import check_commit, parts_of

INDEX = "https://pypi.org/simple"
MAX_FILE_BYTES = 400_000
MAX_FILES = 2_000
MAX_SDIST_BYTES = 200 << 20
_DISTRIBUTION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]{0,99}")
LEFT_OUT = (".git", ".github", "docs", "doc", "examples", "benchmarks", "__pycache__", "node_modules")
Files = Mapping[str, str]
"""Path -> text."""


def sdist_files(name: str, version: str, cache: Path, index: str = INDEX) -> dict[str, str]:
    """The text files of a release's source distribution; downloaded once, its digest checked.

    Raises:
        TaskError: there is no such release, or it has no source distribution.
    """
    if not _DISTRIBUTION.fullmatch(name) or not _VERSION.fullmatch(version):
        raise ConfigError(f"packages: expected the name and version of a release, got {name!r}: {version!r}")
    archive = cache / f"{name}-{version}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            headers = {"Accept": "application/vnd.pypi.simple.v1+json"}
            listing = httpx.get(f"{index}/{name}/", headers=headers, timeout=60, follow_redirects=True)
            listing.raise_for_status()
            found = [one for one in listing.json()["files"] if _normal(one["filename"]) == _normal(archive.name)]
            if not found:
                raise TaskError(f"{name} {version}: expected a source distribution (.tar.gz) on {index}, got none")
            content, digest = _downloaded(found[0]["url"]), found[0]["hashes"]["sha256"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise TaskError(f"{name} {version}: could not be downloaded: {error}") from error
        if sha256(content).hexdigest() != digest:
            raise TaskError(f"{name} {version}: the download does not have the digest that {index} says")
        partial = archive.with_suffix(".part")
        partial.write_bytes(content)
        partial.replace(archive)
    return flat(_unpacked(archive.read_bytes()))


def _downloaded(url: str) -> bytes:
    content = bytearray()
    with httpx.stream("GET", url, timeout=300, follow_redirects=True) as answer:
        answer.raise_for_status()
        for chunk in answer.iter_bytes():
            content += chunk
            if len(content) > MAX_SDIST_BYTES:
                raise ValueError(f"expected at most {MAX_SDIST_BYTES} bytes")
    return bytes(content)


def _normal(filename: str) -> str:
    """Names of distributions are equal up to case, dashes, dots and underscores."""
    return re.sub(r"[-_.]+", "-", filename).lower()


def directory_files(directory: Path) -> dict[str, str]:
    """The text files of a directory."""
    contents = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_FILE_BYTES
    }
    return flat(contents)


def commit_files(repository: Path, commit: str) -> dict[str, str]:
    """The text files of one commit of a local git repository, or of its ``HEAD``."""
    commit = head_of(repository) if commit == "HEAD" else check_commit(commit, "commit")
    return flat(_unpacked(git(objects_of(repository), "archive", "--format=tar", commit), strip=0, is_compressed=False))


def commits(repository: Path, limit: int) -> list[tuple[str, str, str]]:
    """(commit, its only parent, subject) of the last ``limit`` commits that are no merges, newest first."""
    log = git(objects_of(repository), "log", "--no-merges", f"-{limit}", "--format=%H%x00%P%x00%s", head_of(repository))
    rows = [line.split("\0") for line in log.decode(errors="replace").split("\n") if line]
    return [(commit, parent, subject) for commit, parent, subject in rows if parent and " " not in parent]


def flat(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Text only, without folders that no test needs, and ``src/`` moved up."""
    files: dict[str, str] = {}
    for path, content in contents.items():
        parts = PurePosixPath(path).parts
        if any(part in LEFT_OUT or part.endswith(".egg-info") for part in parts[:-1]) or len(files) >= MAX_FILES:
            continue
        if parts[-1].lower() == ".git" or not all(map(str.isprintable, parts)):
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if "\r" not in text and "\0" not in text:
            files["/".join(parts[1:] if parts[0] == "src" and len(parts) > 1 else parts)] = text
    return files


def _unpacked(archive: bytes, strip: int = 1, is_compressed: bool = True) -> dict[str, bytes]:
    contents = {}
    plain: IO[bytes] | gzip.GzipFile = io.BytesIO(archive)
    if is_compressed:
        plain = gzip.GzipFile(fileobj=plain)
    try:
        with tarfile.open(fileobj=Bounded(plain, len(archive)), mode="r|", tarinfo=BoundedEntry) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() and member.size <= MAX_FILE_BYTES else None
                with contextlib.suppress(TaskError):  # a path that leads out is left out
                    if file is not None and (parts := parts_of(member.name, "member")[strip:]):
                        contents["/".join(parts)] = file.read()
    except (NorthError, tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise TaskError(f"expected a sound archive of a repository, got: {error}") from error
    return contents


_TEST_FILE = re.compile(r"(^|/)(tests?/.*|test_[^/]*\.py|[^/]*_tests?\.py|tests?\.py|conftest\.py)$")
_SETUP_FILE = re.compile(r"(^|/)(setup|conftest|noxfile|tasks|conf|__main__|_version|version)\.py$")


def is_test(path: str) -> bool:
    """Whether a file belongs to the tests: it is graded with, never changed."""
    return _TEST_FILE.search(path) is not None


def is_source(path: str) -> bool:
    """Whether bugs may be planted in a file."""
    return path.endswith(".py") and not is_test(path) and _SETUP_FILE.search(path) is None
