"""Attend-and-Excite: nurse the latents, then let another method denoise them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.attention.record import record
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
from attend_excite.guidance.recipes import method_recipes
from attend_excite.guidance.schedule import PlannedTerm, Recipe, StepPlan
from attend_excite.methods.base import Denoise, Method, Run, Step
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.subjects import Prompt, Stream, TokenGroup, parse
from attend_excite.trace import Nursed

_BRACKETS = r"[\[\]]"


@dataclass(frozen=True)
class AttendAndExcite:
    """Generative semantic nursing by cross-attention (Section 4).

    Attributes:
        recipe: the numbers and the terms of the loss, or the name of a packaged recipe; None: what the model
            recommends, which is "official" where it recommends nothing. The ablations, and the methods that
            are a recipe of this one ("syngen"), change that recommendation.
        word_tokens: what stands for a subject of several tokens: "dominant", the token that most
            attention goes to when the model draws the word alone (Appendix A.2), or "max", the
            largest attention among its tokens, at no cost.
        base: the method that denoises the nursed latents, and whose conditioning the attention is
            measured under.
        objective: what the latents are moved down along, if not the recipe's terms: a function of what was
            recorded, of which the caller's own are as good. Whether a threshold is met stays a matter of the
            subjects' attention.

    Raises:
        ValueError: there is no recipe of that name, or nursing cannot go on top of `base`.
    """

    recipe: Recipe | str | None = None
    word_tokens: Literal["dominant", "max"] = "dominant"
    base: Method = field(default_factory=StableDiffusion)
    objective: Objective | None = None

    uses_subjects = True
    attends_to_prompt = True

    def __post_init__(self) -> None:
        if isinstance(self.recipe, str):
            Recipe.named(self.recipe, recommended=Recipe.named("official"))
        elif not isinstance(self.recipe, Recipe | None):
            raise ValueError(
                f"the recipe is of type {type(self.recipe).__name__}: give the name of one, or make one, as "
                "Recipe.from_dict({...}, model.recipe)"
            )
        if self.word_tokens not in ("dominant", "max"):
            raise ValueError(f"word_tokens is '{self.word_tokens}': it must be dominant or max")
        if isinstance(self.base, AttendAndExcite):
            raise ValueError(
                "Attend-and-Excite on top of itself would nurse every latent twice: use one of them"
            )
        if not self.base.attends_to_prompt:
            raise ValueError(
                f"Attend-and-Excite cannot go on top of {self.base.name}: it raises the attention to the "
                f"words of the whole prompt, and {self.base.name} only ever shows the model parts of it"
            )

    @property
    def name(self) -> str:
        """Its name on the command line: the recipe's."""
        return self._told.method

    @property
    def title(self) -> str:
        """Its name for people: the recipe's."""
        return self._told.title

    @property
    def _told(self) -> Recipe:
        """The recipe as far as it doesn't depend on the model."""
        if isinstance(self.recipe, Recipe):
            return self.recipe
        return Recipe.named(self.recipe or "official", recommended=Recipe.named("official"))

    def recipe_for(self, recommended: Recipe) -> Recipe:
        """The recipe in full, for a model that recommends this one."""
        if isinstance(self.recipe, str):
            return Recipe.named(self.recipe, recommended=recommended)
        return self.recipe or recommended

    def on(self, numbers: Recipe | None) -> AttendAndExcite:
        """The same method on other numbers, in place of what a model recommends; None: on what it will."""
        own = self.name if self.name in method_recipes() else None
        if own is not None and numbers is not None:
            return replace(self, recipe=Recipe.named(own, recommended=numbers))
        return replace(self, recipe=own if numbers is None else numbers)

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        """The nursed step. Guidance passes are made only where the recipe can alter the latents."""
        recipe = self.recipe_for(run.model.recipe)
        plans = recipe.plan(len(run.scheduler.timesteps))
        eye = self.eye(run)
        subjects = eye.tables[0].subjects
        resting = _Resting(subjects, recipe) if recipe.rest_after else None
        if self.objective is not None:
            objective = PlannedTerm(1.0, self.objective)
            plans = tuple(replace(plan, terms=(objective,)) for plan in plans)
        if any("self-attention" in plan.needs for plan in plans if not plan.idle):
            run.model.family.self_places(eye.places)  # A model whose self-attention isn't known says so now.
        memory = _Memory(plans, len(run.prompts))

        def nurse_step(latents: Tensor, step: Step) -> tuple[Tensor, list[Visit]]:
            plan = plans[step.index]
            tolerated = None if plan.threshold is None else tolerated_losses(subjects, plan.threshold)
            rows = None if resting is None else resting.awake()
            if rows is not None and not len(rows):
                return latents, []
            memory.begin(step.index)
            scale = run.vp_scale(step)
            # Around the gradients too: with gradient checkpointing the layers run again on the way back.
            with eye.open(plan.terms) as look:
                # In variance-preserving scale, so that a step goes as far with every scheduler. Not a bit
                # changes where the latents have it already.
                def measure(scaled: Tensor, rows: Tensor) -> Measurement:
                    cross, measured, leads = look(scaled / scale, step, rows, memory.before(rows))
                    memory.keep(rows, cross)
                    if resting is None:
                        return measured
                    return measured._replace(rests=resting.looks(rows, measured.losses, leads))

                scaled, visits = nurse(latents * scale, measure, plan, tolerated, rows)
                latents = scaled / scale
            return latents, visits

        with self.base.attach(run) as denoise:

            def denoise_nursed(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
                if not plans[step.index].idle:
                    latents, run.visits[step.index] = nurse_step(latents, step)
                return denoise(latents, step)

            yield denoise_nursed

    def eye(self, run: Run) -> Eye:
        """What looks at the attention of a batch."""
        recipe = self.recipe_for(run.model.recipe)
        return Eye(run, recipe, self._tables(run, recipe), run.model.places())

    def _tables(self, run: Run, recipe: Recipe) -> list[_Table]:
        """The subjects in each of the model's tables of tokens, with its columns of the maps."""
        columns, tables = run.columns, []
        for at, stream in enumerate(run.streams):
            kept = range(stream.start, stream.start + stream.width)
            if columns is not None:
                kept = [index for index, column in enumerate(columns) if column in kept]
            place = slice(kept[0], kept[-1] + 1)
            shared = run.model.family.joint is not None
            tables.append(_Table(place, shared, self._subject_tokens(run, recipe, at, stream)))
        # A subject of the other tables alone counts in the first one too: its losses are told there.
        everywhere = torch.stack([table.subjects.real for table in tables]).any(dim=0)
        return [replace(table, subjects=replace(table.subjects, real=everywhere)) for table in tables]

    def _subject_tokens(self, run: Run, recipe: Recipe, at: int, stream: Stream) -> SubjectTokens:
        prompt_only = recipe.prompt_tokens_only
        if prompt_only is None or run.model.family.joint is not None:
            prompt_only = stream.prompt_tokens_only
        words = [prompt.words(at) if prompt.spans else (1, stream.width - 2) for prompt in run.prompts]
        positions = [
            [group.further[at - 1] if at else self._positions(run, p, group) for group in p.groups]
            for p in run.prompts
        ]
        attributes = [
            [
                [each.further[at - 1] if at else each.positions for each in group.attributes]
                for group in prompt.groups
            ]
            for prompt in run.prompts
        ]
        if at == 0:
            run.nursed = Nursed(
                tuple(
                    {group.text: tokens for group, tokens in zip(prompt.groups, of_image, strict=True)}
                    for prompt, of_image in zip(run.prompts, positions, strict=True)
                ),
                recipe.goal,
            )
        alone = [p.text for p, (first, last) in zip(run.prompts, words, strict=True) if first == last]
        for text in dict.fromkeys(alone if prompt_only else ()):
            warnings.warn(
                f"{text!r} is one token, so its attention over the prompt's own tokens is 1 from the start "
                "and nursing changes nothing: say more of the picture",
                stacklevel=2,
            )
        return SubjectTokens.stack(
            positions=positions,
            # The authors leave the context's last position out, whatever is there; so do we.
            last=[last if prompt_only else stream.width - 2 for _, last in words],
            first=[first for first, _ in words],
            target=[[group.target for group in prompt.groups] for prompt in run.prompts],
            negated=[[group.negated for group in prompt.groups] for prompt in run.prompts],
            attributes=attributes,
            others=[prompt.others(at) if prompt.spans else () for prompt in run.prompts],
            device=run.text.device,
            dtype=run.latents_dtype,
        )

    def _positions(self, run: Run, prompt: Prompt, group: TokenGroup) -> tuple[int, ...]:
        if len(group.positions) <= 1 or self.word_tokens == "max" or run.dominant_token is None:
            return group.positions
        first, last = group.positions[0], group.positions[-1]
        words = prompt.text[prompt.spans[first][0] : prompt.spans[last][1]]
        alone = f"an image of a {re.sub(_BRACKETS, ' ', words)}"
        drawn = parse(alone, run.streams, ())
        end = drawn.words()[1] + 1
        before = end - (last - first + 1)
        if drawn.tokens[before:end] != prompt.tokens[first : last + 1]:
            # Pieces of words, and brackets, which alone are read in another way.
            return group.positions
        there = tuple(before + position - first for position in group.positions)
        found = run.model.dominant_tokens
        if (drawn.text, there) not in found:
            found[drawn.text, there] = run.dominant_token(drawn.text, there)
        return (group.positions[found[drawn.text, there]],)


@dataclass(frozen=True)
class _Table:
    """The subjects of a batch in one of the model's tables of tokens.

    `columns` are those of the table in the maps; `shared` says whether its tokens share a softmax with the
    image's.
    """

    columns: slice
    shared: bool
    subjects: SubjectTokens

    def rows(self, rows: Tensor) -> _Table:
        return replace(self, subjects=self.subjects.rows(rows))

    def part(self, found: Recorded) -> Recorded:
        """The table's own columns of what was recorded."""
        cross = found.cross[..., self.columns]
        if self.shared:
            cross = renormalised(cross, self.subjects.first, self.subjects.last)
        before = None if found.before is None else self.part(found.before)
        return Recorded(cross, found.self_attention, before)


Look = Callable[[Tensor, Step, Tensor, Recorded | None], tuple[Tensor, Measurement, Tensor | None]]
"""(latents (b, C, H, W) as the loop holds them, step, rows (b,), what the step before found of them) -> the
maps of the conditional pass (b, H, W, tokens), what they say, and how far each subject leads, where that is
asked."""


@dataclass(frozen=True)
class Eye:
    """What looks at the attention of a batch.

    Attributes:
        run: the batch.
        recipe: how it is looked at.
        tables: the subjects in each of the model's tables of tokens.
        places: the layers that are read.
    """

    run: Run
    recipe: Recipe
    tables: Sequence[_Table]
    places: Sequence[Place]

    @contextmanager
    def open(self, terms: Sequence[PlannedTerm]) -> Iterator[Look]:
        """In the block latents can be looked at, for the loss that is the sum of these terms."""
        run, model = self.run, self.run.model
        layout = run.layout(model.attention_downsampling)
        asks = any("self-attention" in getattr(each.term, "needs", ()) for each in terms)
        own = model.family.self_places(self.places) if asks else ()
        with record(
            model.network, self.places, layout=layout, stop_after_last=True, self_places=own
        ) as recording:

            def look(
                latents: Tensor, step: Step, rows: Tensor, before: Recorded | None = None
            ) -> tuple[Tensor, Measurement, Tensor | None]:
                recording.forward(**run.network_inputs(latents, step, run.text[rows]))
                found = Recorded(recording.average(), before=before)
                with torch.autocast(found.cross.device.type, enabled=False):
                    if own:
                        found = replace(found, self_attention=recording.self_average())
                    chosen = [table.rows(rows) for table in self.tables]
                    return found.cross, *_measure(found, chosen, self.recipe, terms)

            yield look


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


def _measure(
    found: Recorded, tables: Sequence[_Table], recipe: Recipe, terms: Sequence[PlannedTerm]
) -> tuple[Measurement, Tensor | None]:
    """What a pass says of the subjects: the mean over the tables of tokens that have them.

    Beside it, where the recipe asks, how far each subject leads: (b, S), see `subject_leads`.
    """
    records = [table.part(found) for table in tables]
    attentions, leads = [], []
    for here, table in zip(records, tables, strict=True):
        subjects = table.subjects
        probabilities = token_probabilities(here.cross, subjects.last, recipe.temperature, subjects.first)
        attentions.append(subject_attention(probabilities, subjects, recipe.sigma))
        if recipe.rest_lead is not None:
            leads.append(subject_leads(probabilities.detach(), subjects, recipe.sigma))
    # Only subjects that no table has are filler.
    there = torch.stack([table.subjects.here for table in tables]).sum(dim=0).clamp(min=1)

    def over_tables(values: list[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.stack(values).sum(dim=0) / there

    attention = over_tables(attentions)
    losses = subject_losses(attention, tables[0].subjects)
    parts: dict[str, Tensor] = {}
    for weight, term in terms:
        if term == MostNeglected(recipe.temperature, recipe.sigma):
            loss = most_neglected(losses)  # which are there already
        else:
            values = [_checked(term, *each) for each in zip(records, tables, strict=True)]
            loss = torch.stack(values).mean(dim=0)
        name = getattr(term, "name", "objective")
        parts[name] = weight * loss + parts[name] if name in parts else weight * loss
    total = torch.stack(list(parts.values())).sum(dim=0)
    return Measurement(attention, losses, total, parts), over_tables(leads) if leads else None


def _checked(objective: Objective, found: Recorded, table: _Table) -> Tensor:
    loss = objective(found, table.subjects)
    images = len(found.cross)
    shape = tuple(loss.shape) if isinstance(loss, Tensor) else None
    if shape != (images,) or not loss.requires_grad:
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
