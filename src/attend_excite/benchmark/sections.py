"""What the report says, section by section: the paper's tables and figures, and what else a run tells."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from attend_excite.benchmark import figures, geneval, numbers, paper
from attend_excite.benchmark.blocks import (
    SHOWN_PROMPTS,
    Plot,
    Section,
    Sheet,
    Table,
    between_text,
    count_text,
    difference_text,
    interval_text,
    name_of,
    number_text,
    sheet_of,
    short_name,
    told_of,
    value_text,
)
from attend_excite.benchmark.comparison import Comparison, apart, compare
from attend_excite.benchmark.figures import Curve
from attend_excite.benchmark.names import FULL_METHOD, PLAIN, REWEIGHT, is_ablation, is_bundled
from attend_excite.benchmark.results import (
    ALL,
    BY_GENEVAL,
    DETECTED,
    FULL,
    MINIMUM,
    MISCOLOURED,
    NEGLECT,
    RIGHT,
    TEXT,
    Measure,
    Results,
)
from attend_excite.benchmark.statistics import Estimate
from attend_excite.figures import drawn
from attend_excite.tables import Cell

_MOST_SUBJECTS = 40
_CONDITIONS = ("model", "revision", "dtype", "steps", "guidance", "width", "height")


def title_of(results: Results) -> str:
    """The title of a run's report."""
    return f"{results.settings['model']}: who draws everything that the prompt asks for?"


def summary_of(results: Results, systems: Comparison) -> list[str]:
    """What a report says first: how much was drawn, and the highlighted system against the baseline."""
    seeds = len({row["seed"] for row in results.rows})
    counted = (len(results.prompts), "prompt"), (seeds, "seed"), (len(results.systems), "system")
    lines = [
        f"{count_text(len(results.rows), 'image')}: {', '.join(count_text(*each) for each in counted)}, "
        f"one model ({results.settings['model']})."
    ]
    if is_bundled(results.settings["model"]):
        lines.append(
            "This is one of the small sticker models that come with attend-excite, judged by small models of "
            "its own kind. Nothing here is a result of Stable Diffusion."
        )
    compared, main = results.compared, np.isin(results.system_of, results.main_systems)
    if compared is not None and (left := int((main & ~compared).sum())):
        each = int((main & compared).sum()) // len(results.main_systems)
        lines.append(
            f"The systems are compared on the prompts and seeds that all of them have, {each:,} images each; "
            f"{left:,} other images are left out of the comparison."
        )
    if compared is None:
        lines.append(
            "The systems have no prompt with the same seed in common, so each is told by pictures of its "
            "own: what sets them apart may be the noise."
        )
    if results.baseline in systems.systems and results.highlight in systems.systems:
        for measure in (NEGLECT, RIGHT, DETECTED[0], MINIMUM, TEXT):
            if measure in results.values:
                lines.append(_headline(results, systems, measure))
    nsfw, failed = (sum(counts) for counts in zip(*results.left_out.values(), strict=True))
    if nsfw or failed:
        lines.append(
            f"Left out: {nsfw} images that the safety checker blacked out and {failed} that failed "
            "(by system, under cost)."
        )
    return lines


def _headline(results: Results, systems: Comparison, measure: Measure) -> str:
    subset = ALL if ALL in results.subsets else list(results.subsets)[-1]
    against, ours = str(results.baseline), str(results.highlight)
    told = []
    for name in (against, ours):
        value = value_text(measure, systems.figures[name, subset, measure].mean.value)
        told.append(f"{value} {'plain' if name == PLAIN else f'with {name_of(results, name)}'}")
    means = [results.means(name, measure, results.compared) for name in (ours, against)]
    difference = apart(measure, *means)
    # Similarities about nought have no difference in per cent.
    far = "" if np.isnan(difference.value) else f" ({difference_text(measure, difference, interval=True)})"
    return f"{measure.title}: {told[0]}, {told[1]}{far}."


def comparisons_of(results: Results) -> dict[str, Comparison]:
    """Of all that the paper compares: the systems, re-weighting (appendix C.1), the ablations (B)."""
    found = {"systems": compare(results, "systems", results.main_systems, results.compared)}
    for name, systems in (("reweighting", [REWEIGHT]), ("ablations", results.ablations)):
        if systems and set(systems) <= set(results.systems) and FULL_METHOD in results.systems:
            together = [*systems, FULL_METHOD]
            found[name] = compare(results, name, together, results.shared(together), FULL_METHOD)
    for what, points in results.sweeps.items():
        together = [system for _, system in points]
        plain = [PLAIN] if PLAIN in results.systems else []
        name = f"sweep-{what.replace(' ', '-')}"
        found[name] = compare(results, name, [*together, *plain], results.shared([*together, *plain]))
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
    yield paper.presence(results, systems, [BY_GENEVAL], "GenEval's verdict", "geneval", geneval.RULE)
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
    for what in results.sweeps:
        yield _sweep(results, comparisons, what)
    yield _metrics_judged(results)
    yield _cost(results)
    yield None if others is None else _two_runs(results, others)
    yield _circumstances(results)


def _pairs(results: Results) -> Section | None:
    measure = next((measure for measure in (NEGLECT, DETECTED[0]) if measure in results.values), None)
    subjects = list(dict.fromkeys(name for prompt in results.prompts for name in prompt["subjects"]))
    against = results.baseline
    if measure is None or against is None or not 3 <= len(subjects) <= _MOST_SUBJECTS:
        return None
    plots = []
    for number, system in enumerate(results.challengers):
        rates = _rates_of_pairs(results, [against, system], measure, subjects)
        if not any(rates):  # No prompt has just two subjects.
            continue
        titles = name_of(results, against), name_of(results, system)
        caption = (
            f"How often one of the two subjects is missing, by {titles[0]} (above the diagonal) and by "
            f"{titles[1]} (below it). {told_of(results, measure)}"
        )
        figure = figures.pairs(subjects, rates[0], rates[1], titles)
        plots.append(Plot(f"pairs-{number + 1}" if number else "pairs", caption, drawn(figure)))
    if not plots:
        return None
    return Section(
        "Neglect, pair by pair",
        ["Each cell is one pair of subjects; blank cells were not drawn."],
        plots,
    )


def _rates_of_pairs(
    results: Results, systems: list[str], measure: Measure, subjects: list[str]
) -> list[dict[tuple[str, str], float]]:
    """Of each system, two subjects -> how often one is missing, on the prompts and seeds that all have."""
    of_pairs, shared = [], results.shared(systems)
    for system in systems:
        rates: dict[tuple[str, str], list[float]] = {}
        for prompt, rate in zip(results.prompts, results.means(system, measure, shared), strict=True):
            if len(prompt["subjects"]) == 2 and not np.isnan(rate):
                first, second = sorted(prompt["subjects"], key=subjects.index)
                rates.setdefault((first, second), []).append(rate)
        of_pairs.append({pair: float(np.mean(of_pair)) for pair, of_pair in rates.items()})
    return of_pairs


def _side_by_side(results: Results) -> Section | None:
    if len(results.main_systems) < 2:
        return None
    systems = [name for name in results.systems if not is_ablation(name)] or results.main_systems
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
    against = results.baseline
    if not measures or against is None:
        return None
    told, sheets = [], []
    for system in results.challengers:
        found = _helped_and_hurt(results, against, system, measures[0], measures[-1])
        if not found:
            told.append(f"With {name_of(results, system)} the numbers of every prompt are the same.")
        sheets += found
    names = " and ".join(name_of(results, name) for name in results.challengers)
    if not sheets and not told:
        return None
    return Section(
        "Best and worst prompts",
        [
            f"The prompts that {names} helps most compared with {name_of(results, against)}, and those that "
            f"it hurts most, by “{measures[0].title.lower()}”. Equal prompts are ordered by "
            f"“{measures[-1].title.lower()}”.",
            *told,
        ],
        sheets,
    )


def _helped_and_hurt(
    results: Results, against: str, system: str, measure: Measure, second: Measure
) -> list[Sheet]:
    """A few prompts on which a system gains most and a few on which it loses most; none where it is level."""
    shared = results.shared([against, system])
    means = {
        each: [results.means(name, each, shared) for name in (against, system)] for each in {measure, second}
    }
    gains = {each: ours - theirs for each, (theirs, ours) in means.items()}
    order = [
        int(at) for at in np.lexsort((gains[second], gains[measure])) if not np.isnan(gains[measure][at])
    ]
    helped = [at for at in reversed(order) if gains[measure][at] > 0]
    hurt = [at for at in order if gains[measure][at] < 0]
    sheets = []
    for kind, chosen in (("helped most", helped[:SHOWN_PROMPTS]), ("hurt most", hurt[:SHOWN_PROMPTS])):
        for at in chosen:
            theirs, ours = (value_text(measure, float(values[at])) for values in means[measure])
            note = f"{kind}: {measure.title.lower()} {theirs} → {ours}"
            sheets.append(sheet_of(results, at, [against, system], note))
    return sheets


def _sweep(results: Results, comparisons: Mapping[str, Comparison], what: str) -> Section | None:
    """What the measures do as one number of the recipe changes; None without a verdict or a score."""
    wanted = [
        measure for measure in (NEGLECT, RIGHT, DETECTED[0], FULL, MINIMUM, TEXT) if measure in results.values
    ]
    name = f"sweep-{what.replace(' ', '-')}"
    comparison, points = comparisons[name], results.sweeps[what]
    subset = ALL if ALL in results.subsets else list(results.subsets)[-1]
    base, _, key = what.rpartition(" ")
    origin = f"{FULL_METHOD} {base}".strip()

    def mean(system: str, measure: Measure) -> Estimate:
        found, scale = comparison.figures[system, subset, measure].mean, 100 if measure.rate else 1
        return Estimate(scale * found.value, scale * found.low, scale * found.high)

    curves = [
        Curve(
            measure.title + (", %" if measure.rate else ""),
            [(value, mean(system, measure)) for value, system in points],
            next((value for value, system in points if system == origin), None),
            mean(PLAIN, measure).value if PLAIN in comparison.systems else float("nan"),
        )
        for measure in wanted
    ]
    if not curves:
        return None
    prompts = max(figure.prompts for figure in comparison.figures.values())
    of_recipe = f"the recipe {base}" if base else "what the model recommends"
    caption = (
        f"Means over prompts and their 95 % intervals for several values of {key}; all else is {of_recipe}. "
        f"Filled: its own value; dashed: {name_of(results, PLAIN)}. {told_of(results)}"
    )
    rows = [
        [
            Cell(f"{value:g}" + (" (the recipe's own)" if system == origin else "")),
            *(_interval_cell(comparison, system, subset, measure) for measure in wanted),
        ]
        for value, system in points
    ]
    if PLAIN in comparison.systems:
        cells = (_interval_cell(comparison, PLAIN, subset, measure) for measure in wanted)
        rows.append([Cell(short_name(results, PLAIN)), *cells])
    table = Table(name, caption, [key, *(measure.title for measure in wanted)], rows)
    return Section(
        f"Sweep: {what.replace('_', ' ')}",
        [f"On {count_text(prompts, 'prompt')} and the seeds that all of them have."],
        [Plot(name, caption, drawn(figures.sweep(key.replace("_", " "), curves))), table],
    )


def _interval_cell(comparison: Comparison, system: str, subset: str, measure: Measure) -> Cell:
    found = comparison.figures[system, subset, measure].mean
    best = comparison.is_best(system, subset, measure)
    return Cell(value_text(measure, found.value), interval_text(measure, found, mean=True), best)


def _metrics_judged(results: Results) -> Section | None:
    agreements = numbers.agreements(results)
    if not agreements:
        return None
    truths = list(dict.fromkeys(found.truth for found in agreements))
    heads = ["", "of any two images", "of two of one prompt", "of two by one system", "correlation"]
    tables = [
        Table(
            f"agreement-{truth.column}",
            f"How often a score prefers the image that is right: {label}. {told_of(results, truth)}",
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
    figure = figures.separation(shown, ("all subjects there", "a subject is missing"))
    caption = (
        "Scores of images with all their subjects and of the others, as shares of each kind. "
        f"{told_of(results, truths[0])}"
    )
    return Section(
        "Do the scores measure what they claim to?",
        [
            f"Take two images, one right and one wrong by the verdict of {results.judges[truths[0].metric]}. "
            "How often does the right one have the higher score? (1: always; 0.5: as by chance.) The two are "
            "any two images, two of one prompt, or two of one prompt by one system. The last tells how well "
            "the score chooses among seeds. The last column is the correlation of score and verdict."
        ],
        [*tables, Plot("separation", caption, drawn(figure))],
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
            "Averages over the run. Seconds are an image's share of its batch's time. Compare them only if "
            "all systems were drawn on the same machine."
        ],
        [
            Table(
                "cost",
                f"What an image costs on average. {told_of(results)}",
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
        f"The other run is {others.run}. Each system is compared on the prompts and seeds that it has in "
        "both runs. The difference is the other run minus this one."
        if rows
        else f"{others.run} has no system, prompt and seed in common with this run."
    ]
    if differing:
        told.append(f"The other has {', '.join(differing)}.")
    if judges:
        told.append(f"Judged by different models: {'; '.join(judges)}.")
    columns = ["", "this run", "the other", "difference"]
    title = f"Beside another run: {others.settings['model']}"
    caption = f"This run beside one of {others.settings['model']}. {told_of(results)}"
    return Section(title, told, [Table("beside", caption, columns, rows)] if rows else [])


def _circumstances(results: Results) -> Section:
    settings = results.settings
    facts = [(name, str(settings[name])) for name in _CONDITIONS if settings.get(name) is not None]
    facts.append(("seeds", seeds_text(sorted({row["seed"] for row in results.rows}))))
    for name, column in (("drawn on", "device"), ("machine", "machine"), ("drawn by", "versions")):
        found = dict.fromkeys(row.get(column) for row in results.rows)
        facts += [(name, value) for value in found if value]
    facts.append(("hosts", str(len({row["host"] for row in results.rows}))))
    facts += [(f"{metric} judged by", judge) for metric, judge in results.judges.items()]
    blocks = [Table("circumstances", "", ["", ""], [[Cell(name), Cell(value)] for name, value in facts])]
    systems = {name: told for name, told in settings["systems"].items() if told and name in results.left_out}
    if systems:
        numbers_of = {name: _numbers_of(told) for name, told in systems.items()}
        keys = dict.fromkeys(key for told in numbers_of.values() for key in told)
        rows = [[Cell("in the run"), *map(Cell, systems)]]
        rows += [[Cell(key), *(Cell(told.get(key, "–")) for told in numbers_of.values())] for key in keys]
        heads = ["", *(name_of(results, name) for name in systems)]
        blocks.append(Table("circumstances-systems", "The systems with all their numbers.", heads, rows))
    return Section(
        "What ran",
        ["The numbers of all tables, and the prompts and images behind them, are in numbers/."],
        blocks,
    )


def seeds_text(seeds: list[int]) -> str:
    """ "0 to 3, 7"."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _numbers_of(told: Mapping[str, Any]) -> dict[str, str]:
    """What a method does to an image, as `System.numbers` has it, number by number."""
    recipe = told.get("recipe")
    flat = {key: value for key, value in told.items() if key not in ("name", "code", "recipe")}
    flat |= recipe if isinstance(recipe, dict) else {}
    flat |= {"digest of its code": told.get("code")}
    return {
        key.replace("_", " "): value if isinstance(value, str) else json.dumps(value)
        for key, value in flat.items()
        if value not in (None, {}, "")
    }
