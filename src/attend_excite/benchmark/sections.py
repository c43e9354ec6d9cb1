"""What the report says, section by section: the paper's tables and figures, and what else a run tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from attend_excite.benchmark import figures, numbers, paper
from attend_excite.benchmark.blocks import (
    SHOWN_PROMPTS,
    Cell,
    Plot,
    Section,
    Table,
    between_text,
    difference_text,
    interval_text,
    name_of,
    number_text,
    sheet_of,
    value_text,
)
from attend_excite.benchmark.comparison import Comparison, apart, compare
from attend_excite.benchmark.results import (
    ALL,
    DETECTED,
    FULL_METHOD,
    MINIMUM,
    MISCOLOURED,
    NEGLECT,
    PLAIN,
    REWEIGHT,
    RIGHT,
    TEXT,
    Measure,
    Results,
    is_ablation,
)
from attend_excite.benchmark.score import is_bundled

_MOST_SUBJECTS = 40
_CONDITIONS = ("model", "revision", "dtype", "steps", "guidance", "width", "height")


def title_of(results: Results) -> str:
    """The title of a run's report."""
    return f"{results.settings['model']}: who draws everything that the prompt asks for?"


def summary_of(results: Results, systems: Comparison) -> list[str]:
    """What a report says first: how much was drawn, and the plain model against Attend-and-Excite."""
    seeds = len({row["seed"] for row in results.rows})
    lines = [
        f"{len(results.rows):,} images: {len(results.prompts)} prompts, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}, "
        f"{len(results.systems)} systems, one model ({results.settings['model']})."
    ]
    if is_bundled(results.settings["model"]):
        lines.append(
            "This is the small sticker model that comes with attend-excite, judged by small models of its "
            "own kind. Nothing here is a result of Stable Diffusion."
        )
    compared, main = results.compared, np.isin(results.system_of, results.main_systems)
    if compared is not None and (left := int((main & ~compared).sum())):
        each = int((main & compared).sum()) // len(results.main_systems)
        lines.append(
            f"The systems are compared on the {each:,} images each of prompts and seeds that all have; "
            f"{left:,} others are left out of that."
        )
    if {PLAIN, FULL_METHOD} <= set(systems.systems):
        for measure in (NEGLECT, RIGHT, DETECTED[0], MINIMUM, TEXT):
            if measure in results.values:
                lines.append(_plain_against_ours(results, systems, measure))
    nsfw, failed = (sum(counts) for counts in zip(*results.left_out.values(), strict=True))
    if nsfw or failed:
        lines.append(
            f"Left out: {nsfw} images that the safety checker blacked out and {failed} that failed "
            "(by system, under cost)."
        )
    return lines


def _plain_against_ours(results: Results, systems: Comparison, measure: Measure) -> str:
    subset = ALL if ALL in results.subsets else list(results.subsets)[-1]
    plain, ours = (systems.figures[name, subset, measure] for name in (PLAIN, FULL_METHOD))
    images = results.compared
    difference = apart(
        measure, results.means(FULL_METHOD, measure, images), results.means(PLAIN, measure, images)
    )
    return (
        f"{measure.title}: {value_text(measure, plain.mean.value)} plain, "
        f"{value_text(measure, ours.mean.value)} with Attend-and-Excite "
        f"({difference_text(measure, difference, interval=True)})."
    )


def comparisons_of(results: Results) -> dict[str, Comparison]:
    """Of all that the paper compares: the systems, re-weighting (appendix C.1), the ablations (B)."""
    found = {"systems": compare(results, "systems", results.main_systems, results.compared)}
    for name, systems in (("reweighting", [REWEIGHT]), ("ablations", results.ablations)):
        if systems and set(systems) <= set(results.systems) and FULL_METHOD in results.systems:
            together = [*systems, FULL_METHOD]
            found[name] = compare(results, name, together, results.shared(together))
    return found


def sections_of(
    results: Results,
    comparisons: Mapping[str, Comparison],
    votes: Mapping[str, Any] | None,
    others: Results | None,
) -> Iterator[Section | None]:
    """The sections of a report in their order; None for what the run has nothing on."""
    systems = comparisons["systems"]
    yield paper.presence(
        results, systems, (NEGLECT, MISCOLOURED, RIGHT), "The presence judge's verdict", "presence"
    )
    yield paper.presence(results, systems, DETECTED, "The detector's verdict", "detector")
    yield paper.similarities(results, comparisons)
    yield paper.captions(results, systems)
    yield paper.vqa(results, systems)
    yield None if votes is None else paper.votes(results, votes)
    yield paper.reweighting(results, comparisons)
    yield paper.findings(results)
    yield _pairs(results)
    yield _side_by_side(results)
    yield _extremes(results)
    yield paper.ablations(results, comparisons)
    yield _metrics_judged(results)
    yield _cost(results)
    yield None if others is None else _two_runs(results, others)
    yield _circumstances(results)


def _pairs(results: Results) -> Section | None:
    measure = next((measure for measure in (NEGLECT, DETECTED[0]) if measure in results.values), None)
    subjects = list(dict.fromkeys(name for prompt in results.prompts for name in prompt["subjects"]))
    shown = {PLAIN, FULL_METHOD} <= set(results.systems)
    if measure is None or not shown or not 3 <= len(subjects) <= _MOST_SUBJECTS:
        return None
    of_pairs, shared = [], results.shared([PLAIN, FULL_METHOD])
    for system in (PLAIN, FULL_METHOD):
        rates: dict[tuple[str, str], list[float]] = {}
        for prompt, rate in zip(results.prompts, results.means(system, measure, shared), strict=True):
            if len(prompt["subjects"]) == 2 and not np.isnan(rate):
                first, second = sorted(prompt["subjects"], key=subjects.index)
                rates.setdefault((first, second), []).append(rate)
        of_pairs.append({pair: float(np.mean(of_pair)) for pair, of_pair in rates.items()})
    drawn = figures.pairs(
        subjects, of_pairs[0], of_pairs[1], (name_of(results, PLAIN), name_of(results, FULL_METHOD))
    )
    return Section(
        "Neglect, pair by pair",
        ["Each cell is one pair of subjects; blank cells were not drawn."],
        [Plot("pairs", "How often one of the two subjects is missing.", drawn)],
    )


def _side_by_side(results: Results) -> Section | None:
    if len(results.main_systems) < 2:
        return None
    systems = [name for name in results.systems if not is_ablation(name)]
    shared = set(results.prompt_of[results.shared(systems)])
    sheets = []
    for name, prompts in results.subsets.items():
        places = [int(at) for at in np.flatnonzero(prompts) if at in shared]
        if places and (name != ALL or len(results.subsets) == 1):
            sheets.append(sheet_of(results, places[len(places) // 2], systems))
    if not sheets:
        return None
    return Section(
        "The systems side by side",
        ["The prompt in the middle of each subset's list, with the same seeds for all. Nothing was picked."],
        sheets,
    )


def _extremes(results: Results) -> Section | None:
    measures = [measure for measure in (RIGHT, DETECTED[2], MINIMUM) if measure in results.values]
    if not measures or not {PLAIN, FULL_METHOD} <= set(results.systems):
        return None
    shared = results.shared([PLAIN, FULL_METHOD])
    means = {
        measure: [results.means(name, measure, shared) for name in (PLAIN, FULL_METHOD)]
        for measure in {measures[0], measures[-1]}
    }
    gains = [ours - plain for plain, ours in (means[measures[0]], means[measures[-1]])]
    order = [int(at) for at in np.lexsort((gains[1], gains[0])) if not np.isnan(gains[0][at])]
    count = min(SHOWN_PROMPTS, len(order) // 2)
    sheets = []
    for kind, chosen in (("helped most", order[::-1][:count]), ("helped least", order[:count])):
        for at in chosen:
            plain, ours = (value_text(measures[0], float(values[at])) for values in means[measures[0]])
            sheets.append(
                sheet_of(
                    results, at, [PLAIN, FULL_METHOD], f"{kind}: {measures[0].title.lower()} {plain} → {ours}"
                )
            )
    if not sheets:
        return None
    return Section(
        "Best and worst prompts",
        [
            "The prompts that Attend-and-Excite helps most and least against the plain model, by "
            f"“{measures[0].title.lower()}”; where that is equal, by “{measures[-1].title.lower()}”."
        ],
        sheets,
    )


def _metrics_judged(results: Results) -> Section | None:
    agreements = numbers.agreements(results)
    if not agreements:
        return None
    truths = list(dict.fromkeys(found.truth for found in agreements))
    heads = ["", "of any two images", "of two of one prompt", "of two by one system", "correlation"]
    tables = [
        Table(
            f"Right is: {label}.",
            heads,
            [
                [
                    Cell(found.score.title),
                    Cell(number_text(found.any_two)),
                    *(
                        Cell(number_text(within.value), between_text(within))
                        for within in (found.of_one_prompt, found.of_one_system)
                    ),
                    Cell(number_text(found.correlation)),
                ]
                for found in agreements
                if found.truth == truth
            ],
        )
        for truth, label in zip(truths, ("all subjects there", "all there, in their colours"), strict=True)
    ]
    shown = {
        found.score.title: (found.values, found.right) for found in agreements if found.truth == truths[0]
    }
    drawn = figures.separation(shown, ("all subjects there", "a subject is missing"))
    return Section(
        "Do the scores measure what they claim to?",
        [
            f"Against the verdict of {results.judges[truths[0].metric]}: how often, of two images, the one "
            "that is right has the higher score (1 always, 0.5 by chance): of any two, of two of one prompt, "
            "and of two of one prompt by one system, which is what a choice among seeds needs. Then the "
            "correlation of score and verdict."
        ],
        [*tables, Plot("separation", "Scores of images with all their subjects and of the others.", drawn)],
    )


def _cost(results: Results) -> Section:
    rows = numbers.cost(results)
    plain = next((row["seconds"] for row in rows if row["system"] == PLAIN), None)

    def cells(row: Mapping[str, Any]) -> list[Cell]:
        if not row["images"]:
            return [Cell("–")] * 3
        beside = f"× {row['seconds'] / plain:.2f}" if plain else ""
        passes, updates = (Cell(f"{row[name]:.1f}") for name in ("unet_passes", "updates"))
        return [Cell(f"{row['seconds']:.2f}", beside), passes, updates]

    return Section(
        "Cost of an image",
        [
            "Averages of what the run wrote down. Seconds are an image's share of its batch, on the machines "
            "that drew it: compare them only where all systems ran on the same."
        ],
        [
            Table(
                "",
                ["", "seconds", "UNet passes", "updates", "images", "blacked out", "failed"],
                [
                    [
                        Cell(name_of(results, row["system"])),
                        *cells(row),
                        *(Cell(f"{row[name]:,}") for name in ("images", "blacked_out", "failed")),
                    ]
                    for row in rows
                ],
            )
        ],
    )


def _two_runs(results: Results, others: Results) -> Section:
    rows = [
        [
            Cell(f"{name_of(results, found.system)}: {found.measure.title.lower()}"),
            Cell(value_text(found.measure, found.here.value)),
            Cell(value_text(found.measure, found.there.value)),
            Cell(
                difference_text(found.measure, found.difference),
                interval_text(found.measure, found.difference),
            ),
        ]
        for found in numbers.beside(results, others)
    ]
    differing = [
        f"{name} {others.settings[name]}, not {results.settings[name]}"
        for name in _CONDITIONS
        if others.settings.get(name) != results.settings.get(name)
    ]
    judges = [
        f"{metric} by {results.judges[metric]} and by {others.judges[metric]}"
        for metric in results.judges
        if others.judges.get(metric, results.judges[metric]) != results.judges[metric]
    ]
    told = [
        f"{others.run}, each system on the prompts and seeds that it has in both runs; the difference is the "
        "other run's less this one's."
        if rows
        else f"{others.run} has no system, prompt and seed in common with this run."
    ]
    if differing:
        told.append(f"The other has {', '.join(differing)}.")
    if judges:
        told.append(f"Judged by different models: {'; '.join(judges)}.")
    columns = ["", "this run", "the other", "difference"]
    title = f"Beside another run: {others.settings['model']}"
    return Section(title, told, [Table("", columns, rows)] if rows else [])


def _circumstances(results: Results) -> Section:
    settings = results.settings
    facts = [(name, str(settings[name])) for name in _CONDITIONS if settings.get(name) is not None]
    for name, column in (("drawn on", "device"), ("drawn by", "versions")):
        facts += [(name, value) for value in dict.fromkeys(row[column] for row in results.rows) if value]
    if (machines := len({row["host"] for row in results.rows})) > 1:
        facts.append(("machines", str(machines)))
    facts += [(f"{metric} judged by", judge) for metric, judge in results.judges.items()]
    recipes = {row["system"]: row["recipe"] for row in results.rows if row["recipe"]}
    facts += [(f"recipe of {system}", recipe) for system, recipe in recipes.items()]
    return Section(
        "What ran",
        ["The numbers of all tables, and the prompts and images behind them, are in numbers/."],
        [Table("", ["", ""], [[Cell(name), Cell(value)] for name, value in facts])],
    )
