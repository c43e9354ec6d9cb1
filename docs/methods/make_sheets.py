"""Draw the sheet of these pages: python docs/methods/make_sheets.py [model] [--steps 50]."""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from attend_excite import load
from attend_excite.methods import METHODS
from attend_excite.sheets import PAPER, comparison_sheet

# The prompts of the paper's Figure 5.
PROMPTS = (
    "a cat and a dog",
    "a turtle and a yellow bowl",
    "a frog and a pink bench",
    "a red bench and a yellow clock",
)
SEEDS = range(4)
SHEET = Path(__file__).with_name("sheet.webp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="stickers", help="name, folder or Hub id")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    arguments = parser.parse_args()

    model = load(arguments.model)
    drawn = {
        name: model.generate(list(PROMPTS), method=method(), seeds=SEEDS, steps=arguments.steps)
        for name, method in METHODS.items()
    }
    sheets = []
    for index in range(len(PROMPTS)):
        images = slice(index * len(SEEDS), (index + 1) * len(SEEDS))
        rows = {name: generation.images[images] for name, generation in drawn.items()}
        prompt = drawn["attend-excite"].prompts[images.start]
        sheets.append(
            comparison_sheet(prompt, f"{arguments.model}, {arguments.steps} steps", rows, list(SEEDS))
        )
    width, height = (max(sizes) for sizes in zip(*(sheet.size for sheet in sheets), strict=True))
    whole = Image.new("RGB", (2 * width, 2 * height), PAPER)
    for index, sheet in enumerate(sheets):
        whole.paste(sheet, (index % 2 * width, index // 2 * height))
    whole.reduce(2).save(SHEET, quality=80, method=6)
    print(f"{SHEET}: {SHEET.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
