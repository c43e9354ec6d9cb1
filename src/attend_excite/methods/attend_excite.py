"""Attend-and-Excite: nurse the latents, then let another method denoise them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.attention.record import record
from attend_excite.columns import compares_prompt_only, tables_of
from attend_excite.guidance.nurse import Measurement
from attend_excite.guidance.nursing import Nursing, Table, measure_tables
from attend_excite.guidance.objectives import Objective, Recorded
from attend_excite.guidance.recipes import method_recipes
from attend_excite.guidance.schedule import PlannedTerm, Recipe
from attend_excite.methods.base import Denoise, Method, Run, Step
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.subjects import Prompt, TokenGroup, parse
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
        if isinstance(self.base, type) or not hasattr(self.base, "attach"):
            raise ValueError(f"the base is {self.base!r}: give a method that is made, as StableDiffusion()")
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
        """The nursed step."""
        nurse_step = self.nursing(run, len(run.timesteps))
        with self.base.attach(run) as denoise:

            def denoise_nursed(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
                return denoise(nurse_step(latents, step), step)

            yield denoise_nursed

    def nursing(self, run: Run, iterations: int) -> Callable[[Tensor, Step], Tensor]:
        """What is done to a step's latents (B, C, H, W) before they are denoised.

        Guidance passes are made only where the recipe can alter the latents: elsewhere they come back as they
        are. For loops that denoise by themselves, as diffusers' do.

        Args:
            run: the batch. Its visits are written down.
            iterations: how many steps there will be.
        """
        recipe = self.recipe_for(run.model.recipe)
        plans = recipe.plan(iterations)
        if self.objective is not None:
            objective = PlannedTerm(1.0, self.objective)
            plans = tuple(replace(plan, terms=(objective,)) for plan in plans)
        eye = self.eye(run)
        nursing = Nursing(recipe, plans, eye.tables)
        if any("self-attention" in plan.needs for plan in plans if not plan.idle):
            run.model.family.self_places(eye.places)  # A model whose self-attention isn't known says so now.

        def nurse_step(latents: Tensor, step: Step) -> Tensor:
            if plans[step.index].idle:
                return latents
            scale = run.vp_scale(step)
            # Around the gradients too: with gradient checkpointing the layers run again on the way back.
            with eye.open(plans[step.index].terms) as look:
                scaled, visits = nursing.step(
                    step.index, latents * scale, lambda scaled, rows: look(scaled / scale, step, rows)
                )
            run.visits[step.index] = visits
            # Not a bit changes where there was nothing to do.
            return scaled / scale if visits else latents

        return nurse_step

    def eye(self, run: Run) -> Eye:
        """What looks at the attention of a batch."""
        recipe = self.recipe_for(run.model.recipe)
        return Eye(run, recipe, self._tables(run, recipe), run.model.places())

    def _tables(self, run: Run, recipe: Recipe) -> list[Table]:
        """The subjects in each of the model's tables of tokens, with its columns of the maps."""
        shared = run.model.family.joint is not None
        first = [[self._positions(run, prompt, group) for group in prompt.groups] for prompt in run.prompts]
        run.nursed = Nursed(
            tuple(
                {group.text: tokens for group, tokens in zip(prompt.groups, of_image, strict=True)}
                for prompt, of_image in zip(run.prompts, first, strict=True)
            ),
            recipe.goal,
        )
        for at, stream in enumerate(run.streams):
            if compares_prompt_only(recipe, stream, shared):
                _warn_of_single_tokens(run.prompts, at)
        return tables_of(
            run.prompts,
            run.streams,
            recipe,
            columns=run.columns,
            shared=shared,
            first=first,
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
        asked = drawn.text, there, run.size
        if asked not in found:
            found[asked] = run.dominant_token(drawn.text, there)
        return (group.positions[found[asked]],)


LookAtStep = Callable[[Tensor, Step, Tensor], Recorded]
"""(latents (b, C, H, W) as the loop holds them, step, rows (b,)) -> what the conditional pass recorded."""


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
    tables: Sequence[Table]
    places: Sequence[Place]

    @contextmanager
    def open(self, terms: Sequence[PlannedTerm]) -> Iterator[LookAtStep]:
        """In the block latents can be looked at, for the loss that is the sum of these terms."""
        run, model = self.run, self.run.model
        layout = run.layout(model.attention_downsampling)
        asks = any("self-attention" in getattr(each.term, "needs", ()) for each in terms)
        own = model.family.self_places(self.places) if asks else ()
        with record(
            model.network, self.places, layout=layout, stop_after_last=True, self_places=own
        ) as recording:

            def look(latents: Tensor, step: Step, rows: Tensor) -> Recorded:
                recording.forward(**run.network_inputs(latents, step, run.text[rows]))
                cross = recording.average()
                with torch.autocast(cross.device.type, enabled=False):
                    return Recorded(cross, recording.self_average() if own else None)

            yield look

    def measure(self, found: Recorded, rows: Tensor, terms: Sequence[PlannedTerm]) -> Measurement:
        """What was recorded of these images says of their subjects."""
        with torch.autocast(found.cross.device.type, enabled=False):
            return measure_tables(found, [table.rows(rows) for table in self.tables], self.recipe, terms)[0]


def _warn_of_single_tokens(prompts: Sequence[Prompt], table: int) -> None:
    spans = [(prompt.text, *prompt.words(table)) for prompt in prompts if prompt.spans]
    for text in dict.fromkeys(text for text, first, last in spans if first == last):
        warnings.warn(
            f"{text!r} is one token, so its attention over the prompt's own tokens is 1 from the start "
            "and nursing changes nothing: say more of the picture",
            stacklevel=2,
        )
