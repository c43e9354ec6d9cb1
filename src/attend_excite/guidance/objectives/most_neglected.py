"""Every subject peaks somewhere: the loss of the most neglected one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens, most_neglected
from attend_excite.guidance.objectives.base import Recorded, Sharpened, peak_losses


@dataclass(frozen=True)
class MostNeglected(Sharpened):
    """max over subjects of (target - peak): Chefer et al., SIGGRAPH 2023, Equation 2. Sharpened maps."""

    name = "most-neglected"

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        return most_neglected(peak_losses(recorded, subjects, self.temperature, self.sigma))
