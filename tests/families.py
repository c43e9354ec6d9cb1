"""Tiny random models of every family, in diffusers' own classes: they build in a second, offline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
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


_QWEN_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""


@functools.cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """One as Qwen's: byte pairs, learnt here from its template and a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    said = "system user assistant Describe the image by detailing the color, shape, size, texture, quantity, "
    said += f"text, spatial relationships of the objects and background: {WORDS}"
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([said, said.replace(" ", ""), *said.split()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=_QWEN_TEMPLATE,
        padding_side="right",
        model_max_length=4096,
    )


def qwen_3(width: int, layers: int, lm: type[Qwen3Model] | type[Qwen3ForCausalLM]) -> Any:
    """A random Qwen 3."""
    return lm(
        Qwen3Config(
            vocab_size=len(qwen_tokenizer()),
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def flux_2_klein(distilled: bool = False) -> Flux2KleinPipeline:
    """FLUX.2 klein's shape."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    sharpened(transformer, ("norm_q", "norm_added_k"))
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, layers_per_block=1
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    pipeline = Flux2KleinPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        # Its states are taken behind layers 9, 18 and 27.
        text_encoder=qwen_3(8, 28, Qwen3ForCausalLM),
        tokenizer=qwen_tokenizer(),
        is_distilled=distilled,
    )
    pipeline.default_sample_size = 16
    return pipeline


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image's shape: two of its blocks are read."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    sharpened(transformer, ("norm_q", "norm_added_k"))
    text = {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    pipeline = QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, -0.4],
            latents_std=[1.5, 0.5, 2.0, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        tokenizer=qwen_tokenizer(),
    )
    pipeline.default_sample_size = 16
    return pipeline


def z_image() -> ZImagePipeline:
    """Z-Image's shape."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[2, 2, 4],
        axes_lens=[512, 64, 64],
    )
    sharpened(transformer, ("norm_q",), 8.0)
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(4, scaling_factor=0.4, shift_factor=0.1, sample_size=128),
        text_encoder=qwen_3(16, 2, Qwen3Model),
        tokenizer=qwen_tokenizer(),
    )


FAMILIES: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "flux": flux,
    "flux schnell": functools.partial(flux, guidance=False),
    "flux-2-klein": functools.partial(flux_2_klein, distilled=True),
    "flux-2-klein-base": flux_2_klein,
    "qwen-image": qwen_image,
    "stable-diffusion-3": stable_diffusion_3,
    "stable-diffusion-3 without T5": functools.partial(stable_diffusion_3, t5=False),
    "z-image": z_image,
}
"""What is to pass every test of the contract (`test_families.py`), by a name for people."""


def pipeline_options(name: str, guidance: float) -> dict[str, Any]:
    """What a family's pipeline must be told to draw as its makers mean it to, with so much guidance."""
    if name == "qwen-image":
        return {"true_cfg_scale": guidance, "negative_prompt": ""}
    if name == "flux schnell":
        return {"guidance_scale": guidance, "max_sequence_length": 256}
    return {"guidance_scale": guidance}
