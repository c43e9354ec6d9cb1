"""The report's figures: drawn for paper, and readable on a dark page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from attend_excite.benchmark.statistics import Estimate, Values

INK = "#1f2328"
"""Text and lines; becomes the page's colour where a figure stands in a page."""

OURS, OTHER, BETTER, WORSE = "#e07b39", "#8a9bb0", "#3f9c8f", "#c65a6b"

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "attend-excite",
    "text.color": INK,
    "text.parse_math": False,  # prompts may have dollars in them
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawn:
    """A figure as files.

    Attributes:
        png: for anywhere, on white.
        svg: the same.
        inline: SVG for a page: no background, and the page's colour as ink.
        width: in points.
    """

    png: bytes
    svg: str
    inline: str
    width: int


@dataclass(frozen=True)
class Bar:
    """One bar: who, how much, and what stands at its end."""

    label: str
    estimate: Estimate
    note: str
    ours: bool


@dataclass(frozen=True)
class Panel:
    """Bars under a title; `bound` is a line that none is expected to pass."""

    title: str
    bars: Sequence[Bar]
    bound: float = float("nan")


def bars(rows: Mapping[str, Sequence[Panel]]) -> Drawn:
    """Bars with intervals: rows of panels, each row with its title and its own scale, nought in it."""
    across, most = max(map(len, rows.values())), max(len(row[0].bars) for row in rows.values())
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.3 + 2.1 * across, len(rows) * (0.75 + 0.24 * most)), layout="constrained")
        grid = figure.subplots(len(rows), across, squeeze=False)
        for line, (title, panels) in zip(grid, rows.items(), strict=True):
            values = [
                value for panel in panels for bar in panel.bars for value in _known(bar.estimate, panel.bound)
            ]
            for axes, panel in zip(line, panels, strict=True):
                _bars(axes, panel, min(values, default=0.0), max(values, default=0.0))
            _write(line[0], title, (0, 1), (0, 17), "axes fraction", weight="bold", size=9.5)
            for axes in line[1:]:
                axes.set_yticklabels([])
        return _drawn(figure)


def pairs(
    subjects: Sequence[str],
    above: Mapping[tuple[str, str], float],
    below: Mapping[tuple[str, str], float],
    titles: tuple[str, str],
) -> Drawn:
    """How often a subject is missing, pair by pair: one system above the diagonal, another below.

    Args:
        subjects: in the order of rows and columns.
        above: two subjects, in that order -> 0 to 1.
        below: the same of the other system.
        titles: of the two.
    """
    count = len(subjects)
    cells = np.full((count, count), np.nan)
    for (first, second), rate in above.items():
        cells[subjects.index(first), subjects.index(second)] = rate
    for (first, second), rate in below.items():
        cells[subjects.index(second), subjects.index(first)] = rate
    with matplotlib.rc_context(_STYLE):
        side = max(3.5, 0.26 * count)
        figure = Figure(figsize=(side + 1.2, side + 0.4), layout="constrained")
        axes = figure.subplots()
        image = axes.pcolormesh(
            100 * cells[::-1], cmap="YlOrRd", vmin=0, vmax=100, edgecolors="white", linewidth=0.6
        )
        places = np.arange(count) + 0.5
        axes.set_xticks(places, subjects, rotation=90)
        axes.set_yticks(places, list(subjects)[::-1])
        axes.tick_params(length=0)
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        axes.plot([0, count], [count, 0], color=INK, linewidth=0.6)
        axes.set_title(f"above the diagonal: {titles[0]} · below: {titles[1]}")
        figure.colorbar(image, ax=axes, shrink=0.5, label="images lacking a subject, %").outline.set_visible(
            False
        )
        return _drawn(figure)


def separation(scores: Mapping[str, tuple[Values, NDArray[np.bool_]]], labels: tuple[str, str]) -> Drawn:
    """What a score is of images that are right and of those that are not.

    Args:
        scores: a title -> (images,) scores and (images,) whether they are right.
        labels: of those that are, and of those that are not.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.9 * len(scores), 2.4), layout="constrained")
        for axes, (title, (values, right)) in zip(
            figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True
        ):
            edges = np.histogram_bin_edges(values, bins=40)
            for chosen, colour, label in ((right, BETTER, labels[0]), (~right, WORSE, labels[1])):
                if chosen.any():
                    axes.hist(
                        values[chosen],
                        edges,
                        density=True,
                        color=colour,
                        alpha=0.55,
                        label=label,
                        histtype="stepfilled",
                    )
            axes.set_title(title)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return _drawn(figure)


def _bars(axes: Axes, panel: Panel, lowest: float, highest: float) -> None:
    least, most = min(lowest, 0.0), max(highest, 0.0)
    width = most - least or 1.0
    for place, bar in enumerate(panel.bars):
        value, low, high = bar.estimate.value, bar.estimate.low, bar.estimate.high
        if np.isnan(value):
            continue
        axes.barh(place, value, height=0.68, color=OURS if bar.ours else OTHER)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
        end = np.nanmax([0, value, high, panel.bound])
        _write(axes, bar.note, (end, place), (4, 0), "data", va="center", size=7.2)
    if not np.isnan(panel.bound):
        axes.axvline(panel.bound, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    # Room for what stands at the ends, which the axis is not to count through.
    axes.set_xlim(least, least + 2.3 * width)
    ticks = MaxNLocator(3).tick_values(least, least + width)
    axes.set_xticks([tick for tick in ticks if least <= tick <= least + 1.1 * width])
    axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"\n{panel.title}", loc="left")  # Above it stands the row's title.


def _write(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float], where: str, **style: Any
) -> None:
    """Text beside a place; the panels keep their width whatever it says."""
    note = axes.annotate(text, at, shift, xycoords=where, textcoords="offset points", **style)
    note.set_in_layout(False)


def _known(estimate: Estimate, bound: float) -> list[float]:
    return [value for value in (estimate.low, estimate.value, estimate.high, bound) if not np.isnan(value)]


def _drawn(figure: Figure) -> Drawn:
    svg = _saved(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    inline = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = svg.replace("<svg ", '<svg style="background: white" ', 1)
    png = _saved(figure, "png", facecolor="white", dpi=160)
    return Drawn(png, svg, inline, round(72 * figure.get_figwidth()))


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
