"""Rows of four benchmarks over one local repository; logs against what the frameworks say elsewhere."""

import asyncio
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from north_lightning.errors import DataError, TaskError, VerifierError
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import load_task, load_tasks
from north_lightning.tasks.check import check_task
from north_lightning.tasks.logs import pytest_log, unittest_log
from north_lightning.tasks.swe_rows import import_rows, read_row, write_instance
from north_lightning.types import Reward, Rollout, Task
from north_lightning.verifiers import UnitTestVerifier

WRONG = "def double(x):\n    return x + 2\n"
RIGHT = "def double(x):\n    return x * 2\n"
OLD_TESTS = (
    "import unittest\nfrom number import double\n\n\nclass Test(unittest.TestCase):\n"
    "    def test_two(self):\n        self.assertEqual(double(2), 4)\n"
)
NEW_TESTS = OLD_TESTS + "\n    def test_three(self):\n        self.assertEqual(double(3), 6)\n"
FAIL, KEEP = ["test_three (tests.test_number.Test)"], ["test_two (tests.test_number.Test)"]


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wrong, then right with the test that shows it; a tag and a branch point at the repair."""
    root = tmp_path_factory.mktemp("clone")
    git(root, "init", "-q", "-b", "main")
    for code, tests in ((WRONG, OLD_TESTS), (RIGHT, NEW_TESTS)):
        (root / "tests").mkdir(exist_ok=True)
        (root / "tests" / "__init__.py").write_text("")
        (root / "number.py").write_text(code)
        (root / "tests" / "test_number.py").write_text(tests)
        (root / "logo.png").write_bytes(b"\x89PNG\0")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", f"state {len(code)}")
    git(root, "tag", "fixed")
    return root


def rows(clone: Path) -> dict[str, dict[str, Any]]:
    before, after = git(clone, "rev-parse", "HEAD~1").strip(), git(clone, "rev-parse", "HEAD").strip()
    code, tests = (git(clone, "diff", before, after, "--", path) for path in ("number.py", "tests"))
    common = {"problem_statement": "double is wrong.", "instance_id": "a__n-1"}
    return {
        "swe_bench": common
        | {"repo": "a/n", "base_commit": before, "patch": code, "test_patch": tests}
        | {"FAIL_TO_PASS": json.dumps(FAIL), "PASS_TO_PASS": json.dumps(KEEP)},
        "swe_bench_pro": common
        | {"repo": "a/n", "base_commit": before, "patch": code, "test_patch": tests, "requirements": "Twice as much."}
        | {"fail_to_pass": repr(FAIL), "pass_to_pass": repr(KEEP), "interface": ""}
        | {"selected_test_files_to_run": "['tests.test_number']"}
        | {"before_repo_set_cmd": f"git reset --hard {before}\ngit checkout {after} -- tests/test_number.py"},
        "swe_smith": common
        | {"repo": f"swesmith/a__n.{after[:8]}", "patch": git(clone, "diff", after, before, "--", "number.py")}
        | {"FAIL_TO_PASS": FAIL, "PASS_TO_PASS": KEEP},
        "r2e_gym": {"repo_name": "a/n", "commit_hash": after, "problem_statement": "double is wrong."}
        | {"expected_output_json": json.dumps(dict.fromkeys((*FAIL, *KEEP), "PASSED") | {"test_gone": "FAILED"})}
        | {
            "execution_result_content": json.dumps(
                {"test_file_names": ["test_1.py"], "test_file_codes": [NEW_TESTS.replace("Test(", "Test(")]}
            )
        },
    }


BENCHMARKS = ("swe_bench", "swe_bench_pro", "swe_smith", "r2e_gym")


def graded(task: Task, workdir: Path) -> Reward:
    rollout = Rollout(task.id, "swe", task.family, 0, 0, 0)
    return asyncio.run(UnitTestVerifier(20).verify(task, rollout, workdir, BubblewrapProvider()))


# Python 3.11 prints the method again in the brackets; rows name it as older ones did.
OLD_NAMES = r"python3 -m unittest -v {places} 2>&1 | sed -E 's/\.test_\w+\)/)/'"
RUN_SCRIPT = "cd /app\n" + OLD_NAMES.replace("{places}", '"$@"')
PARSER = """import json, sys
words = {"ok": "PASSED", "FAIL": "FAILED"}
lines = [line.rstrip().split(" ... ") for line in open(sys.argv[1]) if " ... " in line]
tests = [{"name": name, "status": words.get(word, "ERROR")} for name, word in lines]
json.dump({"tests": tests}, open(sys.argv[3], "w"))
"""


def run_scripts(folder: Path, name: str, run_script: str = RUN_SCRIPT, parser: str = PARSER) -> Path:
    """SWE-bench Pro's folder of this name, for one row."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "run_script.sh").write_text(run_script)
    (folder / name / "parser.py").write_text(parser)
    return folder


def task_of(benchmark: str, clone: Path, parent: Path) -> Task:
    row = rows(clone)[benchmark]
    scripts = run_scripts(parent / "run_scripts", "a__n-1")
    if benchmark == "r2e_gym":  # its tests are files of its own, named without their module
        row["expected_output_json"] = row["expected_output_json"].replace("tests.test_number", "r2e_tests.test_1")
    command = OLD_NAMES if benchmark == "swe_bench" else None
    return load_task(write_instance(read_row(row, scripts, "unittest"), clone, parent, "unittest", command))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_row_becomes_a_task_whose_solution_passes(benchmark: str, clone: Path, tmp_path: Path) -> None:
    task = task_of(benchmark, clone, tmp_path)
    check_task(task.directory)
    image = task.directory / "environment" / "files"
    assert (task.family, task.metadata["repository"]) == (benchmark, "a/n")
    assert task.instruction.startswith("double is wrong.")
    if benchmark == "swe_bench_pro":
        assert task.instruction == "double is wrong.\n\nRequirements:\nTwice as much.\n\nNew interfaces introduced:"
    assert (image / "number.py").read_text() == WRONG
    assert (image / "logo.png").read_bytes() == b"\x89PNG\0"
    assert ("test_three" in (image / "tests" / "test_number.py").read_text()) == (benchmark == "swe_smith")
    # Nothing of the future is there: one commit, no tag, no other branch, no object of the repair.
    assert git(image, "log", "--all", "--format=%s").split() == ["initial"]
    assert git(image, "tag") == "" == git(image, "remote")
    objects = git(image, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)").split()
    assert not any("x * 2" in git(image, "cat-file", "-p", one) for one in objects if one != _png(image))

    assert graded(task, image).value == 0.0
    solved = tmp_path / "solved"
    subprocess.run(["cp", "-r", image, solved], check=True)
    script = (task.directory / "solution" / "solve.sh").read_text().replace("cd /work", f"cd {solved}")
    subprocess.run(["bash", "-c", script], check=True)
    assert (solved / "number.py").read_text() == RIGHT
    reward = graded(task, solved)
    assert reward.value == 1.0, reward.details
    assert len(reward.details["passed"]) == 2


def _png(image: Path) -> str:
    return git(image, "rev-parse", "HEAD:logo.png").strip()


@pytest.mark.parametrize("benchmark", ["swe_bench", "swe_bench_pro"])
def test_a_test_that_is_not_reported_has_failed(benchmark: str, clone: Path, tmp_path: Path) -> None:
    task = task_of(benchmark, clone, tmp_path)
    solved = tmp_path / "solved"
    subprocess.run(["cp", "-r", task.directory / "environment" / "files", solved], check=True)
    (solved / "number.py").write_text(RIGHT)
    # The attempt's own tests, without the one that fails, are not those that are run.
    (solved / "tests" / "test_number.py").write_text("")
    assert graded(task, solved).value == 1.0
    patch = task.directory / "tests" / "test.patch"
    patch.write_text(patch.read_text().replace("def test_three", "def untested_three"))
    reward = graded(task, solved)
    assert (reward.value, reward.details["failed"]) == (0.0, FAIL)
    (task.directory / "tests" / "test.sh").write_text("true\n")
    if benchmark == "swe_bench_pro":  # as its own harness judges it
        assert graded(task, solved).value == 0.0
        return
    with pytest.raises(VerifierError, match="wrote no /logs/verifier/log"):
        graded(task, solved)


def test_the_command_reads_rows_of_any_kind(clone: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    some = [rows(clone)[name] | {"instance_id": f"a__n-{name}"} for name in ("swe_bench", "swe_smith")]
    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    import_rows([file], tmp_path / "tasks", {"a/n": clone})
    tasks = load_tasks(tmp_path / "tasks")
    assert [task.family for task in tasks] == ["swe_bench", "swe_smith"]
    assert "-m pytest -rA" in (tasks[0].directory / "tests" / "eval.sh").read_text()
    with pytest.raises(TaskError, match=r"rows.jsonl:2: clones: expected a clone of a/n, got none"):
        import_rows([file], tmp_path / "more")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"FAIL_TO_PASS": "[]"}, "FAIL_TO_PASS: expected at least one test"),
        ({"PASS_TO_PASS": "a, b"}, "PASS_TO_PASS: expected a list of test names, got 'a, b'"),
        ({"base_commit": None}, "base_commit: expected text, got None"),
        ({"problem_statement": " "}, "problem_statement: expected text"),
    ],
)
def test_a_row_that_lacks_something_names_it(change: dict[str, Any], message: str, clone: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_row(rows(clone)["swe_bench"] | change)


def test_a_patch_that_does_not_apply_is_named(clone: Path, tmp_path: Path) -> None:
    row = rows(clone)["swe_bench"]
    with pytest.raises(TaskError, match="test_patch does not apply"):
        write_instance(read_row(row | {"test_patch": row["test_patch"].replace("test_two", "x")}), clone, tmp_path)
    with pytest.raises(TaskError, match="git archive"):
        write_instance(read_row(row | {"base_commit": "0" * 40}), clone, tmp_path)


SUITE = '''
import unittest, pytest, warnings

@pytest.mark.parametrize("x", ["a", "b - c", "PASSED d"])
def test_params(x): assert x != "a"
def test_ok(): print("PASSED test_suite.py::test_fail")
def test_fail(): assert 0, "why - not"
@pytest.mark.skip(reason="no")
def test_skipped(): pass
@pytest.mark.xfail
def test_xfail(): assert 0
@pytest.fixture
def broken(): raise OSError("no")
def test_error(broken): pass
class TestClass:
    def test_in_class(self): pass
class Old(unittest.TestCase):
    def test_a(self): pass
    def test_b(self): self.fail("no")
    @unittest.skip("no")
    def test_c(self): pass
    @unittest.expectedFailure
    def test_d(self): self.fail("so")
    def test_e(self):
        """Words of its own."""
'''


def test_a_pytest_log_says_what_its_junit_file_says(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--color=yes", "--junitxml=report.xml"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, "test_suite.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    found = pytest_log(done.stdout)
    expected = {}
    for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase"):
        place = (case.get("classname") or "").removeprefix("test_suite").lstrip(".")
        name = "::".join(filter(None, ["test_suite.py", place, case.get("name")]))
        kinds = {child.tag: child.get("type", "") for child in case}
        if "skipped" in kinds:
            outcome = "passed" if kinds["skipped"] == "pytest.xfail" else "skipped"
        else:
            outcome = "error" if "error" in kinds else "failed" if "failure" in kinds else "passed"
        expected[name] = outcome
    # pytest's summary counts skips by place, not by name, and cuts a name at " - " where it adds a message.
    reported = {name: outcome for name, outcome in expected.items() if outcome != "skipped"}
    assert found == reported


def test_a_unittest_log_says_what_the_result_object_says(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "unittest", "-v", "test_suite"]
    log = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stderr
    assert unittest_log(log) == {
        "test_a (test_suite.Old)": "passed",
        "test_b (test_suite.Old)": "failed",
        "test_c (test_suite.Old)": "skipped",
        "test_d (test_suite.Old)": "passed",
        "test_e (test_suite.Old)": "passed",
    }


@pytest.mark.parametrize("words", [("FAILED", "PASSED"), ("PASSED", "FAILED")])
def test_a_test_that_is_named_twice_has_its_worst_outcome(words: tuple[str, str]) -> None:
    assert pytest_log("\n".join(f"{word} test_a.py::test_one" for word in words)) == {"test_a.py::test_one": "failed"}
    log = "\n".join(f"test_one (mod.Case) ... {'ok' if word == 'PASSED' else 'FAIL'}" for word in words)
    assert unittest_log(log) == {"test_one (mod.Case)": "failed"}
