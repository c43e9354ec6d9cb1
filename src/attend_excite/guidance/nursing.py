"""Nursing of a batch over a whole run, whoever records its attention: maps -> loss -> latents.

A host that draws in its own loop, as ComfyUI does, brings its subjects as `Table`s, the plans of a
recipe, and a function that looks at latents; `Nursing` does the rest, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from attend_excite.guidance.nurse import Measurement, Visit, nurse
from attend_excite.guidance.objective import (
    SubjectTokens,
    most_neglected,
    renormalised,
    subject_attention,
    subject_leads,
    subject_losses,
    token_probabilities,
    tolerated_losses,
)
from attend_excite.guidance.objectives import Objective, Recorded
from attend_excite.guidance.objectives.most_neglected import MostNeglected
from attend_excite.guidance.schedule import PlannedTerm, Recipe, StepPlan

Look = Callable[[Tensor, Tensor], Recorded]
"""(latents (b, C, H, W) in variance-preserving scale, rows (b,)) -> what one pass records of them.

`rows` says which images of the batch the latents are. What is recorded is what the step's plan `needs`, and
differentiable with respect to the latents.
"""


class Nursing:
    """The nursing of one batch, from its first step to its last.

    Args:
        recipe: its numbers.
        plans: what to do at each step, from `recipe.plan`, perhaps with an objective of the caller's own.
        tables: the subjects in each of the model's tables of tokens, at least one; those of the first are
            whose losses are told.
    """

    def __init__(self, recipe: Recipe, plans: Sequence[StepPlan], tables: Sequence[Table]) -> None:
        self._tables = tuple(tables)
        self._subjects = self._tables[0].subjects
        self._recipe = recipe
        self.plans = tuple(plans)
        self._resting = _Resting(self._subjects, recipe) if recipe.rest_after else None
        self._memory = _Memory(self.plans, len(self._subjects.real))

    def step(self, index: int, latents: Tensor, look: Look) -> tuple[Tensor, list[Visit]]:
        """Nurse the latents before step `index` of the run; steps come in their order.

        Args:
            index: from 0.
            latents: (B, C, H, W) in variance-preserving scale, so that a step goes as far with every
                scheduler; float32 or wider.
            look: see `Look`.

        Returns:
            The shifted latents, and every visit in its order; none: the latents are those that came in.
        """
        plan = self.plans[index]
        rows = None if self._resting is None else self._resting.awake()
        if plan.idle or (rows is not None and not len(rows)):
            return latents, []
        tolerated = None if plan.threshold is None else tolerated_losses(self._subjects, plan.threshold)
        self._memory.begin(index)

        def measure(latents: Tensor, rows: Tensor) -> Measurement:
            found = look(latents, rows)
            found = replace(found, before=self._memory.before(rows))
            self._memory.keep(rows, found.cross)
            with torch.autocast(found.cross.device.type, enabled=False):
                chosen = [table.rows(rows) for table in self._tables]
                measured, leads = measure_tables(found, chosen, self._recipe, plan.terms)
                if self._resting is None:
                    return measured
                return measured._replace(rests=self._resting.looks(rows, measured.losses, leads))

        return nurse(latents, measure, plan, tolerated, rows)


@dataclass(frozen=True)
class Table:
    """The subjects of a batch in one of the model's tables of tokens.

    Attributes:
        columns: those of the table in the maps.
        shared: whether its tokens share a softmax with the image's.
        subjects: with their positions in the table.
        between: (b, tokens) bool, the tokens between a prompt's chunks; None: it has none.
    """

    columns: slice
    shared: bool
    subjects: SubjectTokens
    between: Tensor | None = None

    def rows(self, rows: Tensor) -> Table:
        """That of some images of the batch."""
        between = None if self.between is None else self.between[rows]
        return replace(self, subjects=self.subjects.rows(rows), between=between)

    def part(self, found: Recorded) -> Recorded:
        """The table's own columns of what was recorded."""
        cross = found.cross[..., self.columns]
        if self.between is not None:
            cross = cross.masked_fill(self.between[:, None, None], 0)
        if self.shared:
            cross = renormalised(cross, self.subjects.first, self.subjects.last)
        before = None if found.before is None else self.part(found.before)
        return Recorded(cross, found.self_attention, before, self.between)


class _Memory:
    """The maps of the guided step before, kept only where a term of the next one needs them."""

    def __init__(self, plans: Sequence[StepPlan], images: int) -> None:
        guided = [index for index, plan in enumerate(plans) if not plan.idle]
        self._wanted = {index for index, after in pairwise(guided) if "step-before" in plans[after].needs}
        self._images = images
        self._past: Tensor | None = None
        self._now: Tensor | None = None
        self._keeps = False

    def begin(self, index: int) -> None:
        """A guided step begins."""
        self._past, self._now, self._keeps = self._now, None, index in self._wanted

    def before(self, rows: Tensor) -> Recorded | None:
        """What the step before found last of some images."""
        return None if self._past is None else Recorded(self._past[rows])

    def keep(self, rows: Tensor, maps: Tensor) -> None:
        """Keep what this step found of some images, if it is wanted."""
        if not self._keeps:
            return
        if self._now is None:
            everyone = (self._images, *maps.shape[1:])
            self._now = maps.new_zeros(everyone) if self._past is None else self._past.clone()
        self._now[rows] = maps.detach()


def measure_tables(
    found: Recorded, tables: Sequence[Table], recipe: Recipe, terms: Sequence[PlannedTerm]
) -> tuple[Measurement, Tensor | None]:
    """What a pass says of the subjects: the mean over the tables of tokens that have them.

    Beside it, where the recipe asks, how far each subject leads: (b, S), see `subject_leads`.
    """
    records = [table.part(found) for table in tables]
    attentions, leads = [], []
    for record, table in zip(records, tables, strict=True):
        subjects = table.subjects
        probabilities = token_probabilities(
            record.cross, subjects.last, recipe.temperature, subjects.first, record.left_out
        )
        attentions.append(subject_attention(probabilities, subjects, recipe.sigma))
        if recipe.rest_lead is not None:
            leads.append(subject_leads(probabilities.detach(), subjects, recipe.sigma))
    # Only subjects that no table has are filler.
    here = torch.stack([table.subjects.here for table in tables])
    there, speaking = here.sum(dim=0).clamp(min=1), here.any(dim=2).sum(dim=0).clamp(min=1)

    def over_tables(values: list[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.stack(values).sum(dim=0) / there

    attention = over_tables(attentions)
    losses = subject_losses(attention, tables[0].subjects)
    parts: dict[str, Tensor] = {}
    for weight, term in terms:
        if term == MostNeglected(temperature=recipe.temperature, sigma=recipe.sigma):
            loss = most_neglected(losses)  # which are there already
        else:
            values = [_checked(term, *each) for each in zip(records, tables, strict=True)]
            loss = torch.stack(values).sum(dim=0) / speaking
        name = getattr(term, "name", "objective")
        parts[name] = weight * loss + parts[name] if name in parts else weight * loss
    total = torch.stack(list(parts.values())).sum(dim=0)
    return Measurement(attention, losses, total, parts), over_tables(leads) if leads else None


def _checked(objective: Objective, found: Recorded, table: Table) -> Tensor:
    loss = objective(found, table.subjects)
    images = len(found.cross)
    shape = tuple(loss.shape) if isinstance(loss, Tensor) else None
    # Noises are compared without a gradient.
    if shape != (images,) or (torch.is_grad_enabled() and not loss.requires_grad):
        what = type(loss).__name__ if shape is None else f"a tensor of shape {shape}"
        raise ValueError(
            f"the objective gave {what} for {images} images: it must give one loss an image, (b,), "
            "worked out from the maps so that it has a gradient"
        )
    return loss


class _Resting:
    """Which images of a batch need no more nursing: see `Recipe.rest_after`."""

    def __init__(self, subjects: SubjectTokens, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tolerated = tolerated_losses(subjects, recipe.enough)
        self._need_no_lead = subjects.negated | ~subjects.real
        self._in_a_row = torch.zeros(len(self._tolerated), dtype=torch.long, device=self._tolerated.device)
        self._step_begins = True

    def awake(self) -> Tensor:
        """(b,) the images that are still nursed, as a step begins."""
        self._step_begins = True
        return (self._in_a_row < self._recipe.rest_after).nonzero().flatten()

    def looks(self, rows: Tensor, losses: Tensor, leads: Tensor | None) -> Tensor:
        """(b,) which of these images rest, by what was just measured of them; counts a step's first look."""
        enough = losses <= self._tolerated[rows]
        if leads is not None and self._recipe.rest_lead is not None:
            enough = enough & (self._need_no_lead[rows] | (leads >= self._recipe.rest_lead))
        enough = enough.all(dim=1)
        if self._step_begins:
            self._in_a_row[rows] = torch.where(enough, self._in_a_row[rows] + 1, 0)
            self._step_begins = False
        return enough & (self._in_a_row[rows].clamp(min=1) >= self._recipe.rest_after)
