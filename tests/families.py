"""Tiny random models of every family, in diffusers' own classes: they build in a second, offline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_dpmsolver_multistep import EDMDPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
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
from attend_excite import Model, load

BUNDLED = Path(attend_excite.__file__).parent / "models" / "stickers"
WORDS = "a an and the with of cat frog dog lion bowl red yellow green crown in on photo"


@functools.cache
def clip_tokenizer(length: int = 77, **options: Any) -> CLIPTokenizer:
    """CLIP's own."""
    return CLIPTokenizer.from_pretrained(BUNDLED / "tokenizer", model_max_length=length, **options)


@functools.cache
def t5_tokenizer() -> PreTrainedTokenizerFast:
    """One as T5's: SentencePiece's Unigram, no token before the text and `</s>` behind it.

    It cuts "sombrero" in two where CLIP's has one piece more.
    """
    return _unigram("$A </s>", WORDS.split())


@functools.cache
def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """One as Gemma's: `<s>` before the text and no token behind it, padding in front. It has the words of
    Sana's instruction, so that this isn't long."""
    instruction = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    words = {*WORDS.split(), *" ".join(instruction).split()}
    return _unigram("<s> $A", sorted(words), bos_token="<s>", padding_side="left")


def _unigram(template: str, words: Sequence[str], **options: Any) -> PreTrainedTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyz,.'-"
    pieces = [f"▁{word}" for word in words] + ["▁som", "brero", "▁", *letters]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("<s>", 0.0)]
    vocabulary += [(piece, -1.0 - 2 * (len(piece) < 2)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(template, None, [("</s>", 1), ("<s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        **options,
    )


def clip_config(width: int, feedforward: int = 16, **options: Any) -> CLIPTextConfig:
    """That of a small CLIP text encoder."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=feedforward,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=49406,
        eos_token_id=49407,
        **options,
    )


def clip_encoder(width: int, projection: int) -> CLIPTextModelWithProjection:
    """A random CLIP text encoder."""
    return CLIPTextModelWithProjection(clip_config(width, projection_dim=projection))


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
            dropout_rate=0.0,
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


LATENT_DIFFUSION: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
"""The schedule of Stable Diffusion's training."""


def stable_diffusion() -> StableDiffusionPipeline:
    """A random SD 1.x of four levels, 128x128 pixels.

    Its maps at a quarter of the latent's size are 4x4, from one layer on the way down and two on the
    way up.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    sharpened(unet, ("attn2.to_q", "attn2.to_k"))
    return StableDiffusionPipeline(
        unet=unet,
        text_encoder=CLIPTextModel(clip_config(16, feedforward=32)),
        tokenizer=clip_tokenizer(),
        vae=autoencoder(4, sample_size=128),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **LATENT_DIFFUSION),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's three levels, the first without attention to the text."""
    torch.manual_seed(0)
    return _stable_diffusion_xl(
        EulerDiscreteScheduler(timestep_spacing="leading", **LATENT_DIFFUSION),
        {"transformer_layers_per_block": (1, 1, 2)},
        {"force_upcast": True},
    )


def stable_diffusion_xl_relative() -> StableDiffusionXLPipeline:
    """SSD-1B's network, which has nothing in its middle and fewer layers on the way down than up;
    Playground's scheduler and autoencoder."""
    torch.manual_seed(0)
    return _stable_diffusion_xl(
        EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, [1], [2]],
            "reverse_transformer_layers_per_block": [[2, 1], [1, 1], 1],
        },
        {"latents_mean": [-1.5, 1.0, 0.25, 0.0], "latents_std": [8.5, 6.0, 7.0, 5.25], "scaling_factor": 0.5},
    )


def _stable_diffusion_xl(
    scheduler: Any, network: Mapping[str, Any], vae: Mapping[str, Any]
) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        norm_num_groups=4,
        **network,
    )
    sharpened(unet, ("attn2.to_q", "attn2.to_k"))
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=scheduler,
        vae=autoencoder(4, **vae),
        text_encoder=CLIPTextModel(clip_config(16)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(16, 24),
        tokenizer_2=clip_tokenizer(pad_token="!"),
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    """PixArt-Σ."""
    return PixArtSigmaPipeline(**_pixart(sample_size=16))


def pixart_alpha() -> PixArtAlphaPipeline:
    """PixArt-α for 1024x1024 pixels, which is told the size of its pictures."""
    return PixArtAlphaPipeline(**_pixart(sample_size=128))


def _pixart(**options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        **options,
    )
    sharpened(transformer, ("attn2.to_q", "attn2.to_k"))
    return {
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        "vae": autoencoder(4),
        "text_encoder": t5_encoder(32),
        "tokenizer": t5_tokenizer(),
    }


def sana() -> SanaPipeline:
    """Sana, its autoencoder with 8 pixels a cell instead of 32."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        qk_norm="rms_norm_across_heads",
    )
    sharpened(transformer, ("attn2.norm_q", "attn2.norm_k"))
    encoder = Gemma2Config(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    blocks = ("ResBlock",) * 4
    vae = AutoencoderDC(
        latent_channels=4,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )
    return SanaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=Gemma2Model(encoder),
        tokenizer=gemma_tokenizer(),
    )


def ready(pipeline: DiffusionPipeline) -> Any:
    """As one that was loaded: without dropout."""
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipeline


def as_compared(pipeline: DiffusionPipeline) -> Any:
    """A pipeline in float64, where rounding cannot hide a difference."""
    return ready(pipeline).to(torch.float64)


def keep_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some networks, and pipelines, work out parts in float32, where rounding could hide a difference."""
    to = torch.Tensor.to

    def kept_wide(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        narrows = tensor.dtype == torch.float64 and torch.float32 in (*args, options.get("dtype"))
        return tensor if narrows else to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", kept_wide)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


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
    pipeline.tokenizer_max_length = 48
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
    sharpened(transformer, ("norm_q", "norm_added_k"), 2.5)
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
    "flux-2-klein": flux_2_klein,
    "pixart": pixart_sigma,
    "qwen-image": qwen_image,
    "sana": sana,
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-3": stable_diffusion_3,
    "stable-diffusion-3 without T5": functools.partial(stable_diffusion_3, t5=False),
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-xl's relatives": stable_diffusion_xl_relative,
    "z-image": z_image,
}
"""What is to pass every test of the contract (`test_families.py`), by a name for people."""


HURRIED = {"max_refinements": 2}
"""Of a recipe: two passes for each threshold. Random weights meet none, and would take all twenty."""


def hurried(model: Model) -> Model:
    """The same model with a recipe that is `HURRIED`."""
    return replace(model, recipe=replace(model.recipe, **HURRIED))


@functools.cache
def model_of(name: str) -> Model:
    """A family's tiny model, `hurried`."""
    return hurried(load(as_compared(FAMILIES[name]())))


SCHEDULERS: Mapping[str, Callable[[], Any]] = {
    "DDIM": functools.partial(DDIMScheduler, clip_sample=False, **LATENT_DIFFUSION),
    "DPM++": functools.partial(DPMSolverMultistepScheduler, **LATENT_DIFFUSION),
}
"""What diffusion models draw with beside their default."""

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}

FLOW_SCHEDULERS: Mapping[str, Callable[[], Any]] = {
    "DPM++": functools.partial(DPMSolverMultistepScheduler, **_FLOW),
    "UniPC": functools.partial(UniPCMultistepScheduler, **_FLOW),
}
"""What models of flow matching draw with beside theirs."""


def pipeline_options(pipeline: Any, guidance: float) -> dict[str, Any]:
    """What a pipeline must be told to draw a prompt as it is, in the size and with the guidance asked for."""
    kind = type(pipeline).__name__
    if kind == "QwenImagePipeline":
        return {"true_cfg_scale": guidance, "negative_prompt": ""}
    if kind == "Flux2KleinPipeline":
        return {"guidance_scale": guidance, "max_sequence_length": pipeline.tokenizer_max_length}
    if kind == "FluxPipeline" and not pipeline.transformer.config.guidance_embeds:
        return {"guidance_scale": guidance, "max_sequence_length": 256}
    if kind in ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline"):
        return {"guidance_scale": guidance, "use_resolution_binning": False, "clean_caption": False}
    return {"guidance_scale": guidance}
