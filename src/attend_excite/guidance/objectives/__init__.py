"""What nursing can ask of the attention: one file a term, all behind `Term`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from attend_excite.checks import is_number, require
from attend_excite.guidance.objectives.alignment import Alignment
from attend_excite.guidance.objectives.base import Need, Objective, Recorded, Term
from attend_excite.guidance.objectives.binding_cosine import BindingCosine
from attend_excite.guidance.objectives.binding_divergence import BindingDivergence
from attend_excite.guidance.objectives.clean_background import CleanBackground
from attend_excite.guidance.objectives.contrast import Contrast
from attend_excite.guidance.objectives.correspondence import Correspondence
from attend_excite.guidance.objectives.existence import Existence
from attend_excite.guidance.objectives.most_neglected import MostNeglected
from attend_excite.guidance.objectives.overlap import Overlap
from attend_excite.guidance.objectives.self_cross import SelfCross
from attend_excite.guidance.objectives.self_overlap import SelfOverlap
from attend_excite.guidance.objectives.sum_of_subjects import SumOfSubjects
from attend_excite.guidance.objectives.top_patches import TopPatches
from attend_excite.guidance.objectives.total_variation import TotalVariation

TERMS: Mapping[str, Callable[..., Term]] = {
    term.name: term
    for term in (
        MostNeglected,
        SumOfSubjects,
        TopPatches,
        Overlap,
        BindingDivergence,
        BindingCosine,
        Contrast,
        SelfOverlap,
        SelfCross,
        CleanBackground,
        Alignment,
        TotalVariation,
        Existence,
        Correspondence,
    )
}
"""The terms by the name that they have in a recipe."""

_ABOVE_ZERO = ("k", "tau", "temperature")


def term_named(name: str, options: Mapping[str, Any] | None = None, **defaults: Any) -> Term:
    """A term by its name.

    Args:
        name: one of `TERMS`.
        options: its own numbers.
        defaults: numbers that all terms of a recipe share, for those that have them.

    Raises:
        ValueError: there is no such term, it has no such number, or a number is out of its range.
    """
    if name not in TERMS:
        raise ValueError(f"unknown term '{name}': choose one of {', '.join(TERMS)}")
    known: Any = TERMS[name]
    has = {field.name for field in fields(known)}
    if unknown := sorted((options or {}).keys() - has):
        raise ValueError(
            f"the term {name} has no '{unknown[0]}'; known are {', '.join(sorted(has)) or 'none'}"
        )
    for key, value in (options or {}).items():
        _check(name, key, value, getattr(known, key))
    return known(**{key: value for key, value in defaults.items() if key in has} | dict(options or {}))


def _check(name: str, key: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        fine, wanted = isinstance(value, bool), "true or false"
    else:
        whole, above = isinstance(default, int), key in _ABOVE_ZERO
        fine = is_number(value) and (isinstance(value, int) or not whole)
        fine = fine and value < math.inf and (value > 0 if above else value >= 0)
        wanted = f"a {'whole ' if whole else ''}number {'above 0' if above else 'of 0 or more'}"
    require(fine, f"the {key} of the term {name}", value, wanted)


__all__ = ["TERMS", "Need", "Objective", "Recorded", "Term", "term_named"]
