"""No two subjects share their patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Recorded, Sharpened, masked_mean, over_patches, pairs


@dataclass(frozen=True)
class Overlap(Sharpened):
    """Mean over pairs of subjects of sum min(a, b) / sum (a + b): 0 for maps that share no patch, 1/2 for
    equal ones. A-STAR (Agarwal et al., ICCV 2023, arXiv 2306.14544); SAGA (arXiv 2508.13866).

    Attributes:
        raw: whether it takes the raw attention over the patches, which weighs all subjects alike, or the
            sharpened maps, in which a subject without attention overlaps with none.
    """

    raw: bool = False

    name = "overlap"

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        if self.raw:
            maps = over_patches(recorded, subjects.positions, subjects.valid)
        else:
            maps = self.maps(recorded, subjects)
        return masked_mean(pairwise_overlap(maps.flatten(2)), pairs(subjects), dims=2)


def pairwise_overlap(maps: Tensor) -> Tensor:
    """(b, S, P) maps, none negative -> (b, S, S): sum min(a, b) / sum (a + b), 0 to 1/2."""
    shared = torch.minimum(maps[:, :, None], maps[:, None]).sum(dim=-1)
    mass = maps.sum(dim=-1)
    together = mass[:, :, None] + mass[:, None]
    return shared / together.clamp(min=torch.finfo(maps.dtype).tiny)
