"""What a report's tables are made of, and the same as rows for `numbers/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attend_excite.benchmark import statistics
from attend_excite.benchmark.comparison import Comparison, apart
from attend_excite.benchmark.names import FULL_METHOD, PLAIN, REWEIGHT
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
from attend_excite.benchmark.statistics import Estimate, Values

Rows = list[dict[str, Any]]

# What the paper found: the first above the second, in which scores.
_SIMILARITIES = (MINIMUM, FULL, TEXT)
_FINDINGS = (
    *((FULL_METHOD, other, _SIMILARITIES) for other in (PLAIN, "structure", "composable", REWEIGHT)),
    (PLAIN, "structure", (MINIMUM,)),
    (PLAIN, "composable", (TEXT,)),
)
_STUDY_COLUMNS = (
    *("votes", "shown", "share", "low", "high", "bootstrap_low", "bootstrap_high"),
    *("strength", "strength_low", "strength_high"),
)


@dataclass(frozen=True)
class Finding:
    """Something that the paper found, and what this run says of it.

    Attributes:
        measure: in which score.
        better: the system that the paper found above the other.
        worse: the other.
        subset: of which prompts.
        difference: of `worse` from `better`, as `apart` has it.
        absolute: the same in the measure's own unit.
    """

    measure: Measure
    better: str
    worse: str
    subset: str
    difference: Estimate
    absolute: Estimate

    @property
    def verdict(self) -> str:
        """ "yes", "no" or "not told apart"."""
        return "yes" if self.absolute.high < 0 else "no" if self.absolute.low > 0 else "not told apart"

    def numbers(self) -> dict[str, Any]:
        """As a row."""
        return {
            "measure": self.measure.key,
            "better": self.better,
            "worse": self.worse,
            "subset": self.subset,
            "holds": self.verdict,
        } | self.difference.columns("difference")


@dataclass(frozen=True)
class Agreement:
    """How well a score tells images that are right from those that are not.

    Attributes:
        truth: the verdict that says which are.
        score: the score.
        any_two: how often, of two images, the one that is right scores higher.
        of_one_prompt: the same of two images of one prompt.
        of_one_system: the same of two images of one prompt by one system.
        correlation: of score and verdict.
        values: (images,) the scores.
        right: (images,) the verdicts.
    """

    truth: Measure
    score: Measure
    any_two: float
    of_one_prompt: Estimate
    of_one_system: Estimate
    correlation: float
    values: Values
    right: NDArray[np.bool_]

    def numbers(self) -> dict[str, Any]:
        """As a row."""
        return (
            {"truth": self.truth.key, "score": self.score.key, "images": len(self.values)}
            | {"any_two": self.any_two, "correlation": self.correlation}
            | self.of_one_prompt.columns("of_one_prompt")
            | self.of_one_system.columns("of_one_system")
        )


@dataclass(frozen=True)
class Beside:
    """A system in this run and in another, on the prompts and seeds that it has in both.

    Attributes:
        system: which.
        measure: of what.
        here: its mean in this run.
        there: its mean in the other.
        difference: of the other from this, as `apart` has it.
    """

    system: str
    measure: Measure
    here: Estimate
    there: Estimate
    difference: Estimate

    def numbers(self) -> dict[str, Any]:
        """As a row."""
        return (
            {"system": self.system, "measure": self.measure.key}
            | self.here.columns("here")
            | self.there.columns("there")
            | self.difference.columns("difference")
        )


def findings(results: Results) -> list[Finding]:
    """The paper's findings on similarities, for those systems and scores that the run has."""
    found = []
    for measure in _SIMILARITIES:
        for better, worse, measures in _FINDINGS:
            there = {better, worse} <= set(results.systems) and measure in results.values
            if not there or measure not in measures:
                continue
            images = results.shared([better, worse])
            first, second = (results.means(name, measure, images) for name in (better, worse))
            for subset, prompts in results.subsets.items():
                pair = second[prompts], first[prompts]
                distances = apart(measure, *pair), statistics.difference(*pair)
                found.append(Finding(measure, better, worse, subset, *distances))
    return found


def agreements(results: Results) -> list[Agreement]:
    """Every score against the verdicts of the presence judge, or else of the detector."""
    truths = (NEGLECT, RIGHT) if NEGLECT in results.values else (DETECTED[0], DETECTED[2])
    return [
        _agreement(results, score, truth)
        for truth in truths
        for score in (FULL, MINIMUM, TEXT, YES)
        if {truth, score} <= results.values.keys()
    ]


def _agreement(results: Results, score: Measure, truth: Measure) -> Agreement:
    both = ~np.isnan(results.values[score]) & ~np.isnan(results.values[truth])
    values = results.values[score][both]
    right = results.values[truth][both] == (0 if truth.lower_is_better else 1)
    prompts, systems = results.prompt_of[both], results.system_of[both]
    of_one = np.unique(systems, return_inverse=True)[1]
    return Agreement(
        truth=truth,
        score=score,
        any_two=statistics.chance_of_order(values, right),
        of_one_prompt=statistics.chance_of_order_within(prompts, np.zeros_like(of_one), values, right),
        of_one_system=statistics.chance_of_order_within(prompts, of_one, values, right),
        correlation=float(np.corrcoef(values, right)[0, 1]) if 0 < right.mean() < 1 else float("nan"),
        values=values,
        right=right,
    )


def beside(results: Results, others: Results) -> list[Beside]:
    """Systems and measures that both runs have, each on the prompts and seeds that it has in both."""
    places = {prompt["prompt"]: at for at, prompt in enumerate(others.prompts)}
    here = [at for at, prompt in enumerate(results.prompts) if prompt["prompt"] in places]
    there = [places[results.prompts[at]["prompt"]] for at in here]
    rows = []
    for system in (name for name in results.systems if name in others.systems):
        common = _seeds_of(results, system) & _seeds_of(others, system)
        mine, theirs = (np.array([_seed(row) in common for row in run.rows]) for run in (results, others))
        for measure in (measure for measure in results.measures if measure in others.values):
            first = results.means(system, measure, mine)[here]
            second = others.means(system, measure, theirs)[there]
            both = ~np.isnan(first) & ~np.isnan(second)
            if both.any():
                means = statistics.mean(first[both]), statistics.mean(second[both])
                rows.append(Beside(system, measure, *means, apart(measure, second, first)))
    return rows


def _seeds_of(results: Results, system: str) -> set[tuple[str, int]]:
    """The prompts and seeds of a system's images."""
    return {_seed(row) for row in results.rows if row["system"] == system}


def _seed(row: dict[str, Any]) -> tuple[str, int]:
    return row["prompt"], row["seed"]


def cost(results: Results) -> Rows:
    """What an image of each system cost on average; None for a system that has none."""
    rows = []
    for system, (nsfw, failed) in results.left_out.items():
        mine = [row for row in results.rows if row["system"] == system]
        averages = {
            name: float(np.mean([row[name] for row in mine])) if mine else None
            for name in ("seconds", "unet_passes", "updates")
        }
        counts = {"images": len(mine), "blacked_out": nsfw, "failed": failed}
        rows.append({"system": system} | counts | averages)
    return rows


def tables(
    results: Results,
    comparisons: Mapping[str, Comparison],
    votes: Mapping[str, Any] | None,
    others: Results | None,
) -> dict[str, Rows]:
    """All that a report says in numbers, by the name of its file; without those that have no row."""
    found = {
        "averages": [row for comparison in comparisons.values() for row in comparison.numbers()],
        "prompts": _prompts(results),
        "images": _images(results),
        "cost": cost(results),
        "findings": _numbers(findings(results)),
        "agreement": _numbers(agreements(results)),
        "bounds": [
            {"subset": subset, "minimum_similarity_of_real_images": results.bound(subset)}
            for subset in results.subsets
            if not np.isnan(results.bound(subset))
        ],
        "study": [] if votes is None else _study(votes),
        "beside": [] if others is None else _numbers(beside(results, others)),
    }
    return {name: rows for name, rows in found.items() if rows}


def _numbers(items: Sequence[Finding | Agreement | Beside]) -> Rows:
    return [item.numbers() for item in items]


def _prompts(results: Results) -> Rows:
    means = {
        (system, measure): results.means(system, measure)
        for system in results.systems
        for measure in results.measures
    }
    return [
        {
            "prompt": prompt["prompt"],
            "subset": prompt["subset"],
            "subjects": "; ".join(prompt["subjects"]),
            "system": system,
        }
        | {measure.key: _known(means[system, measure][at]) for measure in results.measures}
        for at, prompt in enumerate(results.prompts)
        for system in results.systems
    ]


def _images(results: Results) -> Rows:
    columns = ("job", "prompt", "subset", "seed", "system", "seconds", "unet_passes", "updates")
    return [
        {name: row[name] for name in columns}
        | {measure.key: _known(values[at]) for measure, values in results.values.items()}
        | {"caption": results.captions[at]}
        for at, row in enumerate(results.rows)
    ]


def _study(votes: Mapping[str, Any]) -> Rows:
    return [
        {"subset": subset, "system": system, "simulated": votes["simulated"]}
        | {name: shares.get(name) for name in _STUDY_COLUMNS}
        for subset, of_systems in votes["subsets"].items()
        for system, shares in of_systems.items()
    ]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
