"""Against diffusers: its deprecated class and its plain pipeline, on the same weights and noise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as deprecated,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from attend_excite import AttendAndExcite, Model, StableDiffusion, load
from attend_excite.diffusers import StableDiffusionAttendAndExcitePipeline as Ours

Oracle = deprecated.StableDiffusionAttendAndExcitePipeline
THRESHOLDS = {0: 0.1, 2: 0.2, 4: 0.3}


class ExactSmoothing(deprecated.GaussianSmoothing):
    """The oracle's filter in float64: it builds its kernel in float32, which costs eight digits."""

    def __init__(self) -> None:
        super().__init__()
        taps = torch.exp(-(torch.arange(-1.0, 2.0, dtype=torch.float64) ** 2))
        exact = torch.outer(taps, taps) / taps.sum() ** 2
        torch.testing.assert_close(self.weight[0, 0], exact.float())
        self.weight = exact[None, None]


@pytest.fixture(autouse=True)
def _exact_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deprecated, "GaussianSmoothing", ExactSmoothing)


def _latents(pipeline_class: type, folder: Path, scheduler: type, **options: Any) -> Tensor:
    """The final latents of one call of 10 steps in float64."""
    pipeline = pipeline_class.from_pretrained(folder, dtype=torch.float64, safety_checker=None)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    # With the official step of 20 a random network turns the last bit into another picture.
    fixed = {"num_inference_steps": 10, "max_iter_to_alter": 5, "scale_factor": 2, "attn_res": (4, 4)}
    generator = torch.Generator().manual_seed(3)
    call = {"output_type": "latent", "generator": generator, "thresholds": THRESHOLDS} | fixed | options
    return pipeline(**call).images


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DDIMScheduler, {"prompt": "a cat and a frog", "token_indices": [2, 5]}),
        (
            DDIMScheduler,
            {
                "prompt": "a cat and a frog",
                "token_indices": [2],
                "guidance_scale": 1.0,
                "thresholds": {0: 0.6, 2: 0.8},
            },
        ),
        (PNDMScheduler, {"prompt": "a cat and a frog", "token_indices": [2, 5]}),
        (
            PNDMScheduler,
            {
                "prompt": ["a cat and a frog", "a dog"],
                "token_indices": [[2, 5], [2]],
                "num_images_per_prompt": 2,
                "negative_prompt": ["blurry", "a bird"],
            },
        ),
    ],
    ids=["two subjects", "one subject without guidance", "two subjects, PNDM", "two prompts, two images"],
)
def test_whole_runs_equal_the_deprecated_class(
    tiny_folder: Path, scheduler: type, options: dict[str, Any]
) -> None:
    ours = _latents(Ours, tiny_folder, scheduler, **options)
    theirs = _latents(Oracle, tiny_folder, scheduler, **options)
    unrefined = _latents(Ours, tiny_folder, scheduler, **(options | {"thresholds": {}}))
    assert (ours - theirs).norm() / theirs.norm() < 1e-8
    assert (ours - unrefined).norm() / theirs.norm() > 1e-4, "no refinement was triggered"


def test_drop_in_has_the_deprecated_class_s_output_and_pixels(tiny_folder: Path) -> None:
    outputs = []
    for pipeline_class in (Oracle, Ours):
        pipeline = pipeline_class.from_pretrained(tiny_folder, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        outputs.append(
            pipeline(
                "a cat and a frog",
                [2, 5],
                num_inference_steps=2,
                max_iter_to_alter=1,
                thresholds={},
                attn_res=(4, 4),
                generator=torch.Generator().manual_seed(0),
            )
        )
    theirs, ours = outputs
    assert type(ours) is type(theirs)
    assert ours.nsfw_content_detected == theirs.nsfw_content_detected
    difference = np.abs(np.asarray(ours.images[0], int) - np.asarray(theirs.images[0], int))
    assert difference.max() <= 1
    assert pipeline.get_indices("a cat")[2] == "cat</w>"


def test_drop_in_takes_the_parts_of_another_pipeline(tiny_folder: Path) -> None:
    plain = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline = Ours.from_pipe(plain)
    assert pipeline.unet is plain.unet
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        pipeline("a cat", [2], num_inference_steps=0)


def test_drop_in_nurses_in_a_callers_inference_mode_too(tiny_folder: Path) -> None:
    pipeline = Ours.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def latents() -> Tensor:
        text, empty = pipeline.encode_prompt("a cat", "cpu", 1, True)
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        embeddings = {"prompt_embeds": text, "negative_prompt_embeds": empty, "latents": noise}
        return pipeline(None, [2], num_inference_steps=2, output_type="latent", **embeddings).images

    expected = latents()
    with torch.inference_mode():
        assert torch.equal(latents(), expected)


def test_drop_in_calls_back_as_often_and_in_the_same_type(tiny_folder: Path) -> None:
    found = []
    for pipeline_class in (Oracle, Ours):
        pipeline = pipeline_class.from_pretrained(tiny_folder, safety_checker=None, dtype=torch.bfloat16)
        pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
        pipeline.set_progress_bar_config(disable=True)
        calls: list[tuple[int, int]] = []
        output = pipeline(
            "a cat and a frog",
            [2, 5],
            num_inference_steps=6,
            max_iter_to_alter=0,
            attn_res=(4, 4),
            output_type="latent",
            callback=lambda step, timestep, latents, calls=calls: calls.append((step, int(timestep))),
        )
        found.append((calls, output.images.dtype))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="3 generators for 2 pictures"):
        pipeline("a cat", [2], num_images_per_prompt=2, generator=[torch.Generator()] * 3)


@pytest.mark.parametrize(
    ("token_indices", "message"),
    [
        ([[2], [5]], "2 lists for 1 prompts"),
        ([], "at least one"),
        ([0, 2], "1 to 75"),
        ([76], "1 to 75"),
        ([[2], 5], "give positions, or a list of them a prompt"),
    ],
)
def test_drop_in_refuses_positions_that_no_word_has(
    tiny_folder: Path, token_indices: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Ours.from_pretrained(tiny_folder)("a cat and a frog", token_indices, num_inference_steps=1)


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        DPMSolverMultistepScheduler,
        LMSDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_plain_loop_equals_the_stable_diffusion_pipeline(
    tiny_folder: Path, scheduler: type, prediction_type: str
) -> None:
    model = load(tiny_folder, device="cpu")
    model.pipeline.scheduler = scheduler.from_config(
        model.pipeline.scheduler.config, prediction_type=prediction_type
    )
    model.pipeline.set_progress_bar_config(disable=True)
    theirs: Any = model.pipeline(
        "a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(5), negative_prompt="a dog"
    )
    ours = model.generate(
        "a cat", method=StableDiffusion(), seeds=5, steps=4, negative_prompt="a dog", progress=False
    )
    assert np.array_equal(ours.images[0], theirs.images[0])
    excited = model.generate("a cat", method=AttendAndExcite("paper"), seeds=5, steps=4, progress=False)
    assert excited.latents.isfinite().all()
    assert not torch.equal(excited.latents, ours.latents)


def test_a_pipeline_of_the_caller_is_used_as_it_is(tiny_folder: Path, same_model: Any) -> None:
    pipeline = Ours.from_pretrained(tiny_folder)
    model = load(pipeline)
    check = same_model(model)
    assert model.pipeline.unet is pipeline.unet
    assert isinstance(model, Model)
    model.generate("a cat", steps=2, progress=False)
    check()


def test_a_pipeline_keeps_what_its_folder_says(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "attend_excite.json").write_text('{"attention_downsampling": 2, "recipe": {"base": "paper"}}')
    model = load(Ours.from_pretrained(folder))
    assert model.attention_downsampling == 2
    assert model.recipe.decay == "linear"
