"""Z-Image: one stream of the image's patches and, behind them, the text's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attend_excite.attention.places import Place
from attend_excite.models.families import transformer
from attend_excite.models.families.base import Conditioning, Family
from attend_excite.subjects import Stream

# Latent cells along one side of the patches that the network takes for tokens.
_PATCH = 2
# What the pipeline encodes where nobody says otherwise, template included.
_TOKENS = 512


class ZImage(Family):
    """`ZImagePipeline`: a language model's states, as many columns as a prompt has tokens."""

    name = "z-image"
    half = torch.bfloat16
    joint = "image-first"
    # The network fills the patches, and the tokens, up to a multiple of this.
    image_multiple = 32
    block_conditioning = ("prompt_embeds",)

    @classmethod
    def refusal(cls, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        if configs.get("transformer", {}).get("siglip_feat_dim") is not None:
            return "its transformer takes pictures beside a text, as those that edit do"
        return None

    @property
    def size_factor(self) -> int:
        return self.pixels_per_cell * _PATCH

    @property
    def default_size(self) -> tuple[int, int]:
        # Neither its network nor its pipeline says.
        side = self.pipeline.vae.config["sample_size"]
        return side, side

    def streams(self) -> tuple[Stream, ...]:
        tokenizer = self.pipeline.tokenizer
        template = transformer.chat_template(tokenizer, enable_thinking=True)
        return (Stream("Qwen", tokenizer, 0, _TOKENS, template=template),)

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        states, empty = self.pipeline.encode_prompt(
            list(texts),
            device=self.pipeline._execution_device,
            do_classifier_free_guidance=negative is not None,
            negative_prompt=None if negative is None else [negative] * len(texts),
            max_sequence_length=_TOKENS,
        )
        return self._conditioning(states), None if negative is None else self._conditioning(empty)

    @staticmethod
    def _conditioning(states: list[Tensor]) -> Conditioning:
        masks = [each.new_ones(len(each), dtype=torch.bool) for each in states]
        padded = [pad_sequence(each, batch_first=True) for each in (states, masks)]
        return Conditioning({"cap_feats": padded[0], "mask": padded[1]}, "cap_feats")

    def conditioning_of_blocks(self, made: Mapping[str, Any]) -> Conditioning:
        return self._conditioning(made["prompt_embeds"])

    def weight_of_guidance(self, scale: float) -> float:
        # The pipeline counts from the conditional half, not from the other.
        return scale + 1 if scale > 0 else 0.0

    def set_timesteps(self, scheduler: Any, steps: int, size: tuple[int, int]) -> None:
        mu = transformer.resolution_shift(scheduler, size[0] * size[1] // _PATCH**2)
        transformer.set_flow_timesteps(scheduler, steps, self.pipeline._execution_device, mu)

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        given: dict[str, Any] = dict(conditioning.tensors)
        mask = given.pop("mask")
        given["cap_feats"] = [states[kept] for states, kept in zip(given["cap_feats"], mask, strict=True)]
        time = (1000 - timestep.expand(len(latents))) / 1000
        return given | {"x": list(latents[:, :, None].unbind()), "t": time}

    def output(self, raw: Any, latents: Tensor) -> Tensor:
        # It points from the noise to the picture, the scheduler's from the picture to the noise.
        return -torch.stack(raw)[:, :, 0]

    def all_places(self) -> tuple[Place, ...]:
        names = [f"layers.{block}.attention" for block in range(len(self.network.layers))]
        return transformer.fused_places(names, _PATCH, _PATCH)

    def places(self, downsampling: int) -> tuple[Place, ...]:
        # The share of the depth is ours, after Stable Diffusion 3: all blocks would be dear.
        return transformer.places_read(self.all_places(), downsampling)

    def activation_bytes(self, size: tuple[int, int]) -> int:
        config = self.network.config
        tokens = size[0] * size[1] // _PATCH**2 + self.image_multiple
        last = transformer.blocks_read(config["n_layers"])[-1]
        return transformer.activation_bytes(self.network, tokens, config["dim"], last + 1)
