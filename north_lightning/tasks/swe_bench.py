"""SWE-bench's own grader, the package ``swebench`` 5. Needs the ``evaluation`` extra.

In: what a row says of its tests, and the log of them. Out: the package's verdict. No verdict is made here, and there is
no other one where the package is missing (``ConfigError``).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from north_lightning.errors import ConfigError, VerifierError

RUNNER = (sys.executable, "-P", "-X", "utf8", str(Path(__file__).with_name("swe_bench_runner.py")))
TIMEOUT_S = 300.0
END_OF_TESTS = ">>>>> End Test Output"
SHELL_EXIT_CODE = "SWEBENCH_TEST_EXIT_CODE"
GRADER = "the package swebench 5, SWE-bench's own grader"


def grader_version() -> str:
    """Which version grades; ``ConfigError`` if none that can is installed."""
    remedy = "pip install 'north-lightning[evaluation]'"
    for package in ("swebench", "unidiff"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"rows of SWE-bench: expected {GRADER}, and {package} is not installed: {remedy}")
    version = importlib.metadata.version("swebench")
    if version.partition(".")[0] != "5":
        raise ConfigError(f"rows of SWE-bench: expected {GRADER}, got version {version}: {remedy}")
    return version


@cache
def known() -> dict[str, Any]:
    """The package's ``parsers``, and its ``repositories`` in lower case: (parser, kind of evaluation)."""
    grader_version()
    done = subprocess.run(RUNNER, input="null", capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        raise ConfigError(f"rows of SWE-bench: {GRADER}, cannot be imported: {done.stderr.strip()[-300:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def with_exit_code(script: str) -> str:
    """``script``, which also prints the exit code of its tests after their end, as the package's harness makes it."""
    lines = script.split("\n")
    for number, line in enumerate(lines):
        if END_OF_TESTS in line:
            said = f'echo ">>>>> Test Exit Code: ${SHELL_EXIT_CODE}"'
            return "\n".join([*lines[:number], f"{SHELL_EXIT_CODE}=$?", line, said, *lines[number + 1 :]])
    return script


async def grade(row: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """The package's report on the log of a row's tests, ``resolved`` in it; ``VerifierError`` if it gives none."""
    grader_version()
    program = await asyncio.create_subprocess_exec(
        *RUNNER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        request = json.dumps({**row, "log": str(log)}).encode()
        answer, said = await asyncio.wait_for(program.communicate(request), TIMEOUT_S)
    except TimeoutError as error:
        raise VerifierError(f"{row['instance_id']}: {GRADER}, gave no verdict within {TIMEOUT_S:g} s") from error
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    if program.returncode != 0:
        raise VerifierError(f"{row['instance_id']}: {GRADER}, failed: {said.decode(errors='replace')[-300:]}")
    report: dict[str, Any] = json.loads(answer)
    return report
