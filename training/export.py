"""Writes the trained parts as a model folder in diffusers layout, in half precision.

`python -m training.export --generator FOLDER --vae FOLDER --init FOLDER --out FOLDER`; with `--joint FOLDER`
in place of `--generator`, a `StableDiffusion3Pipeline` of the transformer in that folder and of the text
encoder of `--init`, by which it was trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel

from attend_excite.models.catalogue import SETTINGS_FILE
from training.captions import every_word
from training.glyphs import DATA, read_data
from training.joint import projecting, second_encoder


def silence_unseen(text_encoder: PreTrainedModel, tokenizer: CLIPTokenizer) -> int:
    """Zero the embeddings of tokens that no caption has; the number of those kept.

    They were never trained: as zeros they cost nothing in a compressed package.
    """
    seen = set(tokenizer(" ".join(every_word()), truncation=False).input_ids)
    seen |= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    weight = text_encoder.get_input_embeddings().weight.data
    kept = torch.zeros(len(weight), dtype=torch.bool)
    kept[list(seen)] = True
    weight[~kept] = 0
    return int(kept.sum())


def unet_pipeline(
    generator: Path, init: Path, tokenizer: CLIPTokenizer, vae: AutoencoderKL
) -> StableDiffusionPipeline:
    """The UNet and text encoder in the folder `generator`, with the scheduler of the model folder `init`."""
    text_encoder = CLIPTextModel.from_pretrained(generator / "text_encoder", dtype=torch.float16)
    print("embeddings kept:", silence_unseen(text_encoder, tokenizer))
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(generator / "unet", torch_dtype=torch.float16),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(init, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def joint_pipeline(
    joint: Path, init: Path, tokenizer: CLIPTokenizer, vae: AutoencoderKL
) -> StableDiffusion3Pipeline:
    """The transformer in the folder `joint`, the text encoder of the model folder `init`, and the second that
    `training.joint` adds."""
    first = projecting(CLIPTextModel.from_pretrained(init, subfolder="text_encoder", dtype=torch.float32))
    second = second_encoder(first)
    for encoder in (first, second):
        silence_unseen(encoder, tokenizer)
    vae.register_to_config(shift_factor=0.0)  # which the class adds, and Stable Diffusion's has none
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=first.half(),
        tokenizer=tokenizer,
        text_encoder_2=second.half(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=SD3Transformer2DModel.from_pretrained(joint / "transformer", torch_dtype=torch.float16),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def main() -> None:
    """Gather, convert and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--generator", type=Path, help="unet and text_encoder")
    what.add_argument("--joint", type=Path, help="transformer")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True, help="tokenizer and scheduler")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--card", type=Path, help="the model card to put beside the weights")
    arguments = parser.parse_args()

    tokenizer = CLIPTokenizer.from_pretrained(arguments.init, subfolder="tokenizer")
    vae = AutoencoderKL.from_pretrained(arguments.vae, torch_dtype=torch.float16)
    if arguments.joint:
        pipeline = joint_pipeline(arguments.joint, arguments.init, tokenizer, vae)
    else:
        pipeline = unet_pipeline(arguments.generator, arguments.init, tokenizer, vae)
    name = "stickers-joint" if arguments.joint else "stickers"
    for part in (vae, pipeline.transformer if arguments.joint else pipeline.unet):
        part.register_to_config(_name_or_path=name)  # not the folder it was read from
    pipeline.save_pretrained(arguments.out)
    settings = read_data("recommended_joint.json" if arguments.joint else "recommended.json")
    (arguments.out / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    shutil.copy(DATA / "SOURCES.md", arguments.out / "SOURCES.md")
    if arguments.card:
        shutil.copy(arguments.card, arguments.out / "README.md")


if __name__ == "__main__":
    main()
