"""Harbor task directories, read and written.

In: a directory with ``task.toml``, ``instruction.md``, ``environment/`` (a Dockerfile over ``files/``),
``tests/test.sh`` and ``solution/``. Out: a ``Task``. ``[metadata]`` carries what this package adds: ``environment``,
``family``, ``max_turns``, and for software tasks ``fail_to_pass`` and ``pass_to_pass``. Of Harbor's own fields
``[verifier] timeout_sec`` is read. No task code runs here.

A *task set* is a directory of task directories, or a JSONL file whose lines name one each and may override
``max_turns`` (what calibration writes).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from north_lightning.errors import TaskError
from north_lightning.types import Task

DOCKERFILE = "FROM debian:12\nWORKDIR /work\nCOPY files/ /work/\n"
SCHEMA_VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Everything a task directory holds, before it is written.

    ``steps`` are a solver's tool calls, one a turn, for recording trajectories; ``solve_script`` is the same solution
    as Harbor's ``solve.sh``.
    """

    name: str
    environment: str
    family: str
    instruction: str
    files: Mapping[str, str]
    tests: Mapping[str, str]  # path under tests/ -> text; must hold test.sh
    solve_script: str
    steps: tuple[tuple[str, Mapping[str, Any]], ...]  # (tool name, arguments)
    max_turns: int
    links: Mapping[str, str] = field(default_factory=dict)  # path -> target
    directories: tuple[str, ...] = ()  # empty directories
    git: bool = False  # commit the files to a fresh repository
    metadata: Mapping[str, Any] = field(default_factory=dict)


def image_of(task: Task) -> Path:
    """The directory that ``/work`` starts from."""
    return task.directory / "environment" / "files"


def solution_steps(task: Task) -> list[tuple[str, dict[str, Any]]]:
    """The scripted solver's tool calls: (tool name, arguments), one a turn."""
    path = task.directory / "solution" / "steps.json"
    if not path.exists():
        raise TaskError(f"{path}: no scripted solution; trajectories can only be recorded from tasks that have one")
    return [(name, arguments) for name, arguments in json.loads(path.read_text())]


def write_task(source: TaskSource, parent: Path) -> Path:
    """Write one task directory under ``parent``; an existing one of that name is replaced."""
    root = parent / source.name
    if root.exists():
        shutil.rmtree(root)
    image = root / "environment" / "files"
    image.mkdir(parents=True)
    for directory in source.directories:
        (image / directory).mkdir(parents=True, exist_ok=True)
    for path, text in source.files.items():
        _write(image / path, text)
    for path, target in source.links.items():
        (image / path).symlink_to(target)
    if source.git:
        _commit_all(image)
    for path, text in source.tests.items():
        _write(root / "tests" / path, text)
    _write(root / "environment" / "Dockerfile", DOCKERFILE)
    _write(root / "instruction.md", source.instruction + "\n")
    _write(root / "solution" / "solve.sh", source.solve_script)
    _write(root / "solution" / "steps.json", json.dumps(source.steps))
    metadata = {"environment": source.environment, "family": source.family, "max_turns": source.max_turns}
    _write(root / "task.toml", _toml(source.name, {**metadata, **source.metadata}))
    return root


def load_task(directory: Path) -> Task:
    """Read one task directory; ``TaskError`` names the file and what is wrong with it."""
    config = directory / "task.toml"
    try:
        document = tomllib.loads(config.read_text())
    except FileNotFoundError as error:
        raise TaskError(f"{config}: not found; a task directory needs task.toml") from error
    except tomllib.TOMLDecodeError as error:
        raise TaskError(f"{config}: not valid TOML: {error}") from error
    metadata = document.get("metadata", {})
    missing = [key for key in ("environment", "family", "max_turns") if key not in metadata]
    if missing:
        raise TaskError(f"{config}: [metadata] lacks {', '.join(missing)}")
    for needed in ("instruction.md", "tests/test.sh", "environment/files"):
        if not (directory / needed).exists():
            raise TaskError(f"{directory / needed}: not found")
    return Task(
        id=directory.name,
        environment=metadata["environment"],
        family=metadata["family"],
        instruction=(directory / "instruction.md").read_text().strip(),
        directory=directory,
        max_turns=int(metadata["max_turns"]),
        metadata=metadata,
        verifier_timeout_s=_verifier_timeout_s(document, config),
    )


def _verifier_timeout_s(document: Mapping[str, Any], config: Path) -> float | None:
    value = document.get("verifier", {}).get("timeout_sec")
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise TaskError(f"{config}: [verifier] timeout_sec: expected a positive number of seconds, got {value!r}")
    return float(value)


def load_tasks(path: Path) -> list[Task]:
    """Every task of a task set (a directory or a JSONL listing), in order of name or line."""
    if path.is_dir():
        tasks = [load_task(child) for child in sorted(path.iterdir()) if child.is_dir()]
    elif path.exists():
        tasks = [_listed_task(path, number, line) for number, line in enumerate(path.read_text().splitlines(), 1)]
    else:
        raise TaskError(f"{path}: no such task set; expected a directory of task directories or a .jsonl listing")
    if not tasks:
        raise TaskError(f"{path}: the task set is empty")
    return tasks


def load_task_sets(paths: Iterable[Path]) -> list[Task]:
    """The tasks of several task sets, set after set."""
    return [task for path in paths for task in load_tasks(path)]


def _listed_task(listing: Path, number: int, line: str) -> Task:
    try:
        row = json.loads(line)
        directory = Path(row["directory"])
    except (ValueError, KeyError, TypeError) as error:
        raise TaskError(f'{listing}:{number}: expected a JSON object with "directory", got {line[:80]!r}') from error
    task = load_task(directory if directory.is_absolute() else listing.parent / directory)
    return replace(task, max_turns=int(row.get("max_turns", task.max_turns)))


def _commit_all(directory: Path) -> None:
    # A fixed identity and date: the same task is the same commit everywhere.
    identity = {"NAME": "north", "EMAIL": "north@localhost", "DATE": "2026-01-01T00:00:00Z"}
    environment = {f"GIT_{who}_{key}": value for who in ("AUTHOR", "COMMITTER") for key, value in identity.items()}
    script = "git init -q -b main --template= . && git add -A && git commit -q -m initial"
    subprocess.run(
        ["bash", "-c", script],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", **environment},
        check=True,
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _toml(name: str, metadata: Mapping[str, Any]) -> str:
    # JSON strings, numbers and lists of strings are also TOML values.
    rows = "\n".join(f"{key} = {json.dumps(value)}" for key, value in metadata.items())
    return (
        f'schema_version = "{SCHEMA_VERSION}"\n\n[task]\nname = "north/{name}"\n\n[metadata]\n{rows}\n\n'
        "[environment]\nallow_internet = false\n\n[agent]\ntimeout_sec = 600\n\n[verifier]\ntimeout_sec = 60\n"
    )
