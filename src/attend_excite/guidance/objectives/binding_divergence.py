"""A modifier lies where its noun lies, by divergence: SynGen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Need, Recorded, Words, bound_and_apart

# Below it a patch counts as having none of a word's attention.
_LEAST = 1e-8


@dataclass(frozen=True)
class BindingDivergence:
    """Sum over nouns and their modifiers of: the distance of the two, less half of the sum of either's mean
    distance to all words outside the phrase. The distance is the symmetric Kullback-Leibler divergence of
    maps over patches.

    Rassin et al., NeurIPS 2023, arXiv 2306.08877. A noun without modifiers has no part in it.
    A word of several tokens has the attention of all together, where the authors take the largest distance of
    any.
    """

    name = "binding-divergence"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        words = Words.of(recorded, subjects)
        to_own, noun_away, modifiers_away = bound_and_apart(divergences(words.maps), words, subjects)
        modifiers = (subjects.shown[..., None] & subjects.attributes_valid.any(dim=-1)).sum(dim=2)
        return (to_own - modifiers * (noun_away + modifiers_away) / 2).sum(dim=1)


def divergences(maps: Tensor) -> Tensor:
    """(b, W, P) maps that sum to 1 -> (b, W, W): half of KL(a|b) + KL(b|a), 0 only where they are equal."""
    logs = maps.clamp(min=_LEAST).log()
    between = maps @ logs.mT
    own = (maps * logs).sum(dim=-1)
    return (own[:, :, None] + own[:, None] - between - between.mT) / 2
