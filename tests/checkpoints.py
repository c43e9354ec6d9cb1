"""A pipeline's weights under the names of the original code, as checkpoints in one file have them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def save_checkpoint(pipeline: Any, path: Path, **more: Tensor) -> Path:
    """Write a Stable Diffusion 1, 2 or XL as one file, with further tensors."""
    weights = dict(original_weights(pipeline)) | more
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, path)
    return path


def original_weights(pipeline: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of a pipeline by their original names."""
    for name, weight in pipeline.unet.state_dict().items():
        yield f"model.diffusion_model.{_unet_name(name, pipeline.unet)}", weight
    levels = len(pipeline.vae.config.block_out_channels)
    for name, weight in pipeline.vae.state_dict().items():
        if "mid_block.attentions" in name and weight.ndim == 2:
            weight = weight[:, :, None, None]
        yield f"first_stage_model.{_vae_name(name, levels)}", weight
    if getattr(pipeline, "text_encoder_2", None) is not None:
        yield from _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        yield from _open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipeline.tokenizer.pad_token == "!":
        yield from _open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        yield from _clip(pipeline.text_encoder, "cond_stage_model.transformer.text_model.")


def _unet_name(name: str, unet: Any) -> str:
    for ours, original in _UNET.items():
        if name.startswith(ours):
            name = name.replace(ours, original, 1)
    layers = unet.config.layers_per_block
    parts = "resnets|attentions|downsamplers|upsamplers"
    if found := re.match(rf"(down|up)_blocks\.(\d+)\.({parts})\.(\d+)", name):
        way, block, part, layer = found[1], int(found[2]), found[3], int(found[4])
        attends = hasattr(getattr(unet, f"{way}_blocks")[block], "attentions")
        if way == "down":
            index = 1 + block * (layers + 1) + (layers if part == "downsamplers" else layer)
        else:
            index = block * (layers + 1) + (layers if part == "upsamplers" else layer)
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0", "upsamplers": "12"[attends]}[part]
        name = f"{'input' if way == 'down' else 'output'}_blocks.{index}.{place}{name[found.end() :]}"
        if part == "downsamplers":
            name = name.replace(".conv.", ".op.")
    if re.match(r"(in|out)put_blocks\.\d+\.0|middle_block\.[02]", name):
        for ours, original in _RESNET.items():
            name = name.replace(f".{ours}.", f".{original}.")
    return name


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        for ours, original in _VAE_ATTENTION.items():
            name = name.replace(f".{ours}.", f".{original}.")
    return name


def _clip(encoder: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, weight in encoder.state_dict().items():
        yield prefix + name.removeprefix("text_model."), weight


def _open_clip(encoder: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    weights = {name.removeprefix("text_model."): weight for name, weight in encoder.state_dict().items()}
    for name, weight in weights.items():
        if name == "text_projection.weight":
            yield f"{prefix}text_projection", weight.T
        elif found := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [weights[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            yield f"{prefix}transformer.resblocks.{found[1]}.attn.in_proj_{found[2]}", torch.cat(parts)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            for ours, original in _OPEN_CLIP.items():
                name = name.replace(ours, original)
            yield prefix + name, weight
