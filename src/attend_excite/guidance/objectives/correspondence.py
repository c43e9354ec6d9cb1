"""What is a bowl is yellow, and what is yellow is a bowl, in fuzzy logic: Predicated Diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Need, Recorded, masked_mean, over_patches


@dataclass(frozen=True)
class Correspondence:
    """Mean over nouns P and their modifiers Q, and over patches, of -log(1 - P(1 - Q)) - log(1 - Q(1 - P)),
    "every P is Q and every Q is P"; and over modifiers Q and the other nouns P' of -log(1 - P'Q), "no P' is
    Q": Sueyoshi and Matsubara, CVPR 2024, arXiv 2311.16117. Raw maps, each scaled to 0 to 1 over the patches:
    where all are near 0 the statements could only be met by less of both.

    Attributes:
        apart: the weight of what other nouns are not, 0 or more.
    """

    apart: float = 0.3

    name = "correspondence"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        nouns = _stretched(over_patches(recorded, subjects.positions, subjects.valid))
        modifiers = _stretched(over_patches(recorded, subjects.attributes, subjects.attributes_valid))
        shown = subjects.shown
        real = shown[..., None] & subjects.attributes_valid.any(dim=-1)
        own = nouns[:, :, None]
        together = _denied(own * (1 - modifiers)) + _denied(modifiers * (1 - own))
        # (b, S', S, A): each noun beside each modifier of another.
        itself = torch.eye(shown.shape[1], dtype=torch.bool, device=shown.device)
        other = (shown[:, :, None] & ~itself)[..., None] & real[:, None]
        foreign = _denied(nouns[:, :, None, None] * modifiers[:, None])
        return masked_mean(together, real, dims=2) + self.apart * masked_mean(foreign, other, dims=3)


def _stretched(maps: Tensor) -> Tensor:
    """(..., H, W) -> (..., H * W) from 0 to 1; a map that is the same everywhere becomes 0."""
    flat = maps.flatten(-2)
    least = flat.amin(dim=-1, keepdim=True)
    span = flat.amax(dim=-1, keepdim=True) - least
    return (flat - least) / span.clamp(min=torch.finfo(flat.dtype).tiny)


def _denied(values: Tensor) -> Tensor:
    """Mean over the patches of -log(1 - value)."""
    return -torch.log1p(-values.clamp(max=1 - torch.finfo(values.dtype).eps)).mean(dim=-1)
