"""Rows of SWE-bench and SWE-bench Pro, graded as their own harnesses do it.

In: a task and what an attempt left in ``/work``. Out: a ``Reward``. As in those harnesses, the attempt is its patch:
what ``git add -A`` would take of it. It is made and applied in a fresh sandbox that begins with the untouched
repository, and there the benchmark's own scripts run. SWE-bench's log is judged by its own package
(``tasks.swe_bench``). SWE-bench Pro's parser writes which tests passed, and all expected ones have to be among them.

As in those harnesses, files that are no part of the tests' patch are as the attempt left them, and code under test can
print what the parsers read. A patch is relative to the untouched repository, whatever the attempt committed: that is
what is submitted, not how it is graded. No verdict is a killed sandbox, or a grader that fails or does not end.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from north_lightning.errors import ConfigError, VerifierError
from north_lightning.interfaces import SandboxProvider
from north_lightning.tasks import image_of, swe_bench
from north_lightning.tasks.git import without_binary
from north_lightning.types import CommandResult, Reward, Task

GRADERS = ("swe_bench", "swe_bench_pro")
ATTEMPT = "/attempt"
MAX_OUTPUT_CHARS = 2_000
PREPARING_S = 300.0
NOT_STARTED = (126, 127)  # a shell's exit codes where a program is missing

_BAD_REPOSITORY, _BAD_ATTEMPT, _BAD_PATCH = 41, 42, 43
_GIT = "git -c safe.directory='*' -c core.quotePath=false --git-dir=/work/.git"
TAKE_PATCH = f"""cd /work || exit {_BAD_REPOSITORY}
export GIT_INDEX_FILE=/tmp/index HOME=/tmp
tree() {{
    rm -f /tmp/index; cp .git/index /tmp/index
    {_GIT} -C "$1" --work-tree="$1" add -A --ignore-errors . >/dev/null 2>&1
    {_GIT} write-tree
}}
before=$(tree /work) || exit {_BAD_REPOSITORY}
after=$(tree {ATTEMPT}) || exit {_BAD_ATTEMPT}
{_GIT} diff --binary --no-color --no-ext-diff --no-textconv "$before" "$after" >/logs/verifier/attempt.patch
"""
_APPLY = "/logs/verifier/model.patch"
APPLY_PATCH = {
    "swe_bench": f"""cd /work || exit 1
git() {{ command git -c safe.directory='*' "$@"; }}
for how in "git apply --verbose" "git apply --verbose --3way" "git apply --verbose --reject" \\
    "patch --batch --forward --fuzz=5 -p1 -i"; do
    $how {_APPLY} && exit 0
    git checkout -- .; git clean -fd
done
git apply --check --reverse {_APPLY} || exit {_BAD_PATCH}""",
    "swe_bench_pro": f"cd /work && git -c safe.directory='*' apply -v {_APPLY}; exit 0",
}
"""As each harness does it: SWE-bench tries four ways, SWE-bench Pro goes on without a patch that does not apply."""


def check_official(task: Task) -> None:
    """``ConfigError`` if nothing here can grade ``task``."""
    if task.metadata["grader"] not in GRADERS:
        raise ConfigError(
            f"task {task.id}: [metadata] grader: expected one of {', '.join(GRADERS)}, got {task.metadata['grader']!r}"
        )
    if task.metadata["grader"] == "swe_bench":
        swe_bench.grader_version()


def grader_of(task: Task) -> str:
    """Name and version of the benchmark's grader."""
    is_pro = task.metadata["grader"] == "swe_bench_pro"
    return "SWE-bench Pro's scripts" if is_pro else f"swebench {swe_bench.grader_version()}"


async def verify_official(
    task: Task, tests: Path, workdir: Path, logs: Path, sandboxes: SandboxProvider, limit_s: float
) -> Reward:
    """The benchmark's verdict on ``workdir``; ``logs`` is an empty directory that sandboxes may write in."""
    check_official(task)
    instance = json.loads((tests / "instance.json").read_text())
    is_pro = instance["grader"] == "swe_bench_pro"
    root = task.own_verifier.root if task.own_verifier is not None else task.root
    mounts = {"/tests": tests, ATTEMPT: workdir}
    image = image_of(task) if root is None else None
    sandbox = await sandboxes.open(image, read_only=mounts, writable={"/logs/verifier": logs}, root=root)
    try:
        taken = await sandbox.run(TAKE_PATCH, PREPARING_S)
        if taken.exit_code == _BAD_ATTEMPT:
            return Reward(0.0, {"reason": f"no patch can be made of the attempt: {taken.output[-MAX_OUTPUT_CHARS:]}"})
        if taken.exit_code != 0 or taken.timed_out:
            raise VerifierError(f"task {task.id}: the attempt's patch cannot be made: {taken.output[-500:]}")
        patch = read_untrusted(logs / "attempt.patch")
        if is_pro:
            patch = without_binary(patch.decode(errors="surrogateescape")).encode(errors="surrogateescape")
        elif not patch:
            return Reward(0.0, {"reason": "the attempt's patch is empty"})
        (logs / "model.patch").write_bytes(patch)
        applied = CommandResult("", 0) if not patch else await sandbox.run(APPLY_PATCH[instance["grader"]], PREPARING_S)
        if applied.exit_code == _BAD_PATCH:
            return Reward(0.0, {"reason": f"the patch does not apply: {applied.output[-MAX_OUTPUT_CHARS:]}"})
        if applied.exit_code != 0 or applied.timed_out:
            raise VerifierError(f"task {task.id}: the attempt's patch cannot be applied: {applied.output[-500:]}")
        result = await sandbox.run("/bin/bash /tests/test.sh </dev/null; exit 0", limit_s)
    finally:
        await sandbox.close()
    details: dict[str, Any] = {"output": result.output[-MAX_OUTPUT_CHARS:]}
    if result.timed_out:
        return Reward(0.0, {**details, "reason": f"the tests did not end within {limit_s:g} s"}, unended=True)
    if result.exit_code != 0:
        raise VerifierError(
            f"task {task.id}: the tests were killed (exit code {result.exit_code}): {result.output[-500:]}"
        )
    verdict = await (grade_output if is_pro else grade_log)(task.id, instance, logs)
    expected = [*instance["FAIL_TO_PASS"], *instance["PASS_TO_PASS"]]
    passed = set(verdict.pop("passed", ()))
    details |= {"passed": [test for test in expected if test in passed]}
    details |= {"failed": [test for test in expected if test not in passed]}
    return Reward(float(verdict.pop("resolved")), {**details, **verdict})


async def grade_log(task_id: str, instance: Mapping[str, Any], logs: Path) -> dict[str, Any]:
    """SWE-bench: what its package says of the log."""
    try:
        content = await asyncio.to_thread(read_untrusted, logs / "log")
    except FileNotFoundError as error:
        raise VerifierError(f"task {task_id}: test.sh wrote no /logs/verifier/log") from error
    log = logs.parent / "test_output.txt"
    log.write_text(content.decode(errors="replace"), encoding="utf-8", newline="")
    report: dict[str, Any] = await swe_bench.grade(instance, log)
    status = report.get("tests_status", {})
    kept = {key: report[key] for key in ("resolved", "error", "infra_failure", "infra_failure_reason") if key in report}
    passed = [test for kind in ("FAIL_TO_PASS", "PASS_TO_PASS") for test in status.get(kind, {}).get("success", ())]
    return kept | {"passed": passed}


async def grade_output(task_id: str, instance: Mapping[str, Any], logs: Path) -> dict[str, Any]:
    """SWE-bench Pro: resolved if every expected test is among those that its parser found passed."""
    try:
        code = read_untrusted(logs / "parser_exit_code").decode(errors="replace").strip()
    except FileNotFoundError:
        code = ""
    if code in map(str, NOT_STARTED):
        raise VerifierError(f"task {task_id}: parser.py cannot be run in the image: python was not found")
    expected = {*instance["FAIL_TO_PASS"], *instance["PASS_TO_PASS"]}
    try:
        output = json.loads(read_untrusted(logs / "output.json").decode())
        passed = {test["name"] for test in output["tests"] if test["status"] == "PASSED"}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"parser.py wrote no list of tests to output.json: {type(error).__name__}: {error}"
        return {"resolved": False, "reason": reason[:MAX_OUTPUT_CHARS]}
    return {"resolved": expected <= passed, "passed": expected & passed}


def read_untrusted(path: Path, max_bytes: int = -1) -> bytes:
    """Content of a file that untrusted code may have placed, or its beginning. A sandbox limits the size of a file.

    Raises:
        FileNotFoundError: nothing is there.
        VerifierError: a link or a special file is.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise VerifierError(f"{path.name}: expected a regular file: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise VerifierError(f"{path.name}: expected a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(max_bytes)
    finally:
        os.close(descriptor)
