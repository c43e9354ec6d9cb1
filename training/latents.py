"""Scenes as the generator sees them: latents, tokens and layouts, encoded once.

`python -m training.latents --init FOLDER --vae FOLDER` writes chunks of 4096 scenes. The
generator asks for a chunk by its number and makes it if it is not there yet, so encoding
may run ahead of training or not at all.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from scipy.ndimage import distance_transform_edt
from transformers import CLIPTokenizer

from training.glyphs import COLOURS, GlyphBox, generator_glyphs
from training.loop import kept_arrays, use_one_thread, write_atomically
from training.scenes import CELLS, MOST_STICKERS, SIZE, Scene, draw_scene, layout
from training.vae import load_vae, to_tensor
from training.words import token_ids, token_positions

CHUNK = 4096
SEED = 3
# What a token is to a place: nothing, what names it, the colour before that, the rest of its phrase.
NAME, COLOUR, REST = 1, 2, 3


@dataclass(frozen=True)
class Chunk:
    """N scenes.

    `latents` N x 4 x 16 x 16 float16, scaled to about unit variance; `ids` N x T;
    `places` N x 16 x 16 as `scenes.layout` gives them; `nearest` N x 16 x 16, the number from 1 of the
    sticker that a patch is nearest to; `roles` N x 4 x T: row k says what each token is to place k, the
    background (row 0: its `NAME` is <sot> and the words for the place) or a sticker.
    """

    latents: np.ndarray
    ids: np.ndarray
    places: np.ndarray
    nearest: np.ndarray
    roles: np.ndarray


def token_roles(tokenizer: CLIPTokenizer, scene: Scene) -> np.ndarray:
    """4 x T uint8, one scene's row of `Chunk.roles`."""
    words = scene.caption.split()
    positions = token_positions(tokenizer, scene.caption)
    roles = np.zeros((1 + MOST_STICKERS, tokenizer.model_max_length), dtype=np.uint8)
    roles[0, 0] = NAME
    for word in scene.place_words:
        roles[0, positions[word]] = NAME
    for k, word in enumerate(scene.words):
        roles[1 + k, positions[word]] = NAME
        before = word - 1
        if before >= 0 and words[before] in COLOURS:
            roles[1 + k, positions[before]] = COLOUR
            before -= 1
        if before >= 0 and words[before] in ("a", "an", "two"):
            roles[1 + k, positions[before]] = REST
    return roles


def nearest_sticker(scene: Scene) -> np.ndarray:
    """16 x 16 uint8, one scene's row of `Chunk.nearest`."""
    cells = scene.cover.reshape(len(scene.cover), CELLS, SIZE // CELLS, CELLS, SIZE // CELLS)
    share = cells.mean(axis=(2, 4))
    inside = share >= share.max(axis=(1, 2), keepdims=True) / 2
    return 1 + np.stack([distance_transform_edt(~one) for one in inside]).argmin(axis=0).astype(np.uint8)


@torch.no_grad()
def encode_chunk(vae: AutoencoderKL, tokenizer: CLIPTokenizer, number: int) -> Chunk:
    """Draw and encode scenes `number * CHUNK` onwards."""
    box = GlyphBox(generator_glyphs())
    latents = np.empty((CHUNK, 4, CELLS, CELLS), dtype=np.float16)
    places = np.empty((CHUNK, CELLS, CELLS), dtype=np.uint8)
    nearest = np.empty_like(places)
    captions, roles = [], []
    for start in range(0, CHUNK, 32):
        indices = range(number * CHUNK + start, number * CHUNK + start + 32)
        scenes = [draw_scene(box, SEED, index, truthful=False) for index in indices]
        images = to_tensor(np.stack([scene.image for scene in scenes])).to(vae.device)
        means = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        latents[start : start + 32] = means.cpu().numpy()
        places[start : start + 32] = [layout(scene) for scene in scenes]
        nearest[start : start + 32] = [nearest_sticker(scene) for scene in scenes]
        captions += [scene.caption for scene in scenes]
        roles += [token_roles(tokenizer, scene) for scene in scenes]
    return Chunk(latents, token_ids(tokenizer, captions), places, nearest, np.stack(roles))


def check_encoder(folder: Path, vae: AutoencoderKL) -> None:
    """Note whose latents lie in a folder, or compare: a finer decoder changes none of them.

    Raises:
        SystemExit: they are another encoder's.
    """
    digest = hashlib.sha256()
    for name, values in sorted(vae.encoder.state_dict().items()):
        digest.update(name.encode() + values.half().cpu().numpy().tobytes())
    note, own = folder / "encoder.txt", digest.hexdigest()
    if not note.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(note, lambda path: path.write_text(own))
    elif note.read_text() != own:
        raise SystemExit(f"the latents in '{folder}' are another autoencoder's: choose another --latents")


def load_chunk(folder: Path, number: int, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Chunk:
    """Chunk `number`, encoded by `vae` if `folder` lacks it."""
    check_encoder(folder, vae)
    path = folder / f"{number:03}.npz"
    return Chunk(**kept_arrays(path, lambda: vars(encode_chunk(vae, tokenizer, number))))


def main() -> None:
    """Encode the first chunks that are still missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init", type=Path, required=True, help="model folder: tokenizer")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the autoencoder")
    parser.add_argument("--latents", type=Path, default=Path("runs/latents"))
    parser.add_argument("--first", type=int, default=0, help="the first chunk to look for")
    parser.add_argument("--chunks", type=int, default=10, help="so many from there on")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    use_one_thread()
    vae = load_vae(arguments.vae).to(arguments.device)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.init, subfolder="tokenizer")
    for number in range(arguments.first, arguments.first + arguments.chunks):
        load_chunk(arguments.latents, number, vae, tokenizer)


if __name__ == "__main__":
    main()
