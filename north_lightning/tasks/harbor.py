"""Harbor task directories, read and written.

In: a directory with ``task.toml``, ``instruction.md``, ``environment/`` (a Dockerfile over ``files/``),
``tests/test.sh`` and ``solution/``. Out: a ``Task``. ``[metadata]`` carries what this package adds: ``environment``,
``family``, ``max_turns``, and for software tasks ``fail_to_pass`` and ``pass_to_pass``. Directories without them load
too (``load_task``). No task code runs here.

A *task set* is a directory of task directories, or a JSONL file whose lines name one each and may override
``max_turns`` (what calibration writes).
"""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from north_lightning.errors import DataError, TaskError
from north_lightning.sandbox.trees import copy_tree
from north_lightning.tasks.check import check_task
from north_lightning.tasks.git import commit_all
from north_lightning.tasks.places import collect_hooks, root_of, verifier_environment
from north_lightning.tasks.schema import Agent, TaskConfig, Verifier
from north_lightning.tasks.schema import TaskStep as StepConfig
from north_lightning.types import Command, Task, TaskStep
from north_lightning.untrusted import check_name, load_json, read_file, write_files

DOCKERFILE = "FROM debian:12\nWORKDIR /work\nCOPY files/ /work/\n"
IMAGE_DOCKERFILE = """FROM {0}
WORKDIR {1}
RUN rm -rf .git && git init -q && git add -A && git -c user.name=north -c user.email=north@localhost commit -qm initial
"""
SCHEMA_VERSION = "1.0"
MAX_TURNS = 100
_HEADER = f'schema_version = "{SCHEMA_VERSION}"\n\n[task]\nname = "north/'
"""How a ``task.toml`` begins that was written here, and so the mark of a directory that may be replaced."""
NO_TEST_SCRIPT = "echo 'graded by north_lightning alone' >&2; exit 1\n"
"""``test.sh`` of tasks whose ``[metadata]`` names a ``grader``."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


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
    tests: Mapping[str, str | bytes]  # path under tests/ -> content; must hold test.sh
    solve_script: str
    steps: tuple[tuple[str, Mapping[str, Any]], ...]  # (tool name, arguments)
    max_turns: int
    links: Mapping[str, str] = field(default_factory=dict)  # path -> target
    directories: tuple[str, ...] = ()  # empty directories
    base: Path | None = None  # a directory that the files are laid over
    image: tuple[str, str] | None = None  # what takes the place of the files, and the repository's place in it
    git: bool = False  # commit the files to a fresh repository
    time_limits: tuple[float, float] = (600.0, 60.0)  # seconds of the agent's commands, and of the tests
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
    try:
        steps = load_json(read_file(path, task.directory))
        return [(str(name), dict(arguments)) for name, arguments in steps]
    except (DataError, TypeError, ValueError) as error:
        raise TaskError(f"{path}: expected a list of [tool, arguments], got: {error}") from error


def write_task(source: TaskSource, parent: Path) -> Path:
    """Write one task directory under ``parent``, complete or not at all; one of that name is replaced if it was written
    here, and otherwise a ``TaskError``."""
    destination = parent / check_name(source.name, "name")
    if destination.is_symlink() or (destination.exists() and not is_written_here(destination)):
        raise TaskError(f"{destination}: expected a task written by this command, or nothing; move it aside")
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f".writing-{source.name}"
    shutil.rmtree(folder, ignore_errors=True)  # a killed command's
    folder.mkdir(0o700)
    try:
        written = folder / "task"
        _write_task(source, written)
        if destination.exists():
            destination.rename(folder / "old")
        written.rename(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return destination


def is_written_here(directory: Path) -> bool:
    """Whether a task directory, which is no link, was written by ``write_task`` or is what a killed one left."""
    if directory.is_symlink() or directory.name.startswith(".writing-"):
        return not directory.is_symlink()
    try:
        with (directory / "task.toml").open(errors="replace") as file:
            return file.read(len(_HEADER)) == _HEADER
    except OSError:
        return False


def _write_task(source: TaskSource, root: Path) -> None:
    if source.image is None:
        _write_files(source, root / "environment" / "files")
    write_files(root / "tests", source.tests, "tests")
    metadata = {"environment": source.environment, "family": source.family, "max_turns": source.max_turns}
    own = {
        "environment/Dockerfile": DOCKERFILE if source.image is None else IMAGE_DOCKERFILE.format(*source.image),
        "instruction.md": source.instruction + "\n",
        **({"solution/solve.sh": source.solve_script} if source.solve_script else {}),
        "solution/steps.json": json.dumps(source.steps),
        "task.toml": _toml(source, {**metadata, **source.metadata}),
    }
    write_files(root, own, "task")


def _write_files(source: TaskSource, image: Path) -> None:
    image.mkdir(parents=True)
    if source.base is not None:
        copy_tree(source.base, image)
    for directory in source.directories:
        (image / directory).mkdir(parents=True, exist_ok=True)
    write_files(image, source.files)
    for path, target in source.links.items():
        (image / path).symlink_to(target)
    if source.git:
        commit_all(image)


def patch_script(patch: str, options: str = "") -> str:
    """A shell script that applies ``patch`` to ``/work``; no line of the patch ends the here-document."""
    end = "NORTH_PATCH"
    while end in patch:
        end += "_"
    newline = "" if patch.endswith("\n") else "\n"
    return f"cd /work && git apply {options}--whitespace=nowarn - <<'{end}'\n{patch}{newline}{end}\n"


def files_script(files: Mapping[str, str]) -> str:
    """A shell script that writes texts at paths below ``/work``, to the byte."""
    return "cd /work\n" + "".join(
        f"base64 -d > {shlex.quote(path)} <<'END'\n{base64.encodebytes(text.encode()).decode()}END\n"
        for path, text in files.items()
    )


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
        verifier_env=config.verifier.env,
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
        verifier_env={**whole.verifier_env, **step.verifier.env},
        step_tests=part / "tests" if (part / "tests").is_dir() else None,
        collect=(*whole.collect, *collect_hooks(step.verifier)),
        own_verifier=own_verifier,
        unsupported=unsupported,
    )
    check = step.healthcheck
    healthcheck = Command(check.command, check.timeout_sec, check.retries, check.interval_sec) if check else None
    return TaskStep(step.name, part, task, step.min_reward, healthcheck)


def _text(directory: Path, metadata: Mapping[str, Any], key: str, default: str) -> str:
    value = metadata.get(key, default)
    if not isinstance(value, str) or not 0 < len(value) <= 200 or _CONTROL.search(value):
        raise TaskError(
            f"{directory}/task.toml: [metadata] {key}: expected a name of at most 200 characters, got {value!r}"[:300]
        )
    return value


def _max_turns(directory: Path, metadata: Mapping[str, Any]) -> int:
    rate = metadata.get("pass_rate", 0.0)
    if not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise TaskError(f"{directory}/task.toml: [metadata] pass_rate: expected a share, got {rate!r}"[:300])
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


def load_tasks(path: Path) -> list[Task]:
    """Every task of a task set (a directory or a JSONL listing), in order of name or line."""
    if path.is_dir():
        children = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
        tasks = [load_task(child) for child in children if child.is_dir()]
    elif path.exists():
        tasks = [_listed_task(path, number, line) for number, line in enumerate(_lines(path), 1)]
    else:
        raise TaskError(f"{path}: no such task set; expected a directory of task directories or a .jsonl listing")
    if not tasks:
        raise TaskError(f"{path}: the task set is empty")
    return tasks


def load_task_sets(paths: Iterable[Path]) -> list[Task]:
    """The tasks of several task sets, set after set."""
    tasks = {path: load_tasks(path) for path in paths}
    if not any(tasks.values()):
        raise TaskError(f"task_sets: expected at least one task, found none in {list(map(str, tasks)) or 'no set'}")
    return [task for path in paths for task in tasks[path]]


def _listed_task(listing: Path, number: int, line: str) -> Task:
    try:
        row = json.loads(line)
        directory = Path(row["directory"])
        calibrated = {"pass_rate": float(row["pass_rate"])} if "pass_rate" in row else {}
        max_turns = None if row.get("max_turns") is None else int(row["max_turns"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TaskError(f'{listing}:{number}: expected a JSON object with "directory", got {line[:80]!r}') from error
    task = load_task(directory if directory.is_absolute() else listing.parent / directory)
    return replace(task, max_turns=max_turns or task.max_turns, metadata={**task.metadata, **calibrated})


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: expected a .jsonl listing, got: {error}") from error


def _toml(source: TaskSource, metadata: Mapping[str, Any]) -> str:
    # JSON strings, numbers and lists of strings are also TOML values.
    values = {key: json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") for key, value in metadata.items()}
    rows = "\n".join(f"{key} = {value}" for key, value in values.items())
    workdir = own = ""
    if source.image is not None:  # the tests run in the image as it is, the attempt in the one of the Dockerfile
        image, place = map(json.dumps, source.image)
        workdir = f"workdir = {place}\n"
        own = f'environment_mode = "separate"\n\n[verifier.environment]\ndocker_image = {image}\nworkdir = {place}\n'
    return (
        f'{_HEADER}{source.name}"\n\n[metadata]\n{rows}\n\n'
        f"[environment]\nallow_internet = false\n{workdir}\n[agent]\ntimeout_sec = {source.time_limits[0]:g}\n\n"
        f"[verifier]\ntimeout_sec = {source.time_limits[1]:g}\n{own}"
    )
