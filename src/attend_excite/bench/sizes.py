"""The models that are measured: random weights in Stable Diffusion's shape, and `stickers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as deprecated,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from attend_excite import load
from attend_excite.diffusers import StableDiffusionAttendAndExcitePipeline

CHANNELS = {"quarter": (80, 160, 320, 320), "full": (320, 640, 1280, 1280)}
"""SD 1.4 has 320 channels at full resolution; `quarter` has its shape with a quarter of them."""

SIZES = ("stickers", *CHANNELS)


@dataclass(frozen=True)
class Subject:
    """What is measured: the same weights in both pipelines, and the inputs of a run.

    Attributes:
        size: one of `SIZES`.
        ours: our drop-in class.
        theirs: diffusers' deprecated class.
        text: (1, tokens, width) text embeddings, and `empty_text` likewise.
        latent_side: cells of the square latent along one side.
        map_side: patches of the attention maps along one side.
        step_size: the recipe's step for the model.
    """

    size: str
    ours: StableDiffusionAttendAndExcitePipeline
    theirs: deprecated.StableDiffusionAttendAndExcitePipeline
    text: Tensor
    empty_text: Tensor
    latent_side: int
    map_side: int
    step_size: float

    def noise(self, images: int) -> Tensor:
        """(images, 4, side, side) standard normal, always the same."""
        side = self.latent_side
        generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
        return torch.stack([torch.randn(4, side, side, generator=generator) for generator in generators])


def build(size: str) -> Subject:
    """One of `SIZES` on the CPU in float32."""
    if size == "stickers":
        model = load("stickers", device="cpu")
        parts: dict[str, Any] = dict(model.pipeline.components)
        parts.pop("image_encoder")
        text, empty = model.pipeline.encode_prompt(["a cat and a frog"], model.device, 1, True)
        side, map_side, step_size = 16, 16, model.recipe.step_size
    else:
        torch.manual_seed(0)
        parts = {
            "unet": UNet2DConditionModel(
                sample_size=64,
                block_out_channels=CHANNELS[size],
                cross_attention_dim=768,
                attention_head_dim=8,
                norm_num_groups=16,  # divides the channels of both sizes
            ).eval(),
            # Latents are compared, so no picture is decoded, and no text encoded.
            "vae": AutoencoderKL(
                block_out_channels=cast(Any, (8,) * 4),
                norm_num_groups=2,
                down_block_types=cast(Any, ("DownEncoderBlock2D",) * 4),
                up_block_types=cast(Any, ("UpDecoderBlock2D",) * 4),
            ),
            "text_encoder": None,
            "tokenizer": None,
            "scheduler": DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            "safety_checker": None,
            "feature_extractor": None,
        }
        generator = torch.Generator().manual_seed(1)
        text, empty = torch.randn(2, 1, 77, 768, generator=generator)
        side, map_side, step_size = 64, 16, 20.0
    assert empty is not None
    ours = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    theirs = deprecated.StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    for pipeline in (ours, theirs):
        pipeline.set_progress_bar_config(disable=True)
    return Subject(size, ours, theirs, text.detach(), empty.detach(), side, map_side, step_size)
