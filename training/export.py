"""Writes the trained parts as a model folder in diffusers layout, in half precision.

`python -m training.export --generator FOLDER --vae FOLDER --init FOLDER --out FOLDER`
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
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from attend_excite.models.catalogue import SETTINGS_FILE
from training.captions import every_word
from training.glyphs import DATA, read_data


def silence_unseen(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> int:
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


def main() -> None:
    """Gather, convert and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generator", type=Path, required=True, help="unet and text_encoder")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True, help="tokenizer and scheduler")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--card", type=Path, help="the model card to put beside the weights")
    arguments = parser.parse_args()

    half = torch.float16
    tokenizer = CLIPTokenizer.from_pretrained(arguments.init, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(arguments.generator / "text_encoder", dtype=half)
    print("embeddings kept:", silence_unseen(text_encoder, tokenizer))
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(arguments.vae, torch_dtype=half),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(arguments.generator / "unet", torch_dtype=half),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(arguments.init, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for part in (pipeline.vae, pipeline.unet):
        part.register_to_config(_name_or_path="stickers")  # not the folder it was read from
    pipeline.save_pretrained(arguments.out)
    settings = json.dumps(read_data("recommended.json"), indent=2) + "\n"
    (arguments.out / SETTINGS_FILE).write_text(settings)
    shutil.copy(DATA / "SOURCES.md", arguments.out / "SOURCES.md")
    if arguments.card:
        shutil.copy(arguments.card, arguments.out / "README.md")


if __name__ == "__main__":
    main()
