"""Attempts are recorded, resumed and counted: infrastructure failures never score."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from north_lightning.errors import ConfigError, DataError, SandboxError
from north_lightning.evaluation.attempts import (
    Attempt,
    append_attempts,
    attempt_of,
    grading_digest,
    read_attempts,
    task_digest,
    weights_digest,
)
from north_lightning.evaluation.command import evaluate, summary_of
from north_lightning.evaluation.compare import Side, compare_sides, print_comparison
from north_lightning.evaluation.evaluate import Served, run_attempts
from north_lightning.evaluation.summary import breakdown, compare, summarise
from north_lightning.harnesses import ReActTerminalHarness
from north_lightning.rollout import ChatServer
from north_lightning.rollout.metrics import rollout_metrics
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.rollout.stages import Timeouts
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import load_task, write_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import Reward, Rollout, SamplingParams, Turn
from north_lightning.verifiers import UnitTestVerifier
from north_lightning.views.comparison import compare_runs


class CoinRunner:
    """A runner whose outcome is a function of task and sample; tasks in ``broken`` fail outside the model."""

    def __init__(self, broken: set[str] = frozenset(), temperature: float = 1.0, verifier=None) -> None:
        self.harnesses = {"terminal": ReActTerminalHarness()}
        self.sampling = (SamplingParams(16, temperature, 1.0, ()), 64, False)
        self.vary_prompts, self.timeouts = True, Timeouts()
        self.verifier, self.sandboxes = verifier or UnitTestVerifier(), BubblewrapProvider()
        self.broken = broken
        self.asked: list[tuple[str, int]] = []
        self.draws: dict[tuple[str, int], tuple[int, int, int]] = {}

    async def run(self, task, group_id, index, seed):
        self.asked.append((task.id, index))
        self.draws[task.id, index] = (group_id, index, seed)
        if task.id in self.broken:
            raise SandboxError("no sandbox today")
        rollout = Rollout(task.id, task.environment, task.family, group_id, index, seed)
        rollout.reward = Reward(float((group_id + index) % 2))
        rollout.turns = [Turn(0, 4, "stop"), Turn(6, 9, "stop", "not JSON" if index == 0 else None)]
        rollout.loss_mask = [True] * 7 + [False] * 2
        return rollout

    def keep_work(self, keep): ...

    async def close(self): ...


@pytest.fixture
def tasks(tmp_path):
    return [load_task(write_task(terminal_task(index, 0, "heldout"), tmp_path / "tasks")) for index in range(3)]


def attempts_of(runner, tasks, log, weights="w0", num_samples=4):
    return asyncio.run(run_attempts(runner, tasks, Served("model", weights), num_samples, log, concurrency=2))


def attempt(task, seed, reward, *, turns=2, invalid=0, environment="terminal", stop_reason="finished"):
    return Attempt(
        "model",
        "w0",
        task,
        task,
        environment,
        "family",
        "h",
        seed,
        reward,
        "",
        reward == 1,
        None,
        stop_reason,
        turns,
        10,
        invalid,
    )


def test_every_attempt_is_recorded_and_none_is_run_twice(tasks, tmp_path):
    log = tmp_path / "attempts.jsonl"
    first = attempts_of(CoinRunner(), tasks, log)
    again = CoinRunner()
    assert sorted(map(str, attempts_of(again, tasks, log))) == sorted(map(str, first))
    assert again.asked == []
    assert len(read_attempts(log)) == 12


@pytest.mark.parametrize(
    "name", ["steps/one/instruction.md", "steps/one/tests/test.sh", "task.toml", "environment/files/a"]
)
def test_whatever_defines_a_task_of_steps_is_in_its_digest(tasks, name):
    file = tasks[0].directory / name
    digests = {task_digest(tasks[0])}
    file.parent.mkdir(parents=True, exist_ok=True)
    for text in ("cpus = 1", "cpus = 2"):
        file.write_text(f"[environment]\n{text}\n")
        digests.add(task_digest(tasks[0]))
    assert len(digests) == 3
    (tasks[0].directory / "solution").mkdir(exist_ok=True)
    (tasks[0].directory / "solution" / "solve.sh").write_text("another way")
    assert task_digest(tasks[0]) in digests


def test_other_weights_and_a_changed_task_are_attempted_anew(tasks, tmp_path):
    log = tmp_path / "attempts.jsonl"
    attempts_of(CoinRunner(), tasks, log)
    other = CoinRunner()
    attempts_of(other, tasks, log, weights="w1")
    assert len(other.asked) == 12
    before = task_digest(tasks[0]), grading_digest(tasks[0])
    (tasks[0].directory / "tests" / "test.sh").write_text("echo 1 > /logs/verifier/reward.txt\n")
    assert task_digest(tasks[0]) == before[0]
    assert grading_digest(tasks[0]) != before[1]
    changed = CoinRunner()
    attempts_of(changed, tasks, log)
    assert {task for task, _ in changed.asked} == {tasks[0].id}


def test_other_settings_and_another_verifier_are_attempted_anew(tasks, tmp_path):
    log = tmp_path / "attempts.jsonl"
    attempts_of(CoinRunner(), tasks, log)
    for other in (CoinRunner(temperature=0.0), CoinRunner(verifier=UnitTestVerifier(timeout_s=7.0))):
        attempts_of(other, tasks, log)
        assert len(other.asked) == 12


def test_a_draw_depends_on_the_task_and_its_seed_only(tasks, tmp_path):
    whole, part = CoinRunner(), CoinRunner()
    attempts_of(whole, tasks, tmp_path / "whole.jsonl")
    asyncio.run(run_attempts(part, tasks[1:], Served("model", "w0"), 2, tmp_path / "part.jsonl", first_sample=2))
    assert part.draws == {key: whole.draws[key] for key in part.draws}
    assert {index for _, index in part.draws} == {2, 3}
    assert len({draw[:2] for draw in whole.draws.values()}) == 12


def test_another_seed_shares_no_draw_and_every_checkpoint_gets_the_same(tasks, tmp_path):
    draws = {}
    for weights, seed in (("w0", 1), ("w1", 1), ("w0", 2)):
        runner = CoinRunner()
        log = tmp_path / "attempts.jsonl"
        asyncio.run(run_attempts(runner, tasks, Served("model", weights), 4, log, seed=seed))
        draws[weights, seed] = runner.draws
    assert draws["w0", 1] == draws["w1", 1]
    assert draws["w0", 1].keys() == draws["w0", 2].keys()
    assert not set(draws["w0", 1].values()) & set(draws["w0", 2].values())


def test_no_attempts_at_a_time_is_an_error_not_a_hang(tasks, tmp_path):
    with pytest.raises(ConfigError, match="concurrency: expected at least 1, got 0"):
        asyncio.run(run_attempts(CoinRunner(), tasks, Served("m", "w"), 1, tmp_path / "log", concurrency=0))


def test_solved_is_the_verifiers_word_not_a_full_reward(tasks, tmp_path):
    verdict = replace(Reward(1.0), value=0.97)
    rollout = Rollout("a", "terminal", "f", 0, 0, 0, reward=verdict)
    assert verdict.solved
    assert not Reward(0.97).solved
    assert rollout_metrics([rollout])["pass@1"] == 1.0
    names = ("checkpoint", "weights", "task_id", "task", "environment", "family", "harness")
    row = attempt_of(rollout, dict.fromkeys(names, "a") | {"seed": 0})
    assert (row.reward, row.solved) == (0.97, True)
    summary = summarise([row])
    assert (summary["pass@1"], summary["mean_reward"], summary["false_success_rate"]) == (1.0, 0.97, 0.0)


def test_an_infrastructure_failure_is_no_score_and_is_tried_again(tasks, tmp_path):
    log = tmp_path / "attempts.jsonl"
    attempts = attempts_of(CoinRunner(broken={tasks[1].id}), tasks, log)
    failed = [one for one in attempts if one.error is not None]
    assert {one.task_id for one in failed} == {tasks[1].id}
    assert all(one.reward is None and "no sandbox today" in one.error for one in failed)
    summary = summarise(attempts)
    assert (summary["num_tasks"], summary["num_attempts"], summary["num_errors"]) == (2, 8, 4)
    repaired = CoinRunner()
    attempts_of(repaired, tasks, log)
    assert {task for task, _ in repaired.asked} == {tasks[1].id}


def test_a_torn_last_line_is_dropped_and_a_bad_line_before_it_is_an_error(tmp_path):
    log = tmp_path / "attempts.jsonl"
    append_attempts(log, [attempt("a", 0, 1.0), attempt("a", 1, 0.0)])
    log.write_text(log.read_text() + '{"checkpoint": "mo')
    assert [one.seed for one in read_attempts(log)] == [0, 1]
    lines = log.read_text().splitlines()
    log.write_text("\n".join(["nonsense", *lines]))
    with pytest.raises(DataError, match=r"attempts.jsonl:1"):
        read_attempts(log)


def test_the_summary_equals_a_count_by_hand():
    attempts = [
        *(attempt("a", seed, float(seed < 2), turns=3, invalid=1) for seed in range(8)),
        *(attempt("b", seed, 1.0, environment="swe") for seed in range(8)),
        *(attempt("c", seed, 0.0, stop_reason="max_turns") for seed in range(8)),
    ]
    summary = summarise(attempts)
    assert summary["pass@1"] == pytest.approx((2 / 8 + 1 + 0) / 3)
    assert summary["pass@8"] == pytest.approx(2 / 3)
    assert summary["invalid_call_rate"] == pytest.approx(8 / (8 * 3 + 8 * 2 + 8 * 2))
    assert summary["mean_turns"] == pytest.approx((3 + 2 + 2) / 3)
    assert summary["conclusion_rate"] == pytest.approx(16 / 24)
    assert summary["false_success_rate"] == pytest.approx(6 / 16)
    assert summary["truncation_rate"] == pytest.approx(8 / 24)
    assert breakdown(attempts, lambda one: one.environment) == {"swe": 1.0, "terminal": pytest.approx(1 / 8)}


def test_a_comparison_is_paired_by_task_and_refuses_other_tasks():
    before = [attempt(task, seed, 0.0) for task in "abcdefgh" for seed in range(4)]
    after = [attempt(task, seed, float(seed < 2)) for task in "abcdefgh" for seed in range(4)]
    compared = compare([before], [after])
    gain = compared["metrics"]["pass@1"]
    assert gain["difference"] == pytest.approx(0.5)
    assert gain["ci95"] == pytest.approx([0.5, 0.5])  # every task gains the same
    assert gain["minimal_detectable_effect"] is None
    assert compared["num_clusters"] == 8
    with pytest.raises(DataError, match="same tasks"):
        compare([before], [after[:-4]])


def test_a_task_with_more_attempts_does_not_weigh_more():
    attempts = [
        *(attempt("a", seed, 0.0, turns=8, invalid=4, stop_reason="max_turns") for seed in range(6)),
        *(attempt("b", seed, float(seed > 0), turns=2) for seed in range(2)),
    ]
    summary = summarise(attempts, ks=(1, 2, 8))
    assert summary["pass@1"] == pytest.approx((0 + 1 / 2) / 2)
    assert summary["pass@2"] == pytest.approx((0 + 1) / 2)
    assert "pass@8" not in summary
    assert summary["mean_reward"] == pytest.approx((0 + 1 / 2) / 2)
    assert summary["mean_turns"] == pytest.approx((8 + 2) / 2)
    assert summary["invalid_call_rate"] == pytest.approx((4 + 0) / (8 + 2))
    assert summary["conclusion_rate"] == summary["truncation_rate"] == summary["invalid_attempt_rate"] == 0.5
    assert summary["false_success_rate"] == pytest.approx(1 / 2)


def test_pass_at_k_waits_for_the_task_with_the_fewest_attempts():
    attempts = [attempt(task, seed, 1.0) for task, count in (("a", 8), ("b", 7)) for seed in range(count)]
    assert "pass@8" not in summarise(attempts)
    assert summarise([*attempts, attempt("b", 7, 0.0)])["pass@8"] == 1.0


def test_lengths_are_compared_on_the_solved_attempts_of_tasks_that_both_solved():
    before = [attempt("a", 0, 1.0, turns=3), attempt("a", 1, 0.0, turns=50), attempt("b", 0, 1.0, turns=70)]
    after = [attempt("a", 0, 1.0, turns=5), attempt("a", 1, 1.0, turns=7), attempt("b", 0, 0.0, turns=90)]
    assert compare([before], [after])["metrics"]["turns_on_both_solved"]["values"] == [3.0, 6.0]
    assert "turns_on_both_solved" not in compare([before[2:]], [after[2:]])["metrics"]


def test_tasks_of_one_repository_are_not_independent():
    tasks = [f"{name}-{number}" for name in "abcdefgh" for number in range(5)]
    repositories = {task: task[0] for task in tasks}
    before = [attempt(task, 0, float(task[0] in "abcd")) for task in tasks]
    after = [attempt(task, 0, float(task[0] in "abcdef")) for task in tasks]
    alone, clustered = compare([before], [after]), compare([before], [after], repositories)
    assert (alone["num_clusters"], clustered["num_clusters"]) == (40, 8)
    alone, clustered = alone["metrics"]["pass@1"], clustered["metrics"]["pass@1"]
    assert alone["p_value"] < 0.005
    assert clustered["p_value"] > 0.2
    assert clustered["minimal_detectable_effect"] > 2 * alone["minimal_detectable_effect"]
    widths = [np.ptp(summarise(before, one)["pass@1_ci95"]) for one in (None, repositories)]
    assert widths[1] > 1.5 * widths[0]
    assert compare([before[:3]], [after[:3]])["metrics"]["pass@1"]["ci95"] == [-1.0, 1.0]


PROTOCOL = {
    "harness": {"terminal": "h"}, "settings": "s", "sampling": "temperature 1", "limits": "9 turns", "verifier": "v",
    "graders": ["the grader 1.0, tests 0000"],
}  # fmt: skip


def side_of(name, attempts):
    return Side(name, (attempts,), PROTOCOL | {"task_sets": {one.task_id: "all" for one in attempts}})


def printed_of(capsys, sides, clusters):
    print_comparison(compare_sides(sides, sides[0].protocol["task_sets"], clusters))
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("solved", "number"), [("ab", 2.0), ("a", 1.0), ("abcdefg", 1.0), ("", 0.0)])
def test_an_interval_from_too_few_repositories_is_said_not_to_be_trusted(capsys, solved, number):
    tasks = [f"{name}-{index}" for name in "abcdefgh" for index in range(5)]
    repositories = {task: task[0] for task in tasks}
    attempts = [attempt(task, 0, float(task[0] in solved)) for task in tasks]
    assert summarise(attempts, repositories)["pass@1_event_clusters"] == pytest.approx(number)
    note = "base on all tasks: do not trust the interval of pass@1: too few clusters hold what is rarer."
    assert (note in printed_of(capsys, [side_of("base", attempts)], repositories)) == (number < 2)
    assert note not in printed_of(capsys, [side_of("base", attempts)], {})


@pytest.mark.parametrize(("num_errors", "is_said"), [(2, False), (3, True)])
def test_too_many_attempts_that_failed_outside_the_model_raise_an_alarm(capsys, num_errors, is_said):
    attempts = [attempt("a", seed, 1.0) for seed in range(100)]
    attempts += [replace(attempt("a", 100 + seed, None), error="no sandbox") for seed in range(num_errors)]
    printed = printed_of(capsys, [side_of("base", attempts)], {})
    assert ("base on all tasks: 2.9% of the attempts failed outside the model, above 2%" in printed) == is_said
    assert "graded by the grader 1.0, tests 0000" in printed


def test_p_values_are_adjusted_for_the_number_of_comparisons():
    results = {"base": [], "one": [], "two": []}
    for index in range(40):
        for name, solved in (("base", 0), ("one", index < 8), ("two", index < 20)):
            results[name].append(attempt(f"t{index}", 0, float(solved)))
    summary, _ = summary_of([side_of(*one) for one in results.items()], [])
    paired = summary["paired"]
    assert paired["one - base"]["pass@1"] == pytest.approx(8 / 40)
    assert {"ci95", "num_tasks"} <= paired["one - base"].keys()  # which the report shows
    one, two = paired["one - base"], paired["two - base"]
    assert two["p_value_holm"] == pytest.approx(2 * two["p_value"])
    assert one["p_value_holm"] == max(one["p_value"], two["p_value_holm"])


def test_weights_are_known_by_every_shard_the_config_and_the_tokenizer(tmp_path):
    seen = set()
    for name in (
        "",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "config.json",
        "tokenizer.json",
    ):
        for file in (
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "config.json",
            "tokenizer.json",
        ):
            (tmp_path / file).write_text("changed" if file == name else "same")
        (tmp_path / "README.md").write_text(f"about {name}")
        seen.add(weights_digest(tmp_path))
    assert len(seen) == 5
    (tmp_path / "tokenizer.json").write_text("same")
    digest = weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("other words")
    assert weights_digest(tmp_path) == digest


def test_a_record_holds_what_reports_need(tasks, tmp_path):
    log = tmp_path / "attempts.jsonl"
    attempts_of(CoinRunner(), tasks[:1], log, num_samples=1)
    row = json.loads(log.read_text())
    assert (row["turns"], row["generated_tokens"], row["invalid_turns"], row["looped"]) == (2, 7, 1, False)
    assert (row["checkpoint"], row["weights"], row["task_id"]) == ("model", "w0", tasks[0].id)


def test_what_an_evaluation_writes_is_what_compare_reads(tasks, tmp_path, monkeypatch):
    runner, folder = CoinRunner(), tmp_path / "eval"
    settings = RolloutSettings(
        harnesses=runner.harnesses, verifier=runner.verifier, sandboxes=runner.sandboxes,
        max_turn_tokens=16, max_context_tokens=64,
    )  # fmt: skip

    monkeypatch.setattr(RolloutSettings, "make_chat_runner", lambda self, server: CoinRunner())
    servers = {name: ChatServer("http://127.0.0.1:9/v1", name) for name in ("one", "two")}
    for seed in (1, 0):
        evaluate([tmp_path / "tasks"], folder, settings, servers=servers, num_samples=4, seed=seed)
    compare_runs([str(folder)], tmp_path / "out")
    compared = json.loads((tmp_path / "out" / "compare.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())["checkpoints"]
    for name in servers:
        shown = compared["sides"][name]
        assert shown["sets"]["all tasks"]["pass@1"]["value"] == summary[name]["pass@1"]
        assert shown["sets"]["all tasks"]["pass@1"]["ci95"] == summary[name]["pass@1_ci95"]
        assert shown["sets"]["all tasks"]["attempts_per_task"] == 4
        assert shown["protocol"]["sampling"] == "temperature 1, top_p 1"
        (grader,) = shown["protocol"]["graders"]
        assert grader.startswith("test.sh, as Harbor 0.25.0 (strict), tests ")
        assert shown["protocol"]["limits"] == "6 to 6 turns, 16 tokens a turn, 64 in all, 30 s a command of terminal"
