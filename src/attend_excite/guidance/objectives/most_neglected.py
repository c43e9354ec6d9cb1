"""Every subject peaks somewhere: the loss of the most neglected one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens, most_neglected
from attend_excite.guidance.objectives.base import SIGMA, TEMPERATURE, Need, Recorded, peak_losses


@dataclass(frozen=True)
class MostNeglected:
    """max over subjects of (target - peak): Chefer et al., SIGGRAPH 2023, Equation 2. Sharpened maps.

    Attributes:
        temperature: factor on the attention before the softmax over the tokens, above 0.
        sigma: the Gaussian filter's standard deviation in patches; 0: no filter.
    """

    temperature: float = TEMPERATURE
    sigma: float = SIGMA

    name = "most-neglected"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        return most_neglected(peak_losses(recorded, subjects, self.temperature, self.sigma))
