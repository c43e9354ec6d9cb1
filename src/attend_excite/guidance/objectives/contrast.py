"""A subject and its modifiers are alike, and unlike all others, now and at the step before: CONFORM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Need, Recorded, Sharpened, masked_mean


@dataclass(frozen=True)
class Contrast(Sharpened):
    """Contrastive loss (NT-Xent) on the maps of all subjects and modifiers, those of the step before among
    them: Meral et al., CVPR 2024, arXiv 2312.06059. Sharpened maps.

    0 where there is nothing to be alike (at the first step, if no subject has a modifier) or to be unlike (a
    single subject).

    Attributes:
        tau: the loss's own temperature, above 0.
    """

    tau: float = 0.5

    name = "contrast"
    needs = frozenset[Need]({"step-before"})

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        s, a = subjects.attributes.shape[1:3]
        words = (
            (subjects.positions, subjects.valid),
            (subjects.attributes.flatten(1, 2), subjects.attributes_valid.flatten(1, 2)),
        )
        times = [recorded] if recorded.before is None else [recorded, recorded.before]
        maps = torch.cat(
            [self.maps(time, subjects, *group).flatten(2) for time in times for group in words],
            dim=1,
        )
        shown = subjects.shown
        valid = torch.cat(
            [shown, (shown[..., None] & subjects.attributes_valid.any(dim=-1)).flatten(1)] * len(times), dim=1
        )
        index = torch.arange(s, device=valid.device)
        group = torch.cat([index, index.repeat_interleave(a)] * len(times))
        return nt_xent(maps, group, valid, self.tau)


def nt_xent(vectors: Tensor, group: Tensor, valid: Tensor, tau: float) -> Tensor:
    """Mean over pairs of a group of -log(e^(cos/tau) / (e^(cos/tau) + sum over other groups of e^(cos/tau))).

    Args:
        vectors: (b, V, P); their lengths don't matter.
        group: (V,) which group each is of.
        valid: (b, V) which are real.
        tau: temperature.

    Returns:
        (b,); 0 where an image has no pair or a single group.
    """
    directions = F.normalize(vectors, dim=-1)
    similarity = directions @ directions.mT / tau
    both = valid[:, :, None] & valid[:, None]
    same = group[:, None] == group
    itself = torch.eye(len(group), dtype=torch.bool, device=group.device)
    others = similarity.masked_fill(~(both & ~same), -torch.inf)[:, :, None]
    # log(1 + sum e^(other - this)), each pair beside the other groups' vectors of its first.
    beside = F.pad(others - similarity[..., None], (0, 1))
    return masked_mean(beside.logsumexp(dim=-1), both & same & ~itself, dims=2)
