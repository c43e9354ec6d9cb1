"""The sections of a report that repeat the paper's tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attend_excite.benchmark import numbers
from attend_excite.benchmark.blocks import (
    SHOWN_PROMPTS,
    Section,
    Table,
    bar_plot,
    cell_of,
    difference_text,
    name_of,
    sheet_of,
    short_name,
    subset_name,
    table_of,
    told_of,
)
from attend_excite.benchmark.comparison import Comparison
from attend_excite.benchmark.results import (
    DETECTED,
    FULL,
    MINIMUM,
    NEGLECT,
    RIGHT,
    TEXT,
    YES,
    Measure,
    Results,
)
from attend_excite.tables import Cell


def presence(
    results: Results,
    systems: Comparison,
    measures: Sequence[Measure],
    title: str,
    name: str,
    rule: str = "An image neglects a subject where one of those that its prompt names is not there; a colour "
    "is wrong where a subject that is there has another than the prompt names.",
) -> Section | None:
    """A verdict on presence and colours: what the paper shows in pictures, as rates. None without one."""
    wanted = [measure for measure in measures if measure in results.values]
    if not wanted:
        return None
    return Section(
        title,
        [
            f"By {results.judges[wanted[0].metric]}. {rule}",
        ],
        [
            bar_plot(results, systems, wanted, name, "Images that lack what the prompt asks for, by subset."),
            *(
                table_of(results, systems, measure, f"{measure.title}: share of the images.")
                for measure in wanted
            ),
        ],
    )


def similarities(results: Results, comparisons: Mapping[str, Comparison]) -> Section | None:
    """Figure 8: CLIP similarity to the prompt, and to its most neglected part; None without scores."""
    if FULL not in results.values:
        return None
    systems = comparisons["systems"]
    parts = "one part for each subject"
    if not results.judges["clip"].endswith("paper wording"):
        parts = 'before and behind its first "and" or "with"'
    judged_by = f"By {results.judges['clip']}. The minimum is over the parts of the prompt, {parts}."
    return Section(
        "CLIP image-text similarity (Figure 8)",
        [judged_by],
        [
            bar_plot(
                results,
                systems,
                [FULL, MINIMUM],
                "similarity",
                "CLIP's similarity of image and prompt, by subset (the paper's Figure 8, for this model).",
            ),
            table_of(results, systems, FULL, f"{FULL.title}: of image and prompt, by CLIP."),
            table_of(
                results, systems, MINIMUM, f"{MINIMUM.title}: of image and most neglected part, by CLIP."
            ),
        ],
    )


def captions(results: Results, systems: Comparison) -> Section | None:
    """Table 1: similarity of prompt and caption; None without captions."""
    if TEXT not in results.values:
        return None
    return Section(
        "Text-text similarity (Table 1)",
        [f"Between the prompt and a caption of the image, by {results.judges['captions']}."],
        [
            table_of(
                results,
                systems,
                TEXT,
                "Similarity of the prompt and a caption of the image (the paper's Table 1, for this model).",
            )
        ],
    )


def vqa(results: Results, systems: Comparison) -> Section | None:
    """Not in the paper: a vision-language model's answer; None without one."""
    if YES not in results.values:
        return None
    return Section(
        "VQA score",
        [
            f"The chance that {results.judges['vqa']} answers yes when asked whether the image shows the "
            "prompt."
        ],
        [table_of(results, systems, YES, f"{YES.title}: the chance of a yes.")],
    )


def votes(results: Results, votes: Mapping[str, Any]) -> Section:
    """Table 2: the shares of a user study's votes."""
    subsets = list(votes["subsets"])
    names = list(dict.fromkeys(system for shares in votes["subsets"].values() for system in shares))
    rows = []
    for name in names:
        cells = [Cell(name_of(results, name) if name != "none" else "none is better")]
        for subset in subsets:
            shares = {
                system: share
                for system, share in votes["subsets"][subset].items()
                if share["share"] is not None
            }
            share = shares.get(name)
            best = max((found["share"] for found in shares.values()), default=None)
            cells.append(
                Cell("–")
                if share is None
                else Cell(
                    f"{100 * share['share']:.1f} %",
                    _votes_interval(share),
                    share["share"] == best,
                )
            )
        rows.append(cells)
    people = "simulated respondents" if votes["simulated"] else "respondents"
    return Section(
        "User study (Table 2)",
        [
            f"{votes['respondents']} {people} chose the set of images that shows the prompt best; "
            f"{len(votes['excluded'])} more are left out by the study's rules."
            + (
                " The votes are made up by a program to test the study: no person cast them."
                if votes["simulated"]
                else ""
            )
        ],
        [
            Table(
                "votes",
                "Share of the votes that each system got (the paper's Table 2, for this model). "
                f"{votes['respondents']} {people}; pictures by {results.settings['model']}.",
                ["", *map(subset_name, subsets)],
                rows,
                "Intervals of 95 % over respondents and prompts; a dash where there are too few of them.",
            )
        ],
    )


def _votes_interval(share: Mapping[str, Any]) -> str:
    # Not Wilson's: it takes every vote for independent.
    low, high = share.get("bootstrap_low"), share.get("bootstrap_high")
    return "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"


def reweighting(results: Results, comparisons: Mapping[str, Comparison]) -> Section | None:
    """Table 4 and Figure 14: attention re-weighting beside Attend-and-Excite; None without it."""
    comparison = comparisons.get("reweighting")
    if comparison is None:
        return None
    similarities = [measure for measure in (FULL, MINIMUM) if measure in results.values]
    plots = (
        [
            bar_plot(
                results,
                comparison,
                similarities,
                "reweighting",
                "Re-weighting beside Attend-and-Excite (the paper's Figure 14, for this model).",
            )
        ]
        if similarities
        else []
    )
    tables = [
        table_of(results, comparison, measure, title)
        for measure, title in (
            (TEXT, "Text-text similarity, re-weighting beside Attend-and-Excite (the paper's Table 4)."),
            (NEGLECT, f"{NEGLECT.title}: share of the images, re-weighting beside Attend-and-Excite."),
            (RIGHT, f"{RIGHT.title}: share of the images, re-weighting beside Attend-and-Excite."),
        )
        if measure in results.values
    ]
    return Section(
        "Attention re-weighting (Table 4, Figure 14)",
        [
            "Prompt-to-Prompt's re-weighting makes the subjects' attention stronger where it already is, but "
            "cannot move it. Both systems are compared on the prompts and seeds that both have."
        ],
        [*plots, *tables],
    )


def findings(results: Results) -> Section | None:
    """Where this run agrees with what the paper found; None where it has nothing to compare."""
    of_measures: dict[Measure, dict[str, list[Cell]]] = {}
    for found in numbers.findings(results):
        title = f"{name_of(results, found.better)} above {name_of(results, found.worse)}"
        cells = of_measures.setdefault(found.measure, {}).setdefault(title, [Cell(title)])
        cells.append(Cell(found.verdict, difference_text(found.measure, found.difference, interval=True)))
    if not of_measures:
        return None
    heads = ["", *map(subset_name, results.subsets)]
    return Section(
        "Where it agrees with the paper",
        [
            "What the paper finds with Stable Diffusion 1.4, and whether it holds here. In small type: the "
            "difference of the second system from the first, with its 95 % interval. “Not told apart”: that "
            "interval includes 0."
        ],
        [
            Table(
                f"findings-{measure.metric}-{measure.column}",
                f"{measure.title}: what the paper found, and whether it holds. {told_of(results, measure)}",
                heads,
                list(rows.values()),
            )
            for measure, rows in of_measures.items()
        ],
    )


def ablations(results: Results, comparisons: Mapping[str, Comparison]) -> Section | None:
    """Figures 11 and 12: Attend-and-Excite with other recipes, as without one of its parts; None without."""
    comparison = comparisons.get("ablations")
    if comparison is None:
        return None
    wanted = [
        measure for measure in (NEGLECT, RIGHT, DETECTED[0], MINIMUM, TEXT) if measure in results.values
    ]
    shared = results.shared(comparison.systems)
    places = np.unique(results.prompt_of[shared])
    middle = np.linspace(0, len(places) - 1, min(SHOWN_PROMPTS, len(places))).round().astype(int)
    subset = list(results.subsets)[-1]
    rows = []
    for system in comparison.systems:
        cells = [Cell(short_name(results, system))]
        cells += [cell_of(comparison, system, subset, measure) for measure in wanted]
        rows.append(cells)
    return Section(
        "Ablations (Figures 11 and 12)",
        [
            f"On the {len(places)} prompts and the seeds that all of them have. In brackets: the difference "
            "from full Attend-and-Excite. “ns”: not significant, its 95 % interval includes 0."
        ],
        [
            Table(
                "ablations",
                f"Attend-and-Excite with other recipes. {told_of(results)}",
                ["", *(measure.title for measure in wanted)],
                rows,
            ),
            *(sheet_of(results, int(places[at]), comparison.systems) for at in middle),
        ],
    )
