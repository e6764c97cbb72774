"""Problems of SciCode as tasks: ``python -m north_lightning tasks scicode``.

In: the problems (JSON, JSON Lines or parquet) and ``test_data.h5``. Out: a task directory per problem. Its steps are
asked one after the other in one conversation (``SingleAnswerHarness``) with the official prompts, with background, each
with the code of the steps before it, and graded step by step (``verifiers.scicode_runner``). The reward is the share of
steps solved; the task is solved if all are.

Three steps are given, not asked. The official generation keeps only the function that their header names, and of a class
that is its ``__init__`` alone, so that later steps of two problems fail: ``extract`` does the same, ``verbatim`` keeps
the whole code. The family of a task says which.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from north_lightning.data.records import decode, read_records, text_of
from north_lightning.errors import ConfigError, DataError, TaskError
from north_lightning.tasks.harbor import NO_TEST_SCRIPT, TaskSource, files_script, write_task
from north_lightning.untrusted import check_digests, check_name

GIVEN = ("13.6", "62.1", "76.3")
STEP_TIMEOUT_S = 1800
Extraction = Literal["extract", "verbatim"]

# The official wording (multistep_template.txt).
PROMPT = """PROBLEM DESCRIPTION:
You will be provided with problem steps along with background knowledge necessary for solving the problem. Your task will be to develop a Python solution focused on the next step of the problem-solving process.

PROBLEM STEPS AND FUNCTION CODE:
Here, you'll find the Python code for the initial steps of the problem-solving process. This code is integral to building the solution.

{steps}

NEXT STEP - PROBLEM STEP AND FUNCTION HEADER:
This part will describe the next step in the problem-solving process. A function header will be provided, and your task is to develop the Python code for this next step based on the provided description and function header.

{next_step}

DEPENDENCIES:
Use only the following dependencies in your solution. Do not include these dependencies at the beginning of your code.

{dependencies}

RESPONSE GUIDELINES:
Now, based on the instructions and information provided above, write the complete and executable Python program for the next step in a single block.
Your response should focus exclusively on implementing the solution for the next step, adhering closely to the specified function header and the context provided by the initial steps.
Your response should NOT include the dependencies and functions of all previous steps. If your next step function calls functions from previous steps, please make sure it uses the headers provided without modification.
DO NOT generate EXAMPLE USAGE OR TEST CODE in your response. Please make sure your response python code in format of ```python```."""


def import_scicode(
    rows: list[Path],
    test_data: Path,
    output_dir: Path,
    extraction: Extraction = "extract",
    given: Path | None = None,
    sha256: list[str] | None = None,
) -> None:
    """Write one task per problem.

    Args:
        rows: The problems, JSON Lines, JSON or parquet.
        test_data: The file test_data.h5 with what the tests expect; reading it needs h5py.
        output_dir: Where the task directories are written.
        extraction: What of the code of given steps is kept: as in the official generation (extract), which loses
            classes, or all of it (verbatim).
        given: Directory of 13.6.txt, 62.1.txt and 76.3.txt, published in SciCode's repository as eval/data.
        sha256: The SHA-256 of each of the rows' files and then of test_data; another file is an error.
    """
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("test_data: reading it needs h5py: pip install 'north-lightning[scicode]'") from error
    digests = check_digests([*rows, test_data], sha256)
    names: set[str] = set()
    num_steps = 0
    with h5py.File(test_data, "r") as targets:
        for where, content in read_records(rows):
            try:
                source = task_of(decode(content), targets, extraction, given, digests)
                if source.name in names:
                    raise DataError(f"problem_id: expected one row of {source.name}, got another")
                names.add(source.name)
                num_steps += source.max_turns
                write_task(source, output_dir)
            except (DataError, TaskError) as error:
                raise type(error)(f"{where}: {error}") from error
    print(
        f"{output_dir}: {len(names)} tasks, {num_steps} steps asked, given steps by {extraction}\n"
        f"sha256: [{', '.join(digests)}]"
    )


def task_of(
    row: Mapping[str, Any], targets: Any, extraction: Extraction, given: Path | None, digests: list[str]
) -> TaskSource:
    """The task of one row; ``DataError`` names the column that is missing or wrong."""
    import h5py

    name = check_name(f"scicode-{text_of(row, 'problem_id')}", "problem_id", DataError)
    dependencies = text_of(row, "required_dependencies")
    steps: list[dict[str, Any]] = []
    prompts: list[str] = []
    earlier: list[str] = []
    solutions: dict[str, str] = {}
    kept = io.BytesIO()
    with h5py.File(kept, "w") as copied:
        for sub_step in _sub_steps(row):
            number = check_name(text_of(sub_step, "step_number"), "step_number", DataError)
            header = text_of(sub_step, "function_header")
            task = f"{text_of(sub_step, 'step_description_prompt')}\n{sub_step.get('step_background') or ''}"
            tests = sub_step["test_cases"]
            if number in GIVEN:
                code = _given_code(sub_step, number, given)
                code = code if extraction == "verbatim" else extract_function(code, header)
                steps.append({"number": number, "code": code, "tests": []})
            else:
                steps.append({"number": number, "tests": tests})
                _copy_targets(targets, copied, number, len(tests))
                code = f"{{{{answer {len(prompts) + 1}}}}}"
                next_step = f"{task}\n\n{header}\n\n{sub_step.get('return_line') or ''}"
                before = "\n\n------\n\n".join(earlier)
                prompts.append(PROMPT.format(steps=before, next_step=next_step, dependencies=dependencies))
                if sub_step.get("ground_truth_code"):
                    solutions[f"{number}.py"] = str(sub_step["ground_truth_code"])
            earlier.append(f"{task}\n\n{code}")
    if not prompts:
        raise DataError("sub_steps: expected a step that is not given")
    return TaskSource(
        name=name,
        environment="answer",
        family=f"scicode_{extraction}",
        instruction=prompts[0],
        files={},
        tests={
            "problem.json": json.dumps({"dependencies": dependencies, "steps": steps}),
            "targets.h5": kept.getvalue(),
            "test.sh": NO_TEST_SCRIPT,
        },
        solve_script=files_script(solutions) if len(solutions) == len(prompts) else "",
        steps=(),
        max_turns=len(prompts),
        metadata={
            "grader": "scicode",
            "answer_form": "first_python_block",
            "answer_files": [f"{step['number']}.py" for step in steps if "code" not in step],
            "follow_ups": prompts[1:],
            "extraction": extraction,
            "data_sha256": digests,
        },
        time_limits=(600.0, STEP_TIMEOUT_S * len(prompts) + 60),
    )


def extract_function(code: str, header: str) -> str:
    """The function or class of ``code`` that the official generation takes for the one in ``header``."""
    found = re.search(r"\bdef\s+(\w+)\s*\(", header) or re.search(r"\bclass\s+(\w+)\s*\(", header)
    if found is None:
        raise DataError(f"function_header: expected a function or class, got {header[:80]!r}")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == found[1]:
            return ast.unparse(node)
    raise DataError(f"function_header: expected {found[1]} in the given code, found none")


def _sub_steps(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = row.get("sub_steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise DataError(f"sub_steps: expected a list of steps, got {str(steps)[:80]}")
    for step in steps:
        tests = step.get("test_cases")
        is_given = step.get("step_number") in GIVEN
        if not isinstance(tests, list) or not (tests or is_given) or not all(isinstance(one, str) for one in tests):
            raise DataError(f"test_cases: expected at least one test, got {str(tests)[:80]}")
    return steps


def _given_code(sub_step: Mapping[str, Any], number: str, given: Path | None) -> str:
    if sub_step.get("ground_truth_code"):
        return str(sub_step["ground_truth_code"])
    if given is None or not (given / f"{number}.txt").is_file():
        raise DataError(
            f"given: expected a directory with {number}.txt, the code of a step that is given and not asked (published "
            f"in SciCode's repository as eval/data), got {given}"
        )
    return (given / f"{number}.txt").read_text()


def _copy_targets(targets: Any, copied: Any, number: str, num_tests: int) -> None:
    for test in range(1, num_tests + 1):
        place = f"{number}/test{test}"
        if place not in targets:
            raise DataError(f"test_data: expected a group {place}, found none")
        targets.copy(targets[place], copied, place)
