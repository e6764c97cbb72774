"""``python -m north_lightning report``: one JSON file and one page about a whole recipe run.

In: the folder of a run: ``stages.json`` (if the recipe ran), each training stage's ``history.jsonl``, the points that
were measured during RL, the evaluation's ``summary.json``. Out: in that folder ``report.json`` with the numbers that
decide and ``report.html`` with the curves (``page``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from north_lightning.durable import replace_text
from north_lightning.errors import DataError
from north_lightning.evaluation.compare import ALL, describe_sides, protocol_line, read_all, shown
from north_lightning.history import HISTORY, History, read_history
from north_lightning.run_folders import write_result
from north_lightning.views.charts import inline_svg
from north_lightning.views.figures import draw_figures
from north_lightning.views.page import HELDOUT, column, render_page

SFT_STAGES = ("sft_stage1", "sft_stage2")
RL_STAGE = "rl"
WORDS = {
    "pass@1": "pass@1",
    "pass@{k}": "pass@{k}",
    "invalid_call_rate": "invalid calls, per turn",
    "false_success_rate": "said to be done, but was not",
    "conclusion_rate": "ended by itself, with a conclusion",
    "mean_turns": "turns per attempt",
    "mean_generated_tokens": "generated tokens per attempt",
    "infrastructure_share": "failed outside the model",
}
"""What is shown of every checkpoint, and how it is called."""


def write_report(run_dir: Path) -> None:
    """Write ``report.json`` and ``report.html``, and print the final table.

    Args:
        run_dir: The folder of a finished recipe run.

    Raises:
        DataError: something the report is made of is missing; says what and which command makes it.
    """
    if not run_dir.is_dir():
        raise DataError(f"run_dir: expected the folder of a finished recipe run, '{run_dir}' does not exist")
    timed = run_dir / "stages.json"  # written by the recipe; stages run one by one are not timed
    recorded = json.loads(timed.read_text()) if timed.exists() else {}
    stages = {name: stage for name, stage in recorded.items() if "seconds" in stage}  # finished
    evaluation = _read_json(run_dir / "eval" / "summary.json", "test")
    histories = {stage: _read_history(run_dir / stage / HISTORY) for stage in (*SFT_STAGES, RL_STAGE)}
    points = run_dir / RL_STAGE / "eval" / "points.jsonl"  # where OnlineEvaluation is among the callbacks
    histories[HELDOUT] = read_history(points) if points.exists() else []
    accounted = run_dir / RL_STAGE / "time.json"  # where TimeAccounts is among the callbacks
    sides = describe_sides(*read_all([run_dir / "eval"]), notes=[])
    in_order = [name for name in (*SFT_STAGES, RL_STAGE) if name in sides]
    in_order += [name for name in sides if name not in in_order]
    report = build_report(stages, evaluation, histories) | {
        "heldout": {name: {"protocol": protocol_line(sides[name]), **sides[name]["sets"][ALL]} for name in in_order},
        "rl_time": json.loads(accounted.read_text()) if accounted.exists() else None,
    }
    write_result(run_dir / "report.json", json.dumps(report, indent=2) + "\n")
    rows = list(heldout_rows(report["heldout"]))
    drawings = {name: figure for name, figure in draw_figures(run_dir) if not isinstance(figure, str)}
    figures = [inline_svg(drawings[name]) for name in ("benchmarks", "preferences") if name in drawings]
    replace_text(
        run_dir / "report.html",
        render_page(report, evaluation, histories, rows, heldout_caption(report["heldout"]), figures),
    )
    _print(report)
    Console(highlight=False, soft_wrap=True).print(f"{run_dir / 'report.html'}: curves and details")


def build_report(
    stages: Mapping[str, Any], evaluation: Mapping[str, Any], histories: Mapping[str, History]
) -> dict[str, Any]:
    """The numbers that decide, as one JSON-able dictionary."""
    report: dict[str, Any] = {
        name: {key: value for key, value in checkpoint.items() if key != "protocol"}
        | {"loss": _last(histories[name], "train/loss")}
        for name, checkpoint in evaluation["checkpoints"].items()
        if name in histories
    }
    report["paired_gain"] = evaluation["paired"].get(f"{RL_STAGE} - {SFT_STAGES[-1]}")
    rl = histories[RL_STAGE]
    kl = column(rl, "train/mismatch_kl")[1]
    return report | {
        "policy_lag": {"max": _max(rl, "policy_lag/max"), "bound": _last(rl, "policy_lag/bound")},
        "mismatch_kl": {"mean": sum(kl) / len(kl) if kl else None, "max": max(kl, default=None)},
        "weight_pushes": {
            "count": _last(rl, "weights/version"),
            "mean_s": _mean(column(rl, "weights/push_s")[1]),
            "max_s": _max(rl, "weights/push_s"),
        },
        "rl_steps": len(rl),
        "rl_heldout": histories.get(HELDOUT, []),
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "total_seconds": sum(stage["seconds"] for stage in stages.values()),
        "peak_memory_gib": max((stage["peak_memory_bytes"] for stage in stages.values()), default=0) / 2**30,
    }


# ---- reading -------------------------------------------------------------------------------------------------------


def _read_json(path: Path, command: str) -> Any:
    if not path.exists():
        raise DataError(f"{path}: not found; it is written by `python -m north_lightning {command}`")
    return json.loads(path.read_text())


def _read_history(path: Path) -> History:
    if not path.exists():
        raise DataError(f"{path}: not found; it is written by `python -m north_lightning fit` (JSONLHistory logger)")
    return read_history(path)


def _last(history: History, key: str) -> float | None:
    values = column(history, key)[1]
    return values[-1] if values else None


def _max(history: History, key: str) -> float | None:
    return max(column(history, key)[1], default=None)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def heldout_rows(heldout: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """What is shown of the checkpoints on held-out tasks: the words of a row, and a cell of each checkpoint."""
    for metric, words in WORDS.items():
        cells = []
        for side in heldout.values():
            value = side[metric.format(k=side["attempts_per_task"])]
            cells.append(f"{value:.1%}" if isinstance(value, float) else shown(value))
        yield words.format(k=next(iter(heldout.values()))["attempts_per_task"]), cells


def heldout_caption(heldout: Mapping[str, Mapping[str, Any]]) -> str:
    """What the numbers on held-out tasks are of: sizes and protocols."""
    sizes = {
        f"{side['num_tasks']} tasks x {side['attempts_per_task']} attempts of {side['protocol']}"
        for side in heldout.values()
    }
    return "; ".join(sorted(sizes)) + "; 95% intervals"


def markdown_table(heldout: Mapping[str, Mapping[str, Any]]) -> str:
    """The table on held-out tasks, padded so that it reads well as plain text too."""
    lines = [("", list(heldout)), *heldout_rows(heldout)]
    widths = [max(len([words, *cells][column]) for words, cells in lines) for column in range(len(heldout) + 1)]
    lines.insert(1, ("-" * widths[0], ["-" * (width - 1) + ":" for width in widths[1:]]))
    padded = [
        [words.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        for words, cells in lines
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _print(report: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(markdown_table(report["heldout"]))
    console.print(heldout_caption(report["heldout"]))
    gain = report["paired_gain"]
    if gain is not None:
        low, high = gain["ci95"]
        points = f"{100 * gain['pass@1']:+.1f} points, 95% interval [{100 * low:+.1f}, {100 * high:+.1f}]"
        console.print(f"RL over SFT: pass@1 {points}")
