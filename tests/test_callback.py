"""Nursing from diffusers' `callback_on_step_end`: our own loop, but for the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from attend_excite import AttendAndExcite, Model, StableDiffusion, load
from attend_excite.callback import nursing_callback
from attend_excite.methods.base import Denoise, Run, Step
from tests.families import LATENT_DIFFUSION, keep_wide, model_of, pipeline_options

PROMPT = "a cat and a frog"
STEPS = 4
METHOD = AttendAndExcite("no-refinement")


@pytest.fixture(autouse=True)
def _no_rounding_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_wide(monkeypatch)


class FromTheSecondStep:
    """Attend-and-Excite whose first step is plain: what a callback after each step can do."""

    name, title = "from-the-second-step", "From the second step"
    uses_subjects = attends_to_prompt = True

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        with METHOD.attach(run) as nursed, StableDiffusion().attach(run) as plain:

            def denoise(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
                return nursed(latents, step) if step.index else plain(latents, step)

            yield denoise


def by_the_pipeline(model: Model, noise: Tensor, width: int, **options: Any) -> Tensor:
    pipeline = copy.copy(model.pipeline)
    pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    height = model.default_size[0]
    callback = nursing_callback(pipeline, PROMPT, method=METHOD, height=height, width=width)
    return pipeline(
        prompt=PROMPT,
        num_inference_steps=STEPS,
        latents=model.family.as_the_pipeline_has_them(noise),
        output_type="latent",
        height=height,
        width=width,
        callback_on_step_end=callback,
        **pipeline_options(pipeline, 4.0) | options,
    ).images


def noise_of(model: Model, width: int, images: int = 1) -> Tensor:
    shape = (model.family.latent_channels, *model.latent_size(model.default_size[0], width))
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    return torch.stack([torch.randn(shape, generator=each, dtype=torch.float64) for each in generators])


@pytest.mark.parametrize(
    "name", ["flux", "qwen-image", "stable-diffusion", "stable-diffusion-3", "stable-diffusion-xl"]
)
def test_from_the_second_step_on_it_is_our_own_loop(
    name: str, same_model: Callable[[Model], Callable[[], None]]
) -> None:
    model = model_of(name)
    width = model.default_size[1] // 4 * 3

    def ours(method: Any) -> Tensor:
        drawn = model.generate(
            PROMPT,
            method=method,
            seeds=[0, 1],
            width=width,
            steps=STEPS,
            guidance_scale=4.0,
            decode=False,
            progress=False,
        )
        return model.family.as_the_pipeline_has_them(drawn.latents)

    expected = ours(FromTheSecondStep())
    check = same_model(model)
    noise = noise_of(model, width, images=2)
    found = by_the_pipeline(model, noise, width, num_images_per_prompt=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    check()
    assert not torch.allclose(expected, ours(StableDiffusion()))
    assert not torch.allclose(expected, ours(METHOD))


def test_schedulers_with_two_stages_a_step_keep_what_is_nursed() -> None:
    model = copy.copy(model_of("stable-diffusion-xl").pipeline)
    model.scheduler = HeunDiscreteScheduler(**LATENT_DIFFUSION)
    model = load(model)
    width = model.default_size[1]
    options = {"seeds": [0], "steps": STEPS, "guidance_scale": 4.0, "decode": False, "progress": False}
    expected = model.generate(PROMPT, method=FromTheSecondStep(), **options).latents
    found = by_the_pipeline(model, noise_of(model, width), width)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_half_precision_stays_what_it_is_in_a_second_stage() -> None:
    pipeline = copy.deepcopy(model_of("stable-diffusion").pipeline).to(torch.bfloat16)
    pipeline.scheduler = HeunDiscreteScheduler(**LATENT_DIFFUSION)
    dtypes = []

    def kept(pipe: Any, index: int, timestep: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        state = nursing_callback_of(pipe, index, timestep, state)
        dtypes.append(state["latents"].dtype)
        return state

    nursing_callback_of = nursing_callback(pipeline, PROMPT, method=METHOD)
    pipeline(PROMPT, num_inference_steps=3, output_type="latent", callback_on_step_end=kept)
    assert set(dtypes) == {torch.bfloat16}


def test_a_run_that_ends_before_its_last_timestep_is_nursed_at_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a base model's, whose pictures a refiner finishes; and one that begins later, from a picture."""
    pipeline = copy.copy(model_of("stable-diffusion-xl").pipeline)
    pipeline.scheduler = DDIMScheduler(**LATENT_DIFFUSION)
    told, nursing = [], AttendAndExcite.nursing

    def heard(method: AttendAndExcite, run: Run, iterations: int) -> Callable[[Tensor, Step], Tensor]:
        nurse = nursing(method, run, iterations)

        def and_heard(latents: Tensor, step: Step) -> Tensor:
            told.append(int(step.timestep))
            return nurse(latents, step)

        return and_heard

    monkeypatch.setattr(AttendAndExcite, "nursing", heard)
    callback = nursing_callback(pipeline, PROMPT, method=METHOD)
    options = {"height": 128, "width": 128, "num_inference_steps": 5, "denoising_end": 0.6}
    pipeline(PROMPT, output_type="latent", callback_on_step_end=callback, **options)
    assert told == pipeline.scheduler.timesteps[1:3].tolist()
    told.clear()
    later = StableDiffusionXLImg2ImgPipeline(**model_of("stable-diffusion-xl").pipeline.components)
    later.scheduler = PNDMScheduler(**LATENT_DIFFUSION, skip_prk_steps=True)
    callback = nursing_callback(later, PROMPT, method=METHOD)
    picture = {"image": torch.zeros(1, 3, 128, 128, dtype=torch.float64), "strength": 0.8}
    later(PROMPT, num_inference_steps=10, output_type="latent", callback_on_step_end=callback, **picture)
    # One of its timesteps comes twice, and the run begins at the second of them.
    assert told == later.scheduler.timesteps[3:].tolist()


def test_it_nurses_in_image_to_image_too() -> None:
    parts = model_of("stable-diffusion-xl").pipeline.components
    pipeline = StableDiffusionXLImg2ImgPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)

    def drawn(**options: Any) -> Tensor:
        return pipeline(
            PROMPT,
            image=torch.zeros(1, 3, 128, 128, dtype=torch.float64),
            strength=0.5,
            num_inference_steps=8,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        ).images

    callback = nursing_callback(pipeline, PROMPT, method=METHOD)
    first = drawn(callback_on_step_end=callback)
    assert not torch.allclose(first, drawn())
    assert torch.equal(first, drawn(callback_on_step_end=callback))


def test_what_it_cannot_do_is_refused() -> None:
    model = model_of("stable-diffusion-xl")
    with pytest.raises(ValueError, match="it's the pipeline that denoises"):
        nursing_callback(model.pipeline, PROMPT, method=StableDiffusion())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="InitNO searches for its noise before the first step"):
        nursing_callback(model.pipeline, PROMPT, method=AttendAndExcite("initno-search"))
    with pytest.raises(ValueError, match="PixArtSigmaPipeline calls nothing at the end of a step: draw with"):
        nursing_callback(model_of("pixart").pipeline, PROMPT)
    with pytest.raises(ValueError, match="would be drawn as text: take them out, and name the subjects with"):
        nursing_callback(model.pipeline, "a [cat] and a [frog]")
    pipeline = copy.copy(model.pipeline)
    options = {"num_inference_steps": 2, "height": 128, "width": 128}
    with pytest.raises(ValueError, match="3 pictures of 2 prompts: tell the callback"):
        pipeline([PROMPT] * 3, callback_on_step_end=nursing_callback(pipeline, [PROMPT, "a frog"]), **options)
    pipeline.scheduler = UniPCMultistepScheduler(**LATENT_DIFFUSION)
    with pytest.raises(ValueError, match="nursing would be lost: give another scheduler"):
        pipeline(PROMPT, callback_on_step_end=nursing_callback(pipeline, PROMPT), **options)
    flux = model_of("flux")
    latents = flux.family.as_the_pipeline_has_them(noise_of(flux, 96))
    with pytest.raises(ValueError, match="give height and width"):
        flux.pipeline(
            PROMPT,
            latents=latents,
            callback_on_step_end=nursing_callback(flux.pipeline, PROMPT),
            **options | {"width": 96},
        )
