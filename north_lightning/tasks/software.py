"""Generated software tasks: small git repositories with one bug and the unit test that fails for it.

Six kinds of bug. A repository is a module of two functions with a test each: the buggy function's test must go from
fail to pass, the other's must stay passing. Module, functions, parameters, keys and constants are drawn from a
``NameSource``, so repositories of the two splits share nothing but their shape.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from north_lightning.tasks.harbor import TaskSource
from north_lightning.tasks.names import NameSource, Split
from north_lightning.tasks.terminal import TURNS_TO_SPARE

# (word in the issue, operator, result of 7 op 2)
OPERATORS = (("add", "+", 9), ("subtract", "-", 5), ("multiply", "*", 14))


@dataclass(frozen=True, slots=True)
class Bug:
    """One drawn bug: ``wrong`` stands where ``right`` should, in the body of ``function``."""

    issue: str
    function: str
    parameters: str
    body: str  # one line, with {} where wrong or right stands
    wrong: str
    right: str
    assertion: str  # of the function's unit test


def wrong_operator(module: str, names: NameSource, rng: random.Random) -> Bug:
    function, left, right = names.name(), names.name(), names.name()
    (verb, operator, result), (_, wrong, _) = rng.sample(OPERATORS, 2)
    issue = rng.choice(
        (f"{function} in {module}.py must {verb}.", f"{function} of {module}.py should {verb}. It does not.")
    )
    body = f"return {left} {{}} {right}"
    return Bug(
        issue, function, f"{left}, {right}", body, wrong, operator, f"self.assertEqual({function}(7, 2), {result})"
    )


def dropped_last(module: str, names: NameSource, rng: random.Random) -> Bug:
    function, items, count = names.name(), names.name(), names.name()
    issue = rng.choice(
        (f"{function} in {module}.py returns one item too few.", f"{function} of {module}.py drops the last item.")
    )
    body = f"return {items}[:{{}}]"
    assertion = f"self.assertEqual({function}([4, 5, 6], 2), [4, 5])"
    return Bug(issue, function, f"{items}, {count}", body, f"{count} - 1", count, assertion)


def wrong_variable(module: str, names: NameSource, rng: random.Random) -> Bug:
    function, wanted, other = names.name(), names.name(), names.name()
    issue = rng.choice(
        (f"{function} in {module}.py must return {wanted}.", f"Let {function} of {module}.py return {wanted}.")
    )
    return Bug(
        issue, function, f"{wanted}, {other}", "return {}", other, wanted, f"self.assertEqual({function}(3, 8), 3)"
    )


def flipped_comparison(module: str, names: NameSource, rng: random.Random) -> Bug:
    function, left, right = names.name(), names.name(), names.name()
    word, sign, wrong, result = rng.choice((("larger", ">", "<", False), ("smaller", "<", ">", True)))
    issue = rng.choice(
        (f"{function} in {module}.py must test for {word}.", f"{function} of {module}.py should mean {word}.")
    )
    body = f"return {left} {{}} {right}"
    return Bug(issue, function, f"{left}, {right}", body, wrong, sign, f"self.assertIs({function}(3, 8), {result})")


def wrong_constant(module: str, names: NameSource, rng: random.Random) -> Bug:
    function, right, wrong = names.name(), names.number(), names.number()
    issue = rng.choice(
        (f"{function} in {module}.py must return {right}.", f"Let {function} of {module}.py return {right}.")
    )
    return Bug(issue, function, "", "return {}", str(wrong), str(right), f"self.assertEqual({function}(), {right})")


def wrong_key(module: str, names: NameSource, rng: random.Random) -> Bug:
    function, table, right, wrong = (names.name() for _ in range(4))
    issue = rng.choice(
        (f"{function} in {module}.py must read key {right}.", f"{function} of {module}.py should look up {right}.")
    )
    assertion = f"self.assertEqual({function}({{'{right}': 3, '{wrong}': 8}}), 3)"
    return Bug(issue, function, table, f"return {table}['{{}}']", wrong, right, assertion)


KINDS: tuple[Callable[[str, NameSource, random.Random], Bug], ...] = (
    wrong_operator,
    dropped_last,
    wrong_variable,
    flipped_comparison,
    wrong_constant,
    wrong_key,
)


def software_task(index: int, seed: int, split: Split) -> TaskSource:
    """Task number ``index`` of a split: a pure function of its arguments; kinds of bug take turns."""
    rng = random.Random(f"swe/{seed}/{split}/{index}")
    names = NameSource(rng, split)
    kind = KINDS[index % len(KINDS)]
    module, healthy, parameter = names.name(), names.name(), names.name()
    bug = kind(module, names, rng)
    functions = [
        f"def {bug.function}({bug.parameters}):\n    {bug.body.format(bug.wrong)}\n",
        f"def {healthy}({parameter}):\n    return {parameter}\n",
    ]
    rng.shuffle(functions)
    tests = _test_module(module, bug, healthy)
    old, new = bug.body.format(bug.wrong), bug.body.format(bug.right)
    path = f"/work/{module}.py"
    edit = {"command": "str_replace", "path": path, "old_str": old, "new_str": new}
    return TaskSource(
        name=f"swe-{split}-{index:05d}",
        environment="swe",
        family=kind.__name__,
        instruction=bug.issue,
        files={f"{module}.py": "\n\n".join(functions), f"test_{module}.py": tests},
        tests={f"test_{module}.py": tests, "test.sh": TEST_SCRIPT},
        solve_script=f"cd /work\npython3 - <<'END'\n{_patch_program(path, old, new)}END\n",
        steps=(
            ("str_replace_editor", {"command": "view", "path": path}),
            ("str_replace_editor", edit),
            ("submit", {}),
            ("submit", {}),
        ),
        max_turns=4 + TURNS_TO_SPARE,
        git=True,
        metadata={
            "repository": f"{module}/{module}",
            "fail_to_pass": [f"test_{module}.Test.test_{bug.function}"],
            "pass_to_pass": [f"test_{module}.Test.test_{healthy}"],
        },
    )


# For other runners of Harbor tasks; the verifier here reads [metadata] and runs the expected tests by name.
TEST_SCRIPT = """cd /work || exit 1
cp /tests/test_*.py .
if python3 -m unittest -q test_*.py; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""


def _test_module(module: str, bug: Bug, healthy: str) -> str:
    return (
        f"import unittest\n\nfrom {module} import {bug.function}, {healthy}\n\n\n"
        f"class Test(unittest.TestCase):\n    def test_{bug.function}(self):\n        {bug.assertion}\n\n"
        f"    def test_{healthy}(self):\n        self.assertEqual({healthy}(6), 6)\n"
    )


def _patch_program(path: str, old: str, new: str) -> str:
    return (
        f"from pathlib import Path\n\nfile = Path({path!r})\n"
        f"file.write_text(file.read_text().replace({old!r}, {new!r}))\n"
    )
