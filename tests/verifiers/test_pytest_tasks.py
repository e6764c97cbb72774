"""Software tasks whose tests are written for pytest, in real sandboxes: honest attempts, cheats, comparisons."""

import asyncio
from dataclasses import replace

import pytest
from pytest_cheats import BUGGY, PYTEST_CHEATS
from test_unit_tests import LIARS, SOFTWARE_CHEATS, attempt_at, cheat_at, score, write

from north_lightning.errors import VerifierError
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.types import Task
from north_lightning.verifiers.frameworks import FOR_AGENTS, mounts_of

FIXED = BUGGY.replace("a - b", "a + b")
TESTS = """from calc import add, same

import colorsys
import json
import time

import pytest
from .values import SEVEN


@pytest.fixture
def two():
    yield 2


class Test:
    def test_add(self, two):
        result = add(SEVEN, two)
        assert result == 9

    def test_negative(self):
        result = add(7, -2)
        assert 5 == result, "negative"

    def test_same(self):
        assert same(6) == json.loads("6")


@pytest.mark.parametrize(("a", "b"), [(1, 2), (3, 4)], ids=["small", "large"])
def test_many(a, b, given):
    assert add(a, b) == pytest.approx(given + a + b)


time.sleep(0.01)
"""
FAILING = [
    "tests/test_calc.py::Test::test_add",
    "tests/test_calc.py::Test::test_negative",
    "tests/test_calc.py::test_many[small]",
    "tests/test_calc.py::test_many[large]",
]
PASSING = ["tests/test_calc.py::Test::test_same"]


@pytest.fixture(scope="module")
def sandboxes():
    return BubblewrapProvider()


@pytest.fixture
def task(tmp_path):
    return make_pytest_task(tmp_path / "task")


def make_pytest_task(directory):
    tests = {
        "tests/__init__.py": "",
        "tests/test_calc.py": TESTS,
        "tests/values.py": "SEVEN = 7\n",
        "tests/conftest.py": "import pytest\n\n\n@pytest.fixture\ndef given():\n    return 0\n",
    }
    write(directory / "environment" / "files", {"calc.py": BUGGY, **tests})
    write(directory / "tests", {**tests, "test.sh": "exit 1\n"})
    metadata = {"framework": "pytest", "fail_to_pass": FAILING, "pass_to_pass": PASSING}
    return Task("calc", "swe", "tiny", "add must add", directory, 8, metadata)


def test_the_solution_scores_1_and_names_every_test(task, sandboxes):
    reward = score(task, attempt_at(task, {"calc.py": FIXED}), sandboxes)
    assert reward.value == 1.0, reward.details
    assert reward.details["passed"] == [*FAILING, *PASSING]


def test_the_untouched_state_scores_0_and_says_which_tests_fail_and_how(task, sandboxes):
    reward = score(task, attempt_at(task, {}), sandboxes)
    assert (reward.value, reward.details["failed"], reward.details["passed"]) == (0.0, FAILING, PASSING)
    assert "assert 5 == 9" in "\n".join(reward.details["notes"])


def test_a_repair_of_one_case_and_not_the_other_is_told_apart(task, sandboxes):
    code = FIXED.replace("return a + b", "return 9 if a == 7 and b == 2 else 3 if a == 1 else a - b")
    reward = score(task, attempt_at(task, {"calc.py": code}), sandboxes)
    assert (reward.value, reward.details["failed"]) == (0.0, [FAILING[1], FAILING[3]])


@pytest.mark.parametrize("name", PYTEST_CHEATS)
def test_cheat_scores_0(name, task, sandboxes):
    reward = score(task, cheat_at(task, PYTEST_CHEATS[name]), sandboxes)
    assert reward.value == 0.0, reward.details


def test_a_test_function_that_another_test_gives_another_body_is_noticed(task, sandboxes):
    code = (
        "import sys\n    module = sys.modules['tests.test_calc']\n"
        "    module.test_many.__code__ = (lambda a, b, given: None).__code__\n    return a"
    )
    metadata = {"framework": "pytest", "fail_to_pass": FAILING[2:], "pass_to_pass": PASSING}
    attempt = attempt_at(task, {"calc.py": BUGGY.replace("return a\n", f"{code}\n")})
    reward = score(replace(task, metadata=metadata), attempt, sandboxes)
    assert reward.value == 0.0
    assert reward.details["reason"] == "tampered"


@pytest.mark.parametrize("name", sorted(SOFTWARE_CHEATS)[::3])
def test_cheats_made_for_unittest_score_0_here_too(name, task, sandboxes):
    files = {path: text.replace("test_calc", "tests.test_calc") for path, text in SOFTWARE_CHEATS[name].items()}
    reward = score(task, cheat_at(task, files), sandboxes)
    assert reward.value == 0.0, reward.details


def test_what_is_harmless_beside_a_repair_changes_nothing(task, sandboxes):
    """Shadows, plug-ins and configuration of the attempt are not read; what patches the judge ends the run."""
    for name in ("options in every configuration file", "a plug-in by an entry point", "pytest shadowed",
                 "a conftest that passes everything", "a conftest beside the tests", "a printed summary"):  # fmt: skip
        (directory := task.directory.with_name(name)).mkdir()
        own = make_pytest_task(directory)
        shadow = {"colorsys.py": "import os; os._exit(0)\n"}
        attempt = attempt_at(own, {**PYTEST_CHEATS[name], **shadow, "calc.py": FIXED})
        assert score(own, attempt, sandboxes).value == 1.0, name


COMPARISONS = {
    "equal": "assert calc.value() == 9",
    "reflected": "assert 9 == calc.value()",
    "not_equal": "assert calc.value() != 8",
    "less": "assert calc.value() < 10",
    "contained": "assert 9 in calc.value()",
    "member": "assert calc.value() in [9]",
    "in_a_list": "assert [calc.value()] == [9]",
    "in_a_dict": "assert {'a': [calc.value()]} == {'a': [9]}",
    "approximate": "assert calc.value() == pytest.approx(9)",
    "approximately_a_liar": "assert 9 == pytest.approx(calc.value())",
    "both": "assert 1 == 1 and calc.value() == 9",
    "negated": "assert not calc.value() != 9",
    "with_a_message": "assert calc.value() == 9, 'no'",
}


@pytest.mark.parametrize("liar", LIARS)
def test_no_assert_leaves_the_comparison_to_a_class_of_the_code_under_test(liar, task, sandboxes):
    tests = "".join(f"def test_{name}():\n    {line}\n" for name, line in COMPARISONS.items())
    write(task.directory / "tests", {"test_more.py": f"import pytest\nimport calc\n\n{tests}"})
    ids = [f"test_more.py::test_{name}" for name in COMPARISONS]
    task = replace(task, metadata={"framework": "pytest", "fail_to_pass": ids, "pass_to_pass": []})
    reward = score(task, attempt_at(task, {"calc.py": f"{LIARS[liar]}\ndef value(): return Liar()\n"}), sandboxes)
    as_of_any_wrong_value = {"test_more.py::test_not_equal"}
    as_of_any_wrong_value |= {"test_more.py::test_less"} if liar == "a borrowed slot" else set()
    assert set(reward.details["passed"]) <= as_of_any_wrong_value


def test_honest_comparisons_of_many_kinds_pass(task, sandboxes):
    module = """import pytest
from calc import *

class Helper:
    def __eq__(self, other):
        return other == 5

def test_all(capsys, tmp_path, monkeypatch):
    assert 1 < 2 < 3
    assert Point(1) == Point(1) != Point(2)
    assert Helper() == 5
    assert 5 == Helper()
    assert [x for x in (1, 2) if x == 2] == [2]
    assert all(x == y for x, y in [(1, 1), (2, 2)])
    assert (lambda a: a == 1)(1)
    assert 0.1 + 0.2 == pytest.approx(0.3)
    assert {"a": 0.1 + 0.2} == pytest.approx({"a": 0.3})
    assert "b" in "abc" and "z" not in "abc"
    assert None is None
    assert {1, 2} >= {1}
    with pytest.raises(ZeroDivisionError, match="division"):
        1 / 0
    with pytest.raises(AssertionError):
        assert Point(1) == Point(2)
    print("said")
    assert capsys.readouterr().out == "said\\n"
    monkeypatch.setenv("A", "b")
    (tmp_path / "f").write_text("x")
    assert (tmp_path / "f").read_text() == "x"

class TestNested:
    limit = 3
    assert limit == 3
    assert [n for n in (3, 4) if n == 3]
    assert [n for n in (3 == 3,)]
    assert {n == 1 for n in (1,)} and {n: n == 1 for n in (1,)} and all(n == 1 for n in (1,))

    @pytest.mark.parametrize("n", range(2))
    def test_class_scope(self, n):
        assert n <= self.limit
"""
    source = "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: int\n"
    write(task.directory / "tests", {"test_more.py": module})
    ids = ["test_more.py::test_all", *(f"test_more.py::TestNested::test_class_scope[{n}]" for n in range(2))]
    task = replace(task, metadata={"framework": "pytest", "fail_to_pass": ids, "pass_to_pass": []})
    reward = score(task, attempt_at(task, {"calc.py": source}), sandboxes)
    assert reward.value == 1.0, reward.details


def test_a_test_that_fails_in_its_set_up_or_tear_down_has_not_passed(task, sandboxes):
    module = """import pytest
@pytest.fixture
def late():
    yield
    assert False
@pytest.fixture
def early():
    assert False
def test_late(late): pass
def test_early(early): pass
@pytest.mark.xfail
def test_expected(): pass
@pytest.mark.skip
def test_skipped(): pass
def test_plain(): pass
"""
    write(task.directory / "tests", {"test_more.py": module})
    ids = [f"test_more.py::test_{name}" for name in ("late", "early", "expected", "skipped", "plain")]
    task = replace(task, metadata={"framework": "pytest", "fail_to_pass": ids, "pass_to_pass": []})
    assert score(task, attempt_at(task, {}), sandboxes).details["passed"] == ["test_more.py::test_plain"]


def test_a_file_is_demanded_to_see_what_is_in_it(task, sandboxes):
    task = replace(task, metadata={"framework": "pytest", "fail_to_pass": ["tests/test_calc.py"], "pass_to_pass": []})
    reward = score(task, attempt_at(task, {"calc.py": FIXED}), sandboxes)
    assert reward.value == 0.0
    passed = [note.split()[0] for note in reward.details["notes"] if note.split()[1] == "passed"]
    assert sorted(passed) == sorted([*FAILING, *PASSING])


@pytest.mark.parametrize("test", ["tests/test_none.py::test_a", "../calc.py::test_a", "/tests/a.py::b", "a b::c"])
def test_an_id_of_no_file_is_named(test, task, sandboxes):
    task = replace(task, metadata={"framework": "pytest", "fail_to_pass": [test], "pass_to_pass": []})
    with pytest.raises(VerifierError, match="expected test id file.py::test"):
        score(task, attempt_at(task, {}), sandboxes)
    with pytest.raises(VerifierError, match="framework unittest or pytest, got 'nose'"):
        score(replace(task, metadata={**task.metadata, "framework": "nose"}), task.directory / "attempt", sandboxes)


def test_an_attempt_finds_pytest(task, sandboxes):
    async def main():
        sandbox = await sandboxes.open(task.directory / "environment" / "files", read_only=mounts_of(task))
        try:
            return await sandbox.run(f"PYTHONPATH={FOR_AGENTS} python3 -m pytest -q -p no:cacheprovider tests", 60)
        finally:
            await sandbox.close()

    assert "4 failed, 1 passed" in asyncio.run(main()).output
