"""Every subject peaks somewhere: the losses of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import SIGMA, TEMPERATURE, Need, Recorded, peak_losses


@dataclass(frozen=True)
class SumOfSubjects:
    """Sum over subjects of (target - peak). Sharpened maps.

    But for a constant, EBAMA's intensity term (Zhang et al., ECCV 2024, arXiv 2404.07389), there with weight
    0.5.

    Attributes:
        temperature: factor on the attention before the softmax over the tokens, above 0.
        sigma: the Gaussian filter's standard deviation in patches; 0: no filter.
    """

    temperature: float = TEMPERATURE
    sigma: float = SIGMA

    name = "sum-of-subjects"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        return peak_losses(recorded, subjects, self.temperature, self.sigma).sum(dim=1)
