"""Schedulers by name; a shift of the latents is there in the end, whatever one keeps of those before it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from attend_excite import Model
from attend_excite.methods.base import Denoise, Run, Step
from attend_excite.models.catalogue import source_of
from attend_excite.schedulers import scheduler_for_run, scheduler_names, steps_made, vp_scale

STEPS = 20
LIKE_STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "lower_order_final": True,
}


def _normal(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class _Shifting:
    """Predicts the same noise at every step, and shifts the latents at one, in the space of the input."""

    at: int | None
    name = title = "shifting"
    uses_subjects = attends_to_prompt = False

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        def step(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            if step.index == self.at:
                latents = latents + 0.1 * _normal(latents.shape, 1) / run.vp_scale(step)
            return latents, _normal(latents.shape, 0)

        yield step


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        SASolverScheduler,
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        KDPM2AncestralDiscreteScheduler,
        DPMSolverSinglestepScheduler,
    ],
)
@pytest.mark.parametrize("index", [3, 4])  # first and second stages
def test_a_shift_reaches_the_end(tiny: Model, kind: Any, index: int) -> None:
    pipeline = copy.copy(tiny.pipeline)
    pipeline.scheduler = scheduler = kind.from_config(LIKE_STABLE_DIFFUSION)
    model = replace(tiny, family=type(tiny.family)(pipeline))
    shifted, plain = (
        model.generate("a cat", method=_Shifting(at), steps=STEPS, decode=False, progress=False).latents
        for at in (index, None)
    )
    # Given the noise, latents are told from the picture by a factor, of which the samplers differ a little.
    scheduler.set_timesteps(STEPS)
    seen = scheduler.alphas_cumprod[round(float(scheduler.timesteps[index]))].sqrt()
    picture = 0.1 * _normal(plain.shape, 1) / seen
    share = ((shifted - plain) * picture).sum() / picture.square().sum()
    assert float(share) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler.from_config(LIKE_STABLE_DIFFUSION),
        EulerDiscreteScheduler.from_config(LIKE_STABLE_DIFFUSION),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=["variance-preserving", "variance-exploding", "flow"],
)
def test_latents_of_every_parametrisation_come_to_one_scale(scheduler: Any) -> None:
    """A picture and a noise at right angles: in variance-preserving scale the mixture is a unit vector."""
    scheduler.set_timesteps(STEPS)
    picture, noise = torch.eye(2, dtype=torch.float64)
    for index in (1, STEPS // 2, STEPS - 2):
        timestep = scheduler.timesteps[index]
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            latents = scheduler.scale_noise(picture[None], timestep[None], noise[None])[0]
        else:
            latents = scheduler.add_noise(picture[None], noise[None], timestep[None])[0]
        scheduler._step_index = None  # as in a run: the loop asks at each step anew
        assert float((latents * vp_scale(scheduler, timestep)).norm()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", scheduler_names())
def test_a_scheduler_by_name_is_as_one_in_the_pipeline(
    tiny: Model, name: str, same_model: Callable[[Model], Callable[[], None]]
) -> None:
    check = same_model(tiny)
    named = tiny.generate("a cat", steps=4, scheduler=name, decode=False, progress=False).latents
    check()
    pipeline = copy.copy(tiny.pipeline)
    pipeline.scheduler = scheduler_for_run(tiny.pipeline.scheduler, name)
    put = (
        replace(tiny, family=type(tiny.family)(pipeline))
        .generate("a cat", steps=4, decode=False, progress=False)
        .latents
    )
    assert named.isfinite().all()
    assert torch.equal(named, put)


def test_a_scheduler_keeps_the_noise_schedule_and_cuts_nothing() -> None:
    own = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    )
    assert scheduler_for_run(own) is not own
    assert scheduler_for_run(own, "ddim").config["clip_sample"] is False
    for name in scheduler_names():
        torch.testing.assert_close(scheduler_for_run(own, name).alphas_cumprod, own.alphas_cumprod)
    karras = DPMSolverMultistepScheduler.from_config(
        own.config, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"
    )
    warming_up = PNDMScheduler.from_config(own.config, skip_prk_steps=False)
    assert scheduler_for_run(warming_up, "pndm").config["skip_prk_steps"] is True
    for name in ("euler", "heun", "lms", "dpm++"):
        assert scheduler_for_run(karras, name).config["use_karras_sigmas"] is False
    assert scheduler_for_run(karras, "dpm++-karras").config["algorithm_type"] == "dpmsolver++"
    with pytest.raises(ValueError, match="unknown scheduler 'magic': choose one of ddim, "):
        scheduler_for_run(own, "magic")
    with pytest.raises(
        ValueError, match="can't take the place of this model's FlowMatchEulerDiscreteScheduler"
    ):
        scheduler_for_run(FlowMatchEulerDiscreteScheduler(), "ddim")


def test_the_bundled_model_draws_with_the_scheduler_of_its_files(stickers: Model) -> None:
    folder = Path(source_of("stickers"))
    index = json.loads((folder / "model_index.json").read_text())["scheduler"]
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert index == ["diffusers", config["_class_name"]]
    assert type(stickers.pipeline.scheduler).__name__ == config["_class_name"]


def test_a_part_of_a_step_is_left_out_or_made_whole_as_in_diffusers() -> None:
    """Of 28 steps at strength 0.8 (22.4) Stable Diffusion's pipelines make 22, Stable Diffusion 3's 23."""
    assert steps_made(DDIMScheduler(), 28, 0.8) == 22
    assert steps_made(FlowMatchEulerDiscreteScheduler(), 28, 0.8) == 23
    for scheduler in (DDIMScheduler(), FlowMatchEulerDiscreteScheduler()):
        assert [steps_made(scheduler, 50, strength) for strength in (0.5, 1)] == [25, 50]
