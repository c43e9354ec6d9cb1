"""Stable Diffusion XL and what is built like it: SSD-1B, Playground, and fine-tuned models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from attend_excite.a1111 import Chunk
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
    block_conditioning = ("prompt_embeds", "pooled_prompt_embeds", "add_time_ids")
    learns_words: ClassVar[Mapping[str, tuple[str, str]]] = {
        "clip_l": ("tokenizer", "text_encoder"),
        "clip_g": ("tokenizer_2", "text_encoder_2"),
    }
    activations = 390  # counted in the base model's shape, with fused attention among the patches

    @classmethod
    def refusal(cls, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        if configs.keys() > {"unet"} and not (configs.get("text_encoder") and configs.get("text_encoder_2")):
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

    def encode_chunks(
        self, texts: Sequence[Sequence[Chunk]], negative: Sequence[Chunk] | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        number = max(len(chunks) for chunks in [*texts, negative or ()])
        states, pooled = map(torch.cat, zip(*(self._states(each, number) for each in texts), strict=True))
        conditioned = self._conditioning(states, pooled, size)
        if negative is None:
            return conditioned, None
        empty, empty_pooled = self._states(negative, number)
        if not negative and self.pipeline.config["force_zeros_for_empty_prompt"]:
            empty, empty_pooled = torch.zeros_like(empty), torch.zeros_like(empty_pooled)
        rows = [0] * len(texts)
        return conditioned, self._conditioning(empty[rows], empty_pooled[rows], size)

    def _states(self, chunks: Sequence[Chunk], number: int) -> tuple[Tensor, Tensor]:
        """(1, tokens number, width) the weighted embeddings of a text in chunks, and its first's pooled."""
        pipeline = self.pipeline
        pooled: list[Tensor] = []

        def encode(encoder: Any, ids: Tensor) -> Tensor:
            found = encoder(ids.to(pipeline._execution_device), output_hidden_states=True)
            pooled.append(found[0])
            return found.hidden_states[-2]

        first, second = (
            unet.in_weighted_chunks(tokenizer, chunks, number, partial(encode, encoder))
            for tokenizer, encoder in (
                (pipeline.tokenizer, pipeline.text_encoder),
                (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
        )
        return torch.cat([first, second], dim=-1), pooled[number]

    def _conditioning(self, text: Tensor, pooled: Tensor, size: tuple[int, int]) -> Conditioning:
        """With the size of a picture that was neither scaled nor cropped."""
        height, width = (self.pixels_per_cell * side for side in size)
        sizes = text.new_tensor([height, width, 0, 0, height, width]).expand(len(text), -1)
        return Conditioning({"encoder_hidden_states": text, "text_embeds": pooled, "time_ids": sizes})

    def conditioning_of_blocks(self, made: Mapping[str, Any]) -> Conditioning:
        return Conditioning(
            {
                "encoder_hidden_states": made["prompt_embeds"],
                "text_embeds": made["pooled_prompt_embeds"],
                "time_ids": made["add_time_ids"],
            }
        )

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

    def latents_of(self, pixels: Tensor) -> Tensor:
        with _wide_enough(self.pipeline.vae):
            return super().latents_of(pixels)

    def scaled(self, latents: Tensor) -> Tensor:
        if self._statistics is None:
            return super().scaled(latents)
        mean, deviation = map(latents.new_tensor, self._statistics)
        return (latents - mean) * self.pipeline.vae.config["scaling_factor"] / deviation

    def unscaled(self, latents: Tensor) -> Tensor:
        if self._statistics is None:
            return super().unscaled(latents)
        mean, deviation = map(latents.new_tensor, self._statistics)
        return latents * deviation / self.pipeline.vae.config["scaling_factor"] + mean

    @property
    def _statistics(self) -> tuple[Any, Any] | None:
        """Mean and deviation of the latents, one a channel, as [[[mean]], ...]; None: it has none."""
        config = self.pipeline.vae.config
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return None
        return [[[each]] for each in mean], [[[each]] for each in deviation]


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
