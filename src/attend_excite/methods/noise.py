"""Which noise a batch begins from: the seeds' own, the best of several, or one that is searched for."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attend_excite.guidance.noise import search_noise
from attend_excite.guidance.nurse import Measurement
from attend_excite.guidance.schedule import PlannedTerm, Recipe, StepPlan
from attend_excite.methods.attend_excite import AttendAndExcite
from attend_excite.methods.base import Method, Run, Step
from attend_excite.models.model import Model, prepared
from attend_excite.trace import ChosenNoise

MAX_NOISES = 1000
"""Tried for a picture."""

Loop = Callable[..., tuple[Tensor, list[float]]]
"""`generate.denoise`."""


def check_noise(model: Model, method: Method, noises: int, *, from_picture: bool = False) -> None:
    """Refuse to choose among noises where there is nothing to choose by.

    Args:
        model: the model.
        method: what will draw.
        noises: how many are tried for each picture.
        from_picture: whether the run begins from a picture.

    Raises:
        ValueError: the recipe searches already, it searches where a picture lies under the noise, or the
            method never shows the model the whole prompt.
    """
    if from_picture and _searches(model, method):
        raise ValueError(
            f"{method.title} searches for a noise that it sees alone, and this run begins from a picture: "
            "take a recipe without a search"
        )
    if noises == 1:
        return
    if _searches(model, method):
        raise ValueError(
            f"{method.title} searches for the noise already: leave best_of out, or take a recipe without a "
            "search"
        )
    _nursing(method)


def refuse_search(model: Model, method: Method) -> None:
    """Refuse a recipe that searches for its noise where somebody else has drawn that.

    Raises:
        ValueError: it does.
    """
    if _searches(model, method):
        raise ValueError(
            f"{method.title} searches for its noise before the first step, which generate alone can do: take "
            'a recipe without a search, as "initno"'
        )


def chooses_noise(model: Model, method: Method, noises: int) -> bool:
    """Whether a noise is chosen or searched for, which takes its time before the first step."""
    return noises > 1 or _searches(model, method)


def first_noise(
    run: Run,
    method: Method,
    noise: Tensor,
    draw: Callable[[], Tensor],
    generators: Sequence[torch.Generator],
    noises: int,
    denoise: Loop,
) -> Tensor:
    """The noise that each image of a batch begins from. What was done for it stands in `run.noises`.

    Args:
        run: the batch.
        method: what will draw.
        noise: (B, C, H, W) the seeds' own, standard normal.
        draw: gives another noise for all images.
        generators: of the images, for the noise that stochastic schedulers add; they stay as they are.
        noises: how many are tried for each image; 1: the seed's own.
        denoise: the denoising loop.
    """
    if not chooses_noise(run.model, method, noises):
        return noise
    nursing = _nursing(method)
    recipe = nursing.recipe_for(run.model.recipe)
    # What happens on the way is none of the run's maps and visits, and its scheduler has not begun.
    apart = replace(run, map_downsampling=None, maps=[], visits={}, scheduler=copy.deepcopy(run.scheduler))
    began = time.perf_counter()
    with prepared(run.model.network):
        if recipe.search is not None and noises == 1:
            noise, run.noises = _searched(apart, nursing, recipe, noise, draw)
        else:
            candidates = [noise, *(draw() for _ in range(1, noises))]
            noise, run.noises = _best(apart, nursing, recipe, candidates, generators, denoise)
    seconds = time.perf_counter() - began
    run.noises = [replace(each, seconds=seconds) for each in run.noises]
    return noise


def _best(
    run: Run,
    nursing: AttendAndExcite,
    recipe: Recipe,
    candidates: Sequence[Tensor],
    generators: Sequence[torch.Generator],
    denoise: Loop,
) -> tuple[Tensor, list[ChosenNoise]]:
    """Of each image's noises the one whose recipe's loss is lowest a few steps into the plain run."""
    timesteps = run.timesteps
    index = recipe.compared_at(len(timesteps))
    terms = _terms_at(recipe.plan(len(timesteps)), nursing, index)
    rows = torch.arange(len(run.prompts), device=candidates[0].device)
    eye, losses = nursing.eye(run), []
    for noise in candidates:
        trial = replace(run, scheduler=copy.deepcopy(run.scheduler), visits={})
        same = [generator.clone_state() for generator in generators]
        latents, _ = denoise(trial, nursing.base, noise, same, steps=index)
        with nursing.base.attach(trial), replace(eye, run=trial).open(terms) as look:
            found = look(latents, Step(index, timesteps[index]), rows)
            losses.append(eye.measure(found, rows, terms).loss)
    table = torch.stack(losses, dim=1)  # (B, noises)
    for row in (table == table[:, :1]).all(dim=1).nonzero().flatten().tolist():
        warnings.warn(
            f"all noises for '{run.prompts[row].text}' have the same loss, so the first is kept: this "
            "method's loss says nothing of a noise there",
            stacklevel=2,
        )
    chosen = table.nan_to_num(nan=torch.inf).argmin(dim=1)
    a_step = 1 if run.empty_text is None else 2
    starts = [
        ChosenNoise(tuple(of_image), int(best), len(candidates) * (a_step * index + 1), 0.0)
        for of_image, best in zip(table.tolist(), chosen, strict=True)
    ]
    return torch.stack(list(candidates), dim=1)[rows, chosen], starts


def _searched(
    run: Run, nursing: AttendAndExcite, recipe: Recipe, noise: Tensor, draw: Callable[[], Tensor]
) -> tuple[Tensor, list[ChosenNoise]]:
    """Each image's noise moved down the loss of the search, at the first timestep."""
    assert recipe.search is not None
    step = Step(0, run.timesteps[0])
    scale = getattr(run.scheduler, "init_noise_sigma", 1.0)
    eye = nursing.eye(run)
    with nursing.base.attach(run), eye.open(recipe.searched_terms) as look:

        def measure(noise: Tensor, rows: Tensor) -> Measurement:
            return eye.measure(look(noise * scale, step, rows), rows, recipe.searched_terms)

        found = search_noise(noise, draw, measure, recipe.search)
    starts = [ChosenNoise(each.losses, each.chosen, each.passes, 0.0) for each in found]
    return torch.stack([each.noise for each in found]), starts


def _searches(model: Model, method: Method) -> bool:
    return isinstance(method, AttendAndExcite) and method.recipe_for(model.recipe).search is not None


def _nursing(method: Method) -> AttendAndExcite:
    """What knows the loss: the method, or what would nurse on top of it."""
    if isinstance(method, AttendAndExcite):
        return method
    if not method.attends_to_prompt:
        raise ValueError(
            f"{method.title} never shows the model the whole prompt, so no noise can be told from another by "
            "the attention to its words: leave best_of out"
        )
    return AttendAndExcite(base=method)


def _terms_at(plans: Sequence[StepPlan], nursing: AttendAndExcite, index: int) -> tuple[PlannedTerm, ...]:
    """What the loss is the sum of at a step, or if nothing is asked there, at the next one."""
    if nursing.objective is not None:
        return (PlannedTerm(1.0, nursing.objective),)
    asked = next((plan.terms for plan in [*plans[index:], *plans] if plan.terms), None)
    if asked is None:
        raise ValueError("the recipe has no term that counts at any step: leave best_of out, or give it one")
    return asked
