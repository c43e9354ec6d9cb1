"""Attention maps -> one loss per image (Section 4, Equation 2). Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SubjectTokens:
    """The subjects of a batch of images as tensors: B images, at most S subjects of at most K tokens.

    Attributes:
        positions: (B, S, K) token positions, 0 is <sot>; filler where `valid` is False.
        valid: (B, S, K) which positions are real. A subject without any is filler.
        target: (B, S) attention demanded, 0 to 1; for a negated subject the attention allowed.
        negated: (B, S) whether a low attention is demanded.
        last: (B,) the last token position that takes part in the softmax.
        first: (B,) the first one: 1 where <sot> stands before the words.
        real: (B, S) which subjects are no filler. Of several tables of tokens one may lack a subject that
            another has.
        attributes: (B, S, A, K') token positions of each subject's at most A modifiers.
        attributes_valid: (B, S, A, K') which of them are real. A modifier without any is filler.
        others: (B, O) token positions of the prompt's words that belong to no subject, "a" and "and" among
            them.
        others_valid: (B, O) which of them are real.
    """

    positions: Tensor
    valid: Tensor
    target: Tensor
    negated: Tensor
    last: Tensor
    first: Tensor
    real: Tensor
    attributes: Tensor
    attributes_valid: Tensor
    others: Tensor
    others_valid: Tensor

    @property
    def here(self) -> Tensor:
        """(B, S) the subjects that have a token in this table."""
        return self.valid.any(dim=-1)

    @property
    def shown(self) -> Tensor:
        """(B, S) those of them that the picture is to show, none that it is to avoid."""
        return self.here & ~self.negated

    @staticmethod
    def stack(
        positions: Sequence[Sequence[Sequence[int]]],
        last: Sequence[int],
        target: Sequence[Sequence[float]] | None = None,
        negated: Sequence[Sequence[bool]] | None = None,
        first: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attributes: Sequence[Sequence[Sequence[Sequence[int]]]] | None = None,
        others: Sequence[Sequence[int]] | None = None,
    ) -> SubjectTokens:
        """Pad `positions[image][subject] = [token, ...]` and what belongs to it into tensors.

        `attributes[image][subject]` is a list of modifiers, each a list of its tokens; `others[image]` the
        tokens of the prompt's other words. None: there are none.
        """
        padded, valid = _padded(positions)
        images, subjects = padded.shape[:2]
        targets = torch.ones(images, subjects, dtype=dtype)
        negations = torch.zeros(images, subjects, dtype=torch.bool)
        for b, image in enumerate(positions):
            if target is not None:
                targets[b, : len(image)] = torch.as_tensor(target[b], dtype=dtype)
            if negated is not None:
                negations[b, : len(image)] = torch.as_tensor(negated[b])
        begin = torch.ones(images, dtype=torch.long) if first is None else torch.as_tensor(first)
        # Each subject's modifiers are padded as an image's subjects are, and then to so many subjects.
        modifiers, modifiers_valid = _padded(
            [
                subject
                for image in attributes or [[]] * images
                for subject in [*image, *[[]] * (subjects - len(image))]
            ]
        )
        further, further_valid = _padded([[list(image)] for image in others or [[]] * images])
        tensors = (
            *(padded, valid, targets, negations, torch.as_tensor(last), begin, valid.any(dim=-1)),
            *(each.unflatten(0, (images, subjects)) for each in (modifiers, modifiers_valid)),
            *(each[:, 0] for each in (further, further_valid)),
        )
        return SubjectTokens(*(tensor.to(device) for tensor in tensors))

    def rows(self, rows: Tensor) -> SubjectTokens:
        """The subjects of some images of the batch."""
        return SubjectTokens(*(getattr(self, field.name)[rows] for field in fields(self)))


def _padded(positions: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Ragged lists of lists of lists as (n, most, longest) tensors: the positions, and which are real."""
    most = max(map(len, positions), default=0)
    longest = max([1, *(len(tokens) for groups in positions for tokens in groups)])
    padded = torch.zeros(len(positions), most, longest, dtype=torch.long)
    valid = torch.zeros(len(positions), most, longest, dtype=torch.bool)
    for n, groups in enumerate(positions):
        for g, tokens in enumerate(groups):
            padded[n, g, : len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
            valid[n, g, : len(tokens)] = True
    return padded, valid


def renormalised(maps: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The share that each of the prompt's words has of a patch's attention to them all.

    Where image and text share a softmax, thousands of image patches hold nearly all of a patch's attention,
    and what is left for the words is too small to be compared as it is.

    Args:
        maps: (B, H, W, N) attention of each patch to each token.
        first: (B,) the first position that takes part.
        last: (B,) the last one.

    Returns:
        (B, H, W, N): 0 outside of first to last, there summing to 1.
    """
    position = torch.arange(maps.shape[-1], device=maps.device)
    taking_part = (position >= first[:, None]) & (position <= last[:, None])
    maps = maps * taking_part[:, None, None, :]
    return maps / maps.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def token_probabilities(
    maps: Tensor,
    last: Tensor,
    temperature: float,
    first: Tensor | None = None,
    excluded: Tensor | None = None,
) -> Tensor:
    """Re-weigh the attention among the prompt's tokens, <sot> left out (Algorithm 1, step 2).

    Args:
        maps: (B, H, W, N) attention of each patch to each token of the context.
        last: (B,) the last position that takes part.
        temperature: factor on the attention before the softmax; the paper has 1, its code 100.
        first: (B,) the first position that takes part; None: 1, behind <sot>.
        excluded: (B, N) bool, positions between these that don't take part either; None: there are none.

    Returns:
        (B, H, W, N): 0 where a position takes no part, elsewhere positive and summing to 1.
    """
    position = torch.arange(maps.shape[-1], device=maps.device)
    begin = 1 if first is None else first[:, None]
    left_out = (position < begin) | (position > last[:, None])
    if excluded is not None:
        left_out = left_out | excluded
    scores = (maps * temperature).masked_fill(left_out[:, None, None, :], -torch.inf)
    return scores.softmax(dim=-1)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of 3x3 patches with reflected borders (Algorithm 1, step 5).

    Args:
        maps: (..., H, W), at least 2x2.
        sigma: standard deviation in patches; 0 leaves the maps as they are.
    """
    if sigma == 0:
        return maps
    offset = torch.arange(-1.0, 2.0, dtype=maps.dtype, device=maps.device)
    taps = torch.exp(-(offset**2) / (2 * sigma**2))
    kernel = torch.outer(taps, taps)
    kernel = kernel / kernel.sum()
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="reflect"), kernel[None, None]).reshape(maps.shape)


def subject_attention(probabilities: Tensor, subjects: SubjectTokens, sigma: float) -> Tensor:
    """Each subject's largest smoothed attention (Algorithm 1, steps 4-6); over its tokens, too.

    Args:
        probabilities: (B, H, W, N) from `token_probabilities`.
        sigma: see `smooth`.

    Returns:
        (B, S) in 0..1; 0 for filler.
    """
    chosen = maps_at(probabilities, subjects.positions).flatten(1, 2)
    peaks = smooth(chosen, sigma).amax(dim=(-2, -1)).reshape(subjects.positions.shape)
    return peaks.masked_fill(~subjects.valid, 0).amax(dim=-1)


def maps_at(maps: Tensor, positions: Tensor) -> Tensor:
    """Those of some tokens: (B, H, W, N) and positions (B, ..., K) -> (B, ..., K, H, W)."""
    index = positions.flatten(1)[:, None, None, :].expand(-1, *maps.shape[1:3], -1)
    return maps.gather(-1, index).permute(0, 3, 1, 2).unflatten(1, positions.shape[1:])


def subject_leads(probabilities: Tensor, subjects: SubjectTokens, sigma: float) -> Tensor:
    """How far each subject is ahead of all others in the patch where it is furthest ahead.

    A subject of 0.4 whose patch belongs to another of 0.45 is further from being drawn than one of 0.3 that
    has a patch to itself. A subject alone is ahead by its whole attention.

    Args:
        probabilities: (B, H, W, N) from `token_probabilities`.
        sigma: see `smooth`.

    Returns:
        (B, S) in -1..1; 0 for filler.
    """
    _, s, k = subjects.positions.shape
    chosen = smooth(maps_at(probabilities, subjects.positions).flatten(1, 2), sigma).unflatten(1, (s, k))
    maps = chosen.masked_fill(~subjects.valid[..., None, None], 0).amax(dim=2)
    itself = torch.eye(s, dtype=torch.bool, device=maps.device)[:, :, None, None]
    # (B, S, others, H, W): a subject is no rival of its own, and filler, with nothing, of nobody's.
    rivals = maps[:, None].masked_fill(itself, 0).amax(dim=2)
    leads = (maps - rivals).amax(dim=(-2, -1))
    return leads.masked_fill(~subjects.valid.any(dim=-1), 0)


def subject_losses(attention: Tensor, subjects: SubjectTokens) -> Tensor:
    """How far each subject is from its target: (B, S), 0 where the target is met and for filler.

    For a subject that the picture is to show: target - attention, Equation 2 with the target of
    Appendix A.2 in place of 1. For a negated one (Section 6): attention - target.
    """
    short = torch.where(subjects.negated, attention - subjects.target, subjects.target - attention)
    return short.clamp(min=0).masked_fill(~subjects.real, 0)


def tolerated_losses(subjects: SubjectTokens, threshold: float) -> Tensor:
    """The largest losses that need no refinement at this threshold: (B, S).

    A subject must reach an attention of `threshold`, or of its own target where that is lower; a
    negated one, mirrored, must stay under 1 - `threshold`, or its own target where that is higher.
    """
    span = torch.where(subjects.negated, 1 - subjects.target, subjects.target)
    return (span - threshold).clamp(min=0)


def most_neglected(losses: Tensor) -> Tensor:
    """The loss of the most neglected subject of each image (Equation 2): (B, S) -> (B,).

    The first of equally neglected subjects counts, so the gradient is that of one subject.
    """
    order = torch.arange(losses.shape[1], device=losses.device)
    worst = losses == losses.amax(dim=1, keepdim=True)
    first = torch.where(worst, order, losses.shape[1]).amin(dim=1).clamp(max=losses.shape[1] - 1)
    return losses.gather(1, first[:, None]).squeeze(1)
