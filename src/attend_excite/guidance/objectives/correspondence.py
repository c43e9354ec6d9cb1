"""What is a bowl is yellow, and what is yellow is a bowl, in fuzzy logic: Predicated Diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.guidance.objective import SubjectTokens
from attend_excite.guidance.objectives.base import Need, Recorded, raw_maps


@dataclass(frozen=True)
class Correspondence:
    """Sum over nouns P and their modifiers Q, and over patches, of -log(1 - P(1 - Q)) - log(1 - Q(1 - P)),
    "every P is Q and every Q is P"; and over the other nouns P' of -log(1 - P'Q), "no P' is Q": Sueyoshi and
    Matsubara, CVPR 2024, arXiv 2311.16117. Raw maps.

    Attributes:
        apart: the weight of what other nouns are not, 0 or more.
    """

    apart: float = 0.3

    name = "correspondence"
    needs = frozenset[Need]()

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        nouns = raw_maps(recorded, subjects.positions, subjects.valid).flatten(-2)
        modifiers = raw_maps(recorded, subjects.attributes, subjects.attributes_valid).flatten(-2)
        shown = subjects.shown
        real = shown[..., None] & subjects.attributes_valid.any(dim=-1)
        own = nouns[:, :, None]
        together = (_denied(own * (1 - modifiers)) + _denied(modifiers * (1 - own))).masked_fill(~real, 0)
        # (b, S', S, A): each noun beside each modifier of another.
        itself = torch.eye(shown.shape[1], dtype=torch.bool, device=shown.device)
        other = (shown[:, :, None] & ~itself)[..., None] & real[:, None]
        foreign = _denied(nouns[:, :, None, None] * modifiers[:, None]).masked_fill(~other, 0)
        return together.sum(dim=(1, 2)) + self.apart * foreign.sum(dim=(1, 2, 3))


def _denied(values: Tensor) -> Tensor:
    """Sum over the patches of -log(1 - value)."""
    return -torch.log1p(-values.clamp(max=1 - torch.finfo(values.dtype).eps)).sum(dim=-1)
