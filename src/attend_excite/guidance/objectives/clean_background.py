"""A subject is in one place: what is left of it elsewhere goes: InitNO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import SIGMA, TEMPERATURE, Need, Recorded, sharpened
from attend_excite.guidance.objectives.regions import region_of_peak


@dataclass(frozen=True)
class CleanBackground:
    """Sum over subjects of the largest value outside the region about the peak, where it is above the
    smallest
    inside: of Guo et al., CVPR 2024, arXiv 2404.04650, as its authors' code has it. Sharpened maps. The
    region is what of the patches above Otsu's threshold is connected with the peak.

    Attributes:
        temperature: factor on the attention before the softmax over the tokens, above 0.
        sigma: the Gaussian filter's standard deviation in patches; 0: no filter.
    """

    temperature: float = TEMPERATURE
    sigma: float = SIGMA

    name = "clean-background"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        maps = sharpened(recorded, subjects, subjects.positions, subjects.valid, self.temperature, self.sigma)
        inside = region_of_peak(maps)
        background = maps.masked_fill(inside, 0).amax(dim=(-2, -1))
        foreground = maps.detach().masked_fill(~inside, 1).amin(dim=(-2, -1))
        return background.masked_fill(~(subjects.shown & (background > foreground)), 0).sum(dim=1)
