"""Rows of LiveCodeBench's ``code_generation_lite`` as tasks: ``python -m north_lightning tasks live_code_bench``.

In: its files (JSON Lines or parquet) and a range of contest dates. Out: a task directory per problem, answered once
(``SingleAnswerHarness``) and graded by our runner (``verifiers.live_code_bench``). The private tests, published as a
compressed pickle of a text, are read without unpickling.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from north_lightning.data.records import decode, read_records, text_of
from north_lightning.errors import ConfigError, DataError, TaskError
from north_lightning.tasks.harbor import NO_TEST_SCRIPT, TaskSource, files_script, write_task
from north_lightning.untrusted import check_digests, check_name, load_json, load_pickled_text

MAX_ROW_BYTES = 1 << 30
MAX_TESTS_BYTES = 2 << 30
ANSWER_FILE = "solution.py"
TEST_TIMEOUT_S = 6

# The official wording of release_v6, for models that are asked by chat.
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
STARTER = (
    "### Format: You will use the following starter code to write the solution to the problem and enclose your code "
    "within delimiters.\n```python\n{starter_code}\n```\n\n"
)
NO_STARTER = (
    "### Format: Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on "
    "the sample inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it "
    "reads the inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n"
)
END = "### Answer: (use the provided format with backticks)"


def global_limit_s(num_tests: int) -> float:
    """The official runner's limit of all tests together."""
    return (TEST_TIMEOUT_S + 1) * num_tests + 5


def import_live_code_bench(
    rows: list[Path],
    output_dir: Path,
    start_date: str | None = None,
    end_date: str | None = None,
    sha256: list[str] | None = None,
    solutions: Path | None = None,
    stdin_buffer: bool = False,
) -> None:
    """Write one task per problem of a range of contest dates.

    Args:
        rows: The files of the release, JSON Lines or parquet.
        output_dir: Where the task directories are written.
        start_date: First contest date, such as 2024-08-01; all earlier problems too if left out.
        end_date: Last contest date; all later problems too if left out.
        sha256: The SHA-256 of each of the files, in their order; another file is an error.
        solutions: JSON Lines of question_id and code: solutions for the tasks' solve.sh.
        stdin_buffer: Whether answers may read sys.stdin.buffer, as with official runners of 2025 and later.
    """
    digests = check_digests(rows, sha256)
    start, end = _date(start_date or "0001-01-01", "start_date"), _date(end_date or "9999-12-31", "end_date")
    known = _solutions(solutions) if solutions else {}
    dates: dict[str, date] = {}
    num_left_out = 0
    for where, content in read_records(rows, max_record_bytes=MAX_ROW_BYTES):
        try:
            row = decode(content)
            name, day = check_name(text_of(row, "question_id"), "question_id", DataError), _contest_date(row)
            if name in dates:
                raise DataError(f"question_id: expected one row of {name}, got another")
            if not start <= day <= end:
                num_left_out += 1
                continue
            dates[name] = day
            more = {"contest_date": day.isoformat(), "data_sha256": digests}
            write_task(task_of(row, name, known.get(name), stdin_buffer, more), output_dir)
        except (DataError, TaskError) as error:
            raise type(error)(f"{where}: {error}") from error
    if not dates:
        raise DataError(f"start_date, end_date: expected problems of {start} to {end}, got none of {num_left_out}")
    if unknown := known.keys() - dates:
        raise DataError(f"solutions: expected those of problems imported here, got {sorted(unknown)[0]}")
    print(
        f"{output_dir}: {len(dates)} tasks, contests of {min(dates.values())} to {max(dates.values())}, "
        f"{num_left_out} other problems left out\nsha256: [{', '.join(digests)}]"
    )


def task_of(
    row: Mapping[str, Any], name: str, solution: str | None, stdin_buffer: bool, more: Mapping[str, Any]
) -> TaskSource:
    """The task of one row; ``DataError`` names the column that is missing or wrong."""
    tests = cases_of(row)
    starter = str(row.get("starter_code") or "")
    question = f"### Question:\n{text_of(row, 'question_content')}\n\n"
    return TaskSource(
        name=name,
        environment="answer",
        family="live_code_bench",
        instruction=question + (STARTER.format(starter_code=starter) if starter else NO_STARTER) + END,
        files={},
        tests={"tests.json": json.dumps({**tests, "stdin_buffer": stdin_buffer}), "test.sh": NO_TEST_SCRIPT},
        solve_script=files_script({ANSWER_FILE: solution}) if solution is not None else "",
        steps=(),
        max_turns=1,
        metadata={
            "grader": "live_code_bench",
            "answer_files": [ANSWER_FILE],
            "system": SYSTEM,
            "difficulty": str(row.get("difficulty")),
            **more,
        },
        time_limits=(600.0, int(global_limit_s(len(tests["inputs"]))) + 60),
    )


def cases_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs``, ``outputs`` and ``fn_name`` (None for programs that read stdin) of public and private tests."""
    cases = [*_cases(row, "public_test_cases"), *_cases(row, "private_test_cases")]
    metadata = load_json(text_of(row, "metadata"))
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not cases:
        raise DataError("private_test_cases: expected at least one test, got none: no answer could be wrong")
    kinds = {case.get("testtype") for case in cases}
    if kinds != {"functional" if name else "stdin"}:
        raise DataError(f"testtype: expected {'functional' if name else 'stdin'} (func_name is {name!r}), got {kinds}")
    for case in cases:
        if not all(isinstance(case.get(key), str) for key in ("input", "output")):
            raise DataError("test cases: expected texts as input and output")
        if name:
            load_json(case["output"])
    return {
        "inputs": [case["input"] for case in cases],
        "outputs": [case["output"] for case in cases],
        "fn_name": name or None,
    }


def _cases(row: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    text = text_of(row, column)
    try:
        if not text.lstrip().startswith("["):
            unpacking = zlib.decompressobj()
            packed = unpacking.decompress(base64.b64decode(text, validate=True), MAX_TESTS_BYTES)
            if not unpacking.eof:
                raise DataError(f"expected at most {MAX_TESTS_BYTES} bytes in one complete stream")
            text = load_pickled_text(packed)
        cases = load_json(text)
    except (ValueError, zlib.error) as error:
        raise DataError(f"{column}: expected JSON, or base64 of a compressed pickle of it: {error}") from error
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise DataError(f"{column}: expected a list of tests, got {str(cases)[:80]}")
    return cases


def _solutions(file: Path) -> dict[str, str]:
    found = {}
    for where, content in read_records([file]):
        row = decode(content)
        if not isinstance(row.get("question_id"), str) or not isinstance(row.get("code"), str):
            raise DataError(f"{where}: expected question_id and code, got {sorted(row)}")
        found[row["question_id"]] = row["code"]
    return found


def _contest_date(row: Mapping[str, Any]) -> date:
    return _date(text_of(row, "contest_date")[:10], "contest_date")


def _date(text: str, key: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        error = DataError if key == "contest_date" else ConfigError
        raise error(f"{key}: expected a date such as 2024-08-01, got {text!r}") from None
