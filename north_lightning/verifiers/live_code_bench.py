"""LiveCodeBench's verdict on one answer: the answer runs in a sandbox, and what it gives is compared here.

In: a task of ``tasks.live_code_bench`` and the attempt's ``solution.py``. Out: a ``Reward``, 1 if every test passes.
Tests run in order and the first that fails ends the run, as in the official runner, to which the comparison is equal:
lines are stripped and compared as texts or as decimals; a value that a function returns is compared with ``==``, where
a tuple counts as a list. The sandbox is given inputs only (``live_code_bench_runner``).

Stricter than the official runner, on purpose: a test that outlasts its limit by ``GRACE_S`` fails even if the code
silenced the alarm (the official runner waits for the global limit alone); a class whose ``__eq__`` says that it equals
everything equals nothing; an output fails that is far longer than what is expected.
"""

from __future__ import annotations

import asyncio
import json
import time
from asyncio.subprocess import Process
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from north_lightning.errors import VerifierError
from north_lightning.interfaces import SandboxProvider
from north_lightning.tasks.live_code_bench import TEST_TIMEOUT_S, global_limit_s
from north_lightning.types import Reward
from north_lightning.verifiers.frameworks import PACKAGES

RUNNER = "/grader/live_code_bench_runner.py"
START_TIMEOUT_S = 30.0
GRACE_S = 2.0
MIN_OUTPUT_BYTES, OUTPUT_FACTOR = 1 << 20, 32
"""An answer may take this much, or this many times what is expected: a number takes 14 bytes on its way."""


class AnswerFails(Exception):
    """Control flow: the answer is wrong, for this reason."""


async def grade(
    tests: Mapping[str, Any], code: str, image: Path, sandboxes: SandboxProvider, python: str, packages: Path | None
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
                limit_s = TEST_TIMEOUT_S + GRACE_S + (0 if passed else TEST_TIMEOUT_S)  # the first loads the code
                answer = await runner.ask({"input": text}, min(limit_s, end - time.monotonic()), len(wanted))
                if "output" not in answer or not same(answer["output"], wanted):
                    raise AnswerFails("wrong answer")
        except AnswerFails as error:
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


# ---- comparison ----------------------------------------------------------------------------------------------------


def same_lines(printed: Any, expected: str) -> bool:
    """Line by line, blanks around each apart: the same text, or the same decimals."""
    lines, wanted = ([line.strip() for line in str(text).strip().split("\n")] for text in (printed, expected))
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(line: str, wanted: str) -> bool:
    try:
        return line == wanted or [*map(Decimal, line.split())] == [*map(Decimal, wanted.split())]
    except ArithmeticError:
        return False


def same_value(encoded: Any, expected: str) -> bool:
    """``==`` with the JSON value ``expected``; a tuple is a list, and an array of one element is that element."""
    try:
        value = decode(encoded)
        return bool((list(value) if isinstance(value, tuple) else value) == json.loads(expected))
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):  # an array has no one truth value
        return False


def decode(encoded: Any) -> Any:
    """The value that ``live_code_bench_runner.encode`` wrote."""
    if not isinstance(encoded, list):
        return encoded
    kind, *rest = encoded
    match kind:
        case "int":
            return int(rest[0], 16)
        case "float":
            return float.fromhex(rest[0])
        case "complex":
            return complex(*map(float.fromhex, rest))
        case "Decimal":
            return Decimal(rest[0])
        case "Fraction":
            return Fraction(*(int(part, 16) for part in rest))
        case "list" | "tuple":
            return (list if kind == "list" else tuple)(map(decode, rest))
        case "dict":
            return {decode(key): decode(below) for key, below in rest}
        case "numpy" | "array":
            number = np.dtype(rest[0])
            if number.kind not in "biufc":
                raise ValueError(f"expected a type of numbers, got {number}")
            one = number.type(decode(rest[1]))
            return np.array([one]) if kind == "array" else one
        case "other":
            return object()
    raise ValueError(f"unknown value {kind!r}")
