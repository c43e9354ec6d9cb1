"""A subject is in one place: what is left of it elsewhere goes: InitNO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Recorded, Sharpened
from attend_excite.guidance.objectives.regions import region_of_peak


@dataclass(frozen=True)
class CleanBackground(Sharpened):
    """Sum over subjects of the largest value outside the region about the peak, where it is above the
    smallest inside: of Guo et al., CVPR 2024, arXiv 2404.04650, as its authors' code has it. Sharpened maps.
    The region is what of the patches above Otsu's threshold is connected with the peak.
    """

    name = "clean-background"

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        maps = self.maps(recorded, subjects)
        inside = region_of_peak(maps)
        background = maps.masked_fill(inside, 0).amax(dim=(-2, -1))
        foreground = maps.detach().masked_fill(~inside, 1).amin(dim=(-2, -1))
        return background.masked_fill(~(subjects.shown & (background > foreground)), 0).sum(dim=1)
