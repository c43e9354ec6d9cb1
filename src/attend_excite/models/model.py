"""A model: the parts of Stable Diffusion, and what is known about how to nurse it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import nn

from attend_excite.guidance.schedule import Recipe

if TYPE_CHECKING:
    from attend_excite.generate import Generation


@dataclass(frozen=True, eq=False)
class Model:
    """A Stable Diffusion 1.x or 2.x model, from `load`.

    Attributes:
        pipeline: diffusers' pipeline: the parts, and what encodes, decodes and moves them. Nothing of it
            is changed by a generation.
        name: the name, folder or Hub id under which `load` found it.
        recipe: the recipe that the model recommends; "official" where it recommends none.
        attention_downsampling: latent cells per cell of the maps along one side. 4, a quarter of the
            latent's size, gives the paper's 16x16 maps for Stable Diffusion's 64x64 latents.
        dominant_tokens: found so far: which token of a word of several holds most of its attention.
    """

    pipeline: StableDiffusionPipeline
    name: str
    recipe: Recipe = field(default_factory=lambda: Recipe.named("official"))
    attention_downsampling: int = 4
    dominant_tokens: dict[tuple[str, ...], int] = field(default_factory=dict, repr=False)

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoising network."""
        return self.pipeline.unet

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the text encoder."""
        return self.pipeline.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the UNet runs, also when its weights are offloaded between passes."""
        return self.pipeline._execution_device

    @property
    def default_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures the model was trained on."""
        size = self.unet.config["sample_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    def generate(self, prompt: str | list[str], **options: Any) -> Generation:
        """Make pictures of a prompt: see `attend_excite.generate`, which has the options."""
        from attend_excite.generate import generate

        return generate(self, prompt, **options)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """In the block no parameter asks for a gradient and nothing is in training mode.

    The gradient of nursing goes to the latents alone; parameters that asked for one would keep every
    layer's activations alive. Afterwards everything is as it was.
    """
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    training = [child for child in module.modules() if child.training]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        for child in training:
            child.training = False
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for child in training:
            child.training = True
