"""Scenes as the generator sees them: latents, tokens and layouts, encoded once.

`python -m training.latents --init FOLDER --vae FOLDER` writes chunks of 4096 scenes. The
generator asks for a chunk by its number and makes it if it is not there yet, so encoding
may run ahead of training or not at all.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer

from training.glyphs import GlyphBox, generator_glyphs
from training.loop import write_atomically
from training.scenes import CELLS, Scene, draw_scene, layout
from training.vae import load_vae, to_tensor
from training.words import token_ids, token_positions

CHUNK = 4096
SEED = 3
MOST_STICKERS = 3
UNCLEAR = 255


@dataclass(frozen=True)
class Chunk:
    """N scenes.

    `latents` N x 4 x 16 x 16 float16, scaled to about unit variance; `ids` N x T;
    `places` N x 16 x 16 as `scenes.layout` gives them; `wanted` N x 4 x T bool: row k says
    which tokens a patch of place k should attend to (row 0 is the background's).
    """

    latents: np.ndarray
    ids: np.ndarray
    places: np.ndarray
    wanted: np.ndarray


def wanted_tokens(tokenizer: CLIPTokenizer, scene: Scene) -> np.ndarray:
    """4 x T bool; the background may attend to <sot> and to the words of its place."""
    positions = token_positions(tokenizer, scene.caption)
    wanted = np.zeros((1 + MOST_STICKERS, tokenizer.model_max_length), dtype=bool)
    wanted[0, 0] = True
    for word in scene.place_words:
        wanted[0, positions[word]] = True
    for k, word in enumerate(scene.words):
        wanted[1 + k, positions[word]] = True
    return wanted


@torch.no_grad()
def encode_chunk(vae: AutoencoderKL, tokenizer: CLIPTokenizer, number: int) -> Chunk:
    """Draw and encode scenes `number * CHUNK` onwards."""
    box = GlyphBox(generator_glyphs())
    latents = np.empty((CHUNK, 4, CELLS, CELLS), dtype=np.float16)
    places = np.empty((CHUNK, CELLS, CELLS), dtype=np.uint8)
    captions, wanted = [], []
    for start in range(0, CHUNK, 32):
        indices = range(number * CHUNK + start, number * CHUNK + start + 32)
        scenes = [draw_scene(box, SEED, index) for index in indices]
        images = to_tensor(np.stack([scene.image for scene in scenes]))
        means = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        latents[start : start + 32] = means.numpy()
        places[start : start + 32] = [layout(scene) for scene in scenes]
        captions += [scene.caption for scene in scenes]
        wanted += [wanted_tokens(tokenizer, scene) for scene in scenes]
    return Chunk(latents, token_ids(tokenizer, captions), places, np.stack(wanted))


def load_chunk(folder: Path, number: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Chunk:
    """Chunk `number`, encoded by `vae` if `folder` lacks it."""
    path = folder / f"{number:03}.npz"
    if not path.exists():
        chunk = encode_chunk(vae, tokenizer, number)

        def write(draft: Path) -> None:
            with draft.open("wb") as file:
                np.savez(file, **vars(chunk))

        write_atomically(path, write)
        return chunk
    with np.load(path) as arrays:
        return Chunk(**{name: arrays[name] for name in arrays.files})


def main() -> None:
    """Encode the first chunks that are still missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init", type=Path, required=True, help="model folder: tokenizer")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--latents", type=Path, default=Path("runs/latents"))
    parser.add_argument("--chunks", type=int, default=10)
    arguments = parser.parse_args()
    vae = load_vae(arguments.vae)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.init, subfolder="tokenizer")
    for number in range(arguments.chunks):
        load_chunk(arguments.latents, number, vae, tokenizer)


if __name__ == "__main__":
    main()
