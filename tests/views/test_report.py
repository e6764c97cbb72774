"""The report's numbers are those of its sources, and the page shows them."""

import json
import re
from pathlib import Path

import pytest

from north_lightning.errors import DataError
from north_lightning.evaluation.compare import shown
from north_lightning.views.charts import Series, line_chart, running_mean
from north_lightning.views.comparison import compare_runs
from north_lightning.views.page import CHARTS
from north_lightning.views.report import write_report


def test_the_report_holds_every_number_that_decides(run_dir: Path) -> None:
    write_report(run_dir)
    report = json.loads((run_dir / "report.json").read_text())
    for stage in ("sft_stage1", "sft_stage2", "rl"):
        assert {"pass@1", "invalid_call_rate", "mean_turns", "loss"} <= report[stage].keys()
    assert report["rl"]["loss"] == pytest.approx(1 / 20)
    assert report["paired_gain"]["ci95"] == [0.2, 0.3]
    assert report["policy_lag"] == {"max": 3.0, "bound": 5.0}
    assert report["mismatch_kl"]["mean"] == pytest.approx(0.001 * 9.5)
    assert report["weight_pushes"] == {"count": 4, "mean_s": pytest.approx(0.2), "max_s": 0.3}
    assert [(point["step"], point["eval/pass@1/high"]) for point in report["rl_heldout"]] == [
        (0, 0.75),
        (8, 0.75),
        (16, 0.75),
    ]
    assert report["seconds"]["rl"] == 60.0
    assert report["total_seconds"] == 240.0
    assert report["peak_memory_gib"] == 3.0


def test_every_number_on_held_out_tasks_has_its_interval_and_its_protocol_as_compare_prints_them(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(run_dir)
    told = capsys.readouterr().out
    compare_runs([f"{run_dir / 'eval'}:{name}" for name in ("sft_stage1", "rl")], run_dir / "compared")
    sides = json.loads((run_dir / "compared" / "compare.json").read_text())["sides"]
    page = (run_dir / "report.html").read_text()
    for metric, words in {"pass@1": "pass@1", "pass@3": "pass@3", "false_success_rate": "said to be done"}.items():
        (line,) = [line for line in told.splitlines() if line.startswith(f"| {words}")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1::2] == [shown(side["sets"]["all tasks"][metric]) for side in sides.values()]
        assert all(f"<td>{cell}</td>" in page for cell in cells)
        assert all(re.fullmatch(r"[\d.]+% \[[\d.]+, [\d.]+\]", cell) for cell in cells[1:])
    sizes = (
        "54 tasks x 3 attempts of a checkpoint; react-1; temperature 1, top_p 0.95; 8 turns; graded by swebench 5.0.2"
    )
    assert sizes in told
    assert sizes in page


def test_the_page_is_self_contained_and_draws_every_chart(run_dir: Path) -> None:
    write_report(run_dir)
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") == len(CHARTS) + 2  # and the task sets, and the families
    for chart in CHARTS:
        assert chart.title.split(",")[0].replace("'", "&#39;") in page
    assert "+25.0" in page
    assert not re.search(r'(?:src|href)="https?://', page.replace("http://www.w3.org", ""))


def test_a_band_reaches_from_the_lower_to_the_upper_end_of_the_interval() -> None:
    points = Series("one", [0, 8, 16], [0.5] * 3, band=([0.25] * 3, [0.75] * 3))
    svg = line_chart([points], xlabel="", ylabel="", ylim=(0, 1))
    heights = []  # in the picture's units, which count downwards
    for name in ("FillBetweenPolyCollection_1", "patch_2"):  # the band, and the frame from 0 to 1
        (drawn,) = re.findall(rf'<g id="{name}">(.*?)</g>', svg, flags=re.S)
        moved = re.findall(r'<use .*?y="([\d.]+)"', drawn) or ["0"]
        heights.append(sorted({float(y) + float(moved[0]) for y in re.findall(r"[ML] [\d.]+ (-?[\d.]+)", drawn)}))
    (top, bottom), (above, below) = heights
    assert (below - bottom) / (below - above) == pytest.approx(0.25, abs=1e-3)
    assert (below - top) / (below - above) == pytest.approx(0.75, abs=1e-3)
    assert "FillBetween" not in line_chart([Series("one", [0, 8], [0.5, 0.5])], xlabel="", ylabel="")


def test_without_points_during_rl_the_page_has_the_other_charts(run_dir: Path) -> None:
    (run_dir / "rl" / "eval" / "points.jsonl").unlink()
    write_report(run_dir)
    assert json.loads((run_dir / "report.json").read_text())["rl_heldout"] == []
    assert (run_dir / "report.html").read_text().count("<svg") == len(CHARTS) - 2 + 2


def test_the_accounts_of_time_are_drawn_as_bars_of_one_hundred_percent(run_dir: Path) -> None:
    sampler = {"generating": 30.0, "sandbox": 10.0, "harness": 0.0, "verifier": 5.0}
    sampler |= {"no_rollouts": 3.0, "paused": 2.0, "down": 0.0}
    accounts = {
        "trainer_s": {"wait": 37.5, "forward_backward": 12.5},
        "samplers_s": [sampler],
        "generated_for_s": {"trained": 24.0, "discarded": 6.0, "pending": 0.0},
    }
    (run_dir / "rl" / "time.json").write_text(json.dumps(accounts))
    write_report(run_dir)
    assert json.loads((run_dir / "report.json").read_text())["rl_time"] == accounts
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") == len(CHARTS) + 3
    words = re.findall(r"<!-- (.*?) -->", page)  # matplotlib names each text that it draws as glyphs
    bars = ["75%", "25%", "48%", "12%", "20%", "10%", "6%", "4%"]
    assert {*bars, "generating: trained", "generating: discarded", "idle: verifier", "paused"} <= set(words)
    assert not {"generating: pending", "down"} & set(words)  # nothing of that


def test_a_missing_source_is_named_with_the_command_that_makes_it(run_dir: Path) -> None:
    (run_dir / "eval" / "summary.json").unlink()
    with pytest.raises(
        DataError, match=r"eval/summary.json: not found; it is written by `python -m north_lightning test`"
    ):
        write_report(run_dir)


def test_stages_that_were_run_one_by_one_are_reported_without_their_times(run_dir: Path) -> None:
    (run_dir / "stages.json").unlink()
    write_report(run_dir)
    assert json.loads((run_dir / "report.json").read_text())["seconds"] == {}
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_a_running_mean_looks_back_only() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
