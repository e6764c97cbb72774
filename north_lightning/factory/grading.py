"""Which tests of a repository pass, as the verifier of software tasks sees it.

In: the files of a repository. Out: test ids, and the framework they are of: unittest, or pytest where unittest finds no
test that passes. The tests run as they will when an attempt is graded: by ``UnitTestVerifier``, in a fresh sandbox,
without anything that is installed. What cannot be run like that (packages with dependencies, pytest's plug-ins) is
simply not among the tests that pass.
"""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from north_lightning.errors import InfrastructureError
from north_lightning.factory.sources import Files, is_test
from north_lightning.interfaces import SandboxProvider
from north_lightning.sandbox.scratch import Scratch
from north_lightning.sandbox.trees import copy_tree
from north_lightning.tasks import image_of, load_task
from north_lightning.types import Rollout, Task
from north_lightning.untrusted import write_files
from north_lightning.verifiers import UnitTestVerifier
from north_lightning.verifiers.frameworks import PYTEST, UNITTEST


@dataclass(frozen=True)
class Baseline:
    """A repository in its right state, and the tests that pass on it every time."""

    files: Files
    stable: tuple[str, ...]
    num_flaky: int
    framework: str = UNITTEST


@dataclass(frozen=True)
class Grader:
    """Runs tests in sandboxes.

    Args:
        sandboxes: Where they run.
        timeout_s: Limit of one run.
        repeats: How often a state must show the same.
    """

    sandboxes: SandboxProvider
    timeout_s: float
    repeats: int

    async def baseline(self, files: Files) -> Baseline:
        """What passes on ``files`` in every one of ``repeats`` runs."""
        found = await self._passing(files, tuple(test_ids(files)), UNITTEST)
        if not found.stable and (test_files := tuple(pytest_files(files))):
            found = await self._passing(files, await self._collected(files, test_files), PYTEST)
        return found

    async def _passing(self, files: Files, ids: Sequence[str], framework: str) -> Baseline:
        whole = Baseline(files, tuple(ids), 0, framework)
        runs = [set((await self.run(whole, {}))["passed"]) if ids else set() for _ in range(self.repeats)]
        stable = set.intersection(*runs)
        return replace(
            whole, stable=tuple(one for one in ids if one in stable), num_flaky=len(set.union(*runs) - stable)
        )

    async def _collected(self, files: Files, test_files: tuple[str, ...]) -> list[str]:
        """Node ids of what passes once: parameters are known only when tests are collected."""
        details = await self.run(Baseline(files, test_files, 0, PYTEST), {})
        words = [note.split(maxsplit=2) for note in details.get("notes", ())]
        return sorted({node_id for node_id, outcome, _ in words if outcome == "passed"})

    async def run(self, baseline: Baseline, changed: Mapping[str, str | None]) -> Mapping[str, Any]:
        """The verifier's details on the baseline's files with ``changed`` ones (None: deleted); demands ``stable``."""
        files = baseline.files
        with Scratch("task") as folder:
            directory, workdir = folder / "task", folder / "work"
            await asyncio.to_thread(_write, files, directory / "environment" / "files")
            await asyncio.to_thread(_write, tests_of(files), directory / "tests")
            merged = {path: text for path, text in {**files, **changed}.items() if text is not None}
            await asyncio.to_thread(_write, merged, workdir)
            metadata = {"framework": baseline.framework, "fail_to_pass": list(baseline.stable), "pass_to_pass": []}
            task = Task("candidate", "swe", "", "", directory, 1, metadata, self.timeout_s)
            return (await self._verify(task, workdir))[1]

    async def validate(self, directory: Path) -> str | None:
        """Whether a written task holds: its solution scores 1 and its untouched state 0, every time; else why not."""
        task = load_task(directory)
        with Scratch("task") as folder:
            solved = folder / "solved"
            sandbox = await self.sandboxes.open(image_of(task))
            try:
                script = (directory / "solution" / "solve.sh").read_text()
                result = await sandbox.run(script, self.timeout_s)
                await sandbox.snapshot(solved)
            finally:
                await sandbox.close()
            if result.exit_code:
                return "the solution does not apply"
            untouched = folder / "untouched"
            await asyncio.to_thread(copy_tree, image_of(task), untouched)
            for _ in range(self.repeats):
                if (await self._verify(task, solved))[0] != 1.0:
                    return "the solution fails"
                value, details = await self._verify(task, untouched)
                if value != 0.0 or set(details["failed"]) != set(task.metadata["fail_to_pass"]):
                    return "the untouched state does not fail in the same way"
        return None

    async def _verify(self, task: Task, workdir: Path) -> tuple[float, Mapping[str, Any]]:
        rollout = Rollout(task.id, task.environment, task.family, 0, 0, 0)
        for attempts_left in (2, 1, 0):
            try:
                verifier = UnitTestVerifier(self.timeout_s)
                reward = await verifier.verify(task, rollout, workdir, self.sandboxes)
                return reward.value, reward.details
            except InfrastructureError:
                if not attempts_left:
                    raise
        raise AssertionError("unreachable")


def test_ids(files: Files) -> Iterable[str]:
    """``module.Class.method`` of what looks like a unittest, with the methods of base classes in the same file."""
    for path, text in sorted(files.items()):
        module = path.removesuffix(".py").split("/")
        if not path.endswith(".py") or not is_test(path) or not all(part.isidentifier() for part in module):
            continue
        try:
            classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
        except SyntaxError:
            continue
        for name in classes:
            for method in sorted(_methods(name, classes, set())):
                yield ".".join((*module, name, method))


def pytest_files(files: Files) -> Iterator[str]:
    """The files that pytest would collect from."""
    for path in sorted(files):
        name = path.rpartition("/")[2]
        if is_test(path) and (fnmatchcase(name, "test_*.py") or fnmatchcase(name, "*_test.py")):
            yield path


def _methods(name: str, classes: Mapping[str, ast.ClassDef], seen: set[str]) -> set[str]:
    if name not in classes or name in seen:
        return set()
    node = classes[name]
    own = {item.name for item in node.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test")}
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return own.union(*(_methods(base, classes, seen | {name}) for base in bases))


def tests_of(files: Files) -> dict[str, str]:
    """What is graded with: the test modules, and whatever lies beside them."""
    return {path: text for path, text in files.items() if is_test(path)}


def _write(files: Files, directory: Path) -> None:
    write_files(directory, files)
    for parent in (directory, *directory.rglob("*")):
        parent.chmod(0o755 if parent.is_dir() else 0o644)
