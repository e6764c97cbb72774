"""Tasks from a small real repository: what they hold, that they hold, and that a stopped build goes on."""

import asyncio
import hashlib
import io
import json
import subprocess
import tarfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from north_lightning.errors import ConfigError, TaskError
from north_lightning.factory.build import build_tasks, pool_of
from north_lightning.factory.grading import Baseline, Grader
from north_lightning.factory.issues import issue_text
from north_lightning.factory.sources import sdist_files
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import load_tasks
from north_lightning.tasks.check import check_task
from north_lightning.types import Rollout
from north_lightning.verifiers import UnitTestVerifier

CODE = """def clamp(value, low, high):
    if value < low:
        return low
    return {high} if value > high else value


def pairs(items):
    found = []
    for index in range(len(items) - 1):
        found.append((items[index], items[index + 1]))
    return found
"""
TESTS = """import unittest

from . import values
from stretch import clamp, pairs


class Base:
    def test_low(self):
        self.assertEqual(clamp(-5, *values.LIMITS), 0)


class ClampTest(Base, unittest.TestCase):
    def test_inside(self):
        self.assertEqual(clamp(5, 0, 9), 5)
"""
MORE_TESTS = """
    def test_high(self):
        self.assertEqual(clamp(50, 0, 9), 9)


class PairsTest(unittest.TestCase):
    def test_pairs(self):
        self.assertEqual(pairs([1, 2, 3]), [(1, 2), (2, 3)])

    def test_empty(self):
        self.assertEqual(pairs([]), [])
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits: wrong above the upper limit, then repaired, with the tests that show it."""
    root = tmp_path_factory.mktemp("repository")
    write(root, {"src/stretch/__init__.py": CODE.format(high="low"), "tests/test_stretch.py": TESTS})
    write(root, {"tests/values.py": "LIMITS = (0, 9)\n", "tests/__init__.py": "", "docs/index.md": "words\n"})
    commit(root, "start")
    write(root, {"src/stretch/__init__.py": CODE.format(high="high"), "tests/test_stretch.py": TESTS + MORE_TESTS})
    commit(root, "repair the upper limit")
    write(root, {"README.md": "words\n"})
    commit(root, "words")
    return root


def write(root: Path, files: Mapping[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def commit(root: Path, subject: str) -> None:
    script = f"git init -q -b main . && git add -A && git commit -q -m '{subject}'"
    identity = {f"GIT_{who}_{key}": "a@b" for who in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    subprocess.run(["bash", "-c", script], cwd=root, check=True, env={"PATH": "/usr/bin:/bin", **identity})


def build(output_dir: Path, repository: Path, **settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"tasks_per_repository": 4, "repeats": 1, "timeout_s": 20.0, "rl_share": 1.0}
    build_tasks(output_dir, BubblewrapProvider(), repositories={"a/stretch": repository}, **{**defaults, **settings})
    return json.loads((output_dir / "summary.json").read_text())["a/stretch"]


def test_a_repository_becomes_tasks_that_hold(repository: Path, tmp_path: Path) -> None:
    summary = build(tmp_path, repository)
    assert (summary["pool"], summary["tests"], summary["tasks"]) == ("rl", 5, 4)
    tasks = load_tasks(tmp_path / "rl")
    assert not (tmp_path / "sft").exists()
    families = [task.family for task in tasks]
    assert families.count("history") == 1
    assert len(set(families)) == 4
    verifier, sandboxes = UnitTestVerifier(), BubblewrapProvider()
    for task in tasks:
        check_task(task.directory)
        image, rollout = task.directory / "environment" / "files", Rollout(task.id, "swe", task.family, 0, 0, 0)
        untouched = asyncio.run(verifier.verify(task, rollout, image, sandboxes))
        assert untouched.value == 0.0
        assert sorted(untouched.details["failed"]) == sorted(task.metadata["fail_to_pass"])
        log = subprocess.run(["git", "log", "--oneline"], cwd=image, capture_output=True, text=True, check=True).stdout
        assert log.count("\n") == 1  # no later commit to look the answer up in
        assert not (image / "docs").exists()

        solved = tmp_path / "solved" / task.id
        solved.mkdir(parents=True)
        subprocess.run(["cp", "-r", f"{image}/.", solved], check=True)
        script = (task.directory / "solution" / "solve.sh").read_text().replace("cd /work", f"cd {solved}")
        subprocess.run(["bash", "-c", script], check=True)
        assert asyncio.run(verifier.verify(task, rollout, solved, sandboxes)).value == 1.0
        assert (solved / "stretch" / "__init__.py").read_text() == CODE.format(high="high")

        # The issue tells neither the kind of bug nor the repair.
        broken = (image / "stretch" / "__init__.py").read_text()
        repaired = set(CODE.format(high="high").splitlines()) - set(broken.splitlines())
        assert repaired
        assert not [line for line in repaired if line.strip() in task.instruction]
        assert task.family not in task.instruction

    (history,) = (task for task in tasks if task.family == "history")
    assert history.metadata["fail_to_pass"] == ["tests.test_stretch.ClampTest.test_high"]
    assert history.metadata["repository"] == "a/stretch"


PYTEST_TESTS = """import pytest
from stretch import clamp, pairs


@pytest.fixture
def limits():
    return 0, 9


@pytest.mark.parametrize(("value", "expected"), [(5, 5), (50, 9), (-5, 0)])
def test_clamp(value, expected, limits):
    assert clamp(value, *limits) == expected


def test_pairs():
    assert pairs([1, 2, 3]) == [(1, 2), (2, 3)]
"""


def test_a_repository_whose_tests_are_written_for_pytest_becomes_tasks_that_hold(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    files = {"stretch.py": CODE.format(high="high"), "tests/test_it.py": PYTEST_TESTS, "conftest.py": "import pytest\n"}
    write(root, files)
    commit(root, "start")
    summary = build(tmp_path / "out", root, tasks_per_repository=2)
    assert (summary["framework"], summary["tests"], summary["tasks"]) == ("pytest", 4, 2)
    verifier, sandboxes = UnitTestVerifier(), BubblewrapProvider()
    for task in load_tasks(tmp_path / "out" / "rl"):
        check_task(task.directory)
        assert task.metadata["framework"] == "pytest"
        assert all(one.startswith("tests/test_it.py::") for one in task.metadata["fail_to_pass"])
        assert "python3 -m pytest" in task.instruction
        assert "assert " in task.instruction  # the failing statement of the test, and nothing of the code
        assert not [line for line in CODE.splitlines() if line.strip() and line.strip() in task.instruction]
        assert "@" not in task.instruction
        image, rollout = task.directory / "environment" / "files", Rollout(task.id, "swe", task.family, 0, 0, 0)
        assert asyncio.run(verifier.verify(task, rollout, image, sandboxes)).value == 0.0
        solved = tmp_path / "solved" / task.id
        write(solved, files)
        assert asyncio.run(verifier.verify(task, rollout, solved, sandboxes)).value == 1.0


def test_a_stopped_build_goes_on_and_a_finished_one_is_not_repeated(repository: Path, tmp_path: Path) -> None:
    first = build(tmp_path, repository, tasks_per_repository=2)
    records = tmp_path / "records" / "a--stretch.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "rl").iterdir()}
    records.write_text("".join(lines[:2]) + lines[2][:9])  # killed while it wrote a line
    again = build(tmp_path, repository, tasks_per_repository=2)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert [json.loads(line) for line in records.read_text().splitlines()[:-1]] == [json.loads(x) for x in lines[:-1]]
    kept = tmp_path / "rl" / f"a--stretch-{json.loads(lines[1])['id']}"
    assert json.loads(lines[1])["outcome"] != "accepted" or kept.stat().st_mtime_ns == times[kept]
    before = records.read_bytes()
    assert build(tmp_path, repository, tasks_per_repository=2) == again
    assert records.read_bytes() == before


@dataclass(frozen=True)
class Scripted(Grader):
    """Says what passes, run after run."""

    runs: list[list[str]] = field(default_factory=list)

    async def run(self, baseline: Baseline, changed: Any) -> Mapping[str, Any]:
        return {"passed": self.runs.pop(0)}


def test_tests_that_pass_only_sometimes_are_left_out() -> None:
    files = {"test_a.py": "class T:\n    def test_x(self): ...\n    def test_y(self): ...\n    def test_z(self): ...\n"}
    x, y = "test_a.T.test_x", "test_a.T.test_y"
    grader = Scripted(BubblewrapProvider(), 1.0, 3, [[x, y], [x], [y, x]])
    baseline = asyncio.run(grader.baseline(files))
    assert (baseline.stable, baseline.num_flaky) == ((x,), 1)


def test_the_wording_comes_from_the_name_and_the_words_from_the_failing_test() -> None:
    traceback = 'File "/tests/t.py", line 9, in test_x\n    self.assertEqual(f(3), 4)\nAssertionError: 5 != 4\n'
    notes = [f"t.T.test_x failed {traceback!a}", "t.T.test_other failed 'Other'"]
    texts = {issue_text(f"task-{index}", "package", ["t.T.test_x"], notes) for index in range(30)}
    assert len(texts) > 10
    assert all("self.assertEqual(f(3), 4)" in text and "AssertionError: 5 != 4" in text for text in texts)
    assert issue_text("task-1", "package", ["t.T.test_x"], notes) in texts
    assert "t.T.test_x" in issue_text("task-1", "package", ["t.T.test_x"], [])


def test_a_repository_is_in_one_pool_and_shares_are_kept() -> None:
    names = [f"owner/{index}" for index in range(2000)]
    share = sum(pool_of(name, 0.3) == "rl" for name in names) / len(names)
    assert share == pytest.approx(0.3, abs=0.04)
    assert pool_of("Owner/1", 0.3) == pool_of("owner/1", 0.3)


def test_a_release_is_downloaded_once_and_its_digest_is_checked(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path, text in {
            "a-b-1.0/src/ab/__init__.py": "x = 1\n",
            "a-b-1.0/../out.py": "",
            "a-b-1.0/c.bin": "\0",
        }.items():
            member = tarfile.TarInfo(path)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    asked: list[str] = []
    digest = [hashlib.sha256(buffer.getvalue()).hexdigest()]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            url = f"http://127.0.0.1:{server.server_address[1]}/file"
            listing = {"files": [{"filename": "A_b-1.0.tar.gz", "url": url, "hashes": {"sha256": digest[0]}}]}
            body = buffer.getvalue() if self.path == "/file" else json.dumps(listing).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        for _ in range(2):
            assert sdist_files("a-b", "1.0", tmp_path / "one", index) == {"ab/__init__.py": "x = 1\n"}
        assert asked == ["/a-b/", "/file"]
        digest[0] = "0" * 64
        with pytest.raises(TaskError, match="a-b 1.0: the download does not have the digest"):
            sdist_files("a-b", "1.0", tmp_path / "two", index)
        with pytest.raises(TaskError, match=r"a-b 2.0: expected a source distribution"):
            sdist_files("a-b", "2.0", tmp_path / "two", index)
    finally:
        server.shutdown()
        server.server_close()


def test_settings_that_cannot_work_name_their_key(tmp_path: Path) -> None:
    for key, value in {"rl_share": 2.0, "repeats": 0, "tasks_per_repository": 0}.items():
        with pytest.raises(ConfigError, match=key):
            build_tasks(tmp_path, BubblewrapProvider(), packages={"a": "1"}, **{key: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="packages and repositories"):
        build_tasks(tmp_path, BubblewrapProvider())


def test_a_task_that_does_not_hold_is_told_why(repository: Path, tmp_path: Path) -> None:
    build(tmp_path, repository, tasks_per_repository=1)
    (directory,) = (tmp_path / "rl").iterdir()
    grader = Grader(BubblewrapProvider(), 20.0, 1)
    assert asyncio.run(grader.validate(directory)) is None
    solve, code = directory / "solution" / "solve.sh", directory / "environment" / "files" / "stretch" / "__init__.py"
    script = solve.read_text()
    for text, problem in (("true\n", "the solution fails"), ("exit 3\n", "the solution does not apply")):
        solve.write_text(text)
        assert asyncio.run(grader.validate(directory)) == problem
    solve.write_text(script.replace("git apply", "true || git apply"))
    code.write_text(CODE.format(high="high"))
    assert asyncio.run(grader.validate(directory)) == "the untouched state does not fail in the same way"
