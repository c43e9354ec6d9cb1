"""Tiny random models of every family, in diffusers' own classes: they build in a second, offline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import attend_excite

BUNDLED = Path(attend_excite.__file__).parent / "models" / "stickers"
WORDS = "a an and the with of cat frog dog lion bowl red yellow green crown in on photo"


@functools.cache
def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """CLIP's own."""
    return CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", model_max_length=length)


@functools.cache
def t5_tokenizer() -> PreTrainedTokenizerFast:
    """One as T5's: SentencePiece's Unigram, no token before the text and `</s>` behind it.

    It cuts "sombrero" in two where CLIP's has one piece more.
    """
    letters = "abcdefghijklmnopqrstuvwxyz,.'-"
    pieces = [f"▁{word}" for word in WORDS.split()] + ["▁som", "brero", "▁", *letters]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    vocabulary += [(piece, -1.0 - 2 * (len(piece) < 2)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )


def clip_config(width: int, projection: int = 16) -> CLIPTextConfig:
    """Of a random CLIP text encoder."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection,
        bos_token_id=49406,
        eos_token_id=49407,
    )


def clip_encoder(width: int, projection: int) -> CLIPTextModelWithProjection:
    """A random CLIP text encoder."""
    return CLIPTextModelWithProjection(clip_config(width, projection))


def t5_encoder(width: int) -> T5EncoderModel:
    """A random T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def autoencoder(channels: int, **options: Any) -> AutoencoderKL:
    """A random autoencoder that makes a latent's cell of 8x8 pixels."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=channels,
        **options,
    )


def sharpened(network: nn.Module, parts: tuple[str, ...], times: float = 4.0) -> None:
    """Random weights attend almost evenly; sharper queries make maps with something to excite."""
    for name, parameter in network.named_parameters():
        if any(part in name for part in parts):
            parameter.data.mul_(times)


def stable_diffusion_3(t5: bool = True) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium's shape: two of its three blocks attend twice."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    sharpened(transformer, ("norm_q", "norm_added_k"))
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip_encoder(16, 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(16, 16),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(32) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def flux(guidance: bool = True) -> FluxPipeline:
    """FLUX.1's shape: dev's, which is told the guidance, or schnell's, which has none."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    sharpened(transformer, ("norm_q", "norm_added_k"))
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance),
        vae=autoencoder(4, scaling_factor=0.4, shift_factor=0.1),
        text_encoder=CLIPTextModel(clip_config(16)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.default_sample_size = 16
    return pipeline


FAMILIES: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "flux": flux,
    "flux schnell": functools.partial(flux, guidance=False),
    "stable-diffusion-3": stable_diffusion_3,
    "stable-diffusion-3 without T5": functools.partial(stable_diffusion_3, t5=False),
}
"""What is to pass every test of the contract (`test_families.py`), by a name for people."""

PIPELINE_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "flux schnell": {"max_sequence_length": 256},
}
"""What a family's pipeline must be told beside, to draw as its makers mean it to."""
