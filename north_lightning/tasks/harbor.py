"""Harbor task directories, read and written.

In: a directory with ``task.toml``, ``instruction.md``, ``environment/`` (a Dockerfile over ``files/``),
``tests/test.sh`` and ``solution/``. Out: a ``Task``. ``[metadata]`` carries what this package adds: ``environment``,
``family``, ``max_turns``, and for software tasks ``fail_to_pass`` and ``pass_to_pass``. Directories without them load
too (``load_task``). No task code runs here.

A *task set* is a directory of task directories, or a JSONL file whose lines name one each and may override
``max_turns`` (what calibration writes).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from north_lightning.errors import TaskError
from north_lightning.sandbox.trees import copy_tree
from north_lightning.tasks.check import check_task
from north_lightning.tasks.places import collect_hooks, root_of, verifier_environment
from north_lightning.tasks.schema import Agent, TaskConfig, Verifier
from north_lightning.tasks.schema import TaskStep as StepConfig
from north_lightning.types import Command, Task, TaskStep

DOCKERFILE = "FROM debian:12\nWORKDIR /work\nCOPY files/ /work/\n"
SCHEMA_VERSION = "1.0"
MAX_TURNS = 100
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}")


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
    base: Path | None = None  # a directory that the files are laid over
    git: bool = False  # commit the files to a fresh repository
    metadata: Mapping[str, Any] = field(default_factory=dict)


def image_of(task: Task) -> Path:
    """The directory that ``/work`` starts from; ``TaskError`` for a task whose root file system holds it."""
    files = task.directory / "environment" / "files"
    if not files.is_dir():
        raise TaskError(f"{files}: not found; this task's environment is an image")
    return files


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
    if source.base is not None:
        copy_tree(source.base, image)
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
    """Read one task directory; ``TaskError`` names the file and what is wrong with it.

    Any directory that Harbor could run loads, in every published version of its format. Where ``[metadata]`` does not
    say what this package asks for, a task is a terminal task of ``MAX_TURNS`` turns whose family is its ``source``, its
    organisation or the directory that holds it.
    """
    try:
        config = check_task(directory)
    except TaskError as error:
        raise TaskError(f"{directory}/{error}") from error
    metadata = config.metadata
    organisation = config.task.name.partition("/")[0] if config.task else None
    root = root_of(directory, config.environment)
    own_verifier, unsupported = verifier_environment(directory, config, root)
    whole = Task(
        id=directory.name,
        environment=_text(directory, metadata, "environment", "terminal"),
        family=_text(directory, metadata, "family", config.source or organisation or directory.absolute().parent.name),
        instruction="" if config.steps else (directory / "instruction.md").read_text().strip(),
        directory=directory,
        max_turns=_max_turns(directory, metadata),
        metadata=metadata,
        verifier_timeout_s=_timeout_s(directory, "verifier", config.verifier),
        agent_timeout_s=_timeout_s(directory, "agent", config.agent),
        verifier_env=_variables(directory, config.verifier),
        reward_strategy=config.multi_step_reward_strategy or "mean",
        collect=collect_hooks(config.verifier),
        own_verifier=own_verifier,
        root=root,
        unsupported=unsupported,
    )
    steps = tuple(_step(whole, config, step) for step in config.steps or ())
    unsupported = tuple(dict.fromkeys(reason for step in steps for reason in step.task.unsupported))
    return replace(whole, steps=steps, unsupported=unsupported) if steps else whole


def _step(whole: Task, config: TaskConfig, step: StepConfig) -> TaskStep:
    """A step as a task of its own: what it does not say is as the whole task says."""
    part = whole.directory / "steps" / step.name
    section = f"steps.{step.name}"
    own_verifier, unsupported = verifier_environment(whole.directory, config, whole.root, step)
    task = replace(
        whole,
        instruction=(part / "instruction.md").read_text().strip(),
        agent_timeout_s=_timeout_s(whole.directory, f"{section}.agent", step.agent) or whole.agent_timeout_s,
        verifier_timeout_s=_timeout_s(whole.directory, f"{section}.verifier", step.verifier)
        or whole.verifier_timeout_s,
        verifier_env={**whole.verifier_env, **_variables(whole.directory, step.verifier)},
        step_tests=part / "tests" if (part / "tests").is_dir() else None,
        collect=(*whole.collect, *collect_hooks(step.verifier)),
        own_verifier=own_verifier,
        unsupported=unsupported,
    )
    check = step.healthcheck
    healthcheck = Command(check.command, check.timeout_sec, check.retries, check.interval_sec) if check else None
    return TaskStep(step.name, part, task, step.min_reward, healthcheck)


def _variables(directory: Path, verifier: Verifier) -> dict[str, str]:
    return {name: _substituted(directory, value) for name, value in verifier.env.items()}


def _text(directory: Path, metadata: Mapping[str, Any], key: str, default: str) -> str:
    value = metadata.get(key, default)
    if not isinstance(value, str) or not value:
        raise TaskError(f"{directory}/task.toml: [metadata] {key}: expected a name, got {value!r}")
    return value


def _max_turns(directory: Path, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("max_turns", MAX_TURNS)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TaskError(f"{directory}/task.toml: [metadata] max_turns: expected a number of turns, got {value!r}")
    return value


def _timeout_s(directory: Path, section: str, phase: Agent | Verifier) -> float | None:
    """What the section says; None where it says nothing."""
    value = phase.timeout_sec if "timeout_sec" in phase.model_fields_set else None
    if value is not None and not 0 < value < math.inf:
        raise TaskError(
            f"{directory}/task.toml: [{section}] timeout_sec: expected a positive number of seconds, got {value!r}"
        )
    return value


def _substituted(directory: Path, value: str) -> str:
    """``${NAME}`` and ``${NAME:-default}``, alone in a value, are of this process's environment, as in Harbor."""
    found = _VARIABLE.fullmatch(value)
    if found is None:
        return value
    known = os.environ.get(found["name"], found["default"])
    if known is None:
        raise TaskError(f"{directory}/task.toml: [verifier] env: {value} is not set, and has no default")
    return known


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
    calibrated = {"pass_rate": float(row["pass_rate"])} if "pass_rate" in row else {}
    max_turns = int(row.get("max_turns", task.max_turns))
    return replace(task, max_turns=max_turns, metadata={**task.metadata, **calibrated})


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
