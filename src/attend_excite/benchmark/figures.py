"""The figures of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from attend_excite.benchmark.statistics import Estimate, Values
from attend_excite.figures import BETTER, INK, OTHER, OURS, WORSE, styled

# Inches that a letter takes at the sizes used here; a little more than the font's mean.
_LETTER, _BOLD, _SMALL = 0.077, 0.09, 0.062
_NOTE_SIZE = 7.2


@dataclass(frozen=True)
class Bar:
    """One bar: who, how much, what stands beside it, and whether it stands out."""

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


@dataclass(frozen=True)
class Curve:
    """What a measure does as a number of the recipe goes through its values.

    Attributes:
        title: the measure's.
        points: a value and the mean there.
        origin: the value of the recipe that the others come from; None: it wasn't drawn.
        level: the measure without nursing; NaN: it wasn't drawn.
    """

    title: str
    points: Sequence[tuple[float, Estimate]]
    origin: float | None
    level: float


def bars(rows: Mapping[str, Sequence[Panel]]) -> Figure:
    """Bars with intervals: rows of panels, each row with its title and its own scale, nought in it."""
    panels = [panel for line in rows.values() for panel in line]
    across, most = max(map(len, rows.values())), max(len(panel.bars) for panel in panels)
    labels = max(len(bar.label) for panel in panels for bar in panel.bars)
    notes = max(len(bar.note) for panel in panels for bar in panel.bars)
    width = _LETTER * labels + across * (1.35 + _SMALL * notes)
    size = max(width, _BOLD * max(map(len, rows)) + 0.2), len(rows) * (0.8 + 0.24 * most)
    with styled():
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(rows), across, squeeze=False)
        for line, (title, of_row) in zip(grid, rows.items(), strict=True):
            values = [
                value for panel in of_row for bar in panel.bars for value in _known(bar.estimate, panel.bound)
            ]
            for axes, panel in zip(line, of_row, strict=True):
                _bars(axes, panel, min([0.0, *values]), max([0.0, *values]))
            for axes in line[1:]:
                axes.set_yticklabels([])
            # From the figure's edge on, where there is more room than above the first panel alone.
            head = line[0].annotate(
                title,
                (0.01, 1),
                (0, 17),
                xycoords=("figure fraction", "axes fraction"),
                textcoords="offset points",
                weight="bold",
                size=9.5,
                annotation_clip=False,
            )
            head.set_in_layout(False)
    return figure


def pairs(
    subjects: Sequence[str],
    above: Mapping[tuple[str, str], float],
    below: Mapping[tuple[str, str], float],
    titles: tuple[str, str],
) -> Figure:
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
    heads = (f"above the diagonal: {titles[0]}", f"below: {titles[1]}")
    side = max(3.5, 0.26 * count, _LETTER * max(map(len, heads)) - 1.6)
    with styled():
        figure = Figure(figsize=(side + 1.2, side + 0.6), layout="constrained")
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
        axes.set_title("\n".join(heads))
        bar = figure.colorbar(image, ax=axes, shrink=0.5, label="images lacking a subject, %")
        bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def separation(scores: Mapping[str, tuple[Values, NDArray[np.bool_]]], labels: tuple[str, str]) -> Figure:
    """What a score is of images that are right and of those that are not.

    Args:
        scores: a title -> (images,) scores and (images,) whether they are right.
        labels: of those that are, and of those that are not.
    """
    legend = _LETTER * sum(map(len, labels)) + 1.6
    with styled():
        figure = Figure(figsize=(max(2.9 * len(scores), legend), 2.4), layout="constrained")
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
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.spines["left"].set_visible(False)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def sweep(what: str, curves: Sequence[Curve]) -> Figure:
    """Measures over the values of one number of a recipe, with intervals."""
    across = min(3, len(curves))
    down = -(-len(curves) // across)
    longest = max(len(curve.title) for curve in curves)
    with styled():
        figure = Figure(
            figsize=(across * max(2.5, _LETTER * longest + 0.5), 0.3 + 2.1 * down), layout="constrained"
        )
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes in grid[len(curves) :]:
            axes.remove()
        for axes, curve in zip(grid, curves, strict=False):
            values = [value for value, _ in curve.points]
            means = [estimate.value for _, estimate in curve.points]
            axes.plot(values, means, color=OURS, linewidth=1.4)
            for value, found in curve.points:
                axes.plot([value, value], [found.low, found.high], color=INK, linewidth=1.1)
                filled = OURS if value == curve.origin else "white"
                axes.plot(value, found.value, "o", color=OURS, markerfacecolor=filled, markersize=5)
            if not np.isnan(curve.level):
                axes.axhline(curve.level, color=OTHER, linewidth=1.2, linestyle=(0, (4, 3)))
            if min(values) > 0 and max(values) > 20 * min(values):
                axes.set_xscale("log")
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_title(curve.title)
            axes.set_xlabel(what)
            axes.margins(y=0.15)
    return figure


def _bars(axes: Axes, panel: Panel, least: float, most: float) -> None:
    width = most - least or 1.0
    for place, bar in enumerate(panel.bars):
        value, low, high = bar.estimate.value, bar.estimate.low, bar.estimate.high
        if np.isnan(value):
            continue
        axes.barh(place, value, height=0.68, color=OURS if bar.ours else OTHER)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
    if not np.isnan(panel.bound):
        axes.axvline(panel.bound, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlim(least - (0.03 * width if least < 0 else 0), most + 0.03 * width)
    axes.xaxis.set_major_locator(MaxNLocator(2))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(f"\n{panel.title}")  # Above it stands the row's title.
    # What each bar comes to, at the other side, where the layout makes room for it.
    beside = axes.twinx()
    for side, texts in (
        (axes, [bar.label for bar in panel.bars]),
        (beside, [bar.note for bar in panel.bars]),
    ):
        side.set_ylim(len(panel.bars) - 0.4, -0.6)
        side.set_yticks(range(len(panel.bars)), texts)
        side.tick_params(axis="y", length=0)
    beside.tick_params(axis="y", labelsize=_NOTE_SIZE)
    beside.spines[:].set_visible(False)


def _known(estimate: Estimate, bound: float) -> list[float]:
    values: list[Any] = [estimate.low, estimate.value, estimate.high, bound]
    return [value for value in values if not np.isnan(value)]
