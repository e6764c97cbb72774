"""What an attempt left is kept exactly, and graded again where only the grading has changed."""

import asyncio
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from north_lightning.errors import SandboxError
from north_lightning.evaluation.attempts import Attempt, read_attempts
from north_lightning.evaluation.evaluate import (
    Served,
    describe_attempts,
    describe_plan,
    plan_attempts,
    run_attempts,
)
from north_lightning.evaluation.summary import summarise
from north_lightning.evaluation.works import Works
from north_lightning.harnesses import ReActTerminalHarness
from north_lightning.rollout import ScriptedPolicy, script_of_calls
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of, load_task, solution_steps, write_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import Message, Reward, Rollout, Task, ToolCall, Turn
from north_lightning.verifiers import LoopPenalty, UnitTestVerifier
from north_lightning.verifiers.penalties import Part, RewardSum

MODEL = Served("model", "w0")


class SolvingRunner(AttemptRunner):
    """Real sandboxes, harness and tests; odd samples solve the task, even ones do nothing."""

    def __init__(self, tasks, verifier=None, may_sample=True, **limits):
        super().__init__(
            BubblewrapProvider(**limits), {"terminal": ReActTerminalHarness()}, verifier or UnitTestVerifier(), image_of
        )
        self.tasks, self.may_sample = {task.id: task for task in tasks}, may_sample

    sampling = ("scripted",)

    def make_policy(self, rollout):
        assert self.may_sample, f"{rollout.task_id} was attempted"
        calls = solution_steps(self.tasks[rollout.task_id]) if rollout.index % 2 else []
        return ScriptedPolicy(script_of_calls(calls))

    async def close(self):
        pass


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    return [load_task(write_task(terminal_task(index, 0, "heldout"), tmp_path / "tasks")) for index in range(2)]


def attempts_of(runner: AttemptRunner, tasks: list[Task], folder: Path) -> list[Attempt]:
    works = Works(folder / "works")
    return asyncio.run(run_attempts(runner, tasks, MODEL, 2, folder / "attempts.jsonl", works=works))


def actions(runner: AttemptRunner, tasks: list[Task], folder: Path) -> list[tuple[str, str]]:
    recorded, works = read_attempts(folder / "attempts.jsonl"), Works(folder / "works")
    return [(one.action, one.reason) for one in plan_attempts(runner, tasks, MODEL, range(2), recorded, works)]


def test_changed_tests_and_another_verifier_are_graded_again_without_sampling(
    tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = attempts_of(SolvingRunner(tasks), tasks, tmp_path)
    assert [one.solved for one in first] == [False, True] * 2
    test = tasks[0].directory / "tests" / "test.sh"
    test.write_text("echo 0 >/logs/verifier/reward.txt; [ ! -e /work/.. ] || echo 0.5 >/logs/verifier/reward.txt\n")
    silent = SolvingRunner(tasks, may_sample=False)
    changed = ("REGRADE", "the task's tests changed")
    assert actions(silent, tasks, tmp_path) == [changed, changed, ("REUSE", ""), ("REUSE", "")]
    again = attempts_of(silent, tasks, tmp_path)
    assert [one.reward for one in again] == [0.5, 0.5, 0.0, 1.0]
    assert [one.turns for one in again] == [one.turns for one in first]
    assert actions(silent, tasks, tmp_path) == [("REUSE", "")] * 4
    summed = SolvingRunner(
        tasks, RewardSum(Part(UnitTestVerifier(), weight=2.0), {"loops": Part(LoopPenalty())}), False
    )
    assert actions(summed, tasks, tmp_path) == [("REGRADE", "the verifier changed")] * 4
    official = SolvingRunner(tasks, UnitTestVerifier(grading="official"), False)
    assert actions(official, tasks, tmp_path) == [("REGRADE", "the verifier and the grader changed")] * 4
    monkeypatch.setattr(UnitTestVerifier, "grader", lambda self, task: "test.sh, as Harbor 9 (strict)")
    assert actions(silent, tasks, tmp_path) == [("REGRADE", "the grader changed")] * 4
    monkeypatch.undo()
    assert [one.reward for one in attempts_of(summed, tasks, tmp_path)] == [1.0, 1.0, 0.0, 2.0]


def test_a_verdict_given_again_is_that_of_a_new_attempt(tasks: list[Task], tmp_path: Path) -> None:
    attempts_of(SolvingRunner(tasks), tasks, tmp_path / "one")
    for task in tasks:
        test = task.directory / "tests" / "test.sh"
        test.write_text(f"find /work | sort | sha256sum\n{test.read_text()}")
    regraded = attempts_of(SolvingRunner(tasks, may_sample=False), tasks, tmp_path / "one")
    fresh = attempts_of(SolvingRunner(tasks), tasks, tmp_path / "two")
    apart = {"duration_s": 0.0, "kept": ""}
    assert [replace(one, **apart) for one in regraded] == [replace(one, **apart) for one in fresh]
    for one, other in zip(regraded, fresh, strict=True):  # the whole tree, as the tests saw it
        works = (Works(tmp_path / name / "works") for name in ("one", "two"))
        outputs = [
            work.read_record(each.kept)["reward_details"]["output"]
            for work, each in zip(works, (one, other), strict=True)
        ]
        assert outputs[0] == outputs[1] != ""


def test_an_attempt_is_made_again_where_it_would_go_otherwise_or_nothing_is_kept(
    tasks: list[Task], tmp_path: Path
) -> None:
    attempts_of(SolvingRunner(tasks), tasks, tmp_path)
    assert actions(SolvingRunner(tasks, max_slots=3, root=tmp_path), tasks, tmp_path) == [("REUSE", "")] * 4
    assert actions(SolvingRunner(tasks, max_processes=9), tasks, tmp_path) == [("RERUN", "the settings changed")] * 4
    (tasks[0].directory / "instruction.md").write_text("Something else.")
    others = [load_task(task.directory) for task in tasks]
    assert actions(SolvingRunner(tasks), others, tmp_path)[:2] == [("RERUN", "the task changed")] * 2
    (tasks[1].directory / "tests" / "more").write_text("")
    shutil.rmtree(tmp_path / "works")
    reason = "the task's tests changed, and what it left is not kept"
    assert actions(SolvingRunner(tasks), tasks, tmp_path)[2:] == [("RERUN", reason)] * 2


def test_an_attempt_without_a_verdict_keeps_the_earlier_one_and_is_graded_when_there_is(
    tasks: list[Task], tmp_path: Path
) -> None:
    attempts_of(SolvingRunner(tasks), tasks[:1], tmp_path)
    (tasks[0].directory / "tests" / "test.sh").write_text("exit 0\n")  # says nothing
    failed = attempts_of(SolvingRunner(tasks, may_sample=False), tasks[:1], tmp_path)
    assert [one.reward for one in failed] == [None, None]
    assert all("neither reward.json nor reward.txt" in str(one.error) for one in failed)
    (tasks[0].directory / "tests" / "test.sh").write_text("echo 1 >/logs/verifier/reward.txt\n")
    again = attempts_of(SolvingRunner(tasks, may_sample=False), tasks[:1], tmp_path)
    assert [one.reward for one in again] == [1.0, 1.0]


@pytest.mark.parametrize("seed", range(12))
def test_any_tree_is_kept_exactly(seed: int, tasks: list[Task], tmp_path: Path) -> None:
    noise, work, works = random.Random(seed), tmp_path / "work", Works(tmp_path / "works")
    base = image_of(tasks[0])
    for number in range(20):
        change(base / f"given{number}", noise)
    shutil.copytree(base, work, symlinks=True)
    paths = [path for path in work.rglob("*") if not path.is_symlink()]
    for path in noise.sample(paths, len(paths) // 2):
        if os.path.lexists(path):
            change(path, noise)
    for number in range(10):
        change(work / noise.choice(["", "given0", "new\udcff"]) / f"new {number}", noise)
    works.keep_work("name", tasks[0], work)
    works.restore_work("name", tasks[0], tmp_path / "restored")
    assert listing(tmp_path / "restored") == listing(work)


def change(path: Path, noise: random.Random) -> None:
    """Make ``path`` something else, or nothing."""
    if path.parent.is_symlink() or not path.parent.is_dir():
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match noise.randrange(5):
        case 0:
            path.symlink_to(noise.choice(["/etc/passwd", "..", "nowhere", "given1"]))
        case 1:
            path.mkdir()
            (path / "below").write_text(str(noise.random()))
            (path / "deeper").mkdir()
        case 2 | 3:
            path.write_bytes(noise.randbytes(noise.randrange(3000)))
            path.chmod(noise.choice([0o644, 0o755, 0o600]))


def listing(directory: Path) -> dict[str, tuple[object, ...]]:
    return {
        str(path.relative_to(directory)): (
            ("link", os.readlink(path))
            if path.is_symlink()
            else ("directory",)
            if path.is_dir()
            else ("file", path.stat().st_mode, path.read_bytes())
        )
        for path in directory.rglob("*")
    }


def test_a_rollout_that_is_read_back_tells_verifiers_what_they_ask(tmp_path: Path) -> None:
    rollout = Rollout("task", "swe", "family", 3, 1, 17, stop_reason="max_turns", duration_s=1.5)
    calls = (ToolCall("0", "bash", {"command": "ls"}),)
    rollout.messages = [
        Message("user", "Do it."),
        Message("assistant", "", "Hm.", calls),
        Message("tool", "a", "", (), "0"),
    ]
    rollout.token_ids, rollout.loss_mask = [7] * 9, [False] * 4 + [True] * 5
    rollout.policy_versions, rollout.turns = [-1] * 9, [Turn(4, 9, "stop", "not JSON")]
    works = Works(tmp_path)
    works.keep_rollout("name", rollout)
    read = works.read_rollout("name")
    assert read.messages == rollout.messages
    assert (read.stop_reason, read.seed, read.num_sampled_tokens) == ("max_turns", 17, 5)
    assert [(turn.end - turn.start, turn.finish_reason, turn.error) for turn in read.turns] == [(5, "stop", "not JSON")]


def test_a_kept_work_of_an_earlier_try_is_not_that_of_the_next(tasks: list[Task], tmp_path: Path) -> None:
    """A try that leaves nothing to grade, after one that did and was lost."""
    runner = SolvingRunner(tasks)
    attempts_of(runner, tasks[:1], tmp_path)
    (tmp_path / "attempts.jsonl").unlink()

    async def broken(*_: object, **__: object) -> Rollout:
        raise SandboxError("no sandbox today")

    runner.run = broken
    attempts_of(runner, tasks[:1], tmp_path)
    assert not list((tmp_path / "works").glob("*.tar.gz"))


def test_a_plan_says_of_every_attempt_what_is_done_and_why(tasks: list[Task], tmp_path: Path) -> None:
    attempts_of(SolvingRunner(tasks), tasks, tmp_path)
    (tasks[0].directory / "tests" / "more").write_text("")
    recorded, works = read_attempts(tmp_path / "attempts.jsonl"), Works(tmp_path / "works")
    plan = plan_attempts(SolvingRunner(tasks), tasks, MODEL, range(3), recorded, works)
    assert describe_plan(plan) == [
        "REGRADE 2 attempts at 1 tasks: the task's tests changed",
        "RERUN 2 attempts at 2 tasks: it is not recorded",
        "REUSE 2 attempts at 1 tasks",
    ]
    lines = describe_attempts({"model": plan})
    assert len(lines) == 6
    assert lines[2] == f"RERUN   model {tasks[0].id} sample 2: it is not recorded"
    assert json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[0])["kept"]


# ---- kills -----------------------------------------------------------------------------------------------------------


class SlowCoins(AttemptRunner):
    """Attempts of a few milliseconds, some of which fail outside the model in one life and not in the next."""

    def __init__(self, life: int) -> None:
        super().__init__(BubblewrapProvider(), {"terminal": ReActTerminalHarness()}, UnitTestVerifier(), image_of)
        self.noise = random.Random(life)

    sampling = ("coins",)

    def make_policy(self, rollout: Rollout) -> ScriptedPolicy:
        raise NotImplementedError

    async def close(self) -> None: ...

    async def run(self, task: Task, group_id: int, index: int, seed: int) -> Rollout:
        await asyncio.sleep(self.noise.uniform(0, 0.02))
        if self.noise.random() < 0.05:
            raise SandboxError("429 Too Many Requests")
        rollout = Rollout(task.id, task.environment, task.family, group_id, index, seed)
        rollout.reward = Reward(float((group_id + index) % 3 == 0))
        rollout.turns, rollout.loss_mask = [Turn(0, 4, "stop")] * (1 + index % 3), [True] * 4
        self._loop.keep(task, rollout, image_of(task))
        return rollout


def lives(tasks: list[Task], folder: Path, num_kills: int, num_samples: int) -> bytes:
    """The report of an evaluation that is killed ``num_kills`` times at random moments, and started again each time."""
    noise, number, log, works = random.Random(num_kills), 0, folder / "attempts.jsonl", Works(folder / "works")
    while True:
        number += 1
        child = os.fork()
        if child == 0:
            attempts = asyncio.run(
                run_attempts(
                    SlowCoins(number),
                    tasks,
                    MODEL,
                    num_samples,
                    folder / "attempts.jsonl",
                    8,
                    works=Works(folder / "works"),
                )
            )
            os._exit(any(one.error for one in attempts))
        if number <= num_kills:
            time.sleep(noise.uniform(0, 0.15))
            os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and number > num_kills:
            break
    recorded = read_attempts(log)
    scored = [one for one in recorded if one.error is None]
    assert len({one.key for one in scored}) == len(scored) == num_samples * len(tasks)
    assert all(works.has(one.kept) for one in scored)
    return json.dumps(summarise(scored, ks=(1, 8))).encode()


@pytest.mark.parametrize(("num_kills", "num_samples"), [(8, 60), pytest.param(200, 1500, marks=pytest.mark.long)])
def test_kills_lose_nothing_and_count_nothing_twice(
    num_kills: int, num_samples: int, tasks: list[Task], tmp_path: Path
) -> None:
    killed = lives(tasks, tmp_path / "killed", num_kills, num_samples)
    assert killed == lives(tasks, tmp_path / "whole", 0, num_samples)
