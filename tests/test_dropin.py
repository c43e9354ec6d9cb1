"""The drop-in at its door: its model, its arguments, its positions, and latents that are no numbers."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from attend_excite import StableDiffusion, load
from attend_excite.diffusers import StableDiffusionAttendAndExcitePipeline


@pytest.fixture(scope="module")
def pipe(tiny_folder: Path) -> StableDiffusionAttendAndExcitePipeline:
    """The drop-in on the tiny model; no test here may change it."""
    pipeline = StableDiffusionAttendAndExcitePipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _with(
    pipe: StableDiffusionAttendAndExcitePipeline, **parts: Any
) -> StableDiffusionAttendAndExcitePipeline:
    return StableDiffusionAttendAndExcitePipeline(**pipe.components | parts, requires_safety_checker=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_indices": None}, "token_indices is None"),
        ({"token_indices": [2.0]}, r"token_indices is \[2.0\]"),
        ({"token_indices": ["cat"]}, r"token_indices is \['cat'\]"),
        ({"token_indices": 2}, "token_indices is 2"),
        ({"token_indices": torch.tensor([[2, 5]])}, r"token_indices is tensor"),
        ({"token_indices": np.array([[2, 5]])}, r"token_indices is \[\[2 5\]\]"),
        ({"attn_res": 16}, "attn_res is 16"),
        ({"attn_res": (16,)}, r"attn_res is \(16,\)"),
        ({"attn_res": (4.0, 4.0)}, r"attn_res is \(4.0, 4.0\)"),
        ({"attn_res": (5, 5)}, r"attn_res is \(5, 5\).*\(16, 16\), \(8, 8\), \(4, 4\)"),
        ({"thresholds": {"0": 0.5}}, "thresholds is {'0': 0.5}"),
        ({"thresholds": {0: "high"}}, "thresholds is {0: 'high'}"),
        ({"thresholds": None}, "thresholds is None"),
        ({"max_iter_to_alter": None}, "max_iter_to_alter is None"),
        ({"scale_factor": "20"}, "scale_factor is '20'"),
        ({"scale_factor": -20}, "scale_factor is -20"),
        ({"scale_factor": float("inf")}, "scale_factor is inf"),
        ({"guidance_scale": "7.5"}, "guidance_scale is '7.5'"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"eta": None}, "eta is None"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_inference_steps": "4"}, "num_inference_steps is '4'"),
        ({"num_inference_steps": 4.5}, "num_inference_steps is 4.5"),
        ({"callback_steps": None}, "callback_steps is None"),
        ({"height": -64}, "height is -64"),
        ({"width": "64"}, "width is '64'"),
        ({"height": 32, "width": 32}, r"height and width are 32x32.*make both 64 or more"),
        ({"height": 100}, "height"),
        ({"clip_skip": 9}, "clip_skip is 9: it must be 0 to 2"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": [3]}, r"prompt is \[3\]"),
        ({"prompt": None}, "prompt"),
        ({"latents": 0}, "the latents are int"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"the latents are \(1, 4, 8, 8\)"),
    ],
    ids=str,
)
def test_odd_arguments_are_refused_by_name(
    pipe: StableDiffusionAttendAndExcitePipeline, arguments: dict[str, Any], message: str
) -> None:
    call: dict[str, Any] = {"prompt": "a cat and a frog", "token_indices": [2, 5], "num_inference_steps": 1}
    with pytest.raises(ValueError, match=message) as refusal:
        pipe(**call | arguments)
    assert "downsampling" not in str(refusal.value), "a word of the library's"


@pytest.mark.parametrize(
    ("unet", "scheduler", "message"),
    [
        ({"in_channels": 9}, DDIMScheduler(), "more than latents and a text"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 64,
            },
            DDIMScheduler(),
            "more than latents and a text",
        ),
        ({"time_cond_proj_dim": 8}, DDIMScheduler(), "latent consistency"),
        ({"num_class_embeds": 10}, DDIMScheduler(), "told a class"),
        ({"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16}, DDIMScheduler(), "more than a text"),
        ({}, FlowMatchEulerDiscreteScheduler(), "is for flow matching"),
        ({}, DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "is for flow matching"),
        ({}, DPMSolverMultistepScheduler(use_flow_sigmas=True), "is for flow matching"),
    ],
    ids=["9 channels", "SDXL", "LCM", "class labels", "IP-Adapter", "flow", "flow prediction", "flow sigmas"],
)
def test_models_that_do_not_fit_are_refused_as_load_refuses_them(
    pipe: StableDiffusionAttendAndExcitePipeline, unet: dict[str, Any], scheduler: Any, message: str
) -> None:
    changed = UNet2DConditionModel.from_config(dict(pipe.unet.config) | unet)
    odd = StableDiffusionAttendAndExcitePipeline(
        **pipe.components | {"unet": changed, "scheduler": scheduler}
    )
    with pytest.raises(ValueError, match=message):
        odd("a cat", [2], num_inference_steps=1)
    with pytest.raises(ValueError, match=message):
        load(odd)


def test_positions_are_those_of_what_the_encoder_gets(pipe: StableDiffusionAttendAndExcitePipeline) -> None:
    pipe = _with(pipe, tokenizer=copy.deepcopy(pipe.tokenizer), text_encoder=copy.deepcopy(pipe.text_encoder))
    pipe.tokenizer.add_tokens(["toycat", "toycat_1", "toycat_2"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    got: list[list[int]] = []
    pipe.text_encoder.register_forward_pre_hook(lambda _, args: got.append(args[0][0].tolist()))
    for prompt in ("a toycat and a frog", "a Toycat and a frog", "a toycat and a Toycat", "a frog " * 60):
        pipe.encode_prompt(prompt, "cpu", 1, False)
        tokens = pipe.tokenizer.convert_ids_to_tokens(got[-1])
        indices = pipe.get_indices(prompt)
        assert indices == dict(enumerate(tokens[: len(indices)]))
        end = pipe.tokenizer.eos_token
        assert indices[len(indices) - 1] == end
        assert len(indices) == tokens.index(end) + 1
    with pytest.raises(ValueError, match="one text at a time"):
        pipe.get_indices(["a cat"])  # type: ignore[arg-type]


def test_positions_of_padding_are_taken_with_a_warning(
    pipe: StableDiffusionAttendAndExcitePipeline, recwarn: pytest.WarningsRecorder
) -> None:
    call: dict[str, Any] = {"num_inference_steps": 1, "thresholds": {}, "output_type": "latent"}
    pipe("a cat and a frog", [2, 5], **call)
    assert not [warned for warned in recwarn if "token_indices" in str(warned.message)]
    table = re.escape("1: 'a</w>', 2: 'cat</w>', 3: '<|endoftext|>'}")
    with pytest.warns(UserWarning, match=rf"token_indices has 3, 75 for 'a cat', .*{table}") as warnings:
        pipe(["a frog", "a cat"], [[2], [2, 3, 75]], **call)
    assert warnings[0].filename == __file__


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_broken_weight_is_no_black_picture(pipe: StableDiffusionAttendAndExcitePipeline, part: str) -> None:
    pipe = _with(pipe, **{part: copy.deepcopy(pipe.components[part])})
    weights = {"unet": pipe.unet.conv_out.weight, "vae": pipe.vae.decoder.conv_out.weight}
    weights[part].data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaN.*a weight of the model is broken.*float32"):
        pipe("a cat", [2], num_inference_steps=1, thresholds={})
    with pytest.raises(ValueError, match="NaN"):
        load(pipe).generate("a cat", method=StableDiffusion(), steps=1, progress=False)


def test_an_eta_that_makes_nan_is_named(pipe: StableDiffusionAttendAndExcitePipeline) -> None:
    with pytest.raises(ValueError, match="eta is 5, and the latents became NaN: give 0 to 1"):
        pipe("a cat", [2], num_inference_steps=2, thresholds={}, eta=5)
