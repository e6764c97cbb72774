"""The text of an issue, from what the failing tests show: what was done, what came, how much else is affected.

In: the runner's notes on failed tests. Out: a few sentences as a user would report them. The kind of bug, its place
and its fix are not known here, so they cannot be given away; the wording is drawn from the task's name alone.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Sequence

OPENINGS = (
    "{package} does not behave as it should.",
    "I think I found a bug in {package}.",
    "Something is wrong in {package} since the last change.",
    "{package}: wrong behaviour.",
    "After an update, {package} fails on code that used to work.",
    "We hit a regression in {package}.",
)
STEPS = (
    "To reproduce:\n\n    {code}\n\nThis gives:\n\n    {outcome}",
    "Running\n\n    {code}\n\nends in\n\n    {outcome}",
    "What I ran:\n\n    {code}\n\nWhat I got:\n\n    {outcome}",
    "The check\n\n    {code}\n\nfails with\n\n    {outcome}",
)
BARE = (
    "What `{test}` exercises fails with\n\n    {outcome}",
    "I see this where `{test}` looks:\n\n    {outcome}",
    "`{test}` describes what should happen; instead there is\n\n    {outcome}",
)
CLOSINGS = (
    "Please fix it in the package; its tests are right as they are.",
    "Find the cause and repair it. Do not change the tests.",
    "The existing tests describe the expected behaviour; the code should follow them.",
    "Could you make it work again without touching the tests?",
)
MAX_CODE_CHARS = 300
MAX_OUTCOME_CHARS = 300

_NOTE = re.compile(r"(\S+) (\S+) (.*)", re.S)
_PYTEST_FRAME = re.compile(r"(\.\.)?/tests/\S+\.py:\d+: in ")


def issue_text(name: str, package: str, fail_to_pass: Sequence[str], notes: Sequence[str]) -> str:
    """The issue of task ``name``; ``notes`` are the runner's lines ``test outcome 'message'``."""
    rng = random.Random(f"issue/{name}")
    parsed = {match[1]: match[3] for note in notes if (match := _NOTE.fullmatch(note)) and match[1] in fail_to_pass}
    test = next((one for one in fail_to_pass if one in parsed), fail_to_pass[0])
    code, outcome = _shown(parsed.get(test, "''"))
    words = {"package": package, "test": test, "code": code, "outcome": outcome}
    middle = rng.choice(STEPS if code else BARE)
    parts = [rng.choice(OPENINGS), middle]
    if len(fail_to_pass) > 1:
        parts.append(
            rng.choice(("{n} more checks are affected.", "The same happens in {n} other places.")).replace(
                "{n}", str(len(fail_to_pass) - 1)
            )
        )
    parts.append(rng.choice(CLOSINGS))
    return "\n\n".join(part.format(**words) for part in parts)


def _shown(note: str) -> tuple[str, str]:
    """The failing statement of the test, if the note still has it, and the exception's words."""
    try:
        message = str(ast.literal_eval(note))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        message = note
    lines = [line for line in message.splitlines() if line.strip()]
    if any(line.startswith("E ") for line in lines):
        return _shown_by_pytest(lines)
    frames = [number for number, line in enumerate(lines) if line.lstrip().startswith('File "/tests/')]
    code = ""
    if frames and frames[-1] + 1 < len(lines):
        code = lines[frames[-1] + 1].strip()[:MAX_CODE_CHARS]
    last = max((n for n, line in enumerate(lines) if line.lstrip().startswith("File ")), default=-1)
    told = [line for line in lines[last + 1 :] if line[:1] != " "]
    outcome = "\n    ".join(told)[:MAX_OUTCOME_CHARS] or "a failure without a message"
    return code, outcome


def _shown_by_pytest(lines: Sequence[str]) -> tuple[str, str]:
    """Its short style: ``path:line: in function``, the statement, then what is wrong on lines that begin with E."""
    frames = [n for n, line in enumerate(lines) if _PYTEST_FRAME.match(line)]
    code = lines[frames[-1] + 1].strip()[:MAX_CODE_CHARS] if frames and frames[-1] + 1 < len(lines) else ""
    told = [line[1:].strip() for line in lines if line.startswith("E ")]
    return code, "\n    ".join(line for line in told if "@check" not in line)[:MAX_OUTCOME_CHARS]
