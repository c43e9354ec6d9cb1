"""What was measured, as a table and as a chart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from attend_excite.bench.measure import ratios, reached

_COLUMNS = ("ours", "diffusers", "plain")
_MEMORY = "guidance step, MiB above the weights"


def show(report: Mapping[str, Any], console: Console) -> None:
    """The figures as a table: median (smallest to largest)."""
    table = Table(
        title=f"{report['size']}, {report['threads']} threads: seconds, median (smallest to largest)"
    )
    table.add_column("")
    for column in (*_COLUMNS, "diffusers / ours", "ours / plain"):
        table.add_column(column, justify="right")
    for name, seconds in report["seconds"].items():
        cells = [_spread(seconds.get(whose, [])) for whose in _COLUMNS]
        against_plain = ratios(seconds["ours"], seconds["plain"]) if "plain" in seconds else []
        theirs = ratios(seconds["diffusers"], seconds["ours"])
        table.add_row(name, *cells, _spread(theirs), _spread(against_plain))
    if memory := report.get(_MEMORY):
        ratio = f"{memory['diffusers'] / memory['ours']:.2f}"
        table.add_row(_MEMORY, *(f"{memory[whose]:.0f}" for whose in _COLUMNS[:2]), "", ratio, "")
    console.print(table)
    for name, share in reached(report).items():
        console.print(
            f"{name}: {report['GFLOP'][name]:.0f} GFLOP, at {share:.0%} of the machine's rate on large "
            f"matrices, {report['matrix rate, GFLOP/s']:.0f} GFLOP/s"
        )
    apart = ", ".join(f"{name} {distance:.0e}" for name, distance in report["relative distance"].items())
    console.print(f"relative distance of the two: {apart}")


def save_chart(report: Mapping[str, Any], path: Path) -> None:
    """diffusers' time and memory in multiples of ours, as bars with their spread; the name says the format.

    Raises:
        ValueError: matplotlib doesn't know the format.
    """
    from matplotlib.figure import Figure

    bars = {name: ratios(s["diffusers"], s["ours"]) for name, s in report["seconds"].items()}
    if memory := report.get(_MEMORY):
        bars["memory of a guidance step"] = [memory["diffusers"] / memory["ours"]]
    middles = [statistics.median(values) for values in bars.values()]
    below = [middle - min(values) for middle, values in zip(middles, bars.values(), strict=True)]
    above = [max(values) - middle for middle, values in zip(middles, bars.values(), strict=True)]
    figure = Figure(figsize=(8, 0.9 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(bars), middles, xerr=[below, above], color="#4477aa", capsize=3)
    axes.bar_label(drawn, [f"{middle:.2f}" for middle in middles], padding=6)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"diffusers' class in multiples of attend-excite ({report['size']})")
    figure.savefig(path)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
