"""The patches that make up one subject don't look at those of another, at the peaks: InitNO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens, most_neglected, smooth
from attend_excite.guidance.objectives.base import (
    Need,
    Recorded,
    Sharpened,
    losses_here,
    masked_mean,
    pairs,
    self_attention,
)
from attend_excite.guidance.objectives.overlap import pairwise_overlap


@dataclass(frozen=True)
class SelfOverlap(Sharpened):
    """Mean over pairs of subjects of the overlap of the self-attention of their peaks:
    Guo et al., CVPR 2024, arXiv 2404.04650. The peaks are those of the sharpened maps; no gradient
    goes through where they are.

    Attributes:
        gate: it counts only in an image whose most neglected subject's loss is at most so much, 0 to 1; 1:
            always.
    """

    gate: float = 1.0

    name = "self-overlap"
    needs = frozenset[Need]({"self-attention"})

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        maps = self.maps(recorded, subjects)
        peaks = maps.detach().flatten(2).argmax(dim=-1)
        attention = self_attention(recorded)
        rows = attention.gather(1, peaks[..., None].expand(-1, -1, attention.shape[-1]))
        seen = smooth(rows.unflatten(-1, maps.shape[-2:]), self.sigma).flatten(2)
        loss = masked_mean(pairwise_overlap(seen), pairs(subjects), dims=2)
        highest = maps.detach().flatten(2).amax(dim=-1)
        return loss.masked_fill(most_neglected(losses_here(highest, subjects)) > self.gate, 0)
