"""FLUX.1 dev and schnell: joint attention, T5's tokens first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.models.families import transformer
from attend_excite.models.families.base import Conditioning, Defaults, Family, family_data
from attend_excite.subjects import Stream

# Latent cells along one side of the patches that the network takes for tokens.
_PATCH = 2


class Flux(Family):
    """`FluxPipeline`: T5 alone has columns, CLIP gives the pooled text.

    dev is told how much guidance to imitate, schnell has learnt to do without any. Either draws with
    classifier-free guidance only where somebody asks for it beside.
    """

    name = "flux"
    half = torch.bfloat16
    joint = "text-first"
    block_conditioning = ("prompt_embeds", "pooled_prompt_embeds", "guidance")

    @classmethod
    def refusal(cls, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        config = configs.get("transformer", {})
        channels = config.get("in_channels")
        if config.get("out_channels") not in (None, channels):
            return "its transformer takes more than latents and a text, as those that fill in or edit do"
        return None

    @property
    def defaults(self) -> Defaults:
        return family_data()["flux" if self._is_told_guidance else "flux-schnell"]

    @property
    def _is_told_guidance(self) -> bool:
        return self.network.config["guidance_embeds"]

    @property
    def distilled_guidance(self) -> bool:
        return True

    @property
    def takes_guidance(self) -> bool:
        return self._is_told_guidance

    @property
    def size_factor(self) -> int:
        return self.pixels_per_cell * _PATCH

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.pipeline.default_sample_size * self.pixels_per_cell
        return side, side

    @property
    def latent_channels(self) -> int:
        return self.network.config["in_channels"] // _PATCH**2

    def streams(self) -> tuple[Stream, ...]:
        # What each was trained with, by their makers' code.
        return (Stream("T5", self.pipeline.tokenizer_2, 0, 512 if self._is_told_guidance else 256),)

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        conditioned = self._conditioning(list(texts), guidance)
        if negative is None:
            return conditioned, None
        return conditioned, self._conditioning([negative] * len(texts), guidance)

    def _conditioning(self, texts: list[str], guidance: float | None) -> Conditioning:
        text, pooled, _ = self.pipeline.encode_prompt(
            texts,
            prompt_2=None,
            device=self.pipeline._execution_device,
            max_sequence_length=self.streams()[0].width,
        )
        tensors = {"encoder_hidden_states": text, "pooled_projections": pooled}
        if self._is_told_guidance:
            told = self.defaults.guidance_scale if guidance is None else guidance
            tensors["guidance"] = torch.full((len(texts),), told, device=text.device)
        return Conditioning(tensors)

    def conditioning_of_blocks(self, made: Mapping[str, Any]) -> Conditioning:
        states, pooled = made["prompt_embeds"], made["pooled_prompt_embeds"]
        tensors = {"encoder_hidden_states": states, "pooled_projections": pooled}
        if self._is_told_guidance:
            tensors["guidance"] = made["guidance"].expand(len(states))
        return Conditioning(tensors)

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        mu = transformer.resolution_shift(scheduler, size[0] * size[1] // _PATCH**2)
        transformer.set_flow_timesteps(scheduler, steps, self.pipeline._execution_device, mu)

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        rows, columns = (torch.arange(cells // _PATCH, device=latents.device) for cells in latents.shape[-2:])
        places = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)
        return {
            "hidden_states": transformer.packed(latents),
            "timestep": timestep.expand(len(latents)).to(latents.dtype) / 1000,
            "txt_ids": places.new_zeros(conditioning.states.shape[1], 3),
            "img_ids": places,
            **conditioning.tensors,
        }

    def output(self, raw: Any, latents: Tensor) -> Tensor:
        return transformer.unpacked(raw, (latents.shape[-2], latents.shape[-1]))

    def as_the_pipeline_has_them(self, latents: Tensor) -> Tensor:
        return transformer.packed(latents)

    def from_its_loop(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return transformer.unpacked(latents, size)

    def all_places(self) -> tuple[Place, ...]:
        single = len(self.network.single_transformer_blocks)
        names = [f"single_transformer_blocks.{block}.attn" for block in range(single)]
        return self.places(_PATCH) + transformer.fused_places(names, _PATCH, _PATCH)

    def places(self, downsampling: int) -> tuple[Place, ...]:
        blocks = range(len(self.network.transformer_blocks))
        names = [f"transformer_blocks.{block}.attn" for block in blocks]
        return transformer.fused_places(names, _PATCH, downsampling)

    def activation_bytes(self, size: tuple[int, int]) -> int:
        config = self.network.config
        tokens = size[0] * size[1] // _PATCH**2 + self.streams()[0].width
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return transformer.activation_bytes(self.network, tokens, width, config["num_layers"])
