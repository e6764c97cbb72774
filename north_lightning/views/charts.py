"""Curves as inline SVG, for pages that open without a server or a network.

In: series of (x, y). Out: SVG text. No data is read or chosen here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from north_lightning.errors import printable

matplotlib.rcParams["text.parse_math"] = False  # a name with two dollars is no formula
matplotlib.rcParams["svg.hashsalt"] = "north_lightning"  # the same picture, the same bytes

COLOURS = ("#0072b2", "#d55e00", "#44aa99", "#882255", "#56b4e9", "#332288")
"""Told apart by color-blind eyes too."""
GRAY = "#5b6770"
PREFERENCES = ("much better", "better", "about the same", "worse", "much worse")
PREFERENCE_COLOURS = ("#5e3c99", "#b2abd2", "#d9d9d9", "#fdb863", "#e66101")
"""ColorBrewer's PuOr."""
SHADES = (*COLOURS, "#b3567c", "#4a9c9c", "#8f6b4a", "#9aa5ad", "#6b7fc0", "#7d8c3a", "#c27f5c", "#444c55")
"""For more parts than a chart should have curves."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve; ``smooth`` > 1 draws a running mean over so many points above the raw ones. ``band`` is the lower and
    the upper end of an interval at every point."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: int = 1
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """A model's bars: for each label its value, and the ends of its interval."""

    name: str
    values: Mapping[str, tuple[float, float, float]]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last ``width`` values at every point (fewer at the start)."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - width) : end]
        means.append(sum(recent) / len(recent))
    return means


def line_figure(
    series: Sequence[Series],
    *,
    xlabel: str,
    ylabel: str,
    ylim: tuple[float | None, float | None] = (None, None),
    level: tuple[str, float] | None = None,
    size: tuple[float, float] = (5.4, 3.0),
) -> Figure:
    """The curves; ``level`` is a named horizontal line, such as a bound; ``size`` in inches."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for number, one in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        if one.smooth > 1:
            axes.plot(one.x, one.y, color=colour, alpha=0.25, linewidth=0.8)
        if one.band is not None:
            axes.fill_between(one.x, *one.band, color=colour, alpha=0.15, linewidth=0)
        marker = "" if one.band is None else "o"
        means = running_mean(one.y, one.smooth)
        axes.plot(one.x, means, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=one.label)
    if level is not None:
        axes.axhline(level[1], color="#999999", linestyle="--", linewidth=1.0, label=level[0])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(*ylim)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1 or level is not None:
        _legend_above(axes)
    return figure


def line_chart(series: Sequence[Series], **labels: Any) -> str:
    """SVG of ``line_figure``."""
    return inline_svg(line_figure(series, **labels))


def interval_bars(groups: Sequence[Bars], *, ylabel: str) -> Figure:
    """Upright bars of shares, a group of them a label (as wide as they all need), each with its value and interval."""
    labels = list(dict.fromkeys(label for group in groups for label in group.values))
    width = 0.84 / len(groups)
    figure = Figure(figsize=(1.6 + max(0.62 * len(groups), 1.2) * len(labels), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for number, group in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        places = [labels.index(label) + (number - (len(groups) - 1) / 2) * width for label in group.values]
        values = [value for value, _, _ in group.values.values()]
        below, above = ([abs(value - ends[side]) for value, *ends in group.values.values()] for side in (0, 1))
        axes.bar(places, values, 0.92 * width, color=colour, label=_shown(group.name))
        axes.errorbar(places, values, (below, above), fmt="none", ecolor="#333333", elinewidth=1.0, capsize=2.5)
        for place, (value, _, high) in zip(places, group.values.values(), strict=True):
            axes.text(place, high + 0.015, f"{100 * value:.1f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(labels)), [_shown(label) for label in labels], fontsize=9)
    axes.set_ylim(0, 1)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_above(axes)
    return figure


def bar_chart(labels: Sequence[str], groups: Sequence[tuple[str, Sequence[float]]], *, xlabel: str) -> str:
    """SVG of horizontal bars, one group of bars a label (the first 100); values between 0 and 1."""
    labels, groups = list(map(_shown, labels[:100])), [(name, values[:100]) for name, values in groups]
    figure = Figure(figsize=(5.4, 0.6 + 0.36 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups):
        positions = [row + number * height for row in range(len(labels))]
        axes.barh(positions, values, height=height, label=_shown(name), color=COLOURS[number % len(COLOURS)])
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_above(axes)
    return inline_svg(figure)


def share_bars(rows: Sequence[tuple[str, Mapping[str, float]]], *, xlabel: str) -> str:
    """SVG of one horizontal bar a row: its name, and shares of 1 laid end to end; a name has one colour in all rows."""
    names = list(dict.fromkeys(name for _, shares in rows for name, share in shares.items() if share > 0))
    figure = Figure(figsize=(10.8, 1.3 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    ends = [0.0] * len(rows)
    for number, name in enumerate(names):
        widths = [shares.get(name, 0.0) for _, shares in rows]
        colour = SHADES[number % len(SHADES)]
        bars = axes.barh(range(len(rows)), widths, left=ends, height=0.72, color=colour, label=_shown(name))
        texts = [f"{100 * width:.0f}%" if width >= 0.03 else "" for width in widths]
        axes.bar_label(bars, texts, label_type="center", fontsize=8, color="white")
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [_shown(label) for label, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=8)
    return inline_svg(figure)


def forest(rows: Sequence[tuple[str, float, tuple[float, float], bool]], *, xlabel: str) -> str:
    """SVG of one line a row around 0: its name, a difference, its interval, and whether it is told from 0."""
    figure = Figure(figsize=(7.6, 0.9 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for row, (_, value, (low, high), told) in enumerate(rows):
        colour = COLOURS[1] if told else GRAY
        axes.plot([low, high], [row, row], color=colour, linewidth=2.0, solid_capstyle="butt")
        axes.plot([value], [row], color=colour, marker="o", markersize=5)
    axes.axvline(0, color="#999999", linewidth=1.0)
    axes.set_yticks(range(len(rows)), [_shown(name) for name, *_ in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", alpha=0.2)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return inline_svg(figure)


def preference_bars(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """Shares of the five preferences as bars laid end to end; beside them the win rate with its 95% interval. A row is
    a name, and the counts of ``preferences``, ``win_rate`` and ``clustered_ci95`` of a pair of models."""
    figure = Figure(figsize=(10.0, 1.5 + 0.42 * len(rows)), layout="constrained")
    shares, rates = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for at, (_, one) in enumerate(rows):
        end, total = 0.0, sum(one["preferences"])
        for number, count in enumerate(one["preferences"]):
            width = count / total
            colour, label = PREFERENCE_COLOURS[number], PREFERENCES[number] if at == 0 else None
            shares.barh(at, width, left=end, height=0.7, color=colour, edgecolor="white", linewidth=0.8, label=label)
            if width >= 0.06:
                color = "white" if number in (0, 4) else "#222222"
                shares.text(
                    end + width / 2, at, f"{100 * width:.0f}%", ha="center", va="center", fontsize=8, color=color
                )
            end += width
        low, high = one["clustered_ci95"]
        rates.plot([low, high], [at, at], color="#444444", linewidth=2, solid_capstyle="butt")
        rates.plot([one["win_rate"]], [at], "o", color=PREFERENCE_COLOURS[0], markersize=6)
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
    return figure


def histogram(groups: Sequence[tuple[str, Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str) -> str:
    """SVG of stacked bars over a logarithmic axis, one colour a group: its name, its values, their weights."""
    figure = Figure(figsize=(5.4, 3.0), layout="constrained")
    axes = figure.add_subplot()
    values = [value for _, of_group, _ in groups for value in of_group]
    low, high = math.log10(max(min(values), 1)), math.log10(max(values))
    bounds = [10 ** (low + (high + 1e-9 - low) * step / 30) for step in range(31)]
    axes.hist(
        [list(of_group) for _, of_group, _ in groups],
        bins=bounds,
        weights=[list(weights) for _, _, weights in groups],
        stacked=True,
        label=[_shown(name) for name, _, _ in groups],
        color=[COLOURS[number % len(COLOURS)] for number in range(len(groups))],
    )
    axes.set_xscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    _legend_above(axes)
    return inline_svg(figure)


def _shown(name: str) -> str:
    """A name that a stranger may have chosen: short, and none that a legend leaves out for its first character."""
    return f"{' ' * name.startswith('_')}{printable(name.replace(chr(10), ' '))[:60]}"


def _legend_above(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def drawn(figure: Figure, form: str) -> bytes:
    """A file of format ``svg`` or ``png``, without the date and the program's version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=160, metadata={"Date" if form == "svg" else "Software": None})
    return buffer.getvalue()


def inline_svg(figure: Figure) -> str:
    """SVG as a page holds it, without the head of a file."""
    text = drawn(figure, "svg").decode()
    return text[text.index("<svg") :]
