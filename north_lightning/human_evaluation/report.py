"""``python -m north_lightning human-eval report``: opens the seal, and says what the ratings say.

In: a study folder and its ratings. Out: in its ``report/`` the numbers (``report.json``), a page (``report.html``) and
the chart of preferences (``preferences.png``, ``preferences.svg``), the same bytes each time. Before the seal is opened
no model is named: progress, attention, agreement and biases only.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from north_lightning.durable import replace_text, unfinished_name
from north_lightning.errors import printable
from north_lightning.human_evaluation.app import make_templates
from north_lightning.human_evaluation.results import study_results
from north_lightning.human_evaluation.store import Store
from north_lightning.human_evaluation.study import RATINGS, Study
from north_lightning.run_folders import write_result

COLORS = ("#5e3c99", "#b2abd2", "#d9d9d9", "#fdb863", "#e66101")  # ColorBrewer's PuOr: told apart by color-blind eyes
SHARES = ("much better", "better", "about the same", "worse", "much worse")


def write_study_report(study: Path, unseal: bool = False) -> None:
    """Write the report of a study.

    Args:
        study: The study folder.
        unseal: Open the seal: the report names the models, and nothing can be rated any more. Without it, the report of
            a study that is still sealed says how far the raters are and how well they agree.
    """
    opened, store = Study(study), Store(study / RATINGS)
    judgments, is_open = store.judgments(), store.is_unsealed
    seal = opened.unseal() if unseal or is_open else None
    if unseal and not is_open:
        store.unseal()
        judgments = store.judgments()
    results = study_results(opened, judgments, seal)
    folder = study / "report"
    folder.mkdir(exist_ok=True)
    write_result(folder / "report.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    rows = chart_rows(results)
    svg = draw_preferences(rows, "svg").decode() if rows else ""
    page = make_templates().get_template("report.html.jinja").render(results=results, chart=svg[svg.find("<svg") :])
    replace_text(folder / "report.html", page + "\n")
    if rows:
        replace_text(folder / "preferences.svg", svg)
        unfinished = unfinished_name(folder / "preferences.png")
        unfinished.write_bytes(draw_preferences(rows, "png"))
        unfinished.replace(folder / "preferences.png")
    _print(results, folder)


def chart_rows(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The chart's lines: every pair of models, as a whole and by functionality."""
    rows = []
    for pair in results["pairs"] or []:
        first, second = (printable(model)[:40] for model in pair["models"])
        if pair["overall"]:
            rows.append((f"{first} against {second}", pair["overall"]))
            rows += [(f"{kind.replace('_', ' ')}", one) for kind, one in pair["by_functionality"].items() if one]
    return rows


def draw_preferences(rows: list[tuple[str, Mapping[str, Any]]], form: str) -> bytes:
    """Shares of the five preferences as bars laid end to end; beside them the win rate with its 95% interval."""
    with matplotlib.rc_context({"svg.hashsalt": "preferences", "text.parse_math": False}):
        figure = Figure(figsize=(10.0, 1.5 + 0.42 * len(rows)), layout="constrained")
        shares, rates = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        for at, (_, one) in enumerate(rows):
            end, total = 0.0, sum(one["preferences"])
            for number, count in enumerate(one["preferences"]):
                width = count / total
                shares.barh(at, width, left=end, height=0.7, color=COLORS[number], edgecolor="white", linewidth=0.8,
                            label=SHARES[number] if at == 0 else None)  # fmt: skip
                if width >= 0.06:
                    color = "white" if number in (0, 4) else "#222222"
                    shares.text(
                        end + width / 2, at, f"{100 * width:.0f}%", ha="center", va="center", fontsize=8, color=color
                    )
                end += width
            low, high = one["clustered_ci95"]
            rates.plot([low, high], [at, at], color="#444444", linewidth=2, solid_capstyle="butt")
            rates.plot([one["win_rate"]], [at], "o", color=COLORS[0], markersize=6)
            label = f"{100 * one['win_rate']:.1f}%  [{100 * low:.0f}, {100 * high:.0f}]"
            rates.annotate(label, (1.03, at), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        shares.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
        for label, (name, _) in zip(shares.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if " against " in name else "normal")
        shares.set_ylim(len(rows) - 0.5, -0.5)
        shares.set_xlim(0, 1)
        shares.set_xlabel("share of judgments: the first model is ...")
        shares.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)
        rates.axvline(0.5, color="#999999", linewidth=1, linestyle="--")
        rates.set_xlim(0, 1)
        rates.set_xlabel("win rate (a tie is half a win), 95% interval by item")
        rates.tick_params(left=False)
        for axes in (shares, rates):
            axes.spines[["top", "right", "left"]].set_visible(False)
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(buffer, format=form, dpi=160, metadata=metadata)
    return buffer.getvalue()


def _print(results: Mapping[str, Any], folder: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    done, total = (sum(one[at] for one in results["progress"].values()) for at in (0, 1))
    console.print(f"{done} of {total} judgments")
    for pair in results["pairs"] or []:
        first, second = pair["models"]
        if one := pair["overall"]:
            low, high = (100 * end for end in one["clustered_ci95"])
            console.print(
                f"{first} wins {100 * one['win_rate']:.1f}% against {second}, 95% interval {low:.1f} to {high:.1f} "
                f"({one['num_items']} items; a tie is half a win)",
                markup=False,
            )
    if not results["is_unsealed"]:
        console.print("the seal is closed: --unseal true ends the rating and names the models")
    console.print(f"{folder / 'report.html'}: all numbers", markup=False)
