"""What a term is, and what it is made of: the record of one pass, and the maps of words in it.

The papers read a record in two ways. *Sharpened*: the attention of each patch re-weighed among the prompt's
tokens (softmax of temperature x attention, <sot> left out) and smoothed, as Attend-and-Excite does it: a
word's map says how much each patch belongs to it. *Over patches*: a word's raw attention divided by its sum,
as SynGen does it: a word's map says where it lies, however little it has. A term's docstring says which one
it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from attend_excite.guidance.objective import (
    SubjectTokens,
    maps_at,
    smooth,
    subject_attention,
    subject_losses,
    token_probabilities,
)

Need = Literal["self-attention", "step-before"]

TEMPERATURE, SIGMA = 100.0, 0.5**0.5
"""How the authors of Attend-and-Excite, and those who built on it, sharpen and smooth."""


@dataclass(frozen=True)
class Recorded:
    """What one pass recorded of b images.

    Attributes:
        cross: (b, H, W, N) the attention of each patch to each token, mean over layers and heads, summing to
            1 over all tokens of the context.
        self_attention: (b, H * W, H * W) the attention of each patch (row) to each patch of the same size,
            rows summing to 1. None: no term needs it.
        before: what was recorded of the same images at the step before, detached and without self-attention.
            None: it is the first step, or no term needs it.
        left_out: (b, N) bool, tokens between a prompt's chunks, which are no words and have an attention of
            0 here. None: there are none.
    """

    cross: Tensor
    self_attention: Tensor | None = None
    before: Recorded | None = None
    left_out: Tensor | None = None


class Term(Protocol):
    """One thing that is asked of the attention.

    A term is a pure function, and no image, filler subject or unused token changes what it gives for another
    image. It is 0, with a gradient of 0, where it has nothing to say, as a term on pairs for a single
    subject.
    """

    @property
    def name(self) -> str:
        """The term's name in a recipe."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """What must be recorded besides the cross-attention."""
        ...

    def __call__(self, recorded: Recorded, subjects: SubjectTokens) -> Tensor:
        """(b,) one loss an image, differentiable, float32 or wider."""
        ...


Objective = Callable[[Recorded, SubjectTokens], Tensor]
"""A term, or any function like one: (recorded, subjects) -> (b,) one loss an image, differentiable.

It is given what its `needs` names, if it has that, and else the cross-attention alone.
"""


@dataclass(frozen=True, kw_only=True)
class Sharpened:
    """What terms on sharpened maps have in common: the numbers that these are made with.

    Attributes:
        temperature: factor on the attention before the softmax over the tokens, above 0.
        sigma: the Gaussian filter's standard deviation in patches; 0: no filter.
    """

    temperature: float = TEMPERATURE
    sigma: float = SIGMA

    needs = frozenset[Need]()

    def maps(
        self,
        recorded: Recorded,
        subjects: SubjectTokens,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """How much each patch belongs to each word, 0 to 1.

        Args:
            recorded: of b images.
            subjects: say which tokens take part in the softmax.
            positions: (b, ..., K) the tokens of each word; the largest attention among them is the word's.
                None: the words are the subjects.
            valid: (b, ..., K) which of them are real; None likewise.

        Returns:
            (b, ..., H, W); 0 for filler.
        """
        positions = subjects.positions if positions is None else positions
        valid = subjects.valid if valid is None else valid
        maps = maps_at(_shares(recorded, subjects, self.temperature), positions)
        return smooth(maps, self.sigma).masked_fill(~valid[..., None, None], 0).amax(dim=-3)


def over_patches(recorded: Recorded, positions: Tensor, valid: Tensor) -> Tensor:
    """Where words lie: their raw attention, divided by its sum over the patches.

    Args:
        recorded: of b images.
        positions: (b, ..., K) the tokens of each word, which has the attention of all of them together.
        valid: (b, ..., K) which of them are real.

    Returns:
        (b, ..., H, W), each map summing to 1; 0 for filler.
    """
    maps = maps_at(wide(recorded.cross), positions)
    maps = maps.masked_fill(~valid[..., None, None], 0).sum(dim=-3)
    return maps / maps.sum(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


class Words(NamedTuple):
    """Where the W words of a prompt lie: its subjects, then their modifiers, then its other words.

    Attributes:
        maps: (b, W, H * W) from `over_patches`.
        valid: (b, W) which of them are real, and belong to no negated subject.
        subject: (W,) the index of the subject that a word belongs to; of other words, an index of their own.
    """

    maps: Tensor
    valid: Tensor
    subject: Tensor

    @classmethod
    def of(cls, recorded: Recorded, subjects: SubjectTokens) -> Words:
        b, s, a = subjects.attributes.shape[:3]
        o = subjects.others.shape[1]
        groups = (
            (subjects.positions, subjects.valid),
            (subjects.attributes.flatten(1, 2), subjects.attributes_valid.flatten(1, 2)),
            (subjects.others[..., None], subjects.others_valid[..., None]),
        )
        maps = torch.cat([over_patches(recorded, *group).flatten(2) for group in groups], dim=1)
        valid = torch.cat([group[1].any(dim=-1) for group in groups], dim=1)
        index = torch.arange(s + o, device=valid.device)
        avoided = subjects.negated
        left_out = [avoided, avoided.repeat_interleave(a, dim=1), avoided.new_zeros(b, o)]
        return cls(
            maps,
            valid & ~torch.cat(left_out, dim=1),
            torch.cat([index[:s], index[:s].repeat_interleave(a), index[s:]]),
        )


def bound_and_apart(
    distances: Tensor, words: Words, subjects: SubjectTokens
) -> tuple[Tensor, Tensor, Tensor]:
    """What the losses on binding are made of (SynGen, EBAMA).

    Args:
        distances: (b, W, W) between the words' maps.
        words: the words.
        subjects: their subjects.

    Returns:
        Each (b, S), 0 for filler and negated subjects: the sum of a subject's distances to its modifiers; its
        mean distance to the words outside its phrase; the mean of the latter over its modifiers.
    """
    s, a = subjects.attributes.shape[1:3]
    modifiers = words.valid[:, s : s + s * a].unflatten(1, (s, a))
    own = torch.arange(s * a, device=distances.device).unflatten(0, (s, a)) + s
    to_own = distances[:, torch.arange(s, device=distances.device)[:, None], own]
    outside = words.valid[:, None, :] & (words.subject[:, None] != words.subject)
    away = masked_mean(distances, outside)
    shown = subjects.shown
    return (
        to_own.masked_fill(~modifiers, 0).sum(dim=-1).masked_fill(~shown, 0),
        away[:, :s].masked_fill(~shown, 0),
        masked_mean(away[:, s : s + s * a].unflatten(1, (s, a)), modifiers).masked_fill(~shown, 0),
    )


def peak_losses(recorded: Recorded, subjects: SubjectTokens, temperature: float, sigma: float) -> Tensor:
    """(b, S) how far each subject's sharpened peak is from its target; 0 where it is met and for filler."""
    probabilities = _shares(recorded, subjects, temperature)
    return losses_here(subject_attention(probabilities, subjects, sigma), subjects)


def losses_here(attention: Tensor, subjects: SubjectTokens) -> Tensor:
    """(b, S) how far each subject is from its target; 0 for those that have no token in this table."""
    return subject_losses(attention, subjects).masked_fill(~subjects.here, 0)


def pairs(subjects: SubjectTokens) -> Tensor:
    """(b, S, S) the pairs of subjects that the picture is to show, each once: the first before the second."""
    shown = subjects.shown
    return (shown[:, :, None] & shown[:, None, :]).triu(diagonal=1)


def self_attention(recorded: Recorded) -> Tensor:
    """(b, H * W, H * W) in float32 or wider.

    Raises:
        ValueError: it was not recorded.
    """
    if recorded.self_attention is None:
        raise ValueError("self-attention was not recorded: a term that takes it says so in its `needs`")
    return wide(recorded.self_attention)


def masked_mean(values: Tensor, mask: Tensor, dims: int = 1) -> Tensor:
    """The mean of those values of the last so many dimensions that are under the mask; 0 where none is."""
    over = tuple(range(-dims, 0))
    return values.masked_fill(~mask, 0).sum(dim=over) / mask.sum(dim=over).clamp(min=1)


def _shares(recorded: Recorded, subjects: SubjectTokens, temperature: float) -> Tensor:
    """(b, H, W, N) each patch's attention, re-weighed among the words."""
    cross = wide(recorded.cross)
    return token_probabilities(cross, subjects.last, temperature, subjects.first, recorded.left_out)


def wide(maps: Tensor) -> Tensor:
    """In float32 or wider: in half precision sums over the patches lose what the gradient needs."""
    return maps.to(torch.promote_types(maps.dtype, torch.float32))
