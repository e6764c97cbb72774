"""The page about a recipe run: numbers and curves in one self-contained HTML file.

In: the report, the evaluation's summary and the histories of the training stages. Out: HTML. It reads no file but its
template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from north_lightning.history import History
from north_lightning.views.charts import Series, bar_chart, line_chart, share_bars

HELDOUT = "rl_heldout"
"""The history of the points that ``OnlineEvaluation`` has measured; their step is that of the measured weights."""


@dataclass(frozen=True, slots=True)
class Chart:
    """``curves``: (label, stage, logged name); ``level``: a logged name of the RL stage drawn as a horizontal line;
    ``has_band``: ``NAME/low`` and ``NAME/high`` are logged too, and drawn as a band."""

    title: str
    ylabel: str
    curves: tuple[tuple[str, str, str], ...]
    ylim: tuple[float | None, float | None] = (None, None)
    smooth: int = 10
    level: str | None = None
    has_band: bool = False


CHARTS = (
    Chart(
        "held-out pass@1 during RL, with 95% intervals",
        "pass@1",
        (("all tasks", HELDOUT, "eval/pass@1"),),
        (0, 1),
        smooth=1,
        has_band=True,
    ),
    Chart(
        "held-out pass@1 by environment, with 95% intervals",
        "pass@1",
        (("terminal", HELDOUT, "eval/terminal/pass@1"), ("software", HELDOUT, "eval/swe/pass@1")),
        (0, 1),
        smooth=1,
        has_band=True,
    ),
    Chart(
        "SFT loss",
        "nats per token",
        (("stage 1", "sft_stage1", "train/loss"), ("stage 2", "sft_stage2", "train/loss")),
        smooth=20,
    ),
    Chart("RL reward", "reward", (("mean", "rl", "rollout/reward"),), (0, 1)),
    Chart(
        "pass@1 in training, by environment",
        "pass@1",
        (("terminal", "rl", "rollout/terminal/pass@1"), ("software", "rl", "rollout/swe/pass@1")),
        (0, 1),
    ),
    Chart(
        "groups that all or none of the attempts solved",
        "share of groups",
        (("all", "rl", "rollout/solve_all"), ("none", "rl", "rollout/solve_none")),
        (0, 1),
    ),
    Chart("mismatch KL, sampler against trainer", "nats per token", (("mean", "rl", "train/mismatch_kl"),), smooth=1),
    Chart(
        "staleness of the trained tokens",
        "optimizer steps",
        (("mean", "rl", "policy_lag/mean"), ("max", "rl", "policy_lag/max")),
        (0, None),
        smooth=1,
        level="policy_lag/bound",
    ),
    Chart(
        "rollout queue",
        "groups",
        (("slots charged", "rl", "queue/depth"), ("in flight", "rl", "queue/in_flight")),
        (0, None),
        smooth=1,
    ),
    Chart("entropy", "nats per token", (("mean", "rl", "train/entropy"),), (0, None)),
    Chart(
        "clipped tokens",
        "share of tokens",
        (
            ("advantage > 0", "rl", "train/clip_fraction_positive"),
            ("advantage < 0", "rl", "train/clip_fraction_negative"),
        ),
    ),
    Chart("invalid calls", "share of turns", (("all", "rl", "rollout/invalid_call_rate"),), (0, None)),
    Chart("length of a rollout", "turns", (("mean", "rl", "rollout/turns"), ("p90", "rl", "rollout/turns/p90"))),
    Chart(
        "time of a rollout",
        "seconds",
        (
            ("mean", "rl", "rollout/duration_s"),
            ("p90", "rl", "rollout/duration_s/p90"),
            ("p99", "rl", "rollout/duration_s/p99"),
        ),
        (0, None),
    ),
    Chart(
        "use of the sampler's KV cache",
        "share of its blocks",
        (("mean", "rl", "sampler/kv_use/mean"), ("max", "rl", "sampler/kv_use/max")),
        (0, None),
        smooth=1,
    ),
    Chart(
        "where a step's time goes",
        "seconds",
        (("whole step", "rl", "speed/step_s"), ("waiting for rollouts", "rl", "speed/wait_s")),
        (0, None),
    ),
)


def render_page(
    report: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    histories: Mapping[str, History],
    rows: Sequence[tuple[str, list[str]]],
    caption: str,
    figures: Sequence[str],
) -> str:
    """The whole page; charts of numbers that were not logged are left out.

    Args:
        rows: the table on held-out tasks, with ``caption`` below it and ``figures`` (SVG) of the same.
    """
    environment = Environment(
        loader=PackageLoader("north_lightning.views"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    charts = [(chart.title, _draw(chart, histories)) for chart in CHARTS]
    return environment.get_template("report.html.jinja").render(
        report=report,
        rows=rows,
        caption=caption,
        figures=figures,
        gain=report["paired_gain"],
        charts=[(title, svg) for title, svg in charts if svg],
        breakdown=_draw_families(evaluation["checkpoints"]),
        accounts=_draw_accounts(report["rl_time"]),
    )


def column(history: History, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one logged name, where it was logged."""
    rows = [(row["step"], row[name]) for row in history if row.get(name) is not None]
    return [step for step, _ in rows], [value for _, value in rows]


def _draw(chart: Chart, histories: Mapping[str, History]) -> str | None:
    series = []
    for label, stage, name in chart.curves:
        history = histories.get(stage, [])
        steps, values = column(history, name)
        low, high = (column(history, f"{name}/{end}")[1] for end in ("low", "high"))
        if values:
            series.append(Series(label, steps, values, chart.smooth, (low, high) if chart.has_band else None))
    if not series:
        return None
    bounds = column(histories["rl"], chart.level)[1] if chart.level else []
    level = ("bound", bounds[-1]) if bounds else None
    return line_chart(series, xlabel="optimizer step", ylabel=chart.ylabel, ylim=chart.ylim, level=level)


def _draw_accounts(time: Mapping[str, Any] | None) -> str | None:
    """Trainer and samplers, each a bar of 100%; generating is divided by what became of it."""
    if time is None:
        return None
    rows = [("trainer", time["trainer_s"])]
    generated_for, samplers = time.get("generated_for_s", {}), time.get("samplers_s", [])
    generated_s = sum(generated_for.values())
    for index, seconds in enumerate(samplers):
        generating = {
            f"generating: {purpose}": seconds["generating"] * for_it / generated_s
            for purpose, for_it in generated_for.items()
            if generated_s
        }
        idle = {f"idle: {name}": seconds[name] for name in seconds if name not in ("generating", "paused", "down")}
        label = "sampler" if len(samplers) == 1 else f"sampler {index}"
        rows.append((label, {**generating, **idle, "paused": seconds["paused"], "down": seconds["down"]}))
    return share_bars(
        [(label, {name: one / sum(seconds.values()) for name, one in seconds.items()}) for label, seconds in rows],
        xlabel="share of the RL run",
    )


def _draw_families(checkpoints: Mapping[str, Any]) -> str:
    families = sorted({family for one in checkpoints.values() for family in one["by_family"]})
    groups = [(name, [one["by_family"].get(family, 0.0) for family in families]) for name, one in checkpoints.items()]
    return bar_chart(families, groups, xlabel="pass@1 on held-out tasks")
