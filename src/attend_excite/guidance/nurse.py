"""Generative semantic nursing of one step: measure, refine, shift (Algorithm 1, steps 1-15)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from attend_excite.guidance.schedule import StepPlan

# Keeps the gradients inside a half-precision network above float16's smallest numbers. A power of two, so
# that in float32 and wider not a bit of the result depends on it.
GRADIENT_SCALE = 2.0**10


class Measurement(NamedTuple):
    """What is found of b images and their S subjects.

    Attributes:
        attention: (b, S) each subject's attention, 0 to 1.
        losses: (b, S) how far each subject is from its target: whether an image is refined at a threshold.
        loss: (b,) what the latents are moved down along; differentiable. Where it is 0 they stay.
        parts: (b,) each, what the loss is the sum of, by the terms' names.
        rests: (b,) the images to be left as they are, whatever their losses; None: none.
    """

    attention: Tensor
    losses: Tensor
    loss: Tensor
    parts: Mapping[str, Tensor] = {}
    rests: Tensor | None = None


Measure = Callable[[Tensor, Tensor], Measurement]
"""(latents (b, C, H, W), rows (b,)) -> what is found of them.

`rows` says which images of the batch the latents are: those that are done leave the batch.
"""


@dataclass(frozen=True)
class Visit:
    """One measurement of some images of the batch and the update that followed it.

    Attributes:
        rows: (b,) which images of the batch.
        attention: (b, S) each subject's attention before the update, 0 to 1.
        loss: (b,) before the update: the most neglected subject's, or of another objective.
        parts: (b,) each, what it was the sum of, by the terms' names.
        shift: (b,) the update's size relative to the latent, |dz| / |z|; 0: there was no update.
        skipped: (b,) whether an update was left out because its gradient was NaN or infinite.
        due: (b,) whether an update was to be made here.
    """

    rows: Tensor
    attention: Tensor
    loss: Tensor
    shift: Tensor
    skipped: Tensor
    due: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


def nurse(
    latents: Tensor,
    measure: Measure,
    plan: StepPlan,
    tolerated: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, list[Visit]]:
    """Shift the latents of one step down their losses: towards their most neglected subjects.

    Each image has its own loss, its own number of refinements and its own end, as if it were alone.

    Args:
        latents: (B, C, H, W), float32 or wider.
        measure: see `Measure`.
        plan: what to do at this step.
        tolerated: (B, S) the losses that need no refinement; needed where `plan` has a threshold.
        rows: (b,) which images to nurse; None: all.

    Returns:
        The shifted latents, and every visit in its order.
    """
    latents = latents.detach().clone()
    visits: list[Visit] = []
    limits = latents.new_full((len(latents), 1), torch.inf) if tolerated is None else tolerated

    def visit(rows: Tensor, *, ordinary: bool = True) -> Tensor:
        """Measure and shift `rows`, or only those that are short; return the short ones."""
        current = latents[rows]
        (attention, losses, loss, parts, rests), gradient = _gradient(measure, current, rows)
        finite = gradient.flatten(1).isfinite().all(dim=1) & loss.isfinite()
        short = (losses > limits[rows]).any(dim=1)
        due = (loss != 0) & (short | ordinary)
        if rests is not None:
            short, due = short & ~rests, due & ~rests
        # Where there is nothing to lose, the next look would be the same.
        short = finite & short & (loss != 0)
        moves = finite & due
        move = torch.where(moves[:, None, None, None], plan.step_size * gradient, 0)
        length, size = move.flatten(1).norm(dim=1), current.flatten(1).norm(dim=1)
        if plan.max_shift is not None:
            kept = (plan.max_shift * size / length).clamp(max=1)
            move, length = kept[:, None, None, None] * move, kept * length
        latents[rows] = current - move
        visits.append(Visit(rows, attention, loss, length / size, ~finite, due, parts))
        # Asking which images are short makes a GPU wait, so only steps with a threshold ask.
        return rows[:0] if plan.threshold is None else rows[short]

    if rows is None:
        rows = torch.arange(len(latents), device=latents.device)
    refined = active = visit(rows, ordinary=plan.alters)
    for _ in range(1, plan.max_refinements):
        if not len(active):
            break
        active = visit(active)
    if plan.alters and plan.update_after_refinement and len(refined):
        visit(refined)
    return latents, visits


def _gradient(measure: Measure, latents: Tensor, rows: Tensor) -> tuple[Measurement, Tensor]:
    with torch.enable_grad():
        latents = latents.detach().requires_grad_(True)
        measured = measure(latents, rows)
        # No layer mixes images, so the gradient of the sum holds each image's own gradient.
        (gradient,) = torch.autograd.grad(GRADIENT_SCALE * measured.loss.sum(), latents)
    attention, losses, loss = (each.detach() for each in measured[:3])
    parts = {name: part.detach() for name, part in measured.parts.items()}
    return Measurement(attention, losses, loss, parts, measured.rests), gradient / GRADIENT_SCALE
