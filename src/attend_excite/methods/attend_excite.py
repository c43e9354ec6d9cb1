"""Attend-and-Excite: nurse the latents, then let another method denoise them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from attend_excite.attention.places import attends_to_prompt_only, cross_attention_places
from attend_excite.attention.record import record
from attend_excite.guidance.nurse import Measurement, Visit, nurse
from attend_excite.guidance.objective import (
    Objective,
    SubjectTokens,
    most_neglected,
    subject_attention,
    subject_losses,
    token_probabilities,
    tolerated_losses,
)
from attend_excite.guidance.schedule import Recipe
from attend_excite.methods.base import Denoise, Method, Run, Step
from attend_excite.methods.stable_diffusion import StableDiffusion
from attend_excite.models.model import Model
from attend_excite.subjects import Prompt, TokenGroup, parse

# Enough to see where a single word's attention settles, at a few passes a word and model.
_DOMINANT_STEPS = 8
_BRACKETS = r"[\[\]]"


@dataclass(frozen=True)
class AttendAndExcite:
    """Generative semantic nursing by cross-attention (Section 4).

    Attributes:
        recipe: the numbers, or the name of a packaged recipe; None: what the model recommends, which is
            "official" where it recommends nothing. The ablations change that recommendation.
        word_tokens: what stands for a subject of several tokens: "dominant", the token that most
            attention goes to when the model draws the word alone (Appendix A.2), or "max", the
            largest attention among its tokens, at no cost.
        base: the method that denoises the nursed latents, and whose conditioning the attention is
            measured under.
        objective: what the latents are moved down along, if not the loss of the most neglected subject
            (Equation 2): a function of the maps, of which the caller's own are as good. Whether a threshold
            is met stays a matter of the subjects' attention.

    Raises:
        ValueError: there is no recipe of that name, or nursing cannot go on top of `base`.
    """

    recipe: Recipe | str | None = None
    word_tokens: Literal["dominant", "max"] = "dominant"
    base: Method = field(default_factory=StableDiffusion)
    objective: Objective | None = None

    name = "attend-excite"
    title = "Attend-and-Excite"
    uses_subjects = True
    attends_to_prompt = True

    def __post_init__(self) -> None:
        if isinstance(self.recipe, str):
            Recipe.named(self.recipe)
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

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        """The nursed step. Guidance passes are made only where the recipe can alter the latents."""
        recipe = self._recipe(run.model)
        plans = recipe.plan(len(run.scheduler.timesteps))
        subjects = self._subject_tokens(run, recipe)
        resting = _Resting(subjects, recipe) if recipe.rest_after else None
        unet = run.model.unet
        places = cross_attention_places(unet, run.model.attention_downsampling)

        def nurse_step(latents: Tensor, step: Step) -> tuple[Tensor, list[Visit]]:
            plan = plans[step.index]
            tolerated = None if plan.threshold is None else tolerated_losses(subjects, plan.threshold)
            rows = None if resting is None else resting.awake()
            if rows is not None and not len(rows):
                return latents, []
            scale = run.input_scale(step)
            # Around the gradients too: with gradient checkpointing the layers run again on the way back.
            with record(unet, places, stop_after_last=True) as recording:
                # In the space of the UNet's input, so that a step goes as far with every scheduler. Not a
                # bit changes where the two are the same.
                def measure(inputs: Tensor, rows: Tensor) -> Measurement:
                    recording.forward(**run.unet_inputs(inputs / scale, step, run.text[rows]))
                    chosen, maps = subjects.rows(rows), recording.average()
                    with torch.autocast(maps.device.type, enabled=False):
                        probabilities = token_probabilities(maps, chosen.last, recipe.temperature)
                        attention = subject_attention(probabilities, chosen, recipe.sigma)
                        losses = subject_losses(attention, chosen)
                        return Measurement(attention, losses, self._loss(losses, maps, chosen))

                inputs, visits = nurse(latents * scale, measure, plan, tolerated, rows)
                latents = inputs / scale
            if resting is not None:
                resting.update(visits[0])
            return latents, visits

        with self.base.attach(run) as denoise:

            def denoise_nursed(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
                if not plans[step.index].idle:
                    latents, run.visits[step.index] = nurse_step(latents, step)
                return denoise(latents, step)

            yield denoise_nursed

    def _loss(self, losses: Tensor, maps: Tensor, subjects: SubjectTokens) -> Tensor:
        if self.objective is None:
            return most_neglected(losses)
        loss = self.objective(maps, subjects)
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else None
        if shape != (len(maps),) or not loss.requires_grad:
            found = type(loss).__name__ if shape is None else f"a tensor of shape {shape}"
            raise ValueError(
                f"the objective gave {found} for {len(maps)} images: it must give one loss an image, (b,), "
                "worked out from the maps so that it has a gradient"
            )
        return loss

    def _recipe(self, model: Model) -> Recipe:
        if isinstance(self.recipe, str):
            return Recipe.named(self.recipe, recommended=model.recipe)
        return self.recipe or model.recipe

    def _subject_tokens(self, run: Run, recipe: Recipe) -> SubjectTokens:
        prompt_only = recipe.prompt_tokens_only
        if prompt_only is None:
            prompt_only = attends_to_prompt_only(run.model.unet)
        context = run.text.shape[1]
        return SubjectTokens.stack(
            positions=[[self._positions(run.model, p, g) for g in p.groups] for p in run.prompts],
            # The authors leave the context's last position out, whatever is there; so do we.
            last=[len(p.tokens) - 2 if prompt_only else context - 2 for p in run.prompts],
            target=[[group.target for group in prompt.groups] for prompt in run.prompts],
            negated=[[group.negated for group in prompt.groups] for prompt in run.prompts],
            device=run.text.device,
            dtype=run.latents_dtype,
        )

    def _positions(self, model: Model, prompt: Prompt, group: TokenGroup) -> tuple[int, ...]:
        if len(group.positions) == 1 or self.word_tokens == "max":
            return group.positions
        first, last = group.positions[0], group.positions[-1]
        words = prompt.text[prompt.spans[first][0] : prompt.spans[last][1]]
        drawn = parse(f"an image of a {re.sub(_BRACKETS, ' ', words)}", model.tokenizer, ())
        before = len(drawn.tokens) - 1 - (last - first + 1)
        if drawn.tokens[before:-1] != prompt.tokens[first : last + 1]:
            # Pieces of words, and brackets, which alone are read in another way.
            return group.positions
        there = tuple(before + position - first for position in group.positions)
        if (drawn.text, there) not in model.dominant_tokens:
            model.dominant_tokens[drawn.text, there] = _dominant_token(model, drawn.text, there)
        return (group.positions[model.dominant_tokens[drawn.text, there]],)


class _Resting:
    """Which images of a batch need no more nursing: see `Recipe.rest_after`."""

    def __init__(self, subjects: SubjectTokens, recipe: Recipe) -> None:
        self._subjects = subjects
        self._tolerated = tolerated_losses(subjects, recipe.goal)
        self._enough = recipe.rest_after
        self._in_a_row = torch.zeros(len(self._tolerated), dtype=torch.long, device=self._tolerated.device)

    def awake(self) -> Tensor:
        """(b,) the images that are still nursed."""
        return (self._in_a_row < self._enough).nonzero().flatten()

    def update(self, first: Visit) -> None:
        """Count a guided step, by what its first visit found."""
        losses = subject_losses(first.attention, self._subjects.rows(first.rows))
        met = (losses <= self._tolerated[first.rows]).all(dim=1)
        self._in_a_row[first.rows] = torch.where(met, self._in_a_row[first.rows] + 1, 0)


def _dominant_token(model: Model, prompt: str, positions: tuple[int, ...]) -> int:
    """Which of a word's tokens most attention goes to when the model draws the word alone (Appendix A.2)."""
    drawn = model.generate(
        prompt,
        method=StableDiffusion(),
        steps=_DOMINANT_STEPS,
        guidance_scale=1.0,
        maps=True,
        decode=False,
        progress=False,
    )
    maps = drawn.maps.values[0, ..., list(positions)]
    return int(maps.mean(dim=0).amax(dim=(0, 1)).argmax())
