"""``python -m north_lightning tasks check DIR...``: are these Harbor task directories, and if not, why not.

In: any number of directories. Out: one line each, ``ok`` or the reason, and a count. What is checked is what Harbor
needs to run the task: ``task.toml``, instruction, environment and tests, of every step. Nothing is run or built.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from north_lightning.errors import DataError, TaskError, printable
from north_lightning.tasks.schema import TaskConfig, Verifier
from north_lightning.untrusted import check_depth, read_file, resolve_below

_OPENED = ("environment", "environment/files", "environment/Dockerfile", "environment/docker-compose.yaml")
"""What is opened by name; what lies in them is copied link by link, and no link is followed."""
MAX_CONFIG_BYTES = 1 << 20
_SCRIPTS = {"linux": "test.sh", "windows": "test.bat"}


def check_tasks(directories: list[Path]) -> None:
    """Read Harbor task directories and say of each whether it is one.

    Args:
        directories: Task directories; give as many as you like.
    """
    num_bad = 0
    for directory in directories:
        try:
            check_task(directory)
        except TaskError as error:
            num_bad += 1
            print(f"{printable(str(directory))}: {error}")
        else:
            print(f"{printable(str(directory))}: ok")
    print(f"{len(directories) - num_bad} of {len(directories)} ok")
    if num_bad:
        raise TaskError(f"{num_bad} of {len(directories)} directories are no task Harbor could run")


def check_task(directory: Path) -> TaskConfig:
    """The configuration of a task directory that Harbor could run; ``TaskError`` says what is missing or wrong."""
    config = read_config(directory)
    if config.environment.docker_image is None and not (directory / "environment").is_dir():
        raise TaskError("environment/: not found, and [environment] names no docker_image")
    for name in _OPENED:
        resolve_below(directory / name, directory)
    for name in ("tests", "solution", "steps"):
        _check_links(directory / name, directory)
    if not config.steps:
        _check_part(directory, directory, config, config.verifier.mode or "shared")
        return config
    for step in config.steps:
        part = directory / "steps" / step.name
        if not part.is_dir():
            raise TaskError(f"steps/{step.name}/: not found")
        _check_part(part, directory, config, step.verifier.mode or config.verifier.mode or "shared", step.verifier)
    return config


def read_config(directory: Path) -> TaskConfig:
    """``task.toml``, read; ``TaskError`` names the field."""
    try:
        values = tomllib.loads(read_file(directory / "task.toml", directory, MAX_CONFIG_BYTES).decode())
        check_depth(values)
        return TaskConfig.model_validate(values)
    except (FileNotFoundError, NotADirectoryError):
        raise TaskError("task.toml: not found") from None
    except OSError as error:
        raise TaskError(f"task.toml: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TaskError("task.toml: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise TaskError(f"task.toml: not TOML: {error}") from None
    except ValidationError as error:
        raise TaskError(f"task.toml: {'; '.join(_problems(error))}") from None
    except (RecursionError, DataError):
        raise TaskError("task.toml: nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise TaskError(f"task.toml: {error}") from None


def _problems(error: ValidationError) -> list[str]:
    problems = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        problems.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    return list(dict.fromkeys(" ".join(problem.split()) for problem in problems))


def _check_part(
    part: Path,
    root: Path,
    config: TaskConfig,
    mode: Literal["shared", "separate"],
    step_verifier: Verifier | None = None,
) -> None:
    """Instruction and test script of a task or of one of its steps."""
    where = "" if part == root else f"steps/{part.name}/"
    instruction = part / "instruction.md"
    try:
        read_file(instruction, root).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise TaskError(f"{where}instruction.md: not found") from None
    except OSError as error:
        raise TaskError(f"{where}instruction.md: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TaskError(f"{where}instruction.md: not UTF-8 text") from None
    levels = [(step_verifier, part)] if step_verifier is not None else []
    levels.append((config.verifier, root))
    system = config.environment.os
    if mode == "separate":
        if any(image_holds_tests(verifier, place) for verifier, place in levels):
            return
        own = next((verifier.environment for verifier, _ in levels if verifier.environment is not None), None)
        system = own.os if own is not None and "os" in own.model_fields_set else system
    script = _SCRIPTS[system]
    if not any((place / "tests" / script).is_file() for place in (part, root)):
        raise TaskError(f"{where}tests/{script}: not found")


def image_holds_tests(verifier: Verifier, place: Path) -> bool:
    """Whether a separate verifier has an image of its own, named or built from ``tests/``: it brings the tests."""
    if verifier.environment is not None and verifier.environment.docker_image:
        return True
    return any((place / "tests" / name).is_file() for name in ("Dockerfile", "docker-compose.yaml"))


def _check_links(directory: Path, root: Path) -> None:
    """Neither ``directory`` nor a link in it may lead out of the task."""
    resolve_below(directory, root)
    for parent, names, files in os.walk(directory):
        for name in (*names, *files):
            if os.path.islink(path := os.path.join(parent, name)):
                resolve_below(Path(path), root)
