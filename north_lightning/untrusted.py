"""Names, paths, files and JSON that come from outside: rows, task directories, archives, checkpoints of strangers.

In: text that a stranger chose. Out: the same once it is known to stay inside its target, or an error that says what was
expected. Names are allow-listed; paths are relative and walked without following a link; files are regular and of a
bounded size. Not here: what the content means.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickletools
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from north_lightning.errors import ConfigError, DataError, NorthError, TaskError

MAX_FILE_BYTES = 16 << 20
MAX_DEPTH = 128
"""Largest depth of a path and of nested JSON."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class BlockedPathError(ConfigError):
    """A link or a file where a directory was expected."""


# ---- names ---------------------------------------------------------------------------------------------------------


def check_name(name: str, key: str, error: type[NorthError] = TaskError) -> str:
    """``name``, which may be that of a file or directory: letters, digits and ``_ . + = @ -``, no dot or dash first."""
    if not _NAME.fullmatch(name):
        raise error(
            f"{key}: expected a name of at most 200 letters, digits and _.+=@- that begins with none of .+=@-, "
            f"got {name[:80]!r}"
        )
    return name


def check_commit(text: str, key: str) -> str:
    """``text``, which may be the id of a commit: no branch, no option of git."""
    if not _COMMIT.fullmatch(text):
        raise TaskError(f"{key}: expected the hexadecimal id of a commit, got {text[:80]!r}")
    return text


def parts_of(path: str, key: str, error: type[NorthError] = TaskError) -> tuple[str, ...]:
    """The parts of a relative path that stays below where it begins and is in no ``.git``."""
    pure = PurePosixPath(path)
    is_short = len(pure.parts) <= MAX_DEPTH and all(len(os.fsencode(part)) <= 255 for part in pure.parts)
    leads_out = pure.is_absolute() or not pure.parts or ".." in pure.parts or "\0" in path
    if leads_out or not is_short or any(part.lower() == ".git" for part in pure.parts):
        raise error(f"{key}: expected a relative path without '..' and '.git', got {path[:100]!r}")
    return pure.parts


# ---- files ---------------------------------------------------------------------------------------------------------


def open_directory(root: Path, parts: list[str] | tuple[str, ...], make: bool = True) -> int:
    """A descriptor of the directory ``parts`` below ``root``, made where it is missing; no link is followed."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in parts:
        try:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=folder)
            below = os.open(part, DIRECTORY, dir_fd=folder)
        except NotADirectoryError:
            where = "/".join(parts)
            raise BlockedPathError(f"expected {where} to be reached without links or files on the way") from None
        finally:
            os.close(folder)
        folder = below
    return folder


def write_files(directory: Path, files: Mapping[str, str | bytes], key: str = "files") -> None:
    """Write content at relative paths below ``directory``, made if missing; no link is followed and nothing replaced.

    Raises:
        TaskError: a path that leads out, through a link or a file, or to what is there already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        *above, name = parts_of(path, key)
        try:
            folder = open_directory(directory, above)
            try:
                with os.fdopen(os.open(name, NEW_FILE, 0o644, dir_fd=folder), "wb") as file:
                    file.write(text if isinstance(text, bytes) else text.encode())
            finally:
                os.close(folder)
        except (BlockedPathError, FileExistsError, UnicodeEncodeError) as error:
            raise TaskError(f"{key}: {path[:100]!r} cannot be written: {error}") from error


def read_file(path: Path, root: Path, max_bytes: int = MAX_FILE_BYTES, error: type[NorthError] = TaskError) -> bytes:
    """Content of a regular file below ``root``, directly or by links that stay there; ``OSError`` if there is none."""
    resolved = resolve_below(path, root, error)
    descriptor = os.open(resolved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise error(f"{path.name}: expected a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise error(f"{path.name}: expected at most {max_bytes} bytes, got more")
    return content


def resolve_below(path: Path, root: Path, error: type[NorthError] = TaskError) -> Path:
    """``path`` without links, which must be below ``root``."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as loop:  # Python 3.11 and 3.12 raise RuntimeError
        raise error(f"{path.name}: a link that leads to itself") from loop
    if not resolved.is_relative_to(root.resolve()):
        raise error(f"{path.relative_to(root) if path.is_relative_to(root) else path}: a link that leads out of {root}")
    return resolved


# ---- values --------------------------------------------------------------------------------------------------------


def load_json(text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """``json.loads``; whatever is wrong with the text, and too deep nesting, is a ``DataError``."""
    try:
        value = json.loads(text, object_pairs_hook=make_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"expected JSON, got {text[:80]!r} ({error})") from error
    check_depth(value)
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)} is given twice in one block")
    return dict(pairs)


def read_json(path: Path, error: type[NorthError]) -> dict[str, Any]:
    """The object in a JSON file; ``error`` if there is none, or if one of its keys is given twice."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"expected at most {MAX_FILE_BYTES} bytes, got more")
        value = load_json(path.read_bytes(), _no_key_twice)
    except (OSError, DataError) as problem:
        raise error(f"{path}: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def load_pickled_text(data: bytes) -> str:
    """The one text in a pickle that holds nothing else. Nothing is unpickled: its instructions are read, and any that
    could do more than make a text is a ``DataError``."""
    texts = []
    try:
        for instruction, argument, _ in pickletools.genops(data):
            if instruction.name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"):
                texts.append(argument)
            elif instruction.name not in ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"):
                raise ValueError(f"the instruction {instruction.name}")
    except Exception as error:  # whatever a damaged pickle makes the reader raise
        raise DataError(f"expected a pickle of one text, got: {error}") from error
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise DataError(f"expected a pickle of one text, got {len(texts)}")
    return texts[0]


def check_digests(files: Sequence[Path], expected: Sequence[str] | None, key: str = "sha256") -> list[str]:
    """The SHA-256 of every file, in hexadecimal; ``DataError`` for a file that is not there, or is another one than
    expected."""
    if expected is not None and len(expected) != len(files):
        raise ConfigError(f"{key}: expected one for each of {len(files)} files, got {len(expected)}")
    found = []
    for number, file in enumerate(files):
        try:
            with file.open("rb") as opened:
                found.append(hashlib.file_digest(opened, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"{file}: expected a file, got: {error.strerror}") from error
        if expected is not None and found[-1] != expected[number].strip().lower():
            raise DataError(
                f"{key}: {file}: expected {expected[number]}, got {found[-1]}: get the version of the data that was "
                f"meant, or leave {key} out"
            )
    return found


def check_depth(value: Any, max_depth: int = MAX_DEPTH) -> None:
    """``DataError`` for decoded JSON that is nested more deeply: what walks it recurses."""
    level = [value]
    for _ in range(max_depth):
        level = [
            below
            for one in level
            if isinstance(one, dict | list)
            for below in (one.values() if isinstance(one, dict) else one)
            if isinstance(below, dict | list)
        ]
        if not level:
            return
    raise DataError(f"expected JSON nested at most {max_depth} deep, got more")
