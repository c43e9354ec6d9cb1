"""Schedulers by name, and what some need beside their steps: shifts of latents that they keep, seeds of their
noise."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from types import MethodType
from typing import TYPE_CHECKING, Any

# The command line's help names the schedulers: torch and diffusers, which take seconds, are imported late.
if TYPE_CHECKING:
    from torch import Tensor

# UniPC and SA-Solver work the latents in hand out anew, from those before and what the model says now.
_CORRECTORS = ("multistep_uni_c_bh_update", "stochastic_adams_moulton_update")

# Of diffusers' LMS where nobody says otherwise.
_LMS_ORDER = 4


@cache
def _known() -> Mapping[str, Mapping[str, Any]]:
    return json.loads(files("attend_excite").joinpath("data/schedulers.json").read_text(encoding="utf-8"))


def scheduler_names() -> tuple[str, ...]:
    """The short names of diffusers' schedulers, as "ddim" or "dpm++"."""
    return tuple(_known())


def sampler_of(name: str | None) -> Mapping[str, str]:
    """How A1111 and its like call a scheduler with a short name; of a model's own, None, nothing is known."""
    return {} if name is None else _known()[name]["a1111"]


def fitting_schedulers(own: Any) -> dict[str, str]:
    """Of the schedulers with a short name, those that can take the place of a model's own: the name -> its
    title. Flow matching has none of them."""
    if _is_flow(own):
        return {}
    kinds = {kind.__name__ for kind in own.compatibles}
    return {name: known["title"] for name, known in _known().items() if known["class"] in kinds}


def check_scheduler(name: str | None) -> None:
    """Refuse a scheduler that has no short name.

    Raises:
        ValueError: it has none.
    """
    if name is not None and name not in _known():
        raise ValueError(f"unknown scheduler {name!r}: choose one of {', '.join(_known())}")


def scheduler_for_run(own: Any, name: str | None = None) -> Any:
    """A scheduler for one run: a copy of a model's own, or another on the same noise schedule and prediction.

    Args:
        own: the model's, which stays as it is.
        name: one of `scheduler_names`; None: its own.

    Raises:
        ValueError: there is no such scheduler, or the model's noise schedule isn't for it.
    """
    check_scheduler(name)
    if name is None:
        return copy.deepcopy(own)
    fitting = fitting_schedulers(own)
    if not fitting:
        raise ValueError(
            f"the scheduler {name!r} can't take the place of this model's {type(own).__name__}: there is no "
            "other here for its way of making noise, so leave it out"
        )
    if name not in fitting:
        raise ValueError(
            f"the scheduler {name!r} can't take the place of this model's {type(own).__name__}: "
            f"choose one of {', '.join(fitting)}, or leave it out"
        )
    import diffusers

    known = _known()[name]
    return getattr(diffusers, known["class"]).from_config(own.config, **known.get("options", {}))


def seed_noise(scheduler: Any, seeds: Sequence[int]) -> None:
    """Give DPM++ SDE, which takes no generator, each image's seed for the noise that it adds, unless its
    owner gave it one. The scheduler is a run's own."""
    if getattr(scheduler, "noise_sampler_seed", 0) is None:
        scheduler.noise_sampler_seed = list(seeds)


def shift_carrier(scheduler: Any) -> Callable[[Tensor | None], None]:
    """Make a scheduler go on from shifted latents, whatever it remembers of earlier ones.

    Heun, KDPM2, DPM++ SDE and DPM++ singlestep begin a second stage from the latents of the first: those
    are shifted too. UniPC and SA-Solver correct the latents in hand: the shift is added to what comes out.
    The others keep no latents, except PNDM in its warm-up, which is left as the authors had it.

    Args:
        scheduler: a run's own; from now on it must be told of every step.

    Returns:
        To be called before each step with what the latents were shifted by, in the shape in which the
        scheduler has them, or None.
    """
    from torch import Tensor

    shift: Tensor | None = None
    name = next((name for name in _CORRECTORS if hasattr(scheduler, name)), None)
    if name is not None:
        correct = getattr(scheduler, name)

        def correct_and_shift(*args: Any, **kwargs: Any) -> Tensor:
            corrected = correct(*args, **kwargs)
            return corrected if shift is None else corrected + shift.to(corrected.dtype)

        setattr(scheduler, name, correct_and_shift)

    def carry(by: Tensor | None) -> None:
        nonlocal shift
        shift = by
        kept = getattr(scheduler, "sample", None)
        if by is not None and isinstance(kept, Tensor):
            scheduler.sample = kept + by.to(kept.dtype)

    return carry


def without_warm_up(scheduler: Any) -> Any:
    """For a run that begins from a picture: PNDM's first steps count as those of a whole run."""
    if scheduler.config.get("skip_prk_steps") is not False:
        return scheduler
    return type(scheduler).from_config(scheduler.config, skip_prk_steps=True)


def steps_made(scheduler: Any, steps: int, strength: float) -> int:
    """How many steps a run makes that begins from a picture, as in diffusers' pipelines: of 50 steps at
    strength 0.8 the last 40. A part of a step is left out, and with flow matching made whole.

    Args:
        scheduler: of the run.
        steps: of a whole run.
        strength: above 0 to 1.

    Raises:
        ValueError: it is less than a step.
    """
    made = steps - int(steps - steps * strength) if _is_flow(scheduler) else int(steps * strength)
    if made < 1:
        enough = math.ceil(1000 / steps) / 1000
        raise ValueError(f"strength {strength:g} of {steps} steps is no step at all: give {enough:g} or more")
    return made


def first_step(scheduler: Any, steps: int, strength: float) -> int:
    """The index among a scheduler's timesteps, with so many steps set, at which such a run begins.

    Raises:
        ValueError: it makes no step.
    """
    return (steps - steps_made(scheduler, steps, strength)) * getattr(scheduler, "order", 1)


def begin_at(scheduler: Any, first: int) -> None:
    """Make a run's own scheduler begin at another of its timesteps than the first."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    if hasattr(scheduler, "get_lms_coefficient"):
        # LMS takes the steps that were left out for some of whose slopes it knows.
        # A method, so that a copy of the scheduler steps itself.
        scheduler.step = MethodType(_step_with_known_slopes, scheduler)


def _step_with_known_slopes(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    order = min(len(scheduler.derivatives) + 1, _LMS_ORDER)
    return type(scheduler).step(scheduler, *args, order=order, **kwargs)


def noised(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Latents with as much noise as belongs to a timestep.

    Args:
        scheduler: a run's own.
        latents: (B, C, H, W) without noise.
        noise: (B, C, H, W) standard normal.
        timestep: one of the scheduler's.
    """
    if hasattr(scheduler, "scale_noise"):  # of flow matching
        return scheduler.scale_noise(latents, timestep.reshape(1), noise)
    return scheduler.add_noise(latents, noise, timestep.reshape(1))


def refuse_correctors(scheduler: Any) -> None:
    """Refuse a caller's own scheduler on which a shift of the latents would be lost: `shift_carrier` would
    have to change it.

    Raises:
        ValueError: it is one of those.
    """
    if any(hasattr(scheduler, name) for name in _CORRECTORS):
        raise ValueError(
            f"{type(scheduler).__name__} works every step's latents out anew from those before, so nursing "
            "would be lost: give another scheduler, as Euler's or DPM++ multistep"
        )


def scaled_input(scheduler: Any, latents: Tensor, timestep: Tensor) -> Tensor:
    """The latents as the network wants them: as they are but for Euler, LMS and their like, whose latents are
    larger."""
    if not hasattr(scheduler, "scale_model_input"):  # of flow matching
        return latents
    return scheduler.scale_model_input(latents, timestep)


def vp_scale(scheduler: Any, timestep: Tensor) -> float:
    """What brings latents to variance-preserving scale, x = sqrt(a) x0 + sqrt(1 - a) noise.

    In that scale one step size moves a picture as far under every scheduler and parametrisation. A latent
    x = s x0 + n noise has it after a division by sqrt(s^2 + n^2). For diffusion this is the network's input;
    for flow matching, where s = 1 - sigma and n = sigma, 1 / sqrt((1 - sigma)^2 + sigma^2).
    """
    import torch

    if not _is_flow(scheduler):
        return float(scaled_input(scheduler, torch.ones((), dtype=torch.float64), timestep))
    at = (scheduler.timesteps == timestep.to(scheduler.timesteps)).nonzero().flatten()
    sigma = float(scheduler.sigmas[int(at[0])])
    return ((1 - sigma) ** 2 + sigma**2) ** -0.5


def _is_flow(scheduler: Any) -> bool:
    """Whether a scheduler's latents are (1 - sigma) x0 + sigma noise."""
    config = scheduler.config
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flows) or not hasattr(scheduler, "scale_model_input")
