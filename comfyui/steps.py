"""Which of a sampler's calls of the model begin its steps, and whether a shift made there stays.

Samplers differ. Heun, DPM-2 and their like call the model twice and more a step, some of them at noise levels
that are a step's own; UniPC and SA-Solver work the latents out anew from earlier ones, so that a shift
of what they hand in is lost. Instead of a list of names, the sampler is run on a few numbers, with a model
that says nothing: its calls are counted, and what is added to the latents that it hands in is looked for in
the next step's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# What the host tells of guidance: CFG++ samplers ask for the unconditional part so.
_AFTER = "sampler_post_cfg_function"
# Of the one that is added.
_LITTLE = 1e-6


def step_calls(
    sampler: Callable[..., Tensor],
    model: Any,
    sigmas: Tensor,
    nursed: Callable[[int], Sequence[int]],
    extra_args: dict[str, Any],
    options: dict[str, Any],
    name: str,
) -> tuple[int, ...]:
    """The numbers of the calls that begin each step, from 0.

    Args:
        sampler: the host's function of a sampler.
        model: the one that it will be handed, for the attributes that it asks of it.
        sigmas: (steps + 1,) of the run.
        nursed: of so many steps those at which latents will be shifted.
        extra_args: what the sampler hands the model.
        options: its own.
        name: for people.

    Raises:
        ValueError: the sampler's steps depend on what the model says, or it forgets a shift.
    """

    told = len(extra_args.get("model_options", {}).get(_AFTER, ()))

    def tried(start: int, marks: Mapping[int, int]) -> _Silent:
        silent = _Silent(model, marks, told)
        latents = torch.full((1, 4, 1, max(len(sigmas), 2)), float(start), dtype=torch.float64)
        # The run's own noise is to be what it would be without this.
        with torch.inference_mode(), torch.random.fork_rng([]):
            try:
                sampler(
                    silent,
                    latents,
                    sigmas.cpu().double(),
                    extra_args=dict(extra_args),
                    callback=silent.end_step,
                    disable=True,
                    **options,
                )
            except Exception as error:
                raise _refusal(name, f"it couldn't be tried out ({error})") from error
        return silent

    plain, other = tried(0, {}), tried(1, {})
    steps = nursed(len(plain.begins))
    marked = tried(0, {plain.begins[step]: step for step in steps})
    if not plain.begins or not plain.sigmas == other.sigmas == marked.sigmas:
        raise _refusal(name, "it chooses its steps by what the model says")
    for step in steps:
        if step + 1 >= len(plain.begins):
            continue
        before, then, with_mark = (each.seen[plain.begins[step + 1]] for each in (plain, other, marked))
        # LCM goes on from what the model says alone: there is nothing that a shift could be lost from.
        goes_on = (then - before).abs().amax() > _LITTLE
        if goes_on and not (with_mark - before)[..., step].abs().amax() > _LITTLE:
            raise _refusal(name, "it works the latents out anew from earlier ones, and forgets a shift")
    return tuple(plain.begins)


def _refusal(name: str, why: str) -> ValueError:
    return ValueError(
        f"latents can't be nursed under the sampler {name}, since {why}: choose another, as euler, "
        "dpmpp_2m, dpmpp_2m_sde or heun"
    )


class _Silent:
    """In the place of the model: says that the picture is nought, and adds marks to what it is handed.

    Args:
        model: the one that it stands for.
        marks: by the number of the call, the column that gets one.
        told: how many functions of the run's own are told of guidance; further ones are the sampler's.
    """

    def __init__(self, model: Any, marks: Mapping[int, int], told: int) -> None:
        self._model = model
        self._marks = marks
        self._told = told
        self.sigmas: list[float] = []
        self.seen: list[Tensor] = []
        self.begins: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, latents: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        if (column := self._marks.get(len(self.seen))) is not None:
            latents[..., column] += 1
        self.sigmas.append(float(sigma.flatten()[0]))
        self.seen.append(latents.clone())
        nothing = torch.zeros_like(latents)
        told = {"denoised": nothing, "cond_denoised": nothing, "uncond_denoised": nothing, "input": latents}
        for function in extra.get("model_options", {}).get(_AFTER, [])[self._told :]:
            function({**told, "sigma": sigma, "model_options": extra["model_options"]})
        return nothing

    def end_step(self, _: dict[str, Any]) -> None:
        """A sampler reports a step once the model has answered for where it begins."""
        self.begins.append(len(self.seen) - 1)
