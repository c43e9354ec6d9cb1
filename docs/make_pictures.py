"""Draw the pictures of the docs: python docs/make_pictures.py gallery, or methods."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import combinations, product
from pathlib import Path

from PIL import Image

from attend_excite import Generation, load
from attend_excite.methods import METHODS
from attend_excite.sheets import PAPER, comparison_sheet

HERE = Path(__file__).parent
SEEDS = range(4)

# The prompts of the paper's Figure 5.
METHODS_PROMPTS = (
    "a cat and a dog",
    "a turtle and a yellow bowl",
    "a frog and a pink bench",
    "a red bench and a yellow clock",
)

WORDS = json.loads(files("attend_excite").joinpath("data/benchmark.json").read_text(encoding="utf-8"))


def gallery_prompts() -> list[str]:
    """Two prompts of each of the benchmark's subsets, drawn by a random generator with seed 0."""
    draw = random.Random(0)
    things = [thing for thing in WORDS["objects"] if thing not in WORDS["worn"]]
    animals = draw.sample(list(combinations(WORDS["animals"], 2)), 2)
    mixed = draw.sample(list(product(WORDS["animals"], things)), 2)
    objects = draw.sample(list(combinations(things, 2)), 2)
    colours = iter(draw.choices(WORDS["colours"], k=6))
    return (
        [f"a {one} and a {other}" for one, other in animals]
        + [f"a {animal} and a {next(colours)} {thing}" for animal, thing in mixed]
        + [f"a {next(colours)} {one} and a {next(colours)} {other}" for one, other in objects]
    )


def grid(drawn: Mapping[str, Generation], subtitle: str, columns: int) -> Image.Image:
    """One comparison sheet a prompt, `columns` side by side, at half their size."""
    sheets = []
    prompts = drawn["attend-excite"].prompts
    for start in range(0, len(prompts), len(SEEDS)):
        rows = {label: generation.images[start : start + len(SEEDS)] for label, generation in drawn.items()}
        sheets.append(comparison_sheet(prompts[start], subtitle, rows, list(SEEDS)))
    width, height = (max(sizes) for sizes in zip(*(sheet.size for sheet in sheets), strict=True))
    whole = Image.new("RGB", (columns * width, -(-len(sheets) // columns) * height), PAPER)
    for index, sheet in enumerate(sheets):
        whole.paste(sheet, (index % columns * width, index // columns * height))
    return whole.reduce(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", choices=("gallery", "methods"))
    parser.add_argument("--model", default="stickers", help="name, folder or Hub id")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    arguments = parser.parse_args()
    prompts: Sequence[str] = METHODS_PROMPTS
    names: Sequence[str] = tuple(METHODS)
    path = HERE / "methods" / "sheet.webp"
    if arguments.picture == "gallery":
        prompts, names, path = gallery_prompts(), ("stable-diffusion", "attend-excite"), HERE / "gallery.webp"

    model = load(arguments.model)
    drawn = {
        # The bundled model's own pictures are not Stable Diffusion's.
        "plain" if name == "stable-diffusion" else name: model.generate(
            list(prompts), method=METHODS[name](), seeds=SEEDS, steps=arguments.steps
        )
        for name in names
    }
    picture = grid(drawn, f"{model.name}, {arguments.steps} steps", columns=2)
    picture.save(path, quality=80, method=6)
    print(f"{path.name}: {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
