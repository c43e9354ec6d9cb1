"""A subject stays where it was at the step before: InitNO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Need, Recorded, Sharpened, masked_mean


@dataclass(frozen=True)
class Alignment(Sharpened):
    """Mean absolute difference of the subjects' maps from those of the step before; 0 at the first step:
    of Guo et al., CVPR 2024, arXiv 2404.04650, as its authors' code has it, which keeps a moving average of
    the earlier steps where this keeps the last one. Sharpened maps.
    """

    name = "alignment"
    needs = frozenset[Need]({"step-before"})

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        now = self.maps(recorded, subjects)
        before = now.detach() if recorded.before is None else self.maps(recorded.before, subjects)
        return masked_mean((now - before).abs().mean(dim=(-2, -1)), subjects.shown)
