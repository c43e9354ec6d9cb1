"""PixArt-α and PixArt-Σ: transformers that attend to T5's tokens in layers of their own, padding masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.models.families import transformer
from attend_excite.models.families.base import Conditioning, Family
from attend_excite.subjects import Stream


class PixArt(Family):
    """`PixArtAlphaPipeline`.

    A picture is drawn in the size that is asked for, not in one of training's sizes and then cropped. Prompts
    lose their capitals, as in training, and nothing else.
    """

    name = "pixart"
    padding_masked = True
    # A projection with a nonlinearity stands before them.
    sets_refusal = "doesn't make keys and values of the text in a linear way"
    text_tokens: ClassVar[int] = 120
    """What the pipeline encodes a prompt to where nobody says otherwise."""

    @property
    def size_factor(self) -> int:
        return self.pixels_per_cell * self.network.config["patch_size"]

    def streams(self) -> tuple[Stream, ...]:
        return (Stream("T5", self.pipeline.tokenizer, 0, self.text_tokens, uncapitalised=True),)

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        text, mask, empty, empty_mask = self.pipeline.encode_prompt(
            list(texts),
            negative is not None,
            negative_prompt=[negative] * len(texts),
            device=self.pipeline._execution_device,
            max_sequence_length=self.text_tokens,
        )
        conditioned = self._conditioning(text, mask, size)
        return conditioned, None if negative is None else self._conditioning(empty, empty_mask, size)

    def _conditioning(self, text: Tensor, mask: Tensor, size: tuple[int, int]) -> Conditioning:
        tensors = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        if getattr(self.network, "use_additional_conditions", False):
            height, width = (self.pixels_per_cell * side for side in size)
            tensors["resolution"] = text.new_tensor([height, width]).expand(len(text), -1)
            tensors["aspect_ratio"] = text.new_tensor([height / width]).expand(len(text), -1)
        return Conditioning(tensors)

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        tensors = dict(conditioning.tensors)
        told = {name: tensors.pop(name, None) for name in ("resolution", "aspect_ratio")}
        timesteps = timestep.expand(len(latents))
        return {"hidden_states": latents, "timestep": timesteps, "added_cond_kwargs": told, **tensors}

    def output(self, raw: Tensor, latents: Tensor) -> Tensor:
        return raw[:, : latents.shape[1]]  # what follows is the variance, which no scheduler asks for

    def all_places(self) -> tuple[Place, ...]:
        return self.places(self.network.config["patch_size"])

    def places(self, downsampling: int) -> tuple[Place, ...]:
        names = [f"transformer_blocks.{block}.attn2" for block in range(len(self.network.transformer_blocks))]
        return transformer.fused_places(names, self.network.config["patch_size"], downsampling)

    def self_places(self, places: Sequence[Place]) -> tuple[Place, ...]:
        return tuple(replace(place, name=place.name.removesuffix("2") + "1") for place in places)

    def activation_bytes(self, size: tuple[int, int]) -> int:
        config = self.network.config
        tokens = size[0] * size[1] // config["patch_size"] ** 2
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return transformer.activation_bytes(self.network, tokens, width, config["num_layers"])


class PixArtSigma(PixArt):
    """`PixArtSigmaPipeline`: longer prompts."""

    text_tokens = 300
