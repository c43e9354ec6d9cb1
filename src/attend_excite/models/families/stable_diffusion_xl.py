"""Stable Diffusion XL and what is built like it: SSD-1B, Playground, and fine-tuned models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attend_excite.interrupts import to_the_end
from attend_excite.models.families import unet
from attend_excite.models.families.base import Conditioning
from attend_excite.subjects import Stream


class StableDiffusionXL(unet.UNetFamily):
    """`StableDiffusionXLPipeline`: a UNet with cross-attention to two encoders' features of the same tokens.

    Their tokenizers cut a text alike and pad it differently, so a column is the same word in both. Beside the
    text the UNet is told the second encoder's pooled text and the picture's size and crop.
    """

    name = "stable-diffusion-xl"
    activations = 390  # counted in the base model's shape, with fused attention among the patches

    @classmethod
    def refusal(cls, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        if configs and not (configs.get("text_encoder") and configs.get("text_encoder_2")):
            return "it lacks one of the two text encoders, as refiners do: choose the base model"
        return unet.refusal(configs.get("unet", {}), addition="text_time")

    def streams(self) -> tuple[Stream, ...]:
        tokenizer = self.pipeline.tokenizer
        return (Stream("CLIP", tokenizer, 0, tokenizer.model_max_length),)

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        text, empty, pooled, empty_pooled = self.pipeline.encode_prompt(
            list(texts),
            device=self.pipeline._execution_device,
            do_classifier_free_guidance=negative is not None,
            # No negative prompt is not the same as an empty one: most of these models know it as zeros.
            negative_prompt=[negative] * len(texts) if negative else None,
        )
        conditioned = self._conditioning(text, pooled, size)
        return conditioned, None if negative is None else self._conditioning(empty, empty_pooled, size)

    def _conditioning(self, text: Tensor, pooled: Tensor, size: tuple[int, int]) -> Conditioning:
        """With the size of a picture that was neither scaled nor cropped."""
        height, width = (self.pixels_per_cell * side for side in size)
        sizes = text.new_tensor([height, width, 0, 0, height, width]).expand(len(text), -1)
        return Conditioning({"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": sizes})

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        told = {name: conditioning.tensors[name] for name in ("text_embeds", "time_ids")}
        return {
            "sample": latents,
            "timestep": timestep,
            "encoder_hidden_states": conditioning.states,
            "added_cond_kwargs": told,
        }

    def decode(self, latents: Tensor, output_type: str = "pil") -> tuple[Any, list[bool] | None]:
        with _wide_enough(self.pipeline.vae):
            return super().decode(latents, output_type)

    def unscaled(self, latents: Tensor) -> Tensor:
        config = self.pipeline.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return super().unscaled(latents)
        mean, deviation = (latents.new_tensor(values).view(-1, 1, 1) for values in (mean, deviation))
        return latents * deviation / config["scaling_factor"] + mean


@contextmanager
def _wide_enough(vae: Any) -> Iterator[None]:
    """In the block an autoencoder that overflows in float16 is in float32; afterwards as it was."""
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast"):
        yield
        return
    try:
        yield vae.to(torch.float32)
    finally:
        to_the_end(lambda: vae.to(torch.float16))  # which it came from: not a bit is lost
