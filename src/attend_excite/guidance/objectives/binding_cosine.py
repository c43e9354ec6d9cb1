"""A modifier lies where its noun lies, by angle: EBAMA."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Need, Recorded, Words, bound_and_apart


@dataclass(frozen=True)
class BindingCosine:
    """Sum over subjects of: distances of the modifiers to the noun, less the noun's mean distance to all
    words outside the phrase. The distance is 1 - cosine of raw maps.

    The object-conditioned energy of Zhang et al., ECCV 2024, arXiv 2404.07389. A noun without modifiers has
    the negative part. Their intensity term is `sum-of-subjects`.
    """

    name = "binding-cosine"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        words = Words.of(recorded, subjects)
        directions = F.normalize(words.maps, dim=-1)
        to_own, noun_away, _ = bound_and_apart(1 - directions @ directions.mT, words, subjects)
        return (to_own - noun_away).sum(dim=1)
