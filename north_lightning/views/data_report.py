"""``python -m north_lightning data report``: one page about an SFT mix, before anything is trained on it.

In: the data of a training config. Out: ``data.json`` with the numbers and ``data.html``: the mix against its target in
tokens and trainable tokens, harnesses, lengths, how full rows are, what was filtered and why. The numbers are of the
first pass as the training will see it, planned by the same code. No model is needed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console

from north_lightning.data.sft import SFTDataModule
from north_lightning.data.stream import Pass
from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError
from north_lightning.run_folders import write_result
from north_lightning.types import Count
from north_lightning.views.charts import bar_chart, histogram

LEAK_REASONS = ("leak", "duplicate")
"""Reasons with one of these words in them are shown as leaks and duplicates."""


def report_data(
    data: SFTDataModule,
    output_dir: Path = Path("runs/data"),
    rows_per_step: Count = 8,
    filter_account: Path | None = None,
) -> None:
    """Read, filter, tokenise and plan, then write ``data.json`` and ``data.html``.

    Args:
        data: As in the training config.
        output_dir: Where the two files are written.
        rows_per_step: Rows of an optimizer step: micro-batches x ranks.
        filter_account: The `filter.json` of `data filter`, to show what was dropped before: leaks and duplicates too.
    """
    before = _read_account(filter_account)
    data.check_run(None, None, data)
    data.setup("fit")
    planned = data.make_stream(rows_per_step).plan_pass()
    summary = summarise(data, planned, rows_per_step)
    summary |= before
    output_dir.mkdir(parents=True, exist_ok=True)
    write_result(output_dir / "data.json", json.dumps(summary, indent=2) + "\n")
    page = render_page(summary, _draw(data, planned, summary))
    replace_text(output_dir / "data.html", page)
    worst = max((abs(row["error_pp"]) for row in summary["sources"] if row["target"] is not None), default=None)
    Console(highlight=False, soft_wrap=True).print(
        f"{output_dir / 'data.html'}: {summary['num_rows']} rows a pass, {100 * planned.utilisation:.2f}% full"
        + ("" if worst is None else f"; the shares are within {worst:.3f} percentage points")
    )


def summarise(data: SFTDataModule, planned: Pass, rows_per_step: int) -> dict[str, Any]:
    """Everything the page shows, as JSON primitives. Shares are of trainable tokens unless they say otherwise."""
    lengths, trained = data.store.lengths, data.store.trained_tokens
    placed = Counter[str]()
    for source, tokens in zip(data.store.sources, (planned.times_placed * lengths).tolist(), strict=True):
        placed[source] += tokens
    num_tokens, num_trained = placed.total(), sum(planned.trained_tokens.values())
    supply = {name: report.num_trained_tokens for name, report in data.reports.items()}
    targets: Mapping[str, float | None] = data.shares or dict.fromkeys(data.sources)
    sources = []
    for name, report in data.reports.items():
        achieved, target = planned.trained_tokens[name] / num_trained, targets[name]
        sources.append(
            {
                "name": name,
                "group": data.sources[name].group,
                "num_read": report.num_read,
                "num_samples": report.num_samples,
                "num_tokens": report.num_tokens,
                "num_trained_tokens": report.num_trained_tokens,
                "before": supply[name] / sum(supply.values()),
                "target": target,
                "achieved": achieved,
                "error_pp": None if target is None else 100 * (achieved - target),
                "share_of_all_tokens": placed[name] / num_tokens,
                "epochs": planned.trained_tokens[name] / supply[name],
                "step_distance": planned.step_distances[name],
            }
        )
    return {
        "sources": sources,
        "groups": _add_up(sources, "group"),
        "harnesses": _shares_by(data.store.harnesses, planned.times_placed, trained),
        "num_rows": planned.num_rows,
        "rows_per_step": rows_per_step,
        "row_tokens": data.row_tokens,
        "num_tokens": num_tokens,
        "num_trained_tokens": num_trained,
        "utilisation": planned.utilisation,
        "documents_per_row": int(planned.times_placed.sum()) / planned.num_rows,
        "num_too_long": sum(report.dropped["too_long"] for report in data.reports.values()),
        "dropped": _dropped({name: report.dropped for name, report in data.reports.items()}),
        "examples": [
            {"source": name, "reason": reason, **example}
            for name, report in data.reports.items()
            for reason, examples in report.examples.items()
            for example in examples
        ],
    }


def _read_account(path: Path | None) -> dict[str, Any]:
    """What ``data filter`` dropped, in the shape of the summary; ``ConfigError`` for a file that it did not write."""
    try:
        account = {"sources": {}, "examples": {}} if path is None else json.loads(path.read_text(encoding="utf-8"))
        return {
            "filtered": _dropped({name: source["dropped"] for name, source in account["sources"].items()}),
            "filtered_examples": [
                {"reason": reason, **example}
                for reason, examples in account["examples"].items()
                for example in examples
            ],
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"filter_account: expected a file that `data filter` wrote, got '{path}'") from error


def render_page(summary: Mapping[str, Any], charts: Sequence[tuple[str, str]]) -> str:
    """The page, complete in itself."""
    environment = Environment(
        loader=PackageLoader("north_lightning.views"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    dropped = [*summary["filtered"], *summary["dropped"]]
    leaks = [row for row in dropped if any(word in row["reason"] for word in LEAK_REASONS)]
    return environment.get_template("data.html.jinja").render(summary=summary, charts=charts, leaks=leaks)


def _shares_by(labels: Sequence[str], times_placed: np.ndarray, trained: np.ndarray) -> list[dict[str, Any]]:
    before, after = Counter[str](), Counter[str]()
    for label, once, placed in zip(labels, trained.tolist(), (times_placed * trained).tolist(), strict=True):
        before[label or "none"] += once
        after[label or "none"] += placed
    return [
        {"name": name, "before": before[name] / before.total(), "achieved": after[name] / after.total()}
        for name in sorted(before, key=lambda name: -after[name])
    ]


def _add_up(sources: Sequence[Mapping[str, Any]], key: str) -> list[dict[str, Any]]:
    names = dict.fromkeys(source[key] for source in sources)
    if list(names) == [""]:
        return []
    groups = []
    for name in names:
        members = [source for source in sources if source[key] == name]
        group = {"name": name or "none"}
        for column in ("before", "target", "achieved"):
            values = [member[column] for member in members]
            group[column] = None if None in values else sum(values)
        groups.append(group)
    return groups


def _dropped(counts_by_source: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    reasons = sorted({reason for counts in counts_by_source.values() for reason in counts})
    counts = {reason: {name: of.get(reason, 0) for name, of in counts_by_source.items()} for reason in reasons}
    rows = [{"reason": reason, "by_source": row, "total": sum(row.values())} for reason, row in counts.items()]
    return sorted(rows, key=lambda row: (-row["total"], row["reason"]))


def _draw(data: SFTDataModule, planned: Pass, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = [row["name"] for row in summary["sources"]]
    bars = [("in the files", [row["before"] for row in summary["sources"]])]
    if data.shares is not None:
        bars.append(("target", [row["target"] for row in summary["sources"]]))
    bars.append(("in the rows", [row["achieved"] for row in summary["sources"]]))
    lengths, trained = data.store.lengths, data.store.trained_tokens
    groups = {name: source.group or name for name, source in data.sources.items()}
    group_of = np.array([groups[source] for source in data.store.sources])

    def by_group(values: np.ndarray, weights: np.ndarray) -> list[tuple[str, Sequence[float], Sequence[float]]]:
        members = {group: group_of == group for group in dict.fromkeys(groups.values())}
        return [(group, values[which].tolist(), weights[which].tolist()) for group, which in members.items()]

    placed = planned.times_placed
    return [
        ("mix of trainable tokens", bar_chart(names, bars, xlabel="share of trainable tokens")),
        (
            "lengths of the samples in a pass",
            histogram(by_group(lengths, placed), xlabel="tokens of a sample", ylabel="samples"),
        ),
        (
            "where the tokens are",
            histogram(by_group(lengths, placed * lengths), xlabel="tokens of a sample", ylabel="tokens"),
        ),
        (
            "where the trainable tokens are",
            histogram(by_group(lengths, placed * trained), xlabel="tokens of a sample", ylabel="trainable tokens"),
        ),
    ]
