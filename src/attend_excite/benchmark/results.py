"""A run and its scores as columns: what a report is made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attend_excite.benchmark import statistics, store
from attend_excite.benchmark.names import FULL_METHOD, PLAIN, REWEIGHT, is_ablation, is_own, titles
from attend_excite.benchmark.prompts import as_drawn
from attend_excite.benchmark.score import UPPER_BOUND
from attend_excite.benchmark.statistics import Values

ALL = "all"
"""The subset of all prompts."""

_SWEPT = re.compile(rf"{FULL_METHOD} (?P<what>(?:[^ =]+ )?\w+)=(?P<value>-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


@dataclass(frozen=True)
class Measure:
    """A figure that each image has.

    Attributes:
        metric: the folder of scores that it is in.
        column: its column there.
        title: for people.
        rate: it is 0 or 1, told in per cent, and compared in percentage points; else it is compared in per
            cent of Attend-and-Excite's, as in the paper.
        lower_is_better: so it is.
    """

    metric: str
    column: str
    title: str
    rate: bool = False
    lower_is_better: bool = False

    @property
    def key(self) -> str:
        """Its name in tables of numbers."""
        return f"{self.metric} {self.column}"


FULL = Measure("clip", "full", "Full prompt similarity")
MINIMUM = Measure("clip", "minimum", "Minimum object similarity")
TEXT = Measure("captions", "similarity", "Text-text similarity")
YES = Measure("vqa", "yes", "VQA score")
NEGLECT, MISCOLOURED, RIGHT = (
    Measure("presence", "neglected", "A subject is missing", rate=True, lower_is_better=True),
    Measure("presence", "miscoloured", "A colour is wrong", rate=True, lower_is_better=True),
    Measure("presence", "right", "All there, in their colours", rate=True),
)
DETECTED = (
    Measure("detector", "neglected", "A subject is not detected", rate=True, lower_is_better=True),
    Measure("detector", "miscoloured", "A detected colour is wrong", rate=True, lower_is_better=True),
    Measure("detector", "right", "All detected, in their colours", rate=True),
)
BY_GENEVAL = Measure("geneval", "right", "As asked, by GenEval's rule", rate=True)
MEASURES = (FULL, MINIMUM, TEXT, YES, NEGLECT, MISCOLOURED, RIGHT, *DETECTED, BY_GENEVAL)


@dataclass(frozen=True)
class Results:
    """The images of a run that were drawn and not blacked out, with their scores.

    Attributes:
        run: its folder or URL.
        settings: what the run is.
        rows: one an image: the run's columns.
        prompts: the run's prompts, in its order: `prompt`, `subset`, `subjects`.
        systems: those with images, in the run's order.
        values: a measure -> (images,), NaN where an image has no score.
        captions: (images,), where there are any.
        judges: a metric -> who scored.
        upper_bound: a subject -> the similarity of real images, by the CLIP that judges the others.
        left_out: a system, also one without images -> (blacked out, failed).
        reference: the system that differences in tables are from; None: there is no other.
        highlight: the system that the report is about: it stands out in figures, and is set against the
            baseline in the headline, pair by pair, and prompt by prompt.
    """

    run: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    systems: list[str]
    values: dict[Measure, Values]
    captions: list[str | None]
    judges: dict[str, str]
    upper_bound: dict[str, float]
    left_out: dict[str, tuple[int, int]]
    reference: str | None
    highlight: str | None

    @cached_property
    def titles(self) -> dict[str, str]:
        """A name for people for each system."""
        return titles(self.left_out, self.settings["model"], self.settings.get("titles"))

    @property
    def baseline(self) -> str | None:
        """What the highlighted system is set against: the reference, or else the plain model, if it is
        there."""
        others = [self.reference, PLAIN, *self.main_systems]
        return next((name for name in others if name in self.systems and name != self.highlight), None)

    @property
    def challengers(self) -> list[str]:
        """The systems that are set against the baseline: the highlighted one, and those that a user wrote."""
        wanted = [self.highlight, *filter(is_own, self.systems)]
        return [name for name in dict.fromkeys(wanted) if name is not None and name != self.baseline]

    @property
    def measures(self) -> list[Measure]:
        """Those that some image has."""
        return list(self.values)

    @property
    def main_systems(self) -> list[str]:
        """All but the ablations and re-weighting, which the paper compares apart (appendix C.1), unless one
        was chosen to be the reference or the highlight, or there are no others."""
        chosen = (self.reference, self.highlight)
        main = [
            name for name in self.systems if name in chosen or not (is_ablation(name) or name == REWEIGHT)
        ]
        return main or list(self.systems)

    @property
    def ablations(self) -> list[str]:
        """Attend-and-Excite with other recipes."""
        swept = {system for points in self.sweeps.values() for _, system in points}
        return [name for name in self.systems if is_ablation(name) and name not in swept]

    @cached_property
    def sweeps(self) -> dict[str, list[tuple[float, str]]]:
        """Recipes in which one number differs: "step_size", or "official step_size" -> (its value, the
        system), in order. The recipe that they come from is among them, where it was drawn too."""
        found: dict[str, list[tuple[float, str]]] = {}
        for system in self.systems:
            told = _SWEPT.fullmatch(system)
            if told:
                found.setdefault(told["what"], []).append((float(told["value"]), system))
        sweeps = {}
        for what, points in found.items():
            base, _, key = what.rpartition(" ")
            origin = f"{FULL_METHOD} {base}".strip()
            recipe: dict[str, Any] = self.settings["systems"].get(origin, {}).get("recipe") or {}
            value: Any = recipe.get(key)
            if origin in self.systems and type(value) in (int, float):
                points = [*points, (float(value), origin)]
            if len(points) > 1:
                sweeps[what] = sorted(points)
        return sweeps

    @cached_property
    def subsets(self) -> dict[str, NDArray[np.bool_]]:
        """A subset -> (prompts,), and all of them last where there are several."""
        given = [prompt["subset"] for prompt in self.prompts]
        unnamed = ALL if len(set(given)) == 1 else "other"
        names = [name or unnamed for name in given]
        subsets = {name: np.array([each == name for each in names]) for name in dict.fromkeys(names)}
        return subsets if len(subsets) == 1 else subsets | {ALL: np.ones(len(self.prompts), dtype=bool)}

    @cached_property
    def prompt_of(self) -> NDArray[np.int64]:
        """(images,): the index of each image's prompt."""
        places = {prompt["prompt"]: at for at, prompt in enumerate(self.prompts)}
        return np.array([places[row["prompt"]] for row in self.rows], dtype=np.int64)

    @cached_property
    def system_of(self) -> NDArray[np.str_]:
        """(images,): each image's system."""
        return np.array([row["system"] for row in self.rows], dtype=str)

    def means(self, system: str, measure: Measure, images: NDArray[np.bool_] | None = None) -> Values:
        """(prompts,): a system's mean on each prompt, of its images or of some of them."""
        chosen = self.system_of == system
        if images is not None:
            chosen &= images
        return statistics.per_prompt(self.prompt_of[chosen], self.values[measure][chosen], len(self.prompts))

    def shared(self, systems: Sequence[str]) -> NDArray[np.bool_]:
        """(images,): those of the prompts and seeds that all of some systems have."""
        keys = [(row["prompt"], row["seed"]) for row in self.rows]
        of_systems = [
            {key for key, system in zip(keys, self.system_of, strict=True) if system == name}
            for name in systems
        ]
        common = set.intersection(*of_systems)
        return np.array([key in common for key in keys], dtype=bool)

    @cached_property
    def compared(self) -> NDArray[np.bool_] | None:
        """(images,): the prompts and seeds that all main systems have, so that their means are of the same;
        None, which is all, where they have none in common."""
        images = self.shared(self.main_systems)
        return images if images.any() else None

    def bound(self, subset: str) -> float:
        """The upper bound of the minimum object similarity: the mean over the subset's subjects (Section
        5.2); NaN where real images of one are lacking."""
        prompts = [prompt for prompt, there in zip(self.prompts, self.subsets[subset], strict=True) if there]
        subjects = {subject for prompt in prompts for subject in prompt["subjects"]}
        if not subjects or subjects - self.upper_bound.keys():
            return float("nan")
        return float(np.mean([self.upper_bound[subject] for subject in sorted(subjects)]))


def read_results(run: str | Path, *, reference: str | None = None, highlight: str | None = None) -> Results:
    """Read a run and all its scores.

    Args:
        run: the run's folder, or its URL.
        reference: the system that the others are compared with; None: Attend-and-Excite, if it is there.
        highlight: the system that the report is about; None: likewise, or else the first that a user wrote.

    Raises:
        ValueError: there is no run, it has no images, or none by a system that is named; or a metric's
            scores are by several judges.
    """
    settings = store.read_settings(run)
    everything = store.read_rows(run).to_pylist()
    rows = [row for row in everything if row["image"] is not None and not row["nsfw"]]
    if not rows:
        raise ValueError(f"the run '{run}' has no images yet: draw some with attend-excite benchmark run")
    # A score is of the picture that was there then: where another was drawn since, it says nothing.
    digests = {row["job"]: row["digest"] for row in rows}
    scores = {
        metric: {
            score["job"]: score
            for score in store.read_scores(run, metric).to_pylist()
            if score["job"] in digests and score.get("digest") == digests[score["job"]]
        }
        for metric in dict.fromkeys(measure.metric for measure in MEASURES)
    }
    tried = _in_order(settings["systems"], {row["system"] for row in everything})
    there = {row["system"] for row in rows}
    systems = [name for name in tried if name in there]
    for name in (reference, highlight):
        if name is not None and name not in there:
            raise ValueError(f"the run '{run}' has no images by '{name}': it has {', '.join(systems)}")
    full = FULL_METHOD if FULL_METHOD in there else None
    judges = {metric: _judge(run, metric, of_jobs) for metric, of_jobs in scores.items() if of_jobs}
    return Results(
        run=str(run),
        settings=settings,
        rows=rows,
        prompts=_prompts(settings, rows),
        systems=systems,
        values={
            measure: _column(scores[measure.metric], rows, measure.column)
            for measure in MEASURES
            if any(score.get(measure.column) is not None for score in scores[measure.metric].values())
        },
        captions=[scores["captions"].get(row["job"], {}).get("caption") for row in rows],
        judges=judges,
        upper_bound={
            row["job"]: row["similarity"]
            for row in store.read_scores(run, UPPER_BOUND).to_pylist()
            if row["scored_by"] == judges.get("clip")
        },
        left_out={
            name: (
                sum(bool(row["nsfw"]) for row in everything if row["system"] == name),
                sum(row["image"] is None for row in everything if row["system"] == name),
            )
            for name in tried
        },
        reference=reference or full,
        highlight=highlight or full or next(filter(is_own, systems), None),
    )


def _prompts(settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prompts that have images, in the run's order."""
    found = {
        row["prompt"]: {
            "prompt": row["prompt"],
            "subset": row["subset"] or "",
            "subjects": row["subjects"] or [],
        }
        for row in rows
    }
    return [found[text] for text in _in_order(map(as_drawn, settings["prompts"]), set(found))]


def _in_order(names: Iterable[str], there: set[str]) -> list[str]:
    """Those that are there, first the named ones in their order."""
    return [name for name in dict.fromkeys([*names, *sorted(there)]) if name in there]


def _column(scores: dict[str, dict[str, Any]], rows: Sequence[dict[str, Any]], column: str) -> Values:
    values = [scores.get(row["job"], {}).get(column) for row in rows]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _judge(run: str | Path, metric: str, scores: dict[str, dict[str, Any]]) -> str:
    judges = sorted({score["scored_by"] for score in scores.values()})
    if len(judges) > 1:
        raise ValueError(
            f"some scores of {metric} in '{run}' are by {judges[0]}, others by {judges[1]}: "
            "finish attend-excite benchmark score; if it says that pictures are gone, the same attend-excite "
            "benchmark run as before draws them again first"
        )
    return judges[0]
