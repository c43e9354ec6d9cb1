"""A study's figures as files: tables for people and programs, and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from attend_excite.benchmark.names import titles
from attend_excite.figures import INK, NOBODY, SERIES, drawn, styled
from attend_excite.files import write_whole
from attend_excite.study.analysis import ALL, Result
from attend_excite.study.create import NONE
from attend_excite.tables import Cell, csv_bytes, latex, markdown, parquet_bytes

RESULT_FILE = "study_result.json"
NONE_LABEL = "none is better"

# Inches: of the plot of prompts, of a letter, and of a legend's sign with its blanks.
_WIDTH, _LETTER, _SIGN = 9.0, 0.077, 0.55


def banner(result: Result) -> str | None:
    """What every table and plot of a simulated panel says; None: people voted."""
    return "SIMULATED: a program voted, not people" if result.simulated else None


def labels(result: Result) -> dict[str, str]:
    """The systems as people read them, the same as in the benchmark's report."""
    return titles(result.subsets[ALL], result.model, result.titles) | {NONE: NONE_LABEL}


def percent(value: float | None) -> str:
    """61.2, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def between(low: float | None, high: float | None) -> str:
    """57.0 to 65.1, or a dash."""
    return "–" if low is None else f"{percent(low)} to {percent(high)}"


TABLE_COLUMNS = ("subset", "system", "votes", "%", "Wilson", "bootstrap", "strength", "bootstrap")


def table_rows(result: Result) -> Iterator[tuple[str, ...]]:
    """The cells of `TABLE_COLUMNS`, a row a subset and system."""
    named = labels(result)
    for subset, systems in result.subsets.items():
        for system, standing in systems.items():
            yield (
                subset,
                named[system],
                f"{standing.votes} of {standing.shown}",
                percent(standing.share),
                between(standing.low, standing.high),
                between(standing.bootstrap_low, standing.bootstrap_high),
                percent(standing.strength),
                between(standing.strength_low, standing.strength_high),
            )


def remarks(result: Result) -> list[str]:
    """What stands below the table: who was counted, winners and agreement."""
    agreement, prompts, named = result.agreement, result.prompts, labels(result)
    asked = result.respondents + len(result.excluded)
    lines = [f"{result.respondents} of {asked} respondents counted; images by the model {result.model}"]
    lines += [f"left out: {exclusion.respondent}, {exclusion.reason}" for exclusion in result.excluded]
    for system in sorted({name for winner in prompts for name in winner.winners}):
        won = [winner for winner in prompts if winner.winners == (system,)]
        majority = sum(winner.majority for winner in won)
        lines.append(f"{named[system]} won {len(won)} of {len(prompts)} prompts, {majority} by a majority")
    if level := sum(len(winner.winners) > 1 for winner in prompts):
        lines.append(f"without a single winner: {level} of {len(prompts)} prompts")
    alpha = "unknown" if agreement.alpha is None else f"{agreement.alpha:.2f}"
    lines.append(f"agreement among respondents (Krippendorff's alpha): {alpha}")
    if agreement.repeats:
        lines.append(f"repeated pages answered alike: {agreement.repeats_alike} of {agreement.repeats}")
    return lines


def write_results(result: Result, folder: Path) -> list[Path]:
    """Write tables (Markdown, LaTeX, CSV, Parquet), plots (SVG, PNG, PDF) and `study_result.json`.

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
        write_whole(folder / RESULT_FILE, f"{document}\n"),
        write_whole(folder / "table.md", _markdown(result)),
        write_whole(folder / "table.tex", _latex(result)),
    ]
    for name, rows in (("standings", standings), ("prompts", prompts)):
        written.append(write_whole(folder / f"{name}.csv", csv_bytes(rows)))
        written.append(write_whole(folder / f"{name}.parquet", parquet_bytes(rows)))
    with styled():
        figures = {
            "shares": _plot_standings(result, "share", "bootstrap_low", "bootstrap_high"),
            "strengths": _plot_standings(result, "strength", "strength_low", "strength_high"),
            "prompts": _plot_prompts(result),
        }
    for name, figure in figures.items():
        files = drawn(figure).files.items()
        written += [write_whole(folder / f"{name}.{kind}", content) for kind, content in files]
    return written


def _markdown(result: Result) -> str:
    warning = banner(result)
    lines = [f"**{warning}**", ""] if warning else []
    lines += [f"| {' | '.join(TABLE_COLUMNS)} |", "|---|---|--:|--:|--:|--:|--:|--:|"]
    lines += [f"| {' | '.join(map(markdown, row))} |" for row in table_rows(result)]
    lines += ["", *(f"- {markdown(remark)}" for remark in remarks(result))]
    return "\n".join(lines) + "\n"


def _latex(result: Result) -> str:
    """The shares, a row a system and a column a subset."""
    subsets, named = list(result.subsets), labels(result)
    rows = []
    for system in result.subsets[ALL]:
        cells = [Cell(named[system])]
        for subset in subsets:
            standing = result.subsets[subset].get(system)
            if standing is None or standing.share is None:
                cells.append(Cell("–"))
                continue
            best = max(each.share for each in result.subsets[subset].values() if each.share is not None)
            interval = between(standing.bootstrap_low, standing.bootstrap_high)
            cells.append(Cell(f"{percent(standing.share)} %", interval, standing.share == best))
        rows.append(cells)
    told = (
        f"Share of the votes that each system got: {_counted(result)}.",
        "In small type: 95 % intervals over respondents and prompts.",
        banner(result),
    )
    caption = " ".join(filter(None, told))
    return latex(["", *(subset or "no subset" for subset in subsets)], rows, caption, "study")


def _counted(result: Result) -> str:
    return f"{result.respondents} respondents, images by the model {result.model}"


def _plot_standings(result: Result, value: str, low: str, high: str) -> Figure:
    """A panel a subset, a row a system: the value and its interval; with shares, Wilson's as a thick line."""
    systems, named = list(result.subsets[ALL])[::-1], labels(result)
    across = _LETTER * max(len(named[system]) for system in systems) + 2.2 * len(result.subsets)
    figure = Figure(figsize=(max(5.5, across), 1.6 + 0.4 * len(systems)), layout="constrained")
    # So that one panel's 100 and the next one's 0 stand apart.
    space = {"wspace": 0.08}
    panels = figure.subplots(1, len(result.subsets), sharey=True, squeeze=False, gridspec_kw=space)[0]
    for panel, (subset, standings) in zip(panels, result.subsets.items(), strict=True):
        for row, system in enumerate(systems):
            standing = asdict(standings[system]) if system in standings else {}
            if standing.get(value) is None:
                continue
            if value == "share":
                ends = [100 * standing["low"], 100 * standing["high"]]
                panel.plot(ends, [row, row], color=INK, alpha=0.35, linewidth=6, solid_capstyle="butt")
            if standing[low] is not None:
                panel.plot([100 * standing[low], 100 * standing[high]], [row, row], color=INK, linewidth=1.5)
            panel.plot(100 * standing[value], row, "o", color=INK)
        panel.set(title=subset or "no subset", xlim=(0, 100), xticks=(0, 50, 100), xlabel=f"{value}, %")
        panel.set_yticks(range(len(systems)), [named[system] for system in systems])
        panel.grid(axis="x", alpha=0.3)
        panel.margins(y=0.2)
    meaning = "thin: 95 % by respondents and prompts"
    return _titled(figure, result, f"thick: Wilson's 95 %; {meaning}" if value == "share" else meaning)


def _plot_prompts(result: Result) -> Figure:
    """A bar a prompt, parted among the systems."""
    systems, named = list(result.subsets[ALL]), labels(result)
    names = [winner.prompt for winner in reversed(result.prompts)]
    # As many columns of the legend as there is room for.
    columns = max(1, int(_WIDTH / (_SIGN + _LETTER * max(len(named[system]) for system in systems))))
    lines = -(-len(systems) // columns)
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.2 * lines + 0.26 * len(names)), layout="constrained")
    panel = figure.subplots()
    left = [0.0] * len(names)
    for place, system in enumerate(systems):
        shares = [
            100 * winner.votes.get(system, 0) / sum(winner.votes.values())
            for winner in reversed(result.prompts)
        ]
        colour = NOBODY if system == NONE else SERIES[place % len(SERIES)]
        panel.barh(range(len(names)), shares, left=left, color=colour, label=named[system])
        left = [start + share for start, share in zip(left, shares, strict=True)]
    panel.axvline(50, color=INK, linewidth=0.8, linestyle=":")
    panel.set(xlim=(0, 100), xlabel="share of the votes, %", ylim=(-0.6, len(names) - 0.4))
    panel.set_yticks(range(len(names)), names)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return _titled(figure, result, "votes for each prompt")


def _titled(figure: Figure, result: Result, what: str) -> Figure:
    figure.suptitle("\n".join(filter(None, (banner(result), _counted(result), what))), fontsize="medium")
    if result.simulated:
        figure.text(0.5, 0.5, "SIMULATED", fontsize=40, alpha=0.12, rotation=20, ha="center", va="center")
    return figure
