"""Systems against one of them: every average, how sure it is, and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attend_excite.benchmark import statistics
from attend_excite.benchmark.results import Measure, Results
from attend_excite.benchmark.statistics import NOTHING, Estimate, Values


@dataclass(frozen=True)
class Figure:
    """A system's average over a subset's prompts.

    Attributes:
        mean: over prompts, of the means of their images.
        difference: from the reference on the prompts that both have: percentage points of rates, else per
            cent of the reference; NaN for the reference itself.
        prompts: how many.
        images: how many.
    """

    mean: Estimate
    difference: Estimate
    prompts: int
    images: int


@dataclass(frozen=True)
class Comparison:
    """Figures of some systems.

    Attributes:
        name: of the comparison, in tables of numbers.
        systems: in the order of the tables.
        reference: the system that the others are compared with; None: none.
        figures: (system, subset, measure) -> its figure.
    """

    name: str
    systems: Sequence[str]
    reference: str | None
    figures: dict[tuple[str, str, Measure], Figure]

    def is_best(self, system: str, subset: str, measure: Measure) -> bool:
        """Whether no system has a better mean; of those that are equal each is."""
        means = [self.figures[other, subset, measure].mean.value for other in self.systems]
        pick = np.nanmin if measure.lower_is_better else np.nanmax
        mine = self.figures[system, subset, measure].mean.value
        return not np.isnan(mine) and bool(np.isclose(mine, pick(means), rtol=1e-12, atol=1e-12))

    def numbers(self) -> list[dict[str, Any]]:
        """A row a figure."""
        return [
            {
                "comparison": self.name,
                "system": system,
                "subset": subset,
                "measure": measure.key,
                **figure.mean.columns("mean"),
                "reference": self.reference,
                **figure.difference.columns("difference"),
                "difference_unit": "points" if measure.rate else "%",
                "prompts": figure.prompts,
                "images": figure.images,
            }
            for (system, subset, measure), figure in self.figures.items()
        ]


def compare(
    results: Results,
    name: str,
    systems: Sequence[str],
    images: NDArray[np.bool_] | None = None,
    reference: str | None = None,
) -> Comparison:
    """All measures of some systems, subset by subset.

    Args:
        results: of the run.
        name: of the comparison.
        systems: to compare.
        images: (images,), those to take; None: all.
        reference: the system that the others are compared with, where it is among them; None: the run's.
    """
    reference = reference or results.reference
    figures = {}
    for measure in results.measures:
        means = {system: results.means(system, measure, images) for system in systems}
        for subset, prompts in results.subsets.items():
            for system in systems:
                values = means[system][prompts]
                scored = (results.system_of == system) & prompts[results.prompt_of]
                scored &= ~np.isnan(results.values[measure])
                figures[system, subset, measure] = Figure(
                    mean=statistics.mean(values),
                    difference=NOTHING
                    if system == reference or reference is None or reference not in means
                    else apart(measure, values, means[reference][prompts]),
                    prompts=int((~np.isnan(values)).sum()),
                    images=int((scored if images is None else scored & images).sum()),
                )
    return Comparison(name, systems, reference, figures)


def apart(measure: Measure, values: Values, reference: Values) -> Estimate:
    """How far means on the same prompts are apart: percentage points of rates, else per cent."""
    if not measure.rate:
        return statistics.relative_difference(values, reference)
    found = statistics.difference(values, reference)
    return Estimate(100 * found.value, 100 * found.low, 100 * found.high)
