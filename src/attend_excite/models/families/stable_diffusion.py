"""Stable Diffusion 1.x and 2.x, and what is built like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from attend_excite.a1111 import Chunk
from attend_excite.models.families import unet
from attend_excite.models.families.base import Conditioning
from attend_excite.subjects import Stream

# Stable Diffusion 2.x is the family whose text encoder (OpenCLIP ViT-H) is 1024 wide.
_SD2_TEXT_WIDTH = 1024


class StableDiffusion(unet.UNetFamily):
    """`StableDiffusionPipeline`: a UNet with cross-attention to CLIP's tokens."""

    name = "stable-diffusion"
    learns_words: ClassVar[Mapping[str, tuple[str, str]]] = {"emb_params": ("tokenizer", "text_encoder")}

    @classmethod
    def refusal(cls, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        config, scheduler = configs.get("unet", {}), configs.get("scheduler") or {"prediction_type": None}
        # Those of flow matching have no say in what is predicted.
        flows = scheduler.get("prediction_type", "flow_prediction") == "flow_prediction"
        if flows or scheduler.get("use_flow_sigmas"):
            return "its scheduler is for flow matching: give it another, as DDIMScheduler"
        return unet.refusal(config)

    def streams(self) -> tuple[Stream, ...]:
        tokenizer = self.pipeline.tokenizer
        # The authors compare among the prompt's own tokens for Stable Diffusion 2.x; for 1.x among the whole
        # context, padding included.
        prompt_only = self.network.config["cross_attention_dim"] == _SD2_TEXT_WIDTH
        width = 0 if tokenizer is None else tokenizer.model_max_length
        return (Stream("CLIP", tokenizer, 0, width, prompt_tokens_only=prompt_only),)

    def encode(
        self, texts: Sequence[str], negative: str | None, guidance: float | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        text, empty = self.pipeline.encode_prompt(
            list(texts),
            self.pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=negative is not None,
            negative_prompt=None if negative is None else [negative] * len(texts),
        )
        return self.conditioning(text), None if empty is None else self.conditioning(empty)

    def encode_chunks(
        self, texts: Sequence[Sequence[Chunk]], negative: Sequence[Chunk] | None, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        number = max(len(chunks) for chunks in [*texts, negative or ()])
        conditioned = self.conditioning(torch.cat([self._states(chunks, number) for chunks in texts]))
        if negative is None:
            return conditioned, None
        return conditioned, self.conditioning(self._states(negative, number).expand(len(texts), -1, -1))

    def _states(self, chunks: Sequence[Chunk], number: int) -> Tensor:
        """(1, tokens number, width) the weighted embeddings of a text in chunks."""
        pipeline = self.pipeline

        def encode(ids: Tensor) -> Tensor:
            return pipeline.text_encoder(ids.to(pipeline._execution_device))[0]

        return unet.in_weighted_chunks(pipeline.tokenizer, chunks, number, encode)

    @staticmethod
    def conditioning(text: Tensor) -> Conditioning:
        """Of text embeddings (B, tokens, width)."""
        return Conditioning({"encoder_hidden_states": text})

    def unread_tokens(self, ids: Sequence[int]) -> set[int]:
        return self.tokens_of_noughts(ids)

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {"sample": latents, "timestep": timestep, "encoder_hidden_states": conditioning.states}

    def decode(self, latents: Tensor, output_type: str = "pil") -> tuple[Any, list[bool] | None]:
        pipeline, pixels = self.pipeline, self.pixels(latents)
        pixels, flagged = pipeline.run_safety_checker(pixels, pixels.device, pixels.dtype)
        shown = [True] * len(latents) if flagged is None else [not flag for flag in flagged]
        images = pipeline.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=shown)
        return images, flagged
