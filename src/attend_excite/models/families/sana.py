"""Sana: PixArt's way of attending to the text, in which a language model reads an instruction first."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from attend_excite.attention.places import Place
from attend_excite.models.families.base import Conditioning, Family
from attend_excite.models.families.pixart import PixArt
from attend_excite.subjects import Stream
from attend_excite.turns import turn_of

_TOKENS = 300


class Sana(PixArt):
    """`SanaPipeline`. Among the image's patches attention is linear and has no maps; to the text it has."""

    name = "sana"
    half = torch.bfloat16

    @property
    def _instruction(self) -> list[str]:
        """What the pipeline puts before a prompt where nobody says otherwise."""
        return signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default

    def self_places(self, places: Sequence[Place]) -> tuple[Place, ...]:
        return Family.self_places(self, places)

    def streams(self) -> tuple[Stream, ...]:
        tokenizer, instruction = self.pipeline.tokenizer, "\n".join(self._instruction)
        # Of the instruction's tokens the network sees the first, and the last, with which a word may merge.
        with turn_of(tokenizer):
            skipped = len(tokenizer.encode(instruction)) - 2
        return (Stream("Gemma", tokenizer, 0, _TOKENS, skipped, instruction + "{}", uncapitalised=True),)

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        tokenizer = self.pipeline.tokenizer
        side = tokenizer.padding_side
        try:
            text, mask, empty, empty_mask = self.pipeline.encode_prompt(
                list(texts),
                negative is not None,
                negative_prompt=negative,
                device=self.pipeline._execution_device,
                max_sequence_length=_TOKENS,
                complex_human_instruction=self._instruction,
            )
        finally:
            tokenizer.padding_side = side  # the pipeline sets it
        conditioned = self._conditioning(text.to(self.network.dtype), mask, size)
        if negative is None:
            return conditioned, None
        return conditioned, self._conditioning(empty.to(self.network.dtype), empty_mask, size)

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": timestep.expand(len(latents)) * self.network.config["timestep_scale"],
            **conditioning.tensors,
        }
