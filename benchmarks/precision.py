"""How far runs in half precision stray from the float32 run, step by step.

    python -m benchmarks.precision --chart docs/precision.svg

`stickers` draws the same seeds from the same noise in each precision. The distance is that of the
latents relative to float32's, |z - z32| / |z32|, over all images. A run in float32 with only the weights
rounded to the precision says how much of it is due to them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attend_excite import AttendAndExcite, Generation, Model, StableDiffusion, StepEvent, load
from attend_excite.methods import Method

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Figures:
    """What came of a run.

    Attributes:
        apart: the distance to float32, a step each.
        apart_by_weights: likewise with only the weights rounded.
        skipped: updates left out because their gradient was not finite.
    """

    apart: list[float]
    apart_by_weights: list[float]
    skipped: int


def path(
    model: Model, method: Method, prompt: str, seeds: int, steps: int
) -> tuple[list[Tensor], Generation]:
    """The latents (images, C, H, W) after every step, and the run."""
    latents: list[Tensor] = []

    def keep(event: StepEvent) -> None:
        latents.append(event.latents.clone())

    drawn = model.generate(
        prompt,
        method=method,
        seeds=range(seeds),
        steps=steps,
        batch_size=seeds,
        decode=False,
        progress=False,
        callback=keep,
    )
    return latents, drawn


def rounded(dtype: torch.dtype) -> Model:
    """The bundled model with the weights of a precision, computing in float32."""
    model = load("stickers", device="cpu", dtype=dtype)
    model.pipeline.to(dtype=torch.float32)
    return model


def distances(exact: list[Tensor], other: list[Tensor]) -> list[float]:
    """A step each."""
    return [float((b - a).norm() / a.norm()) for a, b in zip(exact, other, strict=True)]


def main() -> None:
    """Draw in each precision, print a table, and write the figures and their chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompt", default="a cat and a frog")
    parser.add_argument("--seeds", type=int, default=8, help="images")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--chart", type=Path, help="draw them here, an .svg or .png")
    options = parser.parse_args()
    figures: dict[str, Figures] = {}
    for method in (AttendAndExcite(), StableDiffusion()):
        asked = (method, options.prompt, options.seeds, options.steps)
        exact, _ = path(load("stickers", device="cpu"), *asked)
        for name, dtype in PRECISIONS.items():
            half, drawn = path(load("stickers", device="cpu", dtype=dtype), *asked)
            weights, _ = path(rounded(dtype), *asked)
            figures[f"{method.name}, {name}"] = Figures(
                distances(exact, half),
                distances(exact, weights),
                sum(trace.skipped for trace in drawn.trace),
            )
    table = Table("", "first step", "half way", "last step", "last, weights only", "updates skipped")
    for name, row in figures.items():
        half_way = row.apart[len(row.apart) // 2]
        shown = (row.apart[0], half_way, row.apart[-1], row.apart_by_weights[-1])
        table.add_row(name, *(f"{value:.1e}" for value in shown), str(row.skipped))
    Console().print(table)
    if options.json:
        document = {name: asdict(row) for name, row in figures.items()}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.chart:
        save_chart(figures, options.chart)


def save_chart(figures: Mapping[str, Figures], path: Path) -> None:
    """A line a run, on a logarithmic scale."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, row in figures.items():
        style = "-" if name.startswith("attend-excite") else "--"
        colour = "#4477aa" if "bfloat16" in name else "#ee6677"
        axes.plot(range(1, len(row.apart) + 1), row.apart, style, color=colour, label=name)
    axes.set(xlabel="step", ylabel="distance to float32, relative", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
