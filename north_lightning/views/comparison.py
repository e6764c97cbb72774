"""``python -m north_lightning compare``: its files, and the page: differences with their intervals, what they say, and
every metric of every side.

In: output folders of ``test`` and published counts. Out: ``compare.json`` and one self-contained HTML file. No number
is made here (``evaluation.compare``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError
from north_lightning.evaluation.compare import compare_sides, print_comparison, protocol_line, read_all, shown
from north_lightning.run_folders import write_result
from north_lightning.views.charts import forest


def compare_runs(sides: list[str], output_dir: Path = Path("runs/compare"), cluster_by: str = "repository") -> None:
    """Compare checkpoints, recipes of several training runs, and published counts. The others are compared with the
    first, task set by task set; among three or more, a winner is looked for.

    Args:
        sides: What to compare, as leading words. FOLDER is an output folder of `test`, with all its checkpoints;
            FOLDER:CHECKPOINT is one. NAME=RUN,RUN,... is a recipe of several training runs (seeds), each a FOLDER or
            FOLDER:CHECKPOINT; RUN+RUN is one training run whose task sets are in two folders. NAME=156/500 is a
            published count of solved tasks, NAME=0.25 a share that is taken as exact.
        output_dir: Where compare.json and compare.html are written.
        cluster_by: What tasks are grouped by because they are not independent: repository, family, or task (nothing).
    """
    read, task_sets, clusters = read_all([str(side) for side in sides], cluster_by)
    if len(read) < 2:
        raise ConfigError(f"sides: expected two or more, got {', '.join(side.name for side in read) or 'none'}")
    result = compare_sides(read, task_sets, clusters)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_result(output_dir / "compare.json", json.dumps(result, indent=2) + "\n")
    replace_text(output_dir / "compare.html", render_comparison(result))
    print_comparison(result)
    Console(highlight=False, soft_wrap=True).print(f"{output_dir / 'compare.html'}: all metrics, with intervals")


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
