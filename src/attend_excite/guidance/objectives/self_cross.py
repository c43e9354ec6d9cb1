"""The patches that make up one subject don't look at those of another, all of them: Self-Cross."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens, most_neglected, smooth
from attend_excite.guidance.objectives.base import (
    Need,
    Recorded,
    Sharpened,
    losses_here,
    masked_mean,
    self_attention,
)
from attend_excite.guidance.objectives.regions import above_otsu


@dataclass(frozen=True)
class SelfCross(Sharpened):
    """Mean over ordered pairs of subjects of sum min(what the one's patches look at, the other's map):
    Qiu et al., CVPR 2025, arXiv 2411.18936. Sharpened maps.

    What a subject's patches look at is their self-attention, weighed by the subject's map within Otsu's
    threshold, smoothed, and normalised to sum 1. So the term is 0 to 1.

    Attributes:
        gate: it counts only in an image whose most neglected subject's loss, by its k best patches, is at
            most so much, 0 to 1; 1: always.
        k: of the gate: how many patches.
    """

    gate: float = 0.5
    k: int = 16

    name = "self-cross"
    needs = frozenset[Need]({"self-attention"})

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        maps = self.maps(recorded, subjects)
        flat = maps.flatten(2)
        weights = (maps * above_otsu(maps)).flatten(2)
        looked_at = smooth((weights @ self_attention(recorded)).unflatten(-1, maps.shape[-2:]), self.sigma)
        looked_at = looked_at.flatten(2)
        looked_at = looked_at / looked_at.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
        shared = torch.minimum(looked_at[:, :, None], flat[:, None]).sum(dim=-1)
        shown = subjects.shown
        itself = torch.eye(shown.shape[1], dtype=torch.bool, device=shown.device)
        loss = masked_mean(shared, shown[:, :, None] & shown[:, None] & ~itself, dims=2)
        best = flat.detach().topk(min(self.k, flat.shape[-1]), dim=-1).values.mean(dim=-1)
        neglected = most_neglected(losses_here(best, subjects)) > self.gate
        return loss.masked_fill(neglected, 0)
