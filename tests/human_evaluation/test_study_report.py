"""The report: planted quality and biases are recovered, the seal is kept until it is opened, the bytes are the same."""

import csv
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from small_studies import LEFT, QUALITY, THRESHOLDS, TWICE_AS_LONG, judge, judge_all, prepare, write_sides

from north_lightning.cli import main
from north_lightning.human_evaluation import prepare as prepare_module
from north_lightning.human_evaluation.measures import preference_effects
from north_lightning.human_evaluation.store import Store
from north_lightning.human_evaluation.study import RATINGS, Study

STRENGTHS = {"quokka": QUALITY / 2, "wombat": -QUALITY / 2}


@pytest.fixture(autouse=True)
def same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module.secrets, "token_hex", lambda size: "5" * 2 * size)


def report(study: Path, *arguments: str) -> dict[str, Any]:
    assert main(["human-eval", "report", "--study", str(study), *arguments]) == 0
    read: dict[str, Any] = json.loads((study / "report" / "report.json").read_text())
    return read


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """85 items, three raters."""
    folder = tmp_path_factory.mktemp("judged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module.secrets, "token_hex", lambda size: "5" * 2 * size)
        study = prepare(write_sides(folder, list(STRENGTHS), 85), folder / "study")
    judge_all(study, STRENGTHS)
    return study.folder


@pytest.fixture
def study(judged: Path, tmp_path: Path) -> Path:
    shutil.copytree(judged, tmp_path / "study")
    return tmp_path / "study"


def true_win_rate() -> float:
    """Of the planted raters, where sides and lengths are even: a tie is half a win."""
    noise = np.random.default_rng(0).logistic(size=200_000)
    rng = np.random.default_rng(1)
    longer = np.log2(rng.choice([60, 120, 270, 620], 200_000) / rng.choice([60, 120, 270, 620], 200_000))
    pull = QUALITY + LEFT * rng.choice([-1, 1], 200_000) + TWICE_AS_LONG * longer + noise
    return float(np.mean(pull > THRESHOLDS[2]) + np.mean(abs(pull) <= THRESHOLDS[2]) / 2)


def test_planted_quality_and_biases_are_recovered(study: Path) -> None:
    found = report(study, "--unseal", "true")
    effects = found["bias"]["effects"]
    planted = {"left": LEFT, "twice_as_long": TWICE_AS_LONG, "wombat instead of quokka": -QUALITY}
    assert effects.keys() == planted.keys()
    for name, value in planted.items():
        low, high = effects[name]["ci95"]
        assert low < value < high, name
        assert effects[name]["p_value"] < 0.05
    overall = found["pairs"][0]["overall"]
    assert overall["num_items"] == 85
    for interval in ("wilson_ci95", "clustered_ci95", "bootstrap_ci95"):
        low, high = overall[interval]
        assert low < overall["win_rate"] < high
        assert low < true_win_rate() < high
    assert overall["num_judgments"] == 85 + found["num_judged_twice"]
    assert found["num_judged_twice"] >= 0.25 * 85
    assert found["bias"]["left_preferred"]["share"] > 0.5
    assert found["bias"]["longer_preferred"]["share"] > 0.5
    assert all(one == {"shown": 2, "passed": 2} for one in found["attention"].values())


@pytest.mark.long
def test_the_intervals_of_planted_effects_cover_them_in_95_percent_of_studies() -> None:
    rng = np.random.default_rng(0)
    covered, num = np.zeros(3), 1000
    for _ in range(num):
        lengths = rng.choice([60, 120, 270, 620], size=(85, 2))
        items = np.concatenate([np.arange(85), rng.choice(85, 22, replace=False)])
        swapped = rng.choice([-1.0, 1.0], len(items))
        longer = np.log2(lengths[items, 0] / lengths[items, 1]) * swapped
        effects = np.column_stack([-np.ones(len(items)), longer, swapped])
        pull = effects @ [LEFT, TWICE_AS_LONG, QUALITY] + rng.logistic(size=len(items))
        found = preference_effects(effects, (1 + np.digitize(pull, THRESHOLDS)).tolist(), items.tolist())
        for at, true in enumerate((LEFT, TWICE_AS_LONG, QUALITY)):
            covered[at] += found[at].interval[0] < true < found[at].interval[1]
    assert (covered / num > 0.925).all(), covered / num
    assert (covered / num < 0.975).all(), covered / num


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_report_is_the_same_bytes_twice(study: Path) -> None:
    report(study, "--unseal", "true")
    first = files_of(study / "report")
    assert set(first) == {"report.json", "report.html", "preferences.png", "preferences.svg"}
    shutil.rmtree(study / "report")
    report(study)
    assert files_of(study / "report") == first


def test_no_model_is_named_before_the_seal_is_opened(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(study)
    assert main(["human-eval", "export", "--study", str(study), "--output_dir", str(study / "out")]) == 0
    said = capsys.readouterr()
    written = [path for folder in ("report", "out") for path in (study / folder).rglob("*") if path.is_file()]
    assert len(written) == 2 + 2 + 8
    for text in (said.out, said.err, *map(str, written), *(path.read_text() for path in written)):
        assert not re.search("quokka|wombat|item-0", text.replace(str(study), ""), re.IGNORECASE)
    assert found["models"] is found["pairs"] is found["rubrics"] is found["bias"]["effects"] is None
    assert found["agreement"]["preference"]["num_units"] >= 22
    assert not Store(study / RATINGS).is_unsealed
    named = report(study, "--unseal", "true")
    assert named["models"] == list(STRENGTHS)
    assert Store(study / RATINGS).is_unsealed
    for key in ("attention", "agreement", "progress"):
        assert named[key] == found[key]


def test_numbers_that_can_be_counted_by_hand(tmp_path: Path) -> None:
    study = prepare(write_sides(tmp_path, ["quokka", "wombat"], 4), tmp_path / "study", "--double_rated", "0")
    store, seal = Store(study.folder / RATINGS), study.unseal()
    wanted = iter([5, 4, 3, 1])  # towards quokka: two wins, a tie, a loss
    for one in (one for rows in study.assignments.values() for one in rows):
        comparison = study.comparison_of(one)
        is_left = (comparison.expected or "") == one.left
        levels = {one.left: 5, one.right: 1} if is_left else {one.left: 1, one.right: 5}
        preference: int | None = 1 if is_left else 5
        if not comparison.expected:
            towards = next(wanted)
            preference = 6 - towards if seal.attempts[one.left] == "quokka" else towards
            levels = {side: 4 if seal.attempts[side] == "quokka" else 2 for side in (one.left, one.right)}
        questions = study.questions(one)
        store.save_ratings(one.id, {side: dict.fromkeys(questions, level) for side, level in levels.items()})
        store.save_preference(one.id, preference, "")
    found = report(study.folder, "--unseal", "true")
    overall = found["pairs"][0]["overall"]
    assert (overall["wins"], overall["ties"], overall["losses"]) == (2, 1, 1)
    assert overall["win_rate"] == 2.5 / 4
    assert overall["win_rate_without_ties"] == 2 / 3
    assert overall["preferences"] == [1, 1, 1, 0, 1]
    means = [model["mean"] for rows in found["rubrics"].values() for row in rows.values() for model in row.values()]
    assert means == [4.0, 2.0] * (len(means) // 2)
    assert len(means) == 2 * 4 * 3


def test_a_rater_who_fails_the_attention_items_is_left_out(study: Path) -> None:
    opened, seal = Study(study), Study(study).unseal()
    (study / RATINGS).unlink()
    store = Store(study / RATINGS)
    for rater, rows in opened.assignments.items():
        for one in rows:
            answers, preference = judge(opened, one, seal, STRENGTHS, random.Random(one.id))
            store.save_ratings(one.id, answers)
            is_careless = rater == "rater-2"
            planted = opened.comparison_of(one).expected
            store.save_preference(one.id, (None if planted else 3) if is_careless else preference, "")
    found = report(study, "--unseal", "true")
    assert found["raters_left_out"] == ["rater-2"]
    assert found["attention"]["rater-2"] == {"shown": 2, "passed": 0}
    pair = found["pairs"][0]
    assert pair["overall"]["num_judgments"] < pair["with_all_raters"]["num_judgments"]
    assert pair["with_all_raters"]["ties"] > pair["overall"]["ties"]


def test_strengths_of_three_models_are_in_their_order(tmp_path: Path) -> None:
    strengths = {"quokka": 1.2, "wombat": 0.0, "numbat": -1.2}
    study = prepare(write_sides(tmp_path, list(strengths), 24), tmp_path / "study")
    judge_all(study, strengths)
    found = report(study.folder, "--unseal", "true")
    assert [pair["models"] for pair in found["pairs"]] == [
        ["quokka", "wombat"],
        ["quokka", "numbat"],
        ["wombat", "numbat"],
    ]
    values = [one["strength"] for one in found["bradley_terry"].values()]
    assert values == sorted(values, reverse=True)
    assert sum(values) == pytest.approx(0, abs=1e-9)
    assert "Bradley-Terry" in (study.folder / "report" / "report.html").read_text()


def test_an_unrated_study_has_a_report_too(tmp_path: Path) -> None:
    study = prepare(write_sides(tmp_path, ["quokka", "wombat"], 4), tmp_path / "study")
    for arguments in ((), ("--unseal", "true")):
        found = report(study.folder, *arguments)
        assert found["num_judgments"] == 0
    assert (study.folder / "report" / "report.html").read_text().endswith("</html>\n")


def test_the_chart_is_told_apart_by_color_blind_eyes(study: Path) -> None:
    """Simulated by the matrices of Machado, Oliveira and Fernandes (2009), severity 1: neighbors differ in lightness
    or hue by more than a just noticeable amount for every kind of color blindness."""
    from north_lightning.views.charts import PREFERENCE_COLOURS as COLORS

    kinds = {
        "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    }
    linear = np.array([[int(one[at : at + 2], 16) / 255 for at in (1, 3, 5)] for one in COLORS]) ** 2.2
    for matrix in kinds.values():
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        for first in range(5):
            for second in range(first):
                assert np.linalg.norm(seen[first] - seen[second]) > 0.12, (first, second)
    report(study, "--unseal", "true")
    with Image.open(study / "report" / "preferences.png") as image:
        assert image.width > 1200
        assert len(image.getcolors(1 << 20) or []) > 20


def test_label_studio_and_back(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["human-eval", "export", "--study", str(study), "--output_dir", str(out)]) == 0
    before = Store(study / RATINGS).judgments()
    files = sorted((out / "label_studio").glob("*.json"))
    tasks = [task for file in files for task in json.loads(file.read_text())]
    assert len(tasks) == len(before)
    for file in files:  # every name in an annotation is one of the configuration's, with one of its choices
        config = ElementTree.parse(file.with_suffix(".xml")).getroot()
        choices = {one.get("name"): [choice.get("value") for choice in one] for one in config.iter("Choices")}
        data = {one.get("value", "").removeprefix("$") for one in config.iter("HyperText")}
        for task in json.loads(file.read_text()):
            assert data <= task["data"].keys()
            for result in task["annotations"][0]["result"]:
                assert result["value"]["choices"][0] in choices[result["from_name"]]
    (study / RATINGS).unlink()
    arguments = ["human-eval", "import", "--study", str(study), "--files", json.dumps([str(file) for file in files])]
    assert main(arguments) == 0
    assert Store(study / RATINGS).judgments() == before
    rows = list(csv.DictReader((out / "ratings.csv").open()))
    lines = [json.loads(line) for line in (out / "ratings.jsonl").read_text().splitlines()]
    assert len(lines) == len(before)
    assert sum(row["side"] == "both" for row in rows) == len(before)
    assert len(rows) == 7 * len(before)
    torn = json.loads(files[0].read_text())
    torn[0]["annotations"][0]["result"].pop(0)
    (tmp_path / "torn.json").write_text(json.dumps(torn))
    assert main([*arguments[:-1], json.dumps([str(tmp_path / "torn.json")])]) == 1
    assert "task 1: expected an answer to 'A: " in capsys.readouterr().err
