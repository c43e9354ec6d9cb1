"""What a report is made of: tables, figures and pictures, and how figures are worded."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from attend_excite.benchmark import figures, store
from attend_excite.benchmark.comparison import Comparison
from attend_excite.benchmark.figures import Bar, Panel
from attend_excite.benchmark.names import is_ablation, recipe_of
from attend_excite.benchmark.results import ALL, MINIMUM, Measure, Results
from attend_excite.benchmark.statistics import Estimate
from attend_excite.figures import Drawn, drawn
from attend_excite.tables import Cell

SHOWN_PROMPTS = 4
"""Of which sheets are shown, where there are many."""

_SHOWN_SEEDS = 4
_THUMBNAIL = 128


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows.

    Attributes:
        name: of its file.
        title: what it shows, so that it can be understood where it stands alone; "" where its section says
            it.
        columns: their heads.
        rows: of as many cells.
        note: what its signs mean.
    """

    kind: ClassVar[str] = "table"
    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Plot:
    """A figure; `name` is that of its files, and `title` says what it shows where it stands alone."""

    kind: ClassVar[str] = "plot"
    name: str
    title: str
    drawn: Drawn


@dataclass(frozen=True)
class Thumbnail:
    """A small picture as WebP; `name` is that of its file."""

    name: str
    webp: bytes
    label: str

    @property
    def uri(self) -> str:
        """The picture itself, for a page of one file."""
        return f"data:image/webp;base64,{base64.b64encode(self.webp).decode()}"


@dataclass(frozen=True)
class Sheet:
    """Pictures: a labelled row a system, seeds side by side; None where there is none."""

    kind: ClassVar[str] = "sheet"
    title: str
    rows: Sequence[tuple[str, Sequence[Thumbnail | None]]]
    note: str = ""


Block = Table | Plot | Sheet


@dataclass(frozen=True)
class Section:
    """A heading, what is to be said under it, and what is to be seen."""

    title: str
    paragraphs: Sequence[str]
    blocks: Sequence[Block]


def bar_plot(
    results: Results, comparison: Comparison, measures: Sequence[Measure], name: str, title: str
) -> Plot:
    """Bars of some measures, a row each, with a panel a subset.

    Args:
        results: of the run.
        comparison: the systems, a bar each.
        measures: those of one judge.
        name: of the figure's files.
        title: what it shows; what the numbers are of, and what the signs mean, is added.
    """
    rows = {}
    for measure in measures:
        panels = []
        for subset in results.subsets:
            made = []
            for system in comparison.systems:
                figure = comparison.figures[system, subset, measure]
                scale = 100 if measure.rate else 1
                mean = Estimate(
                    *(scale * value for value in (figure.mean.value, figure.mean.low, figure.mean.high))
                )
                apart_by = figure.difference
                note = value_text(measure, figure.mean.value)
                if not np.isnan(apart_by.value):
                    note += f" ({difference_text(measure, apart_by, short=True)})"
                stands_out = system == (results.highlight or comparison.systems[-1])
                made.append(Bar(short_name(results, system), mean, note, stands_out))
            bound = results.bound(subset) if measure == MINIMUM else float("nan")
            panels.append(Panel(subset_name(subset), made, bound))
        bounded = measure == MINIMUM and bool(results.upper_bound)
        unit = ", %" if measure.rate else " (dashed: upper bound)" if bounded else ""
        rows[measure.title + unit] = panels
    caption = (
        f"{title} {told_of(results, measures[0])} Bars: means over prompts; lines: their 95 % intervals."
        f"{_brackets(results, comparison, measures[0])}"
    )
    return Plot(name, caption, drawn(figures.bars(rows)))


def table_of(results: Results, comparison: Comparison, measure: Measure, title: str) -> Table:
    """One measure: a row a system, a column a subset.

    Args:
        results: of the run.
        comparison: the systems, a row each.
        measure: of what.
        title: what it shows; what the numbers are of is added.
    """
    rows = [
        [
            Cell(name_of(results, system)),
            *(cell_of(comparison, system, subset, measure) for subset in results.subsets),
        ]
        for system in comparison.systems
    ]
    if measure == MINIMUM and results.upper_bound:
        bounds = [results.bound(subset) for subset in results.subsets]
        rows.append(
            [Cell("upper bound, real images"), *(Cell(value_text(measure, bound)) for bound in bounds)]
        )
    name = f"{comparison.name}-{measure.metric}-{measure.column}"
    note = f"In small type: 95 % intervals over prompts.{_brackets(results, comparison, measure)}"
    return Table(
        name, f"{title} {told_of(results, measure)}", ["", *map(subset_name, results.subsets)], rows, note
    )


def _brackets(results: Results, comparison: Comparison, measure: Measure) -> str:
    """What stands in brackets, if anything does."""
    if comparison.reference not in comparison.systems or len(comparison.systems) < 2:
        return ""
    unit = "percentage points" if measure.rate else "per cent"
    return (
        f" In brackets: the difference from {name_of(results, str(comparison.reference))}, in {unit}. “ns”: "
        "not significant, because its interval includes 0 or there is only one prompt."
    )


def told_of(results: Results, measure: Measure | None = None) -> str:
    """What numbers are of: the model, the prompts and the seeds, and who judged."""
    seeds = len({row["seed"] for row in results.rows})
    of_all = f"{count_text(len(results.prompts), 'prompt')}, {count_text(seeds, 'seed')}"
    steps = results.settings.get("steps")
    drawn_in = f", {count_text(steps, 'step')}" if steps else ""
    judged = f"; judged by {results.judges[measure.metric]}" if measure is not None else ""
    return f"Model {results.settings['model']}{drawn_in}; {of_all}{judged}."


def count_text(count: int, noun: str) -> str:
    """ "1 seed", "2 seeds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def cell_of(comparison: Comparison, system: str, subset: str, measure: Measure) -> Cell:
    """A figure, how far it is from the reference, and its interval."""
    figure = comparison.figures[system, subset, measure]
    text = value_text(measure, figure.mean.value)
    if not np.isnan(figure.difference.value):
        text += f" ({difference_text(measure, figure.difference, short=True)})"
    return Cell(
        text, interval_text(measure, figure.mean, mean=True), comparison.is_best(system, subset, measure)
    )


def sheet_of(results: Results, prompt: int, systems: Sequence[str], note: str = "") -> Sheet:
    """One prompt's images: the first seeds that the systems share."""
    shared = results.shared([name for name in systems if name in results.systems])
    rows = [
        row
        for row, at, there in zip(results.rows, results.prompt_of, shared, strict=True)
        if at == prompt and there
    ]
    seeds = sorted({row["seed"] for row in rows})[:_SHOWN_SEEDS]
    found = {(row["system"], row["seed"]): row for row in rows}
    return Sheet(
        results.prompts[prompt]["prompt"],
        [
            (
                short_name(results, system),
                [
                    _thumbnail(results, found[system, seed]) if (system, seed) in found else None
                    for seed in seeds
                ],
            )
            for system in systems
        ],
        note,
    )


def _thumbnail(results: Results, row: Mapping[str, Any]) -> Thumbnail | None:
    try:
        image = store.read_image(results.run, row["image"]).convert("RGB")
    except (FileNotFoundError, store.BrokenImageError):
        warnings.warn(
            f"the picture '{row['image']}' is gone or broken: the report leaves it out", stacklevel=2
        )
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=78, method=6)
    label = f"{row['prompt']}, {name_of(results, row['system'])}, seed {row['seed']}"
    return Thumbnail(row["job"], buffer.getvalue(), label)


def name_of(results: Results, system: str) -> str:
    """A system for people. Only Stable Diffusion's own images are called that."""
    return results.titles.get(system, system)


def short_name(results: Results, system: str) -> str:
    """The same where there is little room."""
    return recipe_of(system) if is_ablation(system) else name_of(results, system)


def subset_name(name: str) -> str:
    """A subset for people."""
    return {"": "all", ALL: "all prompts"}.get(name, name)


def value_text(measure: Measure, value: float) -> str:
    """ "12.5 %" or "0.301", and a dash for NaN."""
    if np.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if measure.rate else f"{value:.3f}"


def number_text(value: float) -> str:
    """ "0.30", and a dash for NaN."""
    return "–" if np.isnan(value) else f"{value:.2f}"


def between_text(found: Estimate) -> str:
    """ "0.53 to 0.76", and nothing where it is not known."""
    return "" if np.isnan(found.low) else f"{number_text(found.low)} to {number_text(found.high)}"


def difference_text(measure: Measure, found: Estimate, *, interval: bool = False, short: bool = False) -> str:
    """ "+5.1 %" or "+5.1 points", and "ns" where it may as well be nought for all that is known."""
    if np.isnan(found.value):
        return "–"
    unit = ("" if short else " points") if measure.rate else " %"
    sure = "" if found.excludes(0) else " ns"
    between = f", {interval_text(measure, found)}" if interval and not np.isnan(found.low) else ""
    return f"{_signed(found.value)}{unit}{between}{'' if interval else sure}"


def interval_text(measure: Measure, found: Estimate, *, mean: bool = False) -> str:
    """From where to where: of a difference, or of a mean. Empty where it is not known."""
    if np.isnan(found.low):
        return ""
    if not mean:
        return f"{_signed(found.low)} to {_signed(found.high)}"
    return f"{value_text(measure, found.low)} to {value_text(measure, found.high)}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
