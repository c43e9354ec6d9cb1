"""The losses that the authors published, step by step, against those of this machine."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from attend_excite.generate import denoise
from attend_excite.methods import AttendAndExcite, Run
from attend_excite.models import Model
from attend_excite.subjects import parse

STEPS, GUIDANCE = 50, 7.5
"""Of the published runs."""

_LATENT_SIDE = 64


@dataclass(frozen=True)
class PublishedTrace:
    """A run of the authors' notebooks.

    Attributes:
        model: the name in the catalogue of the model that it was made with.
        prompt: what was drawn.
        seed: of a generator on a CUDA device.
        losses: the loss of each altered step, with four decimals.
    """

    model: str
    prompt: str
    seed: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """A published trace and the losses found here.

    Attributes:
        trace: what was published.
        losses: what was found here.
        differences: |found - published| a step; infinite where nothing finite was found.
        departure: the first step, from 1, that is beyond the tolerance; None: all are within it.
    """

    trace: PublishedTrace
    losses: tuple[float, ...]
    differences: tuple[float, ...]
    departure: int | None


def published_traces() -> tuple[PublishedTrace, ...]:
    """The 13 traces of the authors' notebooks."""
    return tuple(
        PublishedTrace(trace["model"], trace["prompt"], trace["seed"], tuple(trace["losses"]))
        for trace in _facts()["traces"]
    )


def tolerance(step: int) -> float:
    """How far a loss may be from the published one at a step, counted from 1.

    So far the losses moved between two releases of the authors' own code.
    """
    allowed = _facts()["tolerance"]
    return allowed["in_first_steps"] if step <= allowed["first_steps"] else allowed["overall"]


def compare(trace: PublishedTrace, losses: Sequence[float]) -> Comparison:
    """Set losses beside published ones, after rounding them as those are rounded.

    Args:
        trace: what was published.
        losses: those found, a step each; steps that are missing count as departures.
    """
    found = [*losses[: len(trace.losses)], *[math.nan] * (len(trace.losses) - len(losses))]
    differences = tuple(
        abs(round(loss, 4) - published) if math.isfinite(loss) else math.inf
        for loss, published in zip(found, trace.losses, strict=True)
    )
    # Differences of numbers with four decimals; the rest is the rounding of binary fractions.
    beyond = [
        step for step, difference in enumerate(differences, 1) if round(difference, 6) > tolerance(step)
    ]
    return Comparison(trace, tuple(found), differences, beyond[0] if beyond else None)


def traces_for(model: Model) -> tuple[PublishedTrace, ...]:
    """The traces that were published for a model, which is told by its architecture.

    Raises:
        ValueError: there are none, or the model isn't as it was then: in float32, with PNDM.
    """
    own = "sd-2.1-base" if model.family.streams()[0].prompt_tokens_only else "sd-1.4"
    prediction = model.pipeline.scheduler.config.get("prediction_type")
    if model.network.config.get("sample_size") != _LATENT_SIDE or prediction != "epsilon":
        raise ValueError(
            f"no losses were published for '{model.name}': there are some for sd-1.4 and sd-2.1-base"
        )
    scheduler = type(model.pipeline.scheduler).__name__
    if scheduler != "PNDMScheduler":
        raise ValueError(
            f"the published losses are of the scheduler that comes with the model, PNDM, and '{model.name}' "
            f"has {scheduler}"
        )
    if model.dtype != torch.float32:
        raise ValueError("the published losses are of float32: load the model with that dtype")
    return tuple(trace for trace in published_traces() if trace.model == own)


def require_cuda() -> None:
    """Refuse a machine that cannot make the noise of the published runs.

    Raises:
        ValueError: there is no CUDA device.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise ValueError(
            "the published losses cannot be reproduced on this machine: their noise comes from the random "
            "generator of a CUDA device, the same seed gives other noise elsewhere, and there is none here"
        )


def published_noise(seed: int) -> Tensor:
    """(1, 4, 64, 64) the noise of a published run, on the CUDA device that it must be drawn on."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, 4, _LATENT_SIDE, _LATENT_SIDE, generator=generator, device="cuda")


@torch.no_grad()
def losses_from(
    model: Model,
    prompt: str,
    noise: Tensor,
    steps: int = STEPS,
) -> list[float]:
    """The loss of each altered step with the official recipe, as the authors' notebooks print it.

    Args:
        model: left as it was.
        prompt: its subjects are its nouns.
        noise: (1, C, H, W) standard normal, on the model's device.
        steps: denoising steps.
    """
    size = (noise.shape[-2], noise.shape[-1])
    text, empty = model.family.encode([prompt], "", None, size)
    run = Run(
        model=model,
        prompts=(parse(prompt, model.family.streams()),),
        text=text,
        empty_text=empty,
        guidance_scale=GUIDANCE,
        scheduler=copy.deepcopy(model.pipeline.scheduler),
        size=size,
    )
    model.family.set_timesteps(run.scheduler, steps, size)
    denoise(run, AttendAndExcite("official"), noise, None)
    return [float(visits[-1].loss) for _, visits in sorted(run.visits.items())]


@cache
def _facts() -> dict[str, Any]:
    text = files("attend_excite").joinpath("data/loss_traces.json").read_text(encoding="utf-8")
    return json.loads(text)
