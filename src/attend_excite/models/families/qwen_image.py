"""Qwen-Image: joint attention, the text first, without the first part of its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.models.families import transformer
from attend_excite.models.families.base import Conditioning, Family
from attend_excite.subjects import Stream

# Latent cells along one side of the patches that the network takes for tokens.
_PATCH = 2


class QwenImage(Family):
    """`QwenImagePipeline`: a language model's states, as many columns as the longest prompt has tokens."""

    name = "qwen-image"
    half = torch.bfloat16
    joint = "text-first"
    block_conditioning = ("prompt_embeds", "prompt_embeds_mask")

    @classmethod
    def refusal(cls, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        config = configs.get("transformer", {})
        if config.get("zero_cond_t") or config.get("use_layer3d_rope") or config.get("use_additional_t_cond"):
            return "its transformer takes pictures or layers beside a text, as those that edit do"
        if config.get("guidance_embeds"):
            return "its guidance is distilled into the transformer, which nobody has published yet"
        return None

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
        pipeline = self.pipeline
        return (
            Stream(
                "Qwen",
                pipeline.tokenizer,
                0,
                pipeline.tokenizer_max_length,
                skipped=pipeline.prompt_template_encode_start_idx,
                template=pipeline.prompt_template_encode,
            ),
        )

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        conditioned = self._conditioning(list(texts))
        if negative is None:
            return conditioned, None
        return conditioned, self._conditioning([negative] * len(texts))

    def _conditioning(self, texts: list[str]) -> Conditioning:
        return self._masked(*self.pipeline.encode_prompt(texts, device=self.pipeline._execution_device))

    def conditioning_of_blocks(self, made: Mapping[str, Any]) -> Conditioning:
        return self._masked(made["prompt_embeds"], made["prompt_embeds_mask"])

    @staticmethod
    def _masked(states: Tensor, mask: Tensor | None) -> Conditioning:
        mask = states.new_ones(states.shape[:2]) if mask is None else mask
        return Conditioning({"encoder_hidden_states": states, "encoder_hidden_states_mask": mask.bool()})

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        mu = transformer.resolution_shift(scheduler, size[0] * size[1] // _PATCH**2)
        transformer.set_flow_timesteps(scheduler, steps, self.pipeline._execution_device, mu)

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        grid = 1, latents.shape[-2] // _PATCH, latents.shape[-1] // _PATCH
        given: dict[str, Any] = dict(conditioning.tensors)
        if given["encoder_hidden_states_mask"].all():  # then fused attention is faster without
            given["encoder_hidden_states_mask"] = None
        return given | {
            "hidden_states": transformer.packed(latents),
            "timestep": timestep.expand(len(latents)).to(latents.dtype) / 1000,
            "img_shapes": [[grid]] * len(latents),
        }

    def output(self, raw: Any, latents: Tensor) -> Tensor:
        return transformer.unpacked(raw, (latents.shape[-2], latents.shape[-1]))

    def as_the_pipeline_has_them(self, latents: Tensor) -> Tensor:
        return transformer.packed(latents)

    def from_its_loop(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return transformer.unpacked(latents, size)

    def tempered(self, guided: Tensor, conditional: Tensor) -> Tensor:
        # Each patch is as long as without guidance.
        long, wanted = (transformer.packed(each).norm(dim=-1, keepdim=True) for each in (guided, conditional))
        size = guided.shape[-2], guided.shape[-1]
        return transformer.unpacked(transformer.packed(guided) * (wanted / long), size)

    def all_places(self) -> tuple[Place, ...]:
        names = [f"transformer_blocks.{block}.attn" for block in range(len(self.network.transformer_blocks))]
        return transformer.fused_places(names, _PATCH, _PATCH)

    def places(self, downsampling: int) -> tuple[Place, ...]:
        # The share of the depth is ours, after Stable Diffusion 3: all blocks would be dear.
        return transformer.places_read(self.all_places(), downsampling)

    def activation_bytes(self, size: tuple[int, int]) -> int:
        config = self.network.config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        last = transformer.blocks_read(config["num_layers"])[-1]
        return transformer.activation_bytes(self.network, size[0] * size[1] // _PATCH**2, width, last + 1)

    def scaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (latents - mean) / deviation

    def unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return latents * deviation + mean

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C, 1, 1) of the latents, in a latent's dtype."""
        config = self.pipeline.vae.config
        mean, deviation = (
            torch.tensor(config[name], device=latents.device, dtype=latents.dtype)[:, None, None]
            for name in ("latents_mean", "latents_std")
        )
        return mean, deviation

    def encoded(self, pixels: Tensor) -> Tensor:
        return super().encoded(pixels[:, :, None])[:, :, 0]

    def decoded(self, latents: Tensor) -> Tensor:
        # Of a film of one picture.
        return super().decoded(latents[:, :, None])[:, :, 0]
