"""There is a patch of each subject, in fuzzy logic: Predicated Diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Need, Recorded, raw_maps


@dataclass(frozen=True)
class Existence:
    """Sum over subjects of -log(1 - prod over patches of (1 - A)), "some patch is a cat": Sueyoshi and
    Matsubara, CVPR 2024, arXiv 2311.16117. Raw maps: in sharpened ones every word has its share of every
    patch, so that there always seems to be one. For a negated subject its opposite, -log prod (1 - A), "no
    patch is". Targets play no part.
    """

    name = "existence"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        maps = raw_maps(recorded, subjects.positions, subjects.valid)
        limits = torch.finfo(maps.dtype)
        none = torch.log1p(-maps.clamp(max=1 - limits.eps)).sum(dim=(-2, -1))
        some = (-torch.expm1(none)).clamp(min=limits.tiny).log()
        return -torch.where(subjects.negated, none, some).masked_fill(~subjects.here, 0).sum(dim=1)
