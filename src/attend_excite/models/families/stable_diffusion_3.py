"""Stable Diffusion 3 and 3.5: joint attention, the image's patches first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.models.families import transformer
from attend_excite.models.families.base import Conditioning, Family
from attend_excite.subjects import Stream

# What the pipeline encodes with T5 where nobody says otherwise.
_T5_TOKENS = 256


class StableDiffusion3(Family):
    """`StableDiffusion3Pipeline`: the two CLIPs share their columns, 77 or 16 in the bundled model, and T5's
    follow them, or as many of zeros where there is no T5."""

    name = "stable-diffusion-3"
    joint = "image-first"
    block_conditioning = ("prompt_embeds", "pooled_prompt_embeds")

    @property
    def size_factor(self) -> int:
        return self.pixels_per_cell * self.network.config["patch_size"]

    @property
    def longest_side(self) -> int | None:
        patches = self.network.config.get("pos_embed_max_size")
        return patches and patches * self.size_factor

    def streams(self) -> tuple[Stream, ...]:
        clip = Stream("CLIP", self.pipeline.tokenizer, 0, self.pipeline.tokenizer_max_length)
        if self.pipeline.text_encoder_3 is None:
            return (clip,)
        return clip, Stream("T5", self.pipeline.tokenizer_3, clip.width, _T5_TOKENS)

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        text, empty, pooled, empty_pooled = self.pipeline.encode_prompt(
            list(texts),
            prompt_2=None,
            prompt_3=None,
            device=self.pipeline._execution_device,
            do_classifier_free_guidance=negative is not None,
            negative_prompt=None if negative is None else [negative] * len(texts),
            max_sequence_length=_T5_TOKENS,
        )
        conditioned = Conditioning({"encoder_hidden_states": text, "pooled_projections": pooled})
        if negative is None:
            return conditioned, None
        return conditioned, Conditioning({"encoder_hidden_states": empty, "pooled_projections": empty_pooled})

    def unread_tokens(self, ids: Sequence[int]) -> set[int]:
        return self.tokens_of_noughts(ids)

    def conditioning_of_blocks(self, made: Mapping[str, Any]) -> Conditioning:
        states, pooled = made["prompt_embeds"], made["pooled_prompt_embeds"]
        return Conditioning({"encoder_hidden_states": states, "pooled_projections": pooled})

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        patch = self.network.config["patch_size"]
        mu = transformer.resolution_shift(scheduler, (size[0] // patch) * (size[1] // patch), max_shift=1.16)
        shift = {} if mu is None else {"mu": mu}
        scheduler.set_timesteps(steps, device=self.pipeline._execution_device, **shift)

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {"hidden_states": latents, "timestep": timestep.expand(len(latents)), **conditioning.tensors}

    def all_places(self) -> tuple[Place, ...]:
        patch = self.network.config["patch_size"]
        names = [f"transformer_blocks.{block}.attn" for block in range(len(self.network.transformer_blocks))]
        return transformer.fused_places(names, patch, patch)

    def places(self, downsampling: int) -> tuple[Place, ...]:
        return transformer.places_read(self.all_places(), downsampling)

    def activation_bytes(self, size: tuple[int, int]) -> int:
        config = self.network.config
        text = self.pipeline.tokenizer_max_length + _T5_TOKENS
        tokens = size[0] * size[1] // config["patch_size"] ** 2 + text
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return transformer.activation_bytes(self.network, tokens, width, config["num_layers"])
