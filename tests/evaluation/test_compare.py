"""Comparisons of evaluations: who wins, what cannot be told, and what does not render."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from evaluated import SETS, attempts_of, protocol_of, write_evaluation

from north_lightning.cli import main
from north_lightning.errors import ConfigError, DataError
from north_lightning.evaluation.attempts import Attempt, append_attempts
from north_lightning.evaluation.compare import PROTOCOL, compare_sides, read_sides
from north_lightning.evaluation.statistics import paired_comparison, pass_at_k
from north_lightning.evaluation.summary import METRICS, per_task
from north_lightning.views.comparison import compare_runs


def compared(tmp_path: Path, *sides: str, **arguments) -> dict:
    compare_runs(list(sides), tmp_path / "out", **arguments)
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def row_of(result: dict, tasks: str = "all tasks") -> dict:
    return next(row for row in result["comparisons"] if row["tasks"] == tasks)


# ---- published counts ------------------------------------------------------------------------------------------------


def test_two_published_counts_that_differ_by_less_than_a_point_cannot_be_told_apart(tmp_path, capsys):
    result = compared(tmp_path, "base=152/500", "new=156/500")
    says = row_of(result)["says"]
    assert says.startswith("new with 31.2% and base with 30.4% of 500 tasks cannot be told apart")
    assert "would have to be at least 8.2 points" in says  # (1.96 + 0.8416) sqrt(2 x 0.308 x 0.692 / 500)
    assert says in capsys.readouterr().out


def test_twenty_recipes_have_no_winner_and_each_is_better_than_a_fixed_quarter(tmp_path):
    recipes = [f"r{number}={91 + number}/300" for number in range(20)]  # 0.303 to 0.367
    result = compared(tmp_path, "base=0.25", *recipes)
    assert result["winner"]["name"] is None
    assert result["winner"]["says"].startswith("no winner among 20 (0 of 190 pairs")
    assert all(" is better than base " in row["says"] for row in result["comparisons"])
    assert len(result["comparisons"]) == 20


def test_a_quarter_that_was_measured_on_as_many_tasks_is_less_than_a_fixed_one(tmp_path):
    recipes = [f"r{number}={91 + number}/300" for number in range(20)]
    says = [row["says"] for row in compared(tmp_path, "base=75/300", *recipes)["comparisons"]]
    assert "cannot be told apart" in says[0]
    assert sum(" is better than base " in one for one in says) == 2


def test_one_of_many_that_beats_each_other_wins(tmp_path):
    result = compared(tmp_path, "a=100/500", "b=110/500", "c=300/500")
    assert result["winner"]["name"] == "c"
    assert result["winner"]["says"].startswith("c wins: it is better than each of the other 2 (2 of 3 pairs")


@pytest.mark.parametrize("word", ["a=5/4", "156/500", "a=0/0", "a=1.5"])
def test_what_is_no_count_is_refused(tmp_path, word):
    with pytest.raises((ConfigError, DataError)):
        compared(tmp_path, word, "b=1/2")


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_every_number_is_that_of_the_attempts(tmp_path):
    write_evaluation(tmp_path / "a", "old", -1.0, 1, num_samples=4)
    write_evaluation(tmp_path / "b", "new", 1.5, 2, num_samples=4)
    result = compared(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"), cluster_by="task")
    rates, names = {}, sorted(protocol_of()["task_sets"])
    for name, rate, seed in (("old", -1.0, 1), ("new", 1.5, 2)):
        attempts = attempts_of(name, rate, seed, protocol_of(f"w{seed}", 4))
        counts = [sum(one.solved for one in attempts if one.task_id == task) for task in names]
        rates[name] = [count / 4 for count in counts]
        shown = result["sides"][name]["sets"]["all tasks"]
        for k in range(1, 5):
            assert shown[f"pass@{k}"]["value"] == pytest.approx(np.mean([pass_at_k(4, one, k) for one in counts]))
        assert "pass@5" not in shown
        concluded = [one for one in attempts if one.stop_reason == "finished"]
        assert shown["conclusion_rate"]["value"] == pytest.approx(len(concluded) / len(attempts))
        assert shown["ended_by_itself_rate"]["value"] == shown["conclusion_rate"]["value"]
        wrong = sum(not one.solved for one in concluded) / len(concluded)
        assert shown["false_success_rate"]["value"] == pytest.approx(wrong)
        assert (shown["num_runs"], shown["num_tasks"], shown["attempts_per_task"]) == (1, 54, 4)
    gain = paired_comparison(rates["old"], rates["new"])
    row = row_of(result)["metrics"]["pass@1"]
    assert row["difference"] == pytest.approx(gain.difference)
    assert row["ci95"] == pytest.approx(list(gain.interval))
    assert row["p_value"] == pytest.approx(gain.p_value)
    assert row["p_value_holm"] == pytest.approx(3 * gain.p_value)  # two task sets and all tasks
    assert row_of(result)["says"].startswith("new is better than old on 54 tasks: ")
    assert {"terminal", "swe", "all tasks"} == {one["tasks"] for one in result["comparisons"]}
    assert METRICS.keys() < row_of(result)["metrics"].keys()
    assert "turns_on_both_solved" in row_of(result)["metrics"]


def test_a_linearized_ratio_has_the_intervals_center_and_the_influence_of_leaving_a_task_out():
    attempts = attempts_of("m", 0.0, 5, protocol_of())
    tasks = {task: [one for one in attempts if one.task_id == task] for task in protocol_of()["task_sets"]}
    values = per_task(tasks, [1])["invalid_call_rate"]
    ratio = sum(one.invalid_turns for one in attempts) / sum(one.turns for one in attempts)
    assert values.mean() == pytest.approx(ratio)
    without = {task: group for task, group in tasks.items() if task != "swe-3"}
    moved = ratio - per_task(without, [1])["invalid_call_rate"].mean()
    index = list(tasks).index("swe-3")
    assert (values[index] - ratio) / len(tasks) == pytest.approx(moved, rel=0.1)


def test_a_folder_stands_for_all_its_checkpoints_and_a_colon_for_one(tmp_path):
    folder = tmp_path / "eval"
    for number, name in enumerate(("sft", "rl")):
        write_evaluation(folder, name, float(number), number)
    assert list(compared(tmp_path, str(folder))["sides"]) == ["sft", "rl"]
    assert list(compared(tmp_path, f"{folder}:rl", f"base={folder}:sft")["sides"]) == ["rl", "base"]
    with pytest.raises(ConfigError, match="it holds sft, rl: add :NAME"):
        compared(tmp_path, f"x={folder}", "y=1/2")
    with pytest.raises(ConfigError, match="no checkpoint 'dpo', it holds sft, rl"):
        compared(tmp_path, f"{folder}:dpo", "y=1/2")
    with pytest.raises(ConfigError, match=r"each with its own name \(NAME=...\), got rl, rl"):
        compared(tmp_path, f"{folder}:rl", f"{folder}:rl")


def test_training_runs_of_a_recipe_are_a_random_effect_and_one_run_is_about_its_checkpoint(tmp_path):
    """Recipes whose runs lie far apart: any single pair is told apart, the recipes are not."""
    rates = {("a", 0): -3.0, ("a", 1): 0.0, ("a", 2): 3.0, ("b", 0): -2.0, ("b", 1): 1.0, ("b", 2): 4.0}
    places = {
        one: write_evaluation(tmp_path / f"{one[0]}{one[1]}", rate=rate, seed=seed)
        for seed, (one, rate) in enumerate(rates.items())
    }
    recipes = [f"{name}={','.join(places[name, run] for run in range(3))}" for name in "ab"]
    whole = compared(tmp_path, *recipes)
    assert "cannot be told apart" in row_of(whole)["says"]
    assert whole["notes"] == []
    single = compared(tmp_path, f"a={places['a', 0]}", f"b={places['b', 2]}")
    assert "b is better than a" in row_of(single)["says"]
    assert any("about this checkpoint, not about its recipe" in note for note in single["notes"])
    value = whole["sides"]["a"]["sets"]["all tasks"]["pass@1"]
    each = [
        compared(tmp_path, f"x={places['a', run]}", "y=1/2")["sides"]["x"]["sets"]["all tasks"]["pass@1"]
        for run in range(3)
    ]
    assert value["value"] == pytest.approx(np.mean([one["value"] for one in each]))
    assert np.ptp(value["ci95"]) > 2 * max(np.ptp(one["ci95"]) for one in each)


def test_one_training_run_may_have_its_task_sets_in_two_folders(tmp_path):
    names = protocol_of()["task_sets"]
    parts = [{task: name for task, name in names.items() if name == wanted} for wanted in SETS]
    folders = [
        write_evaluation(tmp_path / wanted, seed=1, task_sets=part) for wanted, part in zip(SETS, parts, strict=True)
    ]
    result = compared(tmp_path, f"a={'+'.join(folders)}", "b=1/2")
    assert {name: row["num_tasks"] for name, row in result["sides"]["a"]["sets"].items()} == {"all tasks": 54, **SETS}


# ---- what does not render --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*PROTOCOL, "weights", "task_sets"])
def test_numbers_without_their_protocol_do_not_render(tmp_path, key):
    folder = tmp_path / "a"
    write_evaluation(folder)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["checkpoints"]["rl"]["protocol"][key]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match=f"rl is not comparable: {key} missing"):
        compared(tmp_path, str(folder), "b=1/2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("harness", {"terminal": "swe_agent-2"}), ("settings", "s2"), ("verifier", "UnitTestVerifier-2"),
        ("sampling", "temperature 0, top_p 1"), ("limits", "9 turns"),
    ],
)  # fmt: skip
def test_other_protocols_and_graders_are_not_paired(tmp_path, key, value):
    first, second = write_evaluation(tmp_path / "a"), write_evaluation(tmp_path / "b", seed=1, **{key: value})
    result = compared(tmp_path, f"a={first}", f"b={second}")
    says = row_of(result)["says"]
    assert re.match(rf"b and a on all tasks: not comparable: {key} .+ against .+", says)
    assert "metrics" not in row_of(result)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "not comparable" in page
    with pytest.raises(DataError, match=f"the runs of 'x' are not comparable: {key}"):
        compared(tmp_path, f"x={first},{second}", "y=1/2")


def test_tasks_are_compared_where_text_and_tests_are_the_same_and_a_line_says_so(tmp_path):
    changed = dict.fromkeys([f"swe-{number}" for number in range(4)], "other tests")
    fewer = {
        task: name for task, name in protocol_of()["task_sets"].items() if task not in ("terminal-1", "terminal-2")
    }
    first = write_evaluation(tmp_path / "a")
    second = write_evaluation(tmp_path / "b", rate=2.0, seed=1, tests=changed, task_sets=fewer)
    row = row_of(compared(tmp_path, f"a={first}", f"b={second}"))
    assert row["num_tasks"] == 54 - 4 - 2
    assert "compared on the 48 of 54 tasks that both share: 2 lack a score on one side, 4 differ" in row["says"]
    none = write_evaluation(tmp_path / "c", seed=1, tests=dict.fromkeys(protocol_of()["task_sets"], "other"))
    assert "not comparable: no task with the same text" in row_of(compared(tmp_path, f"a={first}", f"c={none}"))["says"]


def test_infrastructure_failures_are_shown_apart_score_nothing_and_alarm_above_two_percent(tmp_path):
    protocol = protocol_of("w0")
    attempts = attempts_of("rl", 0.0, 0, protocol)
    lost = [one for one in attempts if one.task_id == "swe-0"]
    made = {"reward": None, "error": "SandboxError: no", "solved": False}
    failed = [Attempt(**{name: getattr(one, name) for name in Attempt.__dataclass_fields__} | made) for one in lost]
    kept = [one for one in attempts if one.task_id != "swe-0"]
    result = compared(tmp_path, f"a={write_evaluation(tmp_path / 'a', attempts=[*kept, *failed])}", "b=1/2")
    row = result["sides"]["a"]["sets"]["swe"]
    assert row["infrastructure_share"] == pytest.approx(1 / 24)
    assert row["num_tasks"] == 23
    rates = np.mean([one.solved for one in kept if one.task_id.startswith("swe")])
    assert row["pass@1"]["value"] == pytest.approx(rates)
    assert any("a on swe: 4.2% of the attempts failed outside the model, above 2%" in note for note in result["notes"])
    assert any("a on swe: 1 of 24 tasks lack a score" in note for note in result["notes"])
    retried = compared(tmp_path, f"a={write_evaluation(tmp_path / 'c', extra=failed)}", "b=1/2")
    assert retried["sides"]["a"]["sets"]["swe"]["infrastructure_share"] == 0
    assert not any("failed outside" in note for note in retried["notes"])


def test_attempts_of_an_earlier_evaluation_in_the_folder_are_not_counted(tmp_path):
    stale = [
        attempts_of("rl", 5.0, 9, protocol_of("other weights")),
        attempts_of("rl", 5.0, 9, protocol_of("w0", settings="s0")),
        attempts_of("rl", 5.0, 9, protocol_of("w0", verifier="UnitTestVerifier-0")),
        attempts_of("other", 5.0, 9, protocol_of("w0")),
    ]
    clean = compared(tmp_path, f"a={write_evaluation(tmp_path / 'a')}", "b=1/2")["sides"]["a"]["sets"]
    others = [one for several in stale for one in several]
    before, after = write_evaluation(tmp_path / "b", extra=others), write_evaluation(tmp_path / "c")
    append_attempts(tmp_path / "c" / "attempts.jsonl", others)
    for mixed in (before, after):
        assert compared(tmp_path, f"a={mixed}", "b=1/2")["sides"]["a"]["sets"] == clean


def test_the_command_explains_itself_and_a_strangers_mistakes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "nowhere", "b=1/2"]) == 1
    assert "nowhere/summary.json: not found; `python -m north_lightning test` writes it" in capsys.readouterr().err
    assert main(["compare", "a=1/2"]) == 1
    assert "expected two or more" in capsys.readouterr().err
    assert main(["compare", "a=100/500", "b=200/500"]) == 0
    assert "b is better than a on 500 tasks: 40.0% against 20.0%" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "runs" / "compare" / "compare.html").read_text()


def test_names_of_strangers_are_text_on_the_page(tmp_path):
    result = compared(tmp_path, "<script>a=1/2", "b=1/3")
    assert list(result["sides"]) == ["<script>a", "b"]
    assert "<script>a" not in (tmp_path / "out" / "compare.html").read_text()


def test_sides_are_compared_the_same_in_any_number_of_workers_and_order(tmp_path):
    known = {"task_set": {}, "repository": {}, "family": {}, "task": {}}
    sides = [read_sides(f"{name}={write_evaluation(tmp_path / name, rate=rate, seed=seed)}", known)[0]
             for name, rate, seed in (("a", 0.0, 1), ("b", 1.0, 2))]  # fmt: skip
    forth, back = (compare_sides(order, known["task_set"], known["repository"]) for order in (sides, sides[::-1]))
    for one, other in product(forth["comparisons"], back["comparisons"]):
        if one["tasks"] == other["tasks"]:
            assert one["metrics"]["pass@1"]["difference"] == pytest.approx(-other["metrics"]["pass@1"]["difference"])
            assert one["metrics"]["pass@1"]["p_value"] == pytest.approx(other["metrics"]["pass@1"]["p_value"])
