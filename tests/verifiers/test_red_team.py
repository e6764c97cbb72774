"""Cheats by kind, canaries without the seal, honest gradings: in real sandboxes."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from red_team import BUGGY, CHEATS, FIXED, PYTEST, UNITTEST, files_of, ids_of
from test_unit_tests import attempt_at, score, write

from north_lightning.errors import RewardFileError
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import load_task, write_task
from north_lightning.tasks.software import software_task
from north_lightning.types import Reward, Task
from north_lightning.verifiers import frameworks

TO_WRITE_MEMORY = {
    "an instance attribute changed",
    "the caller's stack over ctypes",
    "integers rewritten over ctypes",
    "the parameters of the call",
}
TO_LET_THE_LIBRARY_COMPARE = {"a liar that is looked for", "a liar for operator.eq"}
NOT_DEFENDED = TO_WRITE_MEMORY | TO_LET_THE_LIBRARY_COMPARE
"""As ``unit_tests`` says."""


@pytest.fixture(scope="module")
def sandboxes() -> BubblewrapProvider:
    return BubblewrapProvider()


def grade(framework: str, kind: str, code: str, directory: Path, sandboxes: BubblewrapProvider) -> Reward:
    directory.mkdir()
    tests = files_of(framework, kind)
    write(directory / "environment" / "files", {"calc.py": BUGGY, **tests})
    write(directory / "tests", {**tests, "test.sh": "exit 1\n"})
    ids = ids_of(framework, kind)
    metadata = {"framework": framework, "fail_to_pass": ids[:1], "pass_to_pass": ids[1:]}
    task = Task("calc", "swe", "tiny", "add must add", directory, 8, metadata)
    reward = score(task, attempt_at(task, {"calc.py": code}), sandboxes)
    shutil.rmtree(directory)
    return reward


def grade_cheats(names: list[str], directory: Path, sandboxes: BubblewrapProvider) -> dict[str, Reward]:
    def one(name: str) -> Reward:
        framework, kind, code = CHEATS[name]
        return grade(framework, kind, code, directory / str(names.index(name)), sandboxes)

    with ThreadPoolExecutor(2) as threads:
        return dict(zip(names, threads.map(one, names), strict=True))


def assert_all_0(names: list[str], directory: Path, sandboxes: BubblewrapProvider) -> None:
    rewards = grade_cheats(names, directory, sandboxes)
    assert {name for name, reward in rewards.items() if reward.value} <= NOT_DEFENDED


def test_cheats_score_0(tmp_path, sandboxes):
    assert_all_0(sorted(CHEATS)[::12], tmp_path, sandboxes)


@pytest.mark.long
@pytest.mark.parametrize("part", range(4))
def test_every_cheat_scores_0(part, tmp_path, sandboxes):
    assert_all_0(sorted(CHEATS)[part::4], tmp_path, sandboxes)


def test_a_cheat_is_called_one_and_an_honest_failure_is_not(tmp_path, sandboxes):
    framework, kind, code = CHEATS["math.isclose"]
    assert grade(framework, kind, code, tmp_path / "cheat", sandboxes).details["reason"] == "tampered"
    assert "reason" not in grade(framework, kind, BUGGY, tmp_path / "honest", sandboxes).details


# ---- canaries, where nothing watches what judges --------------------------------------------------------------------

UNWATCHED = "\n\nSeal.check = lambda self: None\n"
UNJUDGED = UNWATCHED + "TestFiles.seal_loaded = lambda *a: []\n"


def without_seal(directory: Path, monkeypatch: pytest.MonkeyPatch, change: str, no_canaries: bool = False) -> None:
    copy = directory / f"verifiers{no_canaries}"
    shutil.copytree(frameworks._HERE, copy)
    copy.chmod(0o755)
    seal = copy / "seal.py"
    seal.write_text(seal.read_text() + change)
    if no_canaries:
        canaries = copy / "canaries.py"
        canaries.write_text(canaries.read_text().replace("bodies[:MAX_CANARIES]", "[]"))
    monkeypatch.setattr(frameworks, "_HERE", copy)
    frameworks._runners.cache_clear()


def caught(names: list[str], tmp_path, sandboxes, monkeypatch) -> tuple[int, list[str]]:
    """How many cheats would have the reward without a seal and canaries, and which still have it with canaries."""
    directory = Path("/tmp") / f"red-team-{tmp_path.name}"
    directory.mkdir()
    try:
        without_seal(directory, monkeypatch, UNWATCHED, no_canaries=True)
        bare = [name for name, one in grade_cheats(names, tmp_path, sandboxes).items() if one.value == 1.0]
        monkeypatch.undo()
        without_seal(directory, monkeypatch, UNWATCHED)
        left = [name for name, one in grade_cheats(bare, tmp_path, sandboxes).items() if one.value == 1.0]
    finally:
        monkeypatch.undo()
        frameworks._runners.cache_clear()
        shutil.rmtree(directory)
    return len(bare), left


@pytest.mark.long
def test_canaries_alone_catch_nine_of_ten_cheats_that_change_what_judges(tmp_path, sandboxes, monkeypatch):
    num_bare, left = caught([name for name in CHEATS if name not in NOT_DEFENDED], tmp_path, sandboxes, monkeypatch)
    print(f"{num_bare} cheats win without seal and canaries, {len(left)} with canaries: {left}")
    assert num_bare > 40
    assert len(left) <= num_bare / 10


def test_a_canary_catches_what_no_seal_watches(tmp_path, sandboxes, monkeypatch):
    names = ["math.isclose", "TestCase.run replaced, secrets handed back, process ended", "fail does nothing"]
    num_bare, left = caught(names, tmp_path, sandboxes, monkeypatch)
    assert num_bare >= 2
    assert left == []


# ---- honest work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["unittest", "pytest"])
def test_the_repair_scores_1_however_it_is_judged(framework, tmp_path, sandboxes):
    kinds = sorted(UNITTEST if framework == "unittest" else PYTEST)[::8]
    for kind in kinds:
        reward = grade(framework, kind, FIXED, tmp_path / kind.replace(" ", "-"), sandboxes)
        assert reward.value == 1.0, (kind, reward.details)


def grade_solutions(indices: range, directory: Path, sandboxes: BubblewrapProvider) -> None:
    def one(index: int) -> Reward:
        task = load_task(write_task(software_task(index, 7, "train"), directory))
        solved = directory / f"solved{index}"
        shutil.copytree(task.directory / "environment" / "files", solved, symlinks=True)
        script = (task.directory / "solution" / "solve.sh").read_text().replace("/work", str(solved))
        subprocess.run(["bash", "-c", script], cwd=solved, check=True, capture_output=True)
        return score(task, solved, sandboxes)

    with ThreadPoolExecutor(2) as threads:
        for index, reward in zip(indices, threads.map(one, indices), strict=True):
            assert reward.value == 1.0, (index, reward.details)


def test_solutions_of_generated_tasks_score_1(tmp_path, sandboxes):
    grade_solutions(range(24), tmp_path, sandboxes)


@pytest.mark.long
@pytest.mark.parametrize("part", range(8))
def test_two_thousand_solutions_score_1(part, tmp_path, sandboxes):
    grade_solutions(range(100 + part * 250, 350 + part * 250), tmp_path, sandboxes)


HONEST = """import collections, os
from unittest import mock
import pytest
from calc import *


def test_nested_approx():
    assert [0.1 + 0.2, {"a": 0.1 + 0.2}] == [pytest.approx(0.3), {"a": pytest.approx(0.3)}]
    assert table() == {"rates": pytest.approx([0.1, 0.2]), "n": 3}


def test_any():
    assert {"id": 3, "at": 77} == {"id": 3, "at": mock.ANY}
    listener = mock.Mock()
    tell(listener)
    listener.assert_called_with(1, key=mock.ANY)
    assert listener.mock_calls == [mock.call(1, key=mock.ANY)]


def test_in():
    assert 2 in (n for n in (1, 2, 3))
    assert 9 not in (n for n in (1, 2, 3))
    assert "PATH" in os.environ or "HOME" in os.environ
    assert 5 in Span(0, 10) and 50 not in Span(0, 10)


def test_user_classes():
    assert collections.UserDict(a=1) == {"a": 1}
    assert Bag(a=1) == {"a": 1}
    assert Version("1.0") == "1.0"
    assert Version("1.0") != "2.0"
    assert [Version("1.0")] == ["1.0"]
    assert Version("1.0") < Version("1.1")
    assert Money(3) == 3 and Money(3) < 4 and not Money(3) == 4


def test_chains():
    assert 0 < Money(3) < 5
    assert None is not table()["n"] == 3
    assert all(a == b for a, b in zip([1, 2], [1, 2]))
"""
HONEST_CODE = """import collections, functools

def table():
    return {"rates": [0.1, 0.2], "n": 3}

def tell(listener):
    listener(1, key=object())

class Bag(collections.UserDict):
    pass

class Span:
    def __init__(self, low, high): self.low, self.high = low, high
    def __contains__(self, item): return self.low <= item < self.high

@functools.total_ordering
class Version:
    def __init__(self, text): self.text = text
    def __eq__(self, other): return self.text == getattr(other, "text", other)
    def __lt__(self, other): return self.text < other.text

@functools.total_ordering
class Money:
    def __init__(self, amount): self.amount = amount
    def __eq__(self, other): return self.amount == getattr(other, "amount", other)
    def __lt__(self, other): return self.amount < getattr(other, "amount", other)
"""


def test_comparisons_that_honest_tests_make_are_made(tmp_path, sandboxes):
    directory = tmp_path / "task"
    write(directory / "environment" / "files", {"calc.py": HONEST_CODE})
    write(directory / "tests", {"test_honest.py": HONEST, "test.sh": "exit 1\n"})
    names = ("nested_approx", "any", "in", "user_classes", "chains")
    metadata = {"framework": "pytest", "fail_to_pass": [f"test_honest.py::test_{n}" for n in names], "pass_to_pass": []}
    task = Task("calc", "swe", "tiny", "add must add", directory, 8, metadata)
    reward = score(task, attempt_at(task, {}), sandboxes)
    assert reward.value == 1.0, reward.details


# ---- terminal tasks -------------------------------------------------------------------------------------------------


def terminal(directory: Path, script: str) -> Task:
    write(directory / "environment" / "files", {"note": "blue\n"})
    write(directory / "tests", {"test.sh": script})
    return Task("terminal", "terminal", "tiny", "copy note to answer", directory, 4)


JUDGED = 'bash ./run; if [ "$(cat answer)" = blue ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n'
STOPS_THE_GRADER = """setsid bash -c '
test=$PPID
for _ in $(seq 400); do
    grader=$(ps -o ppid= -p $0 | tr -d " "); [ -n "$grader" ] && break
done
kill -STOP $grader
while kill -0 $0 2>/dev/null && [ ! -s /logs/verifier/reward.txt ]; do :; done
sleep 0.3
echo 1 > /logs/verifier/reward.txt
kill -CONT $grader
' $PPID </dev/null >/dev/null 2>&1 &
"""


def test_a_daemon_that_stops_the_grader_has_no_reward(tmp_path, sandboxes):
    task = terminal(tmp_path / "task", JUDGED)
    reward = score(task, attempt_at(task, {"run": STOPS_THE_GRADER}), sandboxes)
    assert reward.value == 0.0, reward.details


@pytest.mark.parametrize("text", ["1_000", "1e308", "2", "-1", "0x1", "inf", "nan", "1 1", "true"])
def test_a_reward_is_a_number_from_0_to_1(text, tmp_path, sandboxes):
    task = terminal(tmp_path / "task", f"echo {text} > /logs/verifier/reward.txt\n")
    with pytest.raises(RewardFileError):
        score(task, attempt_at(task, {}), sandboxes)
