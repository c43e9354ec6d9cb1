"""Peak memory of a guidance step above the weights: sizes, batches, with and without checkpointing.

    python -m benchmarks.memory --size full

Each figure is that of a fresh process. What would not fit in the free memory is left out.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from attend_excite.bench.memory import peak_of_guidance

# What the weights and an image of 512 pixels take, from the first figures; only to know what to leave out.
GIB_OF_WEIGHTS = {"quarter": 0.5, "full": 3.6}
GIB_AN_IMAGE = {"quarter": 0.4, "full": 1.0}
PIXELS = (512, 768)
IMAGES = (1, 4)


def fits(size: str, pixels: int, images: int) -> bool:
    """Whether a step should fit in what is free now, by a quarter more than the estimate."""
    needed = GIB_OF_WEIGHTS[size] + GIB_AN_IMAGE[size] * images * (pixels / 512) ** 2
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0])
    return 1.25 * needed < available / 2**20


def main() -> None:
    """Measure, print a table, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=tuple(GIB_OF_WEIGHTS), default="quarter")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = []
    table = Table("pixels", "images", "GiB", "GiB with checkpointing", "GiB of diffusers' class")
    for pixels, images in product(PIXELS, IMAGES):
        row: dict[str, float | int] = {"pixels": pixels, "images": images}
        if fits(options.size, pixels, images):
            side = pixels // 8
            for name, checkpointing in (("MiB", False), ("MiB with checkpointing", True)):
                row[name] = peak_of_guidance(
                    options.size, "ours", latent_side=side, images=images, checkpointing=checkpointing
                )
            # Their loop nurses one image after the other, whatever the batch.
            if images == 1 and pixels == 512:
                row["MiB of diffusers' class"] = peak_of_guidance(options.size, "diffusers")
        figures.append(row)
        names = ("MiB", "MiB with checkpointing", "MiB of diffusers' class")
        cells = [f"{row[name] / 1024:.2f}" if name in row else "" for name in names]
        table.add_row(str(pixels), str(images), *cells)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
