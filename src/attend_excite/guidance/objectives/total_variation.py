"""A subject stands out from its surroundings, and its modifiers stand with it: Divide & Bind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Recorded, Sharpened, masked_mean


@dataclass(frozen=True)
class TotalVariation(Sharpened):
    """max over subjects of -(total variation of its map - binding * divergence from its modifiers):
    Li et al., BMVC 2023, arXiv 2307.10864. Sharpened maps; 0 or less without modifiers.

    The total variation is the mean absolute difference of neighbours down, and that across. The divergence is
    Jensen-Shannon's, of softmaxes over the patches of what is above a floor in each map, the modifier's
    stretched to the noun's range; its mean over the modifiers.

    Attributes:
        binding: the divergence's weight, 0 or more.
        noun_floor: share of the noun's peak below which its map counts as 0.
        modifier_floor: likewise of the modifier's.
    """

    binding: float = 1.0
    noun_floor: float = 0.2
    modifier_floor: float = 0.3

    name = "total-variation"

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        nouns = self.maps(recorded, subjects)
        loss = -total_variation(nouns)
        if subjects.attributes.shape[2]:
            modifiers = self.maps(recorded, subjects, subjects.attributes, subjects.attributes_valid)
            modifiers = modifiers.flatten(-2)
            flat = nouns.flatten(-2)[:, :, None]
            low, high = _range(modifiers)
            least, most = _range(flat)
            spread = torch.where(high > low, high - low, 1)
            modifiers = (modifiers - low) / spread * (most - least) + least
            apart = divergence(_softmax(flat, self.noun_floor), _softmax(modifiers, self.modifier_floor))
            loss = loss + self.binding * masked_mean(apart, subjects.attributes_valid.any(dim=-1))
        shown = subjects.shown
        worst = loss.masked_fill(~shown, -torch.inf).amax(dim=1)
        return torch.where(shown.any(dim=1), worst, loss.sum(dim=1) * 0)


def total_variation(maps: Tensor) -> Tensor:
    """(..., H, W) -> (...): mean |difference| of neighbours down, and across."""
    return sum((maps.diff(dim=dim).abs().mean(dim=(-2, -1)) for dim in (-2, -1)), maps.new_zeros(()))


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon's, of distributions along the last dimension with no 0 in them: 0 to log 2."""
    middle = ((first + second) / 2).log()
    return (
        sum(((each * (each.log() - middle)).sum(dim=-1) for each in (first, second)), middle.new_zeros(()))
        / 2
    )


def _range(maps: Tensor) -> tuple[Tensor, Tensor]:
    return maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)


def _softmax(maps: Tensor, floor: float) -> Tensor:
    return (maps - floor * maps.amax(dim=-1, keepdim=True)).relu().softmax(dim=-1)
