"""What test frameworks print, read: test -> ``passed``, ``failed``, ``error`` or ``skipped``.

In: a log. Out: what it says of each test, by the name that SWE-bench's and its relatives' rows use for it. An expected
failure (``xfail``) counts as passed, as SWE-bench counts it. A test that is named twice has its worst outcome.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal

Outcome = Literal["passed", "skipped", "failed", "error"]
Outcomes = dict[str, Outcome]

_ORDER: tuple[Outcome, ...] = ("passed", "skipped", "failed", "error")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PYTEST = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\s+(\S.*)")
_PYTEST_WORDS: dict[str, Outcome] = {
    "PASSED": "passed",
    "XFAIL": "passed",
    "FAILED": "failed",
    "XPASS": "failed",
    "ERROR": "error",
    "SKIPPED": "skipped",
}
_UNITTEST = re.compile(r"(\w+) \(([\w.<>]+)\)(?:\n[^\n]*?)? \.\.\. (ok|FAIL|ERROR|skipped|expected failure)\b")
_UNITTEST_WORDS: dict[str, Outcome] = {
    "ok": "passed", "expected failure": "passed", "FAIL": "failed", "ERROR": "error", "skipped": "skipped",
}  # fmt: skip


def pytest_log(log: str) -> Outcomes:
    """The short summary of ``pytest -rA``: ``PASSED path::test``, ``FAILED path::test - message``."""
    return _worst(_pytest_lines(_ANSI.sub("", log)))


def _pytest_lines(log: str) -> Iterator[tuple[str, Outcome]]:
    for line in log.splitlines():
        if (found := _PYTEST.fullmatch(line)) and not found[2].startswith("["):  # SKIPPED [1] path:line: reason
            name = found[2].partition(" - ")[0] if found[1] != "PASSED" else found[2]
            yield name.rstrip(), _PYTEST_WORDS[found[1]]


def unittest_log(log: str) -> Outcomes:
    """``python -m unittest -v`` and Django's runner: ``test_x (module.Class) ... ok``."""
    found = ((_unittest_name(one[1], one[2]), _UNITTEST_WORDS[one[3]]) for one in _UNITTEST.finditer(log))
    return _worst(found)


def _unittest_name(method: str, place: str) -> str:
    """Python 3.11 and newer print the method again in the brackets; rows name it as older ones did."""
    return f"{method} ({place.removesuffix('.' + method)})"


def _worst(found: Iterator[tuple[str, Outcome]]) -> Outcomes:
    outcomes: Outcomes = {}
    for name, outcome in found:
        outcomes[name] = max(outcomes.get(name, outcome), outcome, key=_ORDER.index)
    return outcomes


PARSERS: dict[str, Callable[[str], Outcomes]] = {"pytest": pytest_log, "unittest": unittest_log}
