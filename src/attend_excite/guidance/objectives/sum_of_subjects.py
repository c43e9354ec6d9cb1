"""Every subject peaks somewhere: the losses of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Recorded, Sharpened, peak_losses


@dataclass(frozen=True)
class SumOfSubjects(Sharpened):
    """Sum over subjects of (target - peak). Sharpened maps.

    But for a constant, EBAMA's intensity term (Zhang et al., ECCV 2024, arXiv 2404.07389), there with weight
    0.5.
    """

    name = "sum-of-subjects"

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        return peak_losses(recorded, subjects, self.temperature, self.sigma).sum(dim=1)
