"""Stable Diffusion 1.x and 2.x, and what is built like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from attend_excite.attention.places import Place
from attend_excite.attention.texts import attend_to_sets
from attend_excite.models.families import unet
from attend_excite.models.families.base import Conditioning, Family
from attend_excite.subjects import Stream

# Stable Diffusion 2.x is the family whose text encoder (OpenCLIP ViT-H) is 1024 wide.
_SD2_TEXT_WIDTH = 1024


class StableDiffusion(Family):
    """`StableDiffusionPipeline`: a UNet with cross-attention to CLIP's tokens."""

    name = "stable-diffusion"
    network_part = "unet"

    @classmethod
    def refusal(cls, configs: Mapping[str, Mapping[str, Any]]) -> str | None:
        config = configs.get("unet", {})
        if config.get("in_channels") != config.get("out_channels"):
            return "its UNet needs more than latents and a text, as those of inpainting do"
        if config.get("addition_embed_type") is not None:
            return "its UNet needs more than latents and a text"
        if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
            return "its UNet is told a class, as those of upscalers are"
        if config.get("encoder_hid_dim_type") is not None:
            return "its UNet wants more than a text, as with an IP-Adapter: take that out first"
        if config.get("time_cond_proj_dim") is not None:
            return "its UNet is told the guidance, as those of latent consistency models are"
        scheduler = configs.get("scheduler") or {"prediction_type": None}
        # Those of flow matching have no say in what is predicted.
        flows = scheduler.get("prediction_type", "flow_prediction") == "flow_prediction"
        if flows or scheduler.get("use_flow_sigmas"):
            return "its scheduler is for flow matching: give it another, as DDIMScheduler"
        return None

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

    @staticmethod
    def conditioning(text: Tensor) -> Conditioning:
        """Of text embeddings (B, tokens, width)."""
        return Conditioning({"encoder_hidden_states": text})

    def inputs(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        return {"sample": latents, "timestep": timestep, "encoder_hidden_states": conditioning.states}

    def places(self, downsampling: int) -> tuple[Place, ...]:
        return unet.cross_attention_places(self.network, downsampling)

    def all_places(self) -> tuple[Place, ...]:
        return tuple(unet.all_places(self.network))

    def downsamplings(self) -> tuple[int, ...]:
        return unet.downsamplings(self.network)

    def attend_to_sets(self, sets: int, width: int) -> AbstractContextManager[None]:
        return attend_to_sets(self.network, sets, width)

    def textless_modules(self) -> tuple[nn.Module, ...]:
        return tuple(unet.textless_modules(self.network))

    def activation_bytes(self, size: tuple[int, int]) -> int:
        return unet.activation_bytes(self.network, size)

    def decode(self, latents: Tensor, output_type: str = "pil") -> tuple[Any, list[bool] | None]:
        pipeline, pixels = self.pipeline, self.pixels(latents)
        pixels, flagged = pipeline.run_safety_checker(pixels, pixels.device, pixels.dtype)
        shown = [True] * len(latents) if flagged is None else [not flag for flag in flagged]
        images = pipeline.image_processor.postprocess(pixels, output_type=output_type, do_denormalize=shown)
        return images, flagged
