"""Rows of SWE-bench, SWE-bench Pro, SWE-smith and R2E-Gym as tasks: ``python -m north_lightning tasks import``.

In: rows (JSON Lines, JSON or parquet). Out: Harbor task directories (``swe_tasks``). Rows of SWE-bench and of SWE-bench
Pro are graded as the benchmark's own harness does it (``verifiers.official``). Of the others, the verifier reads the
test framework's log (``logs``), and a test that it does not name has failed.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from north_lightning.data.records import decode, read_records, text_of
from north_lightning.errors import DataError, TaskError
from north_lightning.tasks import swe_bench
from north_lightning.tasks.swe_tasks import PRO, PRO_SCRIPT, SWE_BENCH, Instance, Parser, write_instance
from north_lightning.untrusted import check_digests, check_name, parts_of

PRO_IMAGES = "jefzda/sweap-images"
_LOG_PARSERS = {"pytest": "parse_log_pytest", "unittest": "parse_log_django"}  # SWE-bench's, of these frameworks
_KINDS = ("pass_and_fail", "fail_only")


def import_rows(
    rows: list[Path],
    output_dir: Path,
    clones: dict[str, Path] | None = None,
    run_scripts: Path | None = None,
    parser: Parser = "pytest",
    test_command: str | None = None,
    sha256: list[str] | None = None,
) -> None:
    """Write one task per row.

    Args:
        rows: JSON Lines, JSON or parquet files.
        output_dir: Where the task directories are written.
        clones: owner/name -> a local clone that holds the rows' commits. Left out, tasks begin with the images that the
            rows name; the machine that runs them must have these.
        run_scripts: SWE-bench Pro's folder of this name: ``<instance_id>/run_script.sh`` and ``parser.py``.
        parser: Whose log the tests print, for rows that do not say.
        test_command: The command that runs the tests, for rows that do not say, in place of the framework's own;
            {places} stands for the expected tests' files.
        sha256: SHA-256 of each file of ``rows``, in hexadecimal; a file with another one is refused.
    """
    for path, digest in zip(rows, check_digests(rows, sha256), strict=True):
        print(f"{path}: sha256 {digest}")
    seen: set[str] = set()
    for where, content in read_records(rows):
        try:
            instance = read_row(decode(content), run_scripts, parser, test_command)
            clone = (clones or {}).get(instance.repository)
            if clone is None and (clones or instance.image is None):
                known = ", ".join(clones or ()) or "none"
                raise TaskError(f"clones: expected a clone of {instance.repository}, got {known}")
            if instance.id in seen:
                raise DataError(f"instance_id: expected one row of {instance.id}, got another")
            seen.add(instance.id)
            write_instance(instance, clone, output_dir, parser, test_command)
        except (DataError, TaskError) as error:
            raise type(error)(f"{where}: {error}") from error
    print(f"{output_dir}: {len(seen)} tasks")


def read_row(
    row: Mapping[str, Any],
    run_scripts: Path | None = None,
    parser: Parser = "pytest",
    test_command: str | None = None,
) -> Instance:
    """A row of any of the four benchmarks; ``DataError`` names the column that is missing or wrong."""
    if "expected_output_json" in row:
        return _r2e(row)
    smith = str(row.get("repo", "")).startswith("swesmith/")
    lower = "fail_to_pass" in row
    fail, keep = ("fail_to_pass", "pass_to_pass") if lower else ("FAIL_TO_PASS", "PASS_TO_PASS")
    common = partial(
        Instance,
        id=check_name(text_of(row, "instance_id"), "instance_id", DataError),
        statement=text_of(row, "problem_statement"),
        fail_to_pass=_names(row, fail),
        pass_to_pass=_names(row, keep),
    )
    if not _names(row, fail):
        raise DataError(f"{fail}: expected at least one test, got none")
    if smith:
        mirror, _, commit = text_of(row, "repo").removeprefix("swesmith/").rpartition(".")
        repository = mirror.replace("__", "/", 1)
        return common(benchmark="swe_smith", repository=repository, commit=commit, bug_patch=text_of(row, "patch"))
    common = partial(
        common,
        repository=text_of(row, "repo"),
        commit=text_of(row, "base_commit"),
        solution=text_of(row, "patch"),
        test_patch=text_of(row, "test_patch") if row.get("test_patch") else "",
    )
    if lower:
        return common(benchmark=PRO, **_pro(row, run_scripts))
    return common(benchmark=SWE_BENCH, **_swe_bench(row, parser, test_command))


def _swe_bench(row: Mapping[str, Any], parser: Parser, test_command: str | None) -> dict[str, Any]:
    """A row of SWE-bench 5 says how it is run and graded; for an older one, the package knows a repository's parser."""
    known = swe_bench.known()
    name, repository = row["instance_id"], row["repo"]
    log_parser, kind = known["repositories"].get(repository.lower(), (_LOG_PARSERS[parser], _KINDS[0]))
    grading = {
        "grader": SWE_BENCH,
        "instance_id": name,
        "image": row.get("image") or f"swebench/sweb.eval.x86_64.{name.lower().replace('__', '_1776_')}:latest",
        "repo": repository,
        "version": str(row.get("version") or ""),
        "FAIL_TO_PASS": _names(row, "FAIL_TO_PASS"),
        "PASS_TO_PASS": _names(row, "PASS_TO_PASS"),
        "log_parser": row.get("log_parser") or log_parser,
        "eval_type": str(row.get("eval_type") or kind).lower(),
    }
    for column, allowed in (("log_parser", known["parsers"]), ("eval_type", _KINDS)):
        if grading[column] not in allowed:
            raise DataError(f"{column}: expected one of {', '.join(allowed)}, got {row[column]!r}"[:2000])
    scripts = {}
    if row.get("eval_script"):
        scripts["eval.sh"] = swe_bench.with_exit_code(text_of(row, "eval_script"))
    elif test_command is None and repository.lower() in known["repositories"] and "pytest" not in log_parser:
        raise DataError(
            f"eval_script: expected the column of SWE-bench 5, or a test_command for tests that {log_parser} reads, "
            "got neither"
        )
    return {"image": str(grading["image"]), "grading": grading, "scripts": scripts}


def _pro(row: Mapping[str, Any], run_scripts: Path | None) -> dict[str, Any]:
    """The statement has all three parts, empty ones too; the tests' scripts ship beside the rows."""
    name = row["instance_id"]
    files = ",".join(_names(row, "selected_test_files_to_run"))
    scripts = {"test.sh": PRO_SCRIPT % files}
    for file in ("run_script.sh", "parser.py"):
        try:
            scripts[file] = ((run_scripts or Path("run_scripts")) / name / file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"run_scripts: expected SWE-bench Pro's folder of this name, with {name}/{file}, got {run_scripts}"
            ) from error
    scripts["set_up.sh"] = str(row.get("before_repo_set_cmd") or "").strip().split("\n")[-1]
    requirements, interface = (row.get(column) or "" for column in ("requirements", "interface"))
    tag = row.get("dockerhub_tag")
    return {
        "statement": f"{row['problem_statement']}\n\nRequirements:\n{requirements}\n\n"
        f"New interfaces introduced:\n{interface}",
        "image": row.get("image") or (f"{PRO_IMAGES}:{tag}" if tag else None),
        "grading": {
            "grader": PRO,
            "FAIL_TO_PASS": _names(row, "fail_to_pass"),
            "PASS_TO_PASS": _names(row, "pass_to_pass"),
        },
        "scripts": scripts,
    }


def _r2e(row: Mapping[str, Any]) -> Instance:
    """R2E-Gym names the repairing commit; its tests are in the row, and all that passed after it must pass."""
    expected = _json(row, "expected_output_json")
    executed = _json(row, "execution_result_content")
    commit = text_of(row, "commit_hash")
    names, codes = (executed.get(key) or [] for key in ("test_file_names", "test_file_codes"))
    if not all(isinstance(one, list) and all(isinstance(text, str) for text in one) for one in (names, codes)):
        raise DataError("execution_result_content: expected lists of texts in test_file_names and test_file_codes")
    if len(names) != len(codes):
        raise DataError(f"test_file_codes: expected one for each of {len(names)} test_file_names, got {len(codes)}")
    return Instance(
        id=check_name(f"{text_of(row, 'repo_name').replace('/', '__')}__{commit[:12]}", "repo_name", DataError),
        benchmark="r2e_gym",
        repository=text_of(row, "repo_name"),
        commit=f"{commit}~1",
        statement=text_of(row, "problem_statement"),
        fail_to_pass=[name for name, outcome in expected.items() if outcome == "PASSED"],
        pass_to_pass=[],
        tests={
            "/".join(("r2e_tests", *parts_of(name, "test_file_names"))): code
            for name, code in zip(names, codes, strict=True)
        },
    )


def _json(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    try:
        value = json.loads(text_of(row, column))
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
