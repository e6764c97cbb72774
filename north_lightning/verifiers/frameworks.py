"""Test frameworks of software tasks, seen from the host: what is mounted where tests run, and how their ids look.

In: the ``framework`` of a task's ``[metadata]`` (``unittest`` by default). Out: mounts and command lines. pytest and
the packages it needs are this machine's own, mounted read-only: nothing is installed in a sandbox.
"""

from __future__ import annotations

import importlib.util
import py_compile
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from north_lightning.errors import ConfigError, VerifierError
from north_lightning.sandbox.scratch import Scratch
from north_lightning.types import Task

GRADER = "/grader"
PACKAGES = "/grader/packages"
FOR_AGENTS = "/opt/pytest"
"""Where an attempt finds pytest: ``PYTHONPATH=/opt/pytest python3 -m pytest``."""

JUDGING = ("unittest_runner", "apart", "strict", "seal", "canaries")
"""Modules that run where tests run."""
UNITTEST, PYTEST = "unittest", "pytest"
UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH
_HERE = Path(__file__).parent
_PYTEST_PACKAGES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "py")


@dataclass(frozen=True)
class Framework:
    """``program`` runs the tests inside, ``mounts`` is what it needs there."""

    name: str
    mounts: Mapping[str, Path]

    @property
    def program(self) -> str:
        """Of Python."""
        return f"import sys; sys.path.insert(0, '{GRADER}'); import {self.name}_runner as runner; runner.main()"

    def is_id(self, test: str, tests: Path) -> bool:
        """Whether ``test`` names a test of a file under ``tests``; for pytest it may be the file."""
        if len(test.split()) != 1:
            return False
        if self.name == PYTEST:
            path = Path(test.split("::")[0])
            return not path.is_absolute() and ".." not in path.parts and (tests / path).is_file()
        parts = test.split(".")
        return len(parts) >= 3 and tests.joinpath(*parts[:-2]).with_suffix(".py").is_file()


def framework_of(task: Task) -> Framework:
    """``VerifierError`` for a name that is not known, or if pytest is not installed here."""
    name = task.metadata.get("framework", UNITTEST)
    if name == UNITTEST:
        return Framework(name, _runners(JUDGING))
    if name != PYTEST:
        raise VerifierError(f"task {task.id}: expected framework {UNITTEST} or {PYTEST}, got {name!r}")
    try:
        packages = pytest_at(f"{GRADER}/packages")
    except ConfigError as error:
        raise VerifierError(f"task {task.id}: {error}") from error
    return Framework(name, {**_runners((*JUDGING, "pytest_runner")), **packages})


@cache
def _runners(names: tuple[str, ...]) -> dict[str, Path]:
    """Mounts of modules with their compiled code, for an interpreter like this one; any other compiles them itself."""
    folder = Scratch("verify").path  # as long as this process lives
    for name in names:
        compiled = folder / f"{name}.{sys.implementation.cache_tag}.pyc"
        py_compile.compile(str(_HERE / f"{name}.py"), str(compiled), invalidation_mode=UNCHECKED)
    return {**{f"{GRADER}/{name}.py": _HERE / f"{name}.py" for name in names}, f"{GRADER}/__pycache__": folder}


def mounts_of(task: Task) -> dict[str, Path]:
    """What an attempt at ``task`` sees beside its files; ``ConfigError`` if it is not here."""
    return pytest_at(FOR_AGENTS) if task.metadata.get("framework") == PYTEST else {}


@cache
def pytest_at(inside: str) -> dict[str, Path]:
    """Mounts of pytest and what it needs below ``inside``; ``ConfigError`` if one is not installed."""
    mounts = {}
    for name in _PYTEST_PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise ConfigError(f"tests of this task need pytest, and {name} is not installed: pip install pytest")
        file = Path(found.origin)
        place = file.parent if found.submodule_search_locations else file
        mounts[f"{inside}/{place.name}"] = place
    return mounts
