"""Against diffusers: its deprecated class and its plain pipeline, on the same weights and noise."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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
        (DDIMScheduler, {"prompt": "a cat and a frog", "token_indices": [2, 9], "attn_res": None}),
        (DDIMScheduler, {"prompt": "a cat and a frog", "token_indices": [2, 5], "attn_res": (16, 16)}),
        (
            DDIMScheduler,
            {
                "prompt": "a cat",
                "token_indices": [2],
                "thresholds": {-1: 0.1, 1: 1.5, 2: -1, 3.0: 0.3},
            },
        ),
        (DDIMScheduler, {"prompt": "a cat and a frog", "token_indices": [2, 5], "max_iter_to_alter": -1}),
    ],
    ids=[
        "two subjects",
        "one subject without guidance",
        "two subjects, PNDM",
        "two prompts, two images",
        "padding, maps by the size",
        "maps of 16x16",
        "odd thresholds",
        "refinement alone",
    ],
)
@pytest.mark.filterwarnings("ignore:token_indices has 9")
def test_whole_runs_equal_the_deprecated_class(
    tiny_folder: Path, scheduler: type, options: dict[str, Any]
) -> None:
    ours = _latents(Ours, tiny_folder, scheduler, **options)
    theirs = _latents(Oracle, tiny_folder, scheduler, **options)
    unrefined = _latents(Ours, tiny_folder, scheduler, **(options | {"thresholds": {}}))
    assert (ours - theirs).norm() / theirs.norm() < 1e-8
    assert (ours - unrefined).norm() / theirs.norm() > 1e-4, "no refinement was triggered"


def test_a_scale_factor_of_nought_moves_nothing_as_there(tiny_folder: Path) -> None:
    call: dict[str, Any] = {
        "prompt": "a cat",
        "token_indices": [2],
        "thresholds": {},
        "num_inference_steps": 2,
    }
    theirs = _latents(Oracle, tiny_folder, DDIMScheduler, **call, scale_factor=0)
    ours = _latents(Ours, tiny_folder, DDIMScheduler, **call, scale_factor=0)
    assert (ours - theirs).norm() / theirs.norm() < 1e-8


@pytest.fixture
def two_levels(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """The parts of a random model of two levels: 64x64 pixels, latents of 32x32, whose only attention maps,
    16x16, are a half of them. Its scheduler is one that a plain pipeline would change."""
    torch.manual_seed(0)
    return {
        "unet": UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=4,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            sample_size=64,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=49406,
                eos_token_id=49407,
            )
        ),
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        "safety_checker": None,
        "feature_extractor": None,
    }


def test_the_documented_call_works_unchanged_on_a_model_of_two_levels(two_levels: dict[str, Any]) -> None:
    pictures = []
    for pipeline_class in (Oracle, Ours):
        pipe = pipeline_class(**two_levels).to(torch.float64)
        pipe.set_progress_bar_config(disable=True)
        assert pipe.scheduler is two_levels["scheduler"]
        prompt = "a cat and a frog"
        assert pipe.get_indices(prompt)[5] == "frog</w>"
        output = pipe(
            prompt=prompt,
            token_indices=[2, 5],
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(6141),
            num_inference_steps=4,
            max_iter_to_alter=25,
            thresholds={0: 0.7},
            output_type="np",
        )
        pictures.append(output.images)
    assert pictures[0].shape == (1, 64, 64, 3)
    np.testing.assert_allclose(pictures[1], pictures[0], atol=1e-6)


def test_drop_in_has_the_parts_of_the_deprecated_class(two_levels: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = Ours(**two_levels), Oracle(**two_levels)
    assert set(ours.components) == set(theirs.components) == set(two_levels)
    assert Ours(**theirs.components).components == Oracle(**ours.components).components
    assert two_levels["scheduler"].config["steps_offset"] == 0
    ours.save_pretrained(tmp_path)
    assert set(Ours.from_pretrained(tmp_path).components) == set(two_levels)
    assert StableDiffusionPipeline.from_pipe(ours).unet is ours.unet


@pytest.mark.parametrize("size", [(192, 192), (128, 256)])
def test_sizes_at_which_the_deprecated_class_fails_are_drawn(
    tiny_folder: Path, size: tuple[int, int]
) -> None:
    # Whose maps of a quarter are 6x6 and 4x8: 256 cells has none.
    call: dict[str, Any] = {"prompt": "a cat", "token_indices": [2], "height": size[0], "width": size[1]}
    outputs = {}
    for pipeline_class in (Ours, Oracle):
        pipeline = pipeline_class.from_pretrained(tiny_folder, safety_checker=None)
        pipeline.set_progress_bar_config(disable=True)
        call |= {"num_inference_steps": 1, "thresholds": {}, "output_type": "np"}
        with contextlib.suppress(RuntimeError, ValueError):
            outputs[pipeline_class] = pipeline(**call).images.shape
    assert outputs == {Ours: (1, *size, 3)}


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
    settings = {"attention_downsampling": 2, "steps": 4, "recipe": {"base": "paper"}}
    (folder / "attend_excite.json").write_text(json.dumps(settings))
    model = load(Ours.from_pretrained(folder))
    assert model.attention_downsampling == 2
    assert len(model.generate("a cat", progress=False).trace[0].steps) == 4
    assert model.recipe.decay == "linear"
