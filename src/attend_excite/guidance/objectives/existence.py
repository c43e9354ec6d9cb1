"""There is a patch of each subject, in fuzzy logic: Predicated Diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Recorded, Sharpened, masked_mean


@dataclass(frozen=True)
class Existence(Sharpened):
    """Mean over subjects of -log(1 - prod over patches of (1 - A)), "some patch is a cat": Sueyoshi and
    Matsubara, CVPR 2024, arXiv 2311.16117. Sharpened maps. In place of the product stands the geometric mean:
    every word has a share of every patch, and of hundreds of patches the product is always 0. For a negated
    subject its opposite, -mean log(1 - A), "no patch is". Targets play no part.
    """

    name = "existence"

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        maps = self.maps(recorded, subjects)
        limits = torch.finfo(maps.dtype)
        none = torch.log1p(-maps.clamp(max=1 - limits.eps)).mean(dim=(-2, -1))
        some = (-torch.expm1(none)).clamp(min=limits.tiny).log()
        return masked_mean(-torch.where(subjects.negated, none, some), subjects.here)
