"""LiveCodeBench's verdict on one answer, which runs in a sandbox.

In: a task of ``tasks.live_code_bench`` and the attempt's ``solution.py``. Out: a ``Reward``, 1 if every test passes.
Tests run in order and the first that fails ends the run, as in the official runner, to which the comparison is equal:
lines are stripped and compared as texts or as decimals; a value that a function returns is compared with ``==``, where
a tuple counts as a list. Official grading compares in the process of the answer, as the official runner does
(``live_code_bench_runner``). Strict grading gives the sandbox inputs only and compares here what comes back as JSON:
the value's own ``==`` is not asked, a nested tuple and a key that is a number are what JSON makes of them, and what
JSON cannot say is wrong. It also limits the time of each test and the length of an answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from asyncio.subprocess import Process
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from north_lightning.errors import VerifierError
from north_lightning.interfaces import SandboxProvider
from north_lightning.tasks.live_code_bench import TEST_TIMEOUT_S, global_limit_s
from north_lightning.types import Grading, Reward
from north_lightning.verifiers.frameworks import PACKAGES
from north_lightning.verifiers.live_code_bench_runner import same_lines, same_value

RUNNER = "/grader/live_code_bench_runner.py"
START_TIMEOUT_S = 30.0
GRACE_S = 2.0
MIN_OUTPUT_BYTES, OUTPUT_FACTOR = 1 << 20, 32
"""An answer may take this much, or this many times what is expected."""


class AnswerFails(Exception):
    """Control flow: the answer is wrong, for this reason."""


async def grade(
    tests: Mapping[str, Any],
    code: str,
    image: Path,
    sandboxes: SandboxProvider,
    python: str,
    packages: Path | None,
    grading: Grading = "strict",
) -> Reward:
    """Run ``code`` on the ``inputs`` of ``tests`` and compare with its ``outputs``.

    Raises:
        VerifierError: the runner did not start, or the code needs a package that is not there.
    """
    mounts = {RUNNER: Path(__file__).with_name("live_code_bench_runner.py")}
    sandbox = await sandboxes.open(image, read_only=mounts | ({PACKAGES: packages} if packages else {}))
    name, expected, passed = tests["fn_name"], tests["outputs"], 0
    same = same_lines if name is None else same_value
    try:
        runner = Runner(await sandbox.spawn([python, "-I", "-B", RUNNER]))
        try:
            await runner.ask({"code": code, "fn_name": name, "stdin_buffer": tests["stdin_buffer"]}, START_TIMEOUT_S)
        except AnswerFails as error:
            raise VerifierError(f"the runner of answers did not start: {error}") from error
        end = time.monotonic() + global_limit_s(len(expected))
        try:
            for passed, (text, wanted) in enumerate(zip(tests["inputs"], expected, strict=True)):
                left_s = end - time.monotonic()
                if grading == "official":
                    answer = await runner.ask({"input": text, "expected": wanted}, left_s)
                    is_right = answer.get("passed") is True
                else:
                    limit_s = TEST_TIMEOUT_S + GRACE_S + (0 if passed else TEST_TIMEOUT_S)  # the first loads the code
                    answer = await runner.ask({"input": text}, min(limit_s, left_s), len(wanted))
                    is_right = "output" in answer and same(answer["output"], wanted)
                if not is_right:
                    raise AnswerFails("wrong answer")
        except AnswerFails as error:
            sandbox.check_intact()
            return Reward(0.0, {"reason": f"test {passed + 1} of {len(expected)}: {error}"})
    finally:
        await sandbox.close()
    return Reward(1.0, {"passed": len(expected)})


class Runner:
    """Asks the program in the sandbox."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def ask(self, question: Mapping[str, Any], limit_s: float, num_expected: int = 0) -> dict[str, Any]:
        """What the program answers; ``AnswerFails`` if it says an error, or nothing within the limit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        frame = json.dumps(question).encode()
        try:
            async with asyncio.timeout(limit_s):
                self._process.stdin.write(b"%d\n%s" % (len(frame), frame))
                await self._process.stdin.drain()
                size = int(await self._process.stdout.readline())
                if not 0 <= size <= MIN_OUTPUT_BYTES + OUTPUT_FACTOR * num_expected:
                    raise AnswerFails(f"{size} bytes where {num_expected} were expected")
                answer = json.loads(await self._process.stdout.readexactly(size))
        except TimeoutError:
            raise AnswerFails("time limit") from None
        except (ConnectionError, asyncio.IncompleteReadError, ValueError, RecursionError):
            raise AnswerFails("the code ended the process") from None
        if not isinstance(answer, dict):
            raise AnswerFails("the code took the place of the runner")
        if "unusable" in answer:
            raise VerifierError(
                f"the answer imports a package that the sandbox does not have ({answer['unusable']}): name a directory "
                "that has it in the verifier's packages"
            )
        if "error" in answer:
            raise AnswerFails(f"{answer['error']}: {answer.get('what')}"[:300])
        return answer
