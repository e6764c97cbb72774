"""Where task repositories come from: a source distribution on PyPI, a directory, or a git repository.

In: what a config names. Out: the files of a repository as text, laid out flat (what is under ``src/`` moves up, so that
it can be imported from the repository's root). No code of a package is run here: a source distribution is
downloaded and unpacked, not built.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath

import httpx

from north_lightning.errors import TaskError

INDEX = "https://pypi.org/simple"
MAX_FILE_BYTES = 400_000
MAX_FILES = 2_000
LEFT_OUT = (".git", ".github", "docs", "doc", "examples", "benchmarks", "__pycache__", "node_modules")
Files = Mapping[str, str]
"""Path -> text."""


def sdist_files(name: str, version: str, cache: Path, index: str = INDEX) -> dict[str, str]:
    """The text files of a release's source distribution; downloaded once, its digest checked.

    Raises:
        TaskError: there is no such release, or it has no source distribution.
    """
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
            answer = httpx.get(found[0]["url"], timeout=300, follow_redirects=True)
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise TaskError(f"{name} {version}: could not be downloaded: {error}") from error
        if sha256(answer.content).hexdigest() != found[0]["hashes"]["sha256"]:
            raise TaskError(f"{name} {version}: the download does not have the digest that {index} says")
        partial = archive.with_suffix(".part")
        partial.write_bytes(answer.content)
        partial.replace(archive)
    return flat(_unpacked(archive.read_bytes()))


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
    """The text files of one commit of a local git repository."""
    archive = git(repository, "archive", "--format=tar.gz", commit)
    return flat(_unpacked(archive, strip=0))


def commits(repository: Path, limit: int) -> list[tuple[str, str, str]]:
    """(commit, its only parent, subject) of the last ``limit`` commits that are no merges, newest first."""
    lines = git(repository, "log", "--no-merges", f"-{limit}", "--format=%H%x00%P%x00%s").decode(errors="replace")
    rows = [line.split("\0") for line in lines.splitlines()]
    return [(commit, parent, subject) for commit, parent, subject in rows if parent and " " not in parent]


def git(repository: Path, *arguments: str) -> bytes:
    """What a git command prints; ``TaskError`` with git's own words."""
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True)
    if done.returncode:
        raise TaskError(f"{repository}: git {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def flat(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Text only, without folders that no test needs, and ``src/`` moved up."""
    files: dict[str, str] = {}
    for path, content in contents.items():
        parts = PurePosixPath(path).parts
        if any(part in LEFT_OUT or part.endswith(".egg-info") for part in parts[:-1]) or len(files) >= MAX_FILES:
            continue
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        if "\r" not in text and "\0" not in text:
            files["/".join(parts[1:] if parts[0] == "src" and len(parts) > 1 else parts)] = text
    return files


def _unpacked(archive: bytes, strip: int = 1) -> dict[str, bytes]:
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[strip:]
            file = tar.extractfile(member) if member.isfile() and member.size <= MAX_FILE_BYTES else None
            if file is not None and parts and ".." not in parts and not member.name.startswith("/"):
                contents["/".join(parts)] = file.read()
    return contents


_TEST_FILE = re.compile(r"(^|/)(tests?/.*|test_[^/]*\.py|[^/]*_tests?\.py|tests?\.py|conftest\.py)$")
_SETUP_FILE = re.compile(r"(^|/)(setup|conftest|noxfile|tasks|conf|__main__|_version|version)\.py$")


def is_test(path: str) -> bool:
    """Whether a file belongs to the tests: it is graded with, never changed."""
    return _TEST_FILE.search(path) is not None


def is_source(path: str) -> bool:
    """Whether bugs may be planted in a file."""
    return path.endswith(".py") and not is_test(path) and _SETUP_FILE.search(path) is None
