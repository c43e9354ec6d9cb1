"""A study's figures as files: tables for people and programs, and plots."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

try:
    import pyarrow as pa
    from pyarrow import parquet
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"the study needs {error.name}: pip install 'attend-excite[study]'") from error

from attend_excite.study.analysis import ALL, Result
from attend_excite.study.create import NONE

RESULT_FILE = "study_result.json"
NONE_LABEL = "none is better"
_INK = "#1c1917"


def banner(result: Result) -> str | None:
    """What every table and plot of a simulated panel says; None: people voted."""
    return "SIMULATED: a program voted, not people" if result.simulated else None


def label(system: str) -> str:
    """A system as people read it."""
    return NONE_LABEL if system == NONE else system


def percent(value: float | None) -> str:
    """61.2, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def between(low: float | None, high: float | None) -> str:
    """57.0 to 65.1, or a dash."""
    return "–" if low is None else f"{percent(low)} to {percent(high)}"


TABLE_COLUMNS = ("subset", "system", "votes", "%", "Wilson", "bootstrap", "strength", "bootstrap")


def table_rows(result: Result) -> Iterator[tuple[str, ...]]:
    """The cells of `TABLE_COLUMNS`, a row a subset and system."""
    for subset, systems in result.subsets.items():
        for system, standing in systems.items():
            yield (
                subset,
                label(system),
                f"{standing.votes} of {standing.shown}",
                percent(standing.share),
                between(standing.low, standing.high),
                between(standing.bootstrap_low, standing.bootstrap_high),
                percent(standing.strength),
                between(standing.strength_low, standing.strength_high),
            )


def remarks(result: Result) -> list[str]:
    """What stands below the table: who was counted, winners and agreement."""
    agreement, prompts = result.agreement, result.prompts
    asked = result.respondents + len(result.excluded)
    lines = [f"{result.respondents} of {asked} respondents counted; images by the model {result.model}"]
    lines += [f"left out: {exclusion.respondent}, {exclusion.reason}" for exclusion in result.excluded]
    for system in sorted({name for winner in prompts for name in winner.winners}):
        won = [winner for winner in prompts if winner.winners == (system,)]
        majority = sum(winner.majority for winner in won)
        lines.append(f"{label(system)} won {len(won)} of {len(prompts)} prompts, {majority} by a majority")
    if level := sum(len(winner.winners) > 1 for winner in prompts):
        lines.append(f"level: {level} of {len(prompts)} prompts")
    alpha = "not to be told" if agreement.alpha is None else f"{agreement.alpha:.2f}"
    lines.append(f"agreement among respondents (Krippendorff's alpha): {alpha}")
    if agreement.repeats:
        lines.append(f"repeated pages answered alike: {agreement.repeats_alike} of {agreement.repeats}")
    return lines


def write_results(result: Result, folder: Path) -> list[Path]:
    """Write tables (Markdown, CSV, Parquet), plots (SVG, PNG) and `study_result.json`.

    Args:
        result: of `analyse`.
        folder: made where it doesn't exist; files of an earlier analysis are replaced.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(result.document(), indent=1, ensure_ascii=False, allow_nan=False)
    standings = [
        {"subset": subset, "system": system} | asdict(standing) | {"simulated": result.simulated}
        for subset, systems in result.subsets.items()
        for system, standing in systems.items()
    ]
    prompts = [
        {
            "subset": winner.subset,
            "prompt": winner.prompt,
            "system": system,
            "votes": votes,
            "wins": system in winner.winners,
            "simulated": result.simulated,
        }
        for winner in result.prompts
        for system, votes in winner.votes.items()
    ]
    written = [
        _write(folder / RESULT_FILE, f"{document}\n".encode()),
        _write(folder / "table.md", _markdown(result).encode()),
    ]
    for name, rows in (("standings", standings), ("prompts", prompts)):
        written.append(_write(folder / f"{name}.csv", _csv(rows).encode()))
        written.append(_write(folder / f"{name}.parquet", _parquet(rows)))
    # Text stays text: it can be searched for and read aloud, and prompts may have dollars in them.
    with rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        for name, figure in (
            ("shares", _plot_standings(result, "share", "bootstrap_low", "bootstrap_high")),
            ("strengths", _plot_standings(result, "strength", "strength_low", "strength_high")),
            ("prompts", _plot_prompts(result)),
        ):
            written += [_write(folder / f"{name}.{kind}", _drawn(figure, kind)) for kind in ("svg", "png")]
    return written


def _markdown(result: Result) -> str:
    warning = banner(result)
    lines = [f"**{warning}**", ""] if warning else []
    lines += [f"| {' | '.join(TABLE_COLUMNS)} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(result)]
    lines += ["", *(f"- {remark}" for remark in remarks(result))]
    return "\n".join(lines) + "\n"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    table = pa.Table.from_pylist(list(rows))
    # Only numbers can be absent, and a column of nothing else has no type.
    typed = [
        column.with_type(pa.float64()) if column.type == pa.null() else column for column in table.schema
    ]
    buffer = io.BytesIO()
    parquet.write_table(table.cast(pa.schema(typed)), buffer)
    return buffer.getvalue()


def _plot_standings(result: Result, value: str, low: str, high: str) -> Figure:
    """A panel a subset, a row a system: the value and its interval; with shares, Wilson's as a thick line."""
    systems = list(result.subsets[ALL])[::-1]
    figure = Figure(figsize=(2 + 2.4 * len(result.subsets), 1.6 + 0.4 * len(systems)), layout="constrained")
    panels = figure.subplots(1, len(result.subsets), sharey=True, squeeze=False)[0]
    for panel, (subset, standings) in zip(panels, result.subsets.items(), strict=True):
        for row, system in enumerate(systems):
            standing = asdict(standings[system]) if system in standings else {}
            if standing.get(value) is None:
                continue
            if value == "share":
                ends = [100 * standing["low"], 100 * standing["high"]]
                panel.plot(ends, [row, row], color=_INK, alpha=0.35, linewidth=6, solid_capstyle="butt")
            if standing[low] is not None:
                panel.plot([100 * standing[low], 100 * standing[high]], [row, row], color=_INK, linewidth=1.5)
            panel.plot(100 * standing[value], row, "o", color=_INK)
        panel.set(title=f"{subset or 'no subset'}", xlim=(0, 100), xlabel=f"{value}, %")
        panel.set_yticks(range(len(systems)), [label(system) for system in systems])
        panel.grid(axis="x", alpha=0.3)
        panel.margins(y=0.2)
    meaning = "thin: 95 % by respondents and prompts"
    return _titled(figure, result, f"thick: Wilson's 95 %; {meaning}" if value == "share" else meaning)


def _plot_prompts(result: Result) -> Figure:
    """A bar a prompt, parted among the systems."""
    systems = list(result.subsets[ALL])
    names = [winner.prompt for winner in reversed(result.prompts)]
    figure = Figure(figsize=(9, 1.6 + 0.26 * len(names)), layout="constrained")
    panel = figure.subplots()
    left = [0.0] * len(names)
    for place, system in enumerate(systems):
        shares = [
            100 * winner.votes.get(system, 0) / sum(winner.votes.values())
            for winner in reversed(result.prompts)
        ]
        colour = "0.8" if system == NONE else f"C{place}"
        panel.barh(range(len(names)), shares, left=left, color=colour, label=label(system))
        left = [start + share for start, share in zip(left, shares, strict=True)]
    panel.axvline(50, color=_INK, linewidth=0.8, linestyle=":")
    panel.set(xlim=(0, 100), xlabel="share of the votes, %", ylim=(-0.6, len(names) - 0.4))
    panel.set_yticks(range(len(names)), names)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=len(systems))
    return _titled(figure, result, "votes for each prompt")


def _titled(figure: Figure, result: Result, what: str) -> Figure:
    counted = f"{result.respondents} respondents, images by the model {result.model}"
    figure.suptitle("\n".join(filter(None, (banner(result), counted, what))), fontsize="medium")
    if result.simulated:
        figure.text(0.5, 0.5, "SIMULATED", fontsize=40, alpha=0.12, rotation=20, ha="center", va="center")
    return figure


def _drawn(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
