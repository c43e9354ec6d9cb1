"""Scenes in stock for the parts that look at pictures: the small CLIP and the captioner.

`python -m training.pictures` writes chunks of 4096. Their glyphs are the generator's and the
judge's, turned and stretched; one scene in 8 went through the autoencoder, for the pictures
to be looked at are as soft. Only the presence judge has to do without the generator's: it
keeps the others honest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from attend_excite.models.catalogue import source_of
from training.glyphs import COLOURS, SUBJECTS, GlyphBox, JostledBox, generator_glyphs, judge_glyphs
from training.judge import labels
from training.loop import kept_arrays, use_one_thread
from training.scenes import MOST_STICKERS, RULES, Scene, draw_scene
from training.vae import load_vae, through

CHUNK = 4096
SIDE = 64  # pixels; as for the judge, what is soft or sharp looks the same at this size
SEED, TEST_SEED = 8, 9
NONE = -1  # in `mentions`: no such sticker, or one in its own colours
BACKGROUNDS = list(RULES["backgrounds"])
COLOUR_NAMES = list(COLOURS)


@dataclass(frozen=True)
class Pictures:
    """N scenes.

    `images` N x 64 x 64 x 3 uint8; `mentions` N x 3 x 2: subject and colour of each
    sticker, from left to right; `backgrounds` N, into `BACKGROUNDS`; `subjects` and
    `colours` N x 8 x 8 as `judge.labels` gives them.
    """

    images: np.ndarray
    mentions: np.ndarray
    backgrounds: np.ndarray
    subjects: np.ndarray
    colours: np.ndarray

    def part(self, rows: slice) -> Pictures:
        """Some of them."""
        return Pictures(**{name: values[rows] for name, values in vars(self).items()})


def mentioned(scene: Scene) -> np.ndarray:
    """3 x 2: subject and colour of each sticker, from left to right."""
    across = scene.cover.sum(axis=1)
    middle = across @ np.arange(across.shape[1]) / across.sum(axis=1)
    mentions = np.full((MOST_STICKERS, 2), NONE)
    for row, k in zip(mentions, np.argsort(middle), strict=False):
        colour = scene.colours[k]
        row[:] = SUBJECTS.index(scene.subjects[k]), COLOUR_NAMES.index(colour) if colour else NONE
    return mentions


def shrunk(image: np.ndarray) -> np.ndarray:
    """64 x 64 x 3, by the filter of the image processors."""
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def draw_pictures(
    box: GlyphBox, seed: int, indices: range, vae: AutoencoderKL | None = None, every: int = 1
) -> Pictures:
    """Scenes of `indices`, one in `every` of them through the autoencoder if there is one."""
    scenes = [draw_scene(box, seed, index, held_out=False) for index in indices]
    images = np.stack([scene.image for scene in scenes])
    if vae is not None:
        images[::every] = through(vae, images[::every])
    cells = [labels(scene) for scene in scenes]
    return Pictures(
        np.stack([shrunk(image) for image in images]),
        np.stack([mentioned(scene) for scene in scenes]),
        np.array([BACKGROUNDS.index(scene.background) for scene in scenes]),
        np.stack([subjects for subjects, _ in cells]),
        np.stack([colours for _, colours in cells]),
    )


def load_chunk(folder: Path, number: int, vae: AutoencoderKL) -> Pictures:
    """Chunk `number` for training, drawn if `folder` lacks it."""

    def make() -> dict[str, np.ndarray]:
        indices = range(number * CHUNK, (number + 1) * CHUNK)
        box = JostledBox(generator_glyphs() + judge_glyphs())
        return vars(draw_pictures(box, SEED, indices, vae, every=8))

    return Pictures(**kept_arrays(folder / f"{number:03}.npz", make))


class Stock:
    """`chunks` chunks in turn, again and again; each is drawn when it is first asked for."""

    def __init__(self, folder: Path, chunks: int, vae: AutoencoderKL) -> None:
        self.folder, self.chunks, self.vae = folder, chunks, vae
        self.loaded: dict[int, Pictures] = {}

    def batch(self, n: int, size: int) -> Pictures:
        """Batch `n` of `size` scenes, which divides a chunk."""
        number, start = n * size // CHUNK % self.chunks, n * size % CHUNK
        if number not in self.loaded:
            self.loaded[number] = load_chunk(self.folder, number, self.vae)
        return self.loaded[number].part(slice(start, start + size))


def measure(folder: Path, figures: Callable[[Pictures], dict[str, float]], scenes: int, vae: Path) -> None:
    """Write `figures` of as many unseen scenes, as drawn and through the autoencoder, to `figures.json`."""
    box, indices = GlyphBox(generator_glyphs()), range(scenes)
    results = {
        "unseen scenes": figures(draw_pictures(box, TEST_SEED, indices)),
        "through the autoencoder": figures(draw_pictures(box, TEST_SEED, indices, load_vae(vae))),
    }
    text = json.dumps(results, indent=2) + "\n"
    (folder / "figures.json").write_text(text)
    print(text)


def trainee_arguments(description: str | None, steps: int) -> argparse.Namespace:
    """What the command line says of a part that learns from these pictures."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument(
        "--init", type=Path, default=source_of("stickers"), help="model folder: tokenizer, vae"
    )
    parser.add_argument("--chunks", type=int, default=4, help="chunks before the first repeats")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--weights", type=Path, help="an exported model of this part, to go on from")
    parser.add_argument("--measure", action="store_true", help="measure the exported model, train nothing")
    return parser.parse_args()


def main() -> None:
    """Draw the first chunks that are still missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--vae", type=Path, default=Path(source_of("stickers")) / "vae")
    parser.add_argument("--chunks", type=int, default=4)
    arguments = parser.parse_args()
    use_one_thread()
    vae = load_vae(arguments.vae)
    for number in range(arguments.chunks):
        load_chunk(arguments.runs / "pictures", number, vae)


if __name__ == "__main__":
    main()
