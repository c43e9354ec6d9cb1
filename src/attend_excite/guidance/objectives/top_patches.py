"""Every subject has more than a peak: the mean of its best patches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens, most_neglected
from attend_excite.guidance.objectives.base import Recorded, Sharpened, losses_here


@dataclass(frozen=True)
class TopPatches(Sharpened):
    """max over subjects of (target - mean of the k largest values): the cross-attention loss of Self-Cross
    (Qiu et al., CVPR 2025, arXiv 2411.18936), there with 16 of 256 patches. Sharpened maps.

    Attributes:
        k: how many patches, 1 or more; all, where there are fewer.
    """

    k: int = 16

    name = "top-patches"

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        maps = self.maps(recorded, subjects).flatten(-2)
        attention = maps.topk(min(self.k, maps.shape[-1]), dim=-1).values.mean(dim=-1)
        return most_neglected(losses_here(attention, subjects))
