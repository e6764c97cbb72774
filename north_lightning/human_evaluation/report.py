"""``python -m north_lightning human-eval report``: opens the seal, and says what the ratings say.

In: a study folder and its ratings. Out: in its ``report/`` the numbers (``report.json``), a page (``report.html``) and
the chart of preferences (``preferences.png``, ``preferences.svg``), the same bytes each time. Before the seal is opened
no model is named: progress, attention, agreement and biases only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from north_lightning.durable import replace_bytes, replace_text
from north_lightning.human_evaluation.app import make_templates
from north_lightning.human_evaluation.results import study_results
from north_lightning.human_evaluation.store import Store
from north_lightning.human_evaluation.study import RATINGS, Study
from north_lightning.run_folders import write_result
from north_lightning.views.charts import drawn, preference_bars
from north_lightning.views.figures import preference_rows


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
    rows = preference_rows(results)
    chart = {form: drawn(preference_bars(rows), form) for form in ("svg", "png")} if rows else {}
    svg = chart["svg"].decode() if rows else ""
    page = make_templates().get_template("report.html.jinja").render(results=results, chart=svg[svg.find("<svg") :])
    replace_text(folder / "report.html", page + "\n")
    for form, picture in chart.items():
        replace_bytes(folder / f"preferences.{form}", picture)
    _print(results, folder)


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
