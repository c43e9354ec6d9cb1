"""A shift of the latents is there in the end, whatever the scheduler keeps of the latents before it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from attend_excite.schedulers import shift_carrier

STEPS = 20
LIKE_STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "lower_order_final": True,
}


def _denoised(kind: Any, shifts: dict[int, Tensor]) -> Tensor:
    """Where a model that always sees the same noise leads, shifted in the space of its input."""
    scheduler = kind.from_config(LIKE_STABLE_DIFFUSION)
    scheduler.set_timesteps(STEPS)
    carry = shift_carrier(scheduler)
    fixed = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1, 4, 8, 8, generator=fixed, dtype=torch.float64)
    latents = latents * scheduler.init_noise_sigma
    torch.manual_seed(0)  # some schedulers add noise
    for index, timestep in enumerate(scheduler.timesteps):
        scale = float(scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep))
        shift = shifts[index] / scale if index in shifts else None
        carry(shift)
        latents = latents if shift is None else latents + shift
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


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
def test_a_shift_reaches_the_end(kind: Any, index: int) -> None:
    shift = 0.01 * torch.randn(1, 4, 8, 8, dtype=torch.float64)
    arrived = _denoised(kind, {index: shift}) - _denoised(kind, {})
    # Given the noise, latents are told from the picture by a factor, of which the samplers differ a little.
    scheduler = kind.from_config(LIKE_STABLE_DIFFUSION)
    scheduler.set_timesteps(STEPS)
    picture = shift / scheduler.alphas_cumprod[round(float(scheduler.timesteps[index]))].sqrt()
    assert float((arrived * picture).sum() / picture.square().sum()) == pytest.approx(1, abs=0.25)
