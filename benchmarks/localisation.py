"""Do the maps explain the picture? How often a subject's map has its maximum on that subject's sticker.

    python -m benchmarks.localisation --json localisation.json --chart localisation.webp

The pointing game (Zhang et al., 2018) on the 30 prompts that `training/data/evaluation.json` keeps for final
figures, plain and excited from the same noise. Where a subject is, the presence judge says: its network sees
each picture four times, shifted by a quarter of its cells' size each way, so that its 8x8 cells become 16x16
(shift and stitch; Long et al., 2015). How well that finds stickers is measured first, on rendered scenes
whose layout is known.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from attend_excite import AttendAndExcite, Model, StableDiffusion, load
from attend_excite.files import written_whole
from attend_excite.methods import Method
from attend_excite.models.catalogue import source_of
from attend_excite.models.judge import Judge, pixels
from training.evaluate import PROMPTS, interval, named
from training.glyphs import GlyphBox, generator_glyphs
from training.scenes import CELLS, draw_scene, layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: dict[str, Method] = {"plain": StableDiffusion(), "excited": AttendAndExcite()}
MAPS = {"last step": -1, "mean over the steps": None}
CHANCE = 0.2  # a cell whose chance of the subject is above this belongs to it
SCENE_SEED, UNCLEAR = 8, 255


@dataclass(frozen=True)
class Pointing:
    """One subject of one picture.

    Attributes:
        prompt: what was asked for.
        there: whether the judge finds the subject.
        hits: for each of `MAPS`, whether the map's maximum lies on it; never where it is not there.
        share: of the picture that it covers, which is how often a blind guess hits.
    """

    prompt: str
    there: bool
    hits: dict[str, bool]
    share: float


@torch.no_grad()
def regions(judge: Judge, images: Tensor) -> Tensor:
    """Where each subject is in B x 3 x H x W pictures in [-1, 1]: B x S x 16 x 16 bool."""
    height, width = images.shape[-2:]
    down, right = height // (2 * CELLS), width // (2 * CELLS)
    padded = F.pad(images, (right, right, down, down), mode="replicate")
    chances = torch.empty(len(images), len(judge.subjects), CELLS, CELLS)
    for row in (0, 1):
        for column in (0, 1):
            y, x = 2 * row * down, 2 * column * right
            shifted = padded[:, :, y : y + height, x : x + width]
            chances[:, :, row::2, column::2] = judge.cells(shifted)[0].softmax(dim=1)[:, 1:]
    return chances > CHANCE


@torch.no_grad()
def accuracy_of_regions(judge: Judge, scenes: int) -> dict[str, float]:
    """Of the cells of rendered scenes that are clearly on a sticker that the judge finds, or clearly off it:
    the shares that `regions` gets right."""
    box = GlyphBox(generator_glyphs())
    on: list[np.ndarray] = []
    off: list[np.ndarray] = []
    for index in track(range(scenes), "scenes", transient=True):
        scene = draw_scene(box, SCENE_SEED, index, held_out=False)
        images, places = pixels([Image.fromarray(scene.image)]), layout(scene)
        there, seen = judge(images).scores[0] >= judge.thresholds, regions(judge, images)[0].numpy()
        for subject in set(scene.subjects):
            at = judge.subjects.index(subject)
            if there[at]:
                own = np.isin(places, [1 + k for k, name in enumerate(scene.subjects) if name == subject])
                on.append(seen[at][own])
                off.append(~seen[at][~own & (places != UNCLEAR)])
    return {
        "cells on the sticker": float(np.concatenate(on).mean()),
        "cells off it": float(np.concatenate(off).mean()),
    }


@torch.no_grad()
def pointings(
    model: Model, judge: Judge, prompts: list[str], seeds: range, steps: int
) -> dict[str, list[Pointing]]:
    """Every subject of every picture, for each of `METHODS`."""
    found: dict[str, list[Pointing]] = {name: [] for name in METHODS}
    for prompt in track(prompts, "drawing", transient=True):
        for name, method in METHODS.items():
            drawn = model.generate(
                prompt, method=method, seeds=seeds, steps=steps, maps=(CELLS, CELLS), progress=False
            )
            images = pixels(drawn.images)
            there, seen = judge(images).scores >= judge.thresholds, regions(judge, images)
            for subject, _ in named(prompt):
                at, maps = judge.subjects.index(subject), drawn.maps[subject]
                for image in range(len(seeds)):
                    region = seen[image, at].flatten()
                    hits = {
                        label: bool(there[image, at] & region[maps.at(image, step).argmax()])
                        for label, step in MAPS.items()
                    }
                    share = region.float().mean().item()
                    found[name].append(Pointing(prompt, bool(there[image, at]), hits, share))
    return found


def figures(found: dict[str, list[Pointing]]) -> dict[str, dict[str, Any]]:
    """A row a question -> plain, excited and their difference, each a share with its 95 % interval."""
    rows = {}
    for label in MAPS:
        rows[f"{label}, of subjects asked for"] = _row(found, lambda p, label=label: p.hits[label])
        rows[f"{label}, of subjects there"] = _row(
            found, lambda p, label=label: p.hits[label] if p.there else None
        )
    rows["a blind guess, of subjects there"] = _row(found, lambda p: p.share if p.there else None)
    rows["subjects there"] = _row(found, lambda p: p.there)
    return rows


def _row(found: dict[str, list[Pointing]], value: Callable[[Pointing], float | None]) -> dict[str, Any]:
    """The mean over the prompts of each prompt's mean; None does not count."""
    means: dict[str, dict[str, float]] = {}
    for name, points in found.items():
        values = defaultdict(list)
        for point in points:
            if (counted := value(point)) is not None:
                values[point.prompt].append(counted)
        means[name] = {prompt: float(np.mean(counted)) for prompt, counted in values.items()}
    plain, excited = means.values()
    means["difference"] = {
        prompt: excited[prompt] - plain[prompt] for prompt in plain.keys() & excited.keys()
    }
    shares = {name: np.array([of[prompt] for prompt in sorted(of)]) for name, of in means.items()}
    return {name: {"share": float(of.mean()), "95 % interval": interval(of)} for name, of in shares.items()}


def chart(rows: dict[str, dict[str, Any]], subtitle: str) -> Figure:
    """Plain and excited side by side, a line a question."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 * len(rows) + 1.2), dpi=150, layout="constrained")
    panel = figure.subplots()
    for name, colour, shift in (("plain", "#78716c", -0.12), ("excited", "#c2410c", 0.12)):
        shares = np.array([row[name]["share"] for row in rows.values()])
        low, high = np.array([row[name]["95 % interval"] for row in rows.values()]).T
        places = np.arange(len(rows)) + shift
        panel.errorbar(shares, places, xerr=(shares - low, high - shares), fmt="o", color=colour, label=name)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.invert_yaxis()
    panel.set_xlim(0, 1.02)
    panel.set_xlabel("share, with its 95 % interval over the prompts")
    panel.set_title(f"is a map's maximum on its subject?\n{subtitle}", loc="left", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main() -> None:
    """Validate, draw, point, print a table, and write the figures as JSON and as a chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--model",
        default="stickers",
        help="stickers, or a folder of its kind",
    )
    parser.add_argument("--judge", type=Path, default=source_of("stickers-judge"), help="its folder")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each of the three subsets")
    parser.add_argument("--seeds", type=int, default=4, help="images a prompt")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--scenes", type=int, default=300, help="rendered scenes to validate the regions on")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--chart", type=Path, help="write the chart here: .png, .webp, .svg, ...")
    options = parser.parse_args()
    model, judge = load(options.model, device="cpu"), Judge.load(options.judge)
    prompts = [prompt for subset in PROMPTS["final"].values() for prompt in subset[: options.prompts]]
    accuracy = accuracy_of_regions(judge, options.scenes)
    rows = figures(pointings(model, judge, prompts, range(options.seeds), options.steps))

    table = Table("the map's maximum lies on the subject", "plain", "excited", "difference")
    for question, row in rows.items():
        table.add_row(question, *(_told(of["share"], *of["95 % interval"]) for of in row.values()))
    Console().print(table)
    Console().print("regions are right, on rendered scenes:", accuracy)
    if options.json:
        document = {"accuracy of the regions": accuracy, "shares": rows}
        with written_whole(options.json) as partial:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.chart:
        seeds = "1 seed" if options.seeds == 1 else f"{options.seeds} seeds"
        subtitle = f"{options.model}, {len(prompts)} prompts, {seeds}, {options.steps} steps"
        with written_whole(options.chart) as partial:
            chart(rows, subtitle).savefig(partial)


def _told(share: float, low: float, high: float) -> str:
    return f"{share:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
