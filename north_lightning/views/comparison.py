"""The page about a comparison: differences with their intervals, what they say, and every metric of every side.

In: what ``compare.json`` holds. Out: one self-contained HTML file. No number is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from north_lightning.evaluation.compare import protocol_line, shown
from north_lightning.views.charts import forest


def render_comparison(result: Mapping[str, Any]) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("north_lightning.views"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    rows = []
    for row in result["comparisons"]:
        if "metrics" in row:
            one = row["metrics"]["pass@1"]
            name = f"{row['second']} - {row['first']}, {row['tasks']}"
            low, high = (100 * bound for bound in one["ci95"])
            rows.append((name, 100 * one["difference"], (low, high), one["p_value_holm"] <= 0.05))
    return environment.get_template("compare.html.jinja").render(
        result=result,
        forest=forest(rows, xlabel="difference in pass@1, points (95% interval)") if rows else "",
        shown=shown,
        protocol_line=protocol_line,
    )
