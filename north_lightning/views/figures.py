"""``python -m north_lightning figures``: the pictures of an announcement, from the files of a run.

In: evaluations, the points and the history of an RL run, the report of a human evaluation. Out: ``benchmarks``
(solved tasks of every model on every task set), ``training`` (held-out pass@1 and reward during RL) and ``preferences``
(what people prefer), each as SVG and PNG, and the same bytes each time. A picture whose source is missing is left out,
and the command that makes the source is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from north_lightning.durable import replace_bytes
from north_lightning.errors import DataError, printable
from north_lightning.evaluation.compare import describe_sides, read_all
from north_lightning.history import HISTORY, History, read_history
from north_lightning.views.charts import Bars, Series, drawn, interval_bars, line_figure, preference_bars
from north_lightning.views.page import column

FORMATS = ("svg", "png")


def write_figures(
    run_dir: Path, evaluations: list[str] | None = None, study: Path | None = None, output_dir: Path | None = None
) -> None:
    """Draw the figures of a run: models on benchmarks, learning during RL, and what people prefer.

    Args:
        run_dir: The folder of a finished recipe run.
        evaluations: Output folders of `test`, FOLDER or FOLDER:CHECKPOINT, whose checkpoints are drawn beside each
            other. Default: RUN_DIR/eval.
        study: The folder of a human evaluation. Default: RUN_DIR/study, if there is one.
        output_dir: Where to. Default: RUN_DIR/figures.
    """
    if not run_dir.is_dir():
        raise DataError(f"run_dir: expected the folder of a finished recipe run, '{run_dir}' does not exist")
    folder = output_dir or run_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, soft_wrap=True)
    for name, figure in draw_figures(run_dir, evaluations, study):
        if isinstance(figure, str):
            console.print(f"{name}: left out: {figure}", markup=False)
            continue
        for form in FORMATS:
            replace_bytes(folder / f"{name}.{form}", drawn(figure, form))
        console.print(f"{folder / name}.svg and .png", markup=False)


def draw_figures(
    run_dir: Path, evaluations: list[str] | None = None, study: Path | None = None
) -> Iterator[tuple[str, Figure | str]]:
    """Every figure with its name, or why it is left out."""
    summary = run_dir / "eval" / "summary.json"
    if evaluations or summary.is_file():
        sides = describe_sides(*read_all(evaluations or [run_dir / "eval"]), notes=[])
        yield "benchmarks", interval_bars(_bars(sides), ylabel="pass@1")
    else:
        yield "benchmarks", f"{summary} not found; `python -m north_lightning test` writes it"
    history, points = run_dir / "rl" / HISTORY, run_dir / "rl" / "eval" / "points.jsonl"
    if history.is_file():
        curves = list(_curves(read_history(history), read_history(points) if points.is_file() else []))
        step = "optimizer step of RL"
        yield "training", line_figure(curves, xlabel=step, ylabel="pass@1", ylim=(0, 1), size=(7.6, 4.2))
    else:
        yield "training", f"{history} not found; `python -m north_lightning fit` writes it (JSONLHistory)"
    report = (study or run_dir / "study") / "report" / "report.json"
    rows = preference_rows(json.loads(report.read_text())) if report.is_file() else []
    if rows:
        yield "preferences", preference_bars(rows)
    else:
        yield "preferences", f"{report} names no models; `human-eval report --unseal true` does"


def _bars(sides: Mapping[str, Any]) -> list[Bars]:
    task_sets = list(dict.fromkeys(name for side in sides.values() for name in side["sets"]))
    return [
        Bars(name, {tasks: _rate(side["sets"][tasks]) for tasks in task_sets if tasks in side["sets"]})
        for name, side in sides.items()
    ]


def _rate(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["pass@1"]["value"], *row["pass@1"]["ci95"]


def _curves(history: History, points: History) -> Iterator[Series]:
    """Held-out pass@1 with its interval, also by environment, and that of the attempts that are trained on."""
    names = {name.split("/")[1] for row in points for name in row if name.endswith("/pass@1") and name.count("/") == 2}
    for name in ("", *sorted(names)):
        key = f"eval/{name}/pass@1" if name else "eval/pass@1"
        steps, values = column(points, key)
        if values:
            low, high = (column(points, f"{key}/{end}")[1] for end in ("low", "high"))
            yield Series(f"held-out{f', {name}' if name else ''}", steps, values, 1, (low, high))
    steps, values = column(history, "rollout/pass@1")
    if values:
        yield Series("training", steps, values, 10)


def preference_rows(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The chart's lines: every pair of models, as a whole and by functionality."""
    rows = []
    for pair in results["pairs"] or []:
        first, second = (printable(model)[:40] for model in pair["models"])
        if pair["overall"]:
            rows.append((f"{first} against {second}", pair["overall"]))
            rows += [(f"{kind.replace('_', ' ')}", one) for kind, one in pair["by_functionality"].items() if one]
    return rows
