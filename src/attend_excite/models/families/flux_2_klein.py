"""FLUX.2 klein: joint attention, a language model's tokens first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn import functional as F

from attend_excite.attention.places import Place
from attend_excite.models.families import transformer
from attend_excite.models.families.base import Conditioning, Defaults, Family, family_data
from attend_excite.subjects import Stream


class Flux2Klein(Family):
    """`Flux2KleinPipeline`, base or distilled. A cell of its latents is a patch, of 16x16 pixels."""

    name = "flux-2-klein"
    half = torch.bfloat16
    joint = "text-first"
    block_conditioning = ("prompt_embeds",)

    @property
    def defaults(self) -> Defaults:
        return family_data()["flux-2-klein" if self._is_distilled else "flux-2-klein-base"]

    @property
    def _is_distilled(self) -> bool:
        return self.pipeline.config["is_distilled"]

    @property
    def distilled_guidance(self) -> bool:
        return self._is_distilled

    @property
    def takes_guidance(self) -> bool:
        return not self._is_distilled

    @property
    def pixels_per_cell(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def streams(self) -> tuple[Stream, ...]:
        tokenizer = self.pipeline.tokenizer
        template = transformer.chat_template(tokenizer, enable_thinking=False)
        return (Stream("Qwen", tokenizer, 0, self.pipeline.tokenizer_max_length, template=template),)

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        conditioned = self._conditioning(list(texts))
        if negative is None:
            return conditioned, None
        return conditioned, self._conditioning([negative] * len(texts))

    def _conditioning(self, texts: list[str]) -> Conditioning:
        if self.pipeline.tokenizer.padding_side != "right":
            raise ValueError("the tokenizer pads on the left, so no word has its place: set padding_side")
        pipeline, length = self.pipeline, self.streams()[0].width
        states, _ = pipeline.encode_prompt(
            texts, device=pipeline._execution_device, max_sequence_length=length
        )
        return Conditioning({"encoder_hidden_states": states})

    def conditioning_of_blocks(self, made: Mapping[str, Any]) -> Conditioning:
        return Conditioning({"encoder_hidden_states": made["prompt_embeds"]})

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        dynamic = scheduler.config.get("use_dynamic_shifting")
        mu = compute_empirical_mu(size[0] * size[1], steps) if dynamic else None
        transformer.set_flow_timesteps(scheduler, steps, self.pipeline._execution_device, mu)

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        def places(*counts: int) -> Tensor:
            return torch.cartesian_prod(*(torch.arange(count, device=latents.device) for count in counts))

        return {
            "hidden_states": self.as_its_loop_has_them(latents),
            "timestep": timestep.expand(len(latents)).to(latents.dtype) / 1000,
            "txt_ids": places(1, 1, 1, conditioning.states.shape[1]),
            "img_ids": places(1, latents.shape[-2], latents.shape[-1], 1),
            **conditioning.tensors,
        }

    def output(self, raw: Any, latents: Tensor) -> Tensor:
        return self.from_its_loop(raw, (latents.shape[-2], latents.shape[-1]))

    def as_its_loop_has_them(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def from_its_loop(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, size)

    def all_places(self) -> tuple[Place, ...]:
        single = len(self.network.single_transformer_blocks)
        names = [f"single_transformer_blocks.{block}.attn" for block in range(single)]
        return self.places(1) + transformer.fused_places(names, 1, 1)

    def places(self, downsampling: int) -> tuple[Place, ...]:
        blocks = range(len(self.network.transformer_blocks))
        return transformer.fused_places(
            [f"transformer_blocks.{each}.attn" for each in blocks], 1, downsampling
        )

    def activation_bytes(self, size: tuple[int, int]) -> int:
        config = self.network.config
        tokens = size[0] * size[1] + self.streams()[0].width
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return transformer.activation_bytes(self.network, tokens, width, config["num_layers"])

    def scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (F.pixel_unshuffle(latents, 2) - mean) / deviation

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return F.pixel_shuffle(latents * deviation + mean, 2)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1) of the latents, in a latent's dtype."""
        norm, config = self.pipeline.vae.bn, self.pipeline.vae.config
        mean, variance = (each.to(latents)[:, None, None] for each in (norm.running_mean, norm.running_var))
        return mean, (variance + config["batch_norm_eps"]).sqrt()
