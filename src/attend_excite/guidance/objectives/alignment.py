"""A subject stays where it was at the step before: InitNO."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import (
    SIGMA,
    TEMPERATURE,
    Need,
    Recorded,
    masked_mean,
    sharpened,
)


@dataclass(frozen=True)
class Alignment:
    """Mean absolute difference of the subjects' maps from those of the step before; 0 at the first step:
    of Guo et al., CVPR 2024, arXiv 2404.04650, as its authors' code has it, which keeps a moving average of
    the earlier steps where this keeps the last one. Sharpened maps.

    Attributes:
        temperature: factor on the attention before the softmax over the tokens, above 0.
        sigma: the Gaussian filter's standard deviation in patches; 0: no filter.
    """

    temperature: float = TEMPERATURE
    sigma: float = SIGMA

    name = "alignment"
    needs = frozenset[Need]({"step-before"})

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        words = subjects, subjects.positions, subjects.valid, self.temperature, self.sigma
        now = sharpened(recorded, *words)
        before = now.detach() if recorded.before is None else sharpened(recorded.before, *words)
        return masked_mean((now - before).abs().mean(dim=(-2, -1)), subjects.shown)
