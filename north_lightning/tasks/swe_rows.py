"""Rows of SWE-bench, SWE-bench Pro, SWE-smith and R2E-Gym as tasks: ``python -m north_lightning tasks import``.

In: rows (JSON Lines or parquet) and a local clone of every repository they name. Out: Harbor task directories. The
repository is exported at the row's base commit and committed anew, so that neither a later commit nor a remote, tag or
reflog is there to look the answer up in. The tests of the row are beside the task, not in it. Every expected test is
demanded by name: the verifier reads the test framework's log (``logs``), and what it does not name has failed.

An image with the repository's dependencies is the user's to bring: the rows name one, nothing is pulled here.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shlex
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from north_lightning.data.records import decode, read_records
from north_lightning.errors import ConfigError, DataError, TaskError
from north_lightning.sandbox.layers import BoundedEntry, unpack
from north_lightning.sandbox.scratch import Scratch
from north_lightning.tasks.git import git, objects_of
from north_lightning.tasks.harbor import TaskSource, patch_script, write_task
from north_lightning.tasks.logs import PARSERS
from north_lightning.untrusted import check_commit, check_name, parts_of, read_file

Parser = Literal["pytest", "unittest"]

MAX_TURNS = 100
COMMANDS = {
    "pytest": "python -m pytest -rA --tb=short -p no:cacheprovider {places}",
    "unittest": "python3 -m unittest -v {places}",
}
_UNITTEST_ID = re.compile(r"(\w+) \(([\w.]+)\)")


@dataclass(frozen=True)
class Instance:
    """One row, whichever benchmark it is of.

    ``bug_patch`` makes the broken state of ``commit`` and is undone; otherwise ``solution`` repairs ``commit``.
    ``tests`` are files as text, beside what ``test_patch`` changes.
    """

    id: str
    benchmark: str
    repository: str  # owner/name
    commit: str
    statement: str
    fail_to_pass: list[str]
    pass_to_pass: list[str]
    solution: str | None = None
    bug_patch: str | None = None
    test_patch: str = ""
    tests: Mapping[str, str] | None = None


def import_rows(
    rows: list[Path],
    clones: dict[str, Path],
    output_dir: Path,
    parser: Parser = "pytest",
    test_command: str | None = None,
) -> None:
    """Write one task per row.

    Args:
        rows: JSON Lines or parquet files.
        clones: owner/name -> a local clone that holds the rows' commits.
        output_dir: Where the task directories are written.
        parser: Whose log the tests print.
        test_command: Runs the tests, in place of the framework's own; {places} stands for the expected tests' files.
    """
    seen: set[str] = set()
    for where, content in read_records(rows):
        try:
            instance = read_row(decode(content))
            if instance.repository not in clones:
                raise TaskError(f"clones: expected a clone of {instance.repository}, got {', '.join(clones) or 'none'}")
            if instance.id in seen:
                raise DataError(f"instance_id: expected one row of {instance.id}, got another")
            seen.add(instance.id)
            write_instance(instance, clones[instance.repository], output_dir, parser, test_command)
        except (DataError, TaskError) as error:
            raise type(error)(f"{where}: {error}") from error
    print(f"{output_dir}: {len(seen)} tasks")


def read_row(row: Mapping[str, Any]) -> Instance:
    """A row of any of the four benchmarks; ``DataError`` names the column that is missing or wrong."""
    if "expected_output_json" in row:
        return _r2e(row)
    smith = str(row.get("repo", "")).startswith("swesmith/")
    lower = "fail_to_pass" in row
    fail, keep = ("fail_to_pass", "pass_to_pass") if lower else ("FAIL_TO_PASS", "PASS_TO_PASS")
    statement = _text(row, "problem_statement")
    for more in ("requirements", "interface"):  # of SWE-bench Pro
        if row.get(more):
            statement += f"\n\n{more.capitalize()}:\n{row[more]}"
    common = partial(
        Instance,
        id=check_name(_text(row, "instance_id"), "instance_id", DataError),
        statement=statement,
        fail_to_pass=_names(row, fail),
        pass_to_pass=_names(row, keep),
    )
    if not _names(row, fail):
        raise DataError(f"{fail}: expected at least one test, got none")
    if smith:
        mirror, _, commit = _text(row, "repo").removeprefix("swesmith/").rpartition(".")
        repository = mirror.replace("__", "/", 1)
        return common(benchmark="swe_smith", repository=repository, commit=commit, bug_patch=_text(row, "patch"))
    return common(
        benchmark="swe_bench_pro" if lower else "swe_bench",
        repository=_text(row, "repo"),
        commit=_text(row, "base_commit"),
        solution=_text(row, "patch"),
        test_patch=_text(row, "test_patch") if row.get("test_patch") else "",
    )


def _r2e(row: Mapping[str, Any]) -> Instance:
    """R2E-Gym names the repairing commit; its tests are in the row, and all that passed after it must pass."""
    expected = _json(row, "expected_output_json")
    executed = _json(row, "execution_result_content")
    commit = _text(row, "commit_hash")
    names, codes = (executed.get(key) or [] for key in ("test_file_names", "test_file_codes"))
    if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in (names, codes)):
        raise DataError("execution_result_content: expected lists of texts in test_file_names and test_file_codes")
    if len(names) != len(codes):
        raise DataError(f"test_file_codes: expected one for each of {len(names)} test_file_names, got {len(codes)}")
    return Instance(
        id=check_name(f"{_text(row, 'repo_name').replace('/', '__')}__{commit[:12]}", "repo_name", DataError),
        benchmark="r2e_gym",
        repository=_text(row, "repo_name"),
        commit=f"{commit}~1",
        statement=_text(row, "problem_statement"),
        fail_to_pass=[name for name, outcome in expected.items() if outcome == "PASSED"],
        pass_to_pass=[],
        tests={
            "/".join(("r2e_tests", *parts_of(name, "test_file_names"))): code
            for name, code in zip(names, codes, strict=True)
        },
    )


def write_instance(
    instance: Instance, clone: Path, parent: Path, parser: Parser = "pytest", test_command: str | None = None
) -> Path:
    """One task directory under ``parent``; ``TaskError`` if a commit is missing or a patch does not apply."""
    with Scratch("task") as folder:
        base, graded = folder / "base", folder / "graded"
        objects = objects_of(clone)
        for tree in (base, graded):
            _export(objects, instance.commit, tree)
            if instance.bug_patch:
                _apply(tree, instance.bug_patch, "patch")
        tests = dict(instance.tests or {})
        if instance.test_patch:
            _apply(graded, instance.test_patch, "test_patch")
            for path in _changed(graded, instance.test_patch):
                if os.path.lexists(graded / path) and not (graded / path).is_dir():
                    tests[path] = _test_file(graded, path)
        solution = instance.bug_patch or instance.solution or _repair(objects, instance)
        solve = patch_script(solution, "--reverse " if instance.bug_patch else "")
        ids = [*instance.fail_to_pass, *instance.pass_to_pass]
        places = " ".join(map(shlex.quote, _places(ids, parser, tests)))
        command = (test_command or COMMANDS[parser]).format(places=places)
        source = TaskSource(
            name=instance.id,
            environment="swe",
            family=instance.benchmark,
            instruction=instance.statement.strip(),
            files={},
            base=base,
            tests={**{f"files/{path}": text for path, text in tests.items()}, "test.sh": TEST_SCRIPT % command},
            solve_script=solve,
            steps=(("bash", {"command": solve}), ("submit", {}), ("submit", {})),
            max_turns=MAX_TURNS,
            git=True,
            metadata={
                "repository": instance.repository,
                "fail_to_pass": instance.fail_to_pass,
                "pass_to_pass": instance.pass_to_pass,
                "log_parser": parser,
            },
        )
        return write_task(source, parent)


# For the verifier here, which reads the log. The tests of the row replace whatever the attempt made of them.
TEST_SCRIPT = """cd /work || exit 1
[ -d /tests/files ] && cp -r /tests/files/. .
%s >/tmp/log 2>&1 </dev/null
tail -c 900000 /tmp/log > /logs/verifier/log
"""


def _places(ids: list[str], parser: Parser, tests: Mapping[str, str]) -> list[str]:
    """What to run: the files (or classes) of the expected tests; every test file where ids name none."""
    if parser == "unittest":
        found = [match[2] for one in ids if (match := _UNITTEST_ID.fullmatch(one))]
    else:
        found = [one.partition("::")[0] for one in ids if "::" in one]
    return list(dict.fromkeys(found)) or [path for path in tests if path.endswith(".py")]


def _export(objects: Path, commit: str, directory: Path) -> None:
    check_commit(commit.removesuffix("~1"), "base_commit")
    archive = git(objects, "archive", "--format=tar", commit)
    directory.mkdir()
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), tarinfo=BoundedEntry) as tar:
            for member in tar:
                parts_of(member.name, commit)
            unpack(tar, directory)
    except (ConfigError, tarfile.TarError, OSError) as error:
        raise TaskError(f"{commit}: {error}") from error


def _repair(objects: Path, instance: Instance) -> str:
    """What the commit after the base changed, tests apart."""
    repairing = instance.commit.removesuffix("~1")
    changed = git(objects, "diff", instance.commit, repairing, "--", ".", ":!*test*")
    return changed.decode(errors="surrogateescape")


def _test_file(tree: Path, path: str) -> str:
    """A file that ``test_patch`` made or changed; a link that it made leads nowhere but to the tree."""
    try:
        return read_file(tree / path, tree).decode()
    except (UnicodeDecodeError, OSError) as error:
        raise TaskError(f"test_patch: {path}: expected a text file, got: {error}") from error


def _apply(tree: Path, patch: str, what: str) -> None:
    try:
        git(tree, "apply", "--whitespace=nowarn", "-", stdin=patch if patch.endswith("\n") else f"{patch}\n")
    except TaskError as error:
        raise TaskError(f"{what} does not apply: {error}") from error


def _changed(tree: Path, patch: str) -> list[str]:
    rows = git(tree, "apply", "--numstat", "-z", "--reverse", "-", stdin=f"{patch}\n").decode().split("\0")
    return [row.split("\t")[2] for row in rows if row]


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{column}: expected text, got {value!r}"[:300])
    return value


def _json(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(row, column))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{column}: expected JSON, got {row[column][:80]!r}") from error
    if not isinstance(value, dict):
        raise DataError(f"{column}: expected a JSON object, got {row[column][:80]!r}")
    return value


def _names(row: Mapping[str, Any], column: str) -> list[str]:
    """Test names: a list, or one written as JSON (SWE-bench) or as Python (SWE-bench Pro)."""
    value = row.get(column)
    if isinstance(value, str):
        for read in (json.loads, ast.literal_eval):
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f"{column}: expected a list of test names, got {value!r}"[:300])
    return value


assert COMMANDS.keys() == PARSERS.keys()
