"""Pictures for people: sheets of images with captions, and plots of a log."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LINE = 11


def save_sheet(
    path: Path, images: list[np.ndarray], captions: list[str] | None = None, columns: int = 8
) -> None:
    """A PNG of HxWx3 uint8 `images` in rows of `columns`, each over its caption."""
    side = images[0].shape[0]
    footer = 2 * LINE + 2 if captions else 0
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + footer + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * (side + 4), i // columns * (side + footer + 4)
        sheet.paste(Image.fromarray(image), (x, y))
        for j, line in enumerate(textwrap.wrap(captions[i], side // 6)[:2] if captions else []):
            pen.text((x, y + side + LINE * j), line, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def plot_log(log: Path, path: Path) -> None:
    """A PNG with one panel per column of a CSV log whose first column is the step."""
    with log.open() as lines:
        rows = list(csv.DictReader(lines))
    if len(rows) < 2:
        return
    step, *names = rows[0]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.plot([float(row[step]) for row in rows], [float(row[name]) for row in rows], lw=0.8)
        axis.set_title(name)
        axis.set_xlabel(step)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
