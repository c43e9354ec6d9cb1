"""Every subject has more than a peak: the mean of its best patches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens, most_neglected
from attend_excite.guidance.objectives.base import SIGMA, TEMPERATURE, Need, Recorded, losses_here, sharpened


@dataclass(frozen=True)
class TopPatches:
    """max over subjects of (target - mean of the k largest values): the cross-attention loss of Self-Cross
    (Qiu et al., CVPR 2025, arXiv 2411.18936), there with 16 of 256 patches. Sharpened maps.

    Attributes:
        k: how many patches, 1 or more; all, where there are fewer.
        temperature: factor on the attention before the softmax over the tokens, above 0.
        sigma: the Gaussian filter's standard deviation in patches; 0: no filter.
    """

    k: int = 16
    temperature: float = TEMPERATURE
    sigma: float = SIGMA

    name = "top-patches"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        maps = sharpened(
            recorded, subjects, subjects.positions, subjects.valid, self.temperature, self.sigma
        ).flatten(-2)
        attention = maps.topk(min(self.k, maps.shape[-1]), dim=-1).values.mean(dim=-1)
        return most_neglected(losses_here(attention, subjects))
