"""What the approximations save, and what they cost in subjects that are missing.

    python -m benchmarks.approximations

On `stickers`, with the prompts that are kept for final figures, the same seeds and noise for all. An
image lacks a subject where the presence judge doesn't find it. All take turns, prompt by prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from attend_excite import AttendAndExcite, Generation, Recipe, StableDiffusion, load
from attend_excite.methods import Method
from attend_excite.models.catalogue import source_of
from attend_excite.models.judge import Judge
from training.evaluate import PROMPTS, judged


@dataclass(frozen=True)
class Variant:
    """A way to draw: its method, steps and scheduler."""

    method: Method
    steps: int = 50
    scheduler: str = "ddim"


@dataclass
class Figures:
    """What came of a variant."""

    images: int = 0
    lacking: int = 0
    guided_steps: int = 0
    updates: int = 0
    seconds: float = 0.0

    def add(self, drawn: Generation, judge: Judge, prompt: str, seconds: float) -> None:
        """Count one prompt's images."""
        there, _ = judged(judge, drawn.images, prompt)
        steps = [step for trace in drawn.trace for step in trace.steps if step.updates]
        self.images += len(drawn.images)
        self.lacking += int((~there).any(axis=1).sum())
        self.guided_steps += len(steps)
        self.updates += sum(len(step.updates) for step in steps)
        self.seconds += seconds


def variants(recipe: Recipe) -> dict[str, Variant]:
    """The exact method, each approximation, and the plain model."""
    return {
        "exact": Variant(AttendAndExcite(recipe)),
        "every second step": Variant(AttendAndExcite(replace(recipe, guide_every=2))),
        "rest after 1 step": Variant(AttendAndExcite(replace(recipe, rest_after=1))),
        "rest after 3 steps": Variant(AttendAndExcite(replace(recipe, rest_after=3))),
        "both, rest after 3": Variant(AttendAndExcite(replace(recipe, guide_every=2, rest_after=3))),
        "DPM-Solver++, 25 steps": Variant(AttendAndExcite(recipe), 25, "dpm++"),
        "DPM-Solver++, 15 steps": Variant(AttendAndExcite(recipe), 15, "dpm++"),
        "plain, 50 steps": Variant(StableDiffusion()),
        "plain, DPM-Solver++, 25 steps": Variant(StableDiffusion(), 25, "dpm++"),
    }


def main() -> None:
    """Draw, judge, print a table, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each of the three subsets")
    parser.add_argument("--seeds", type=int, default=8, help="images a prompt, in one batch")
    parser.add_argument("--recipe", help="a packaged recipe; the model's own if left out")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    model, judge = load("stickers", device="cpu"), Judge.load(Path(source_of("stickers-judge")))
    recipe = Recipe.named(options.recipe, model.recipe) if options.recipe else model.recipe
    chosen = variants(recipe)
    figures = {name: Figures() for name in chosen}
    prompts = [prompt for subset in PROMPTS["final"].values() for prompt in subset[: options.prompts]]
    for prompt in track(prompts, "drawing", console=Console(stderr=True)):
        for name, variant in chosen.items():
            began = time.perf_counter()
            drawn = model.generate(
                prompt,
                method=variant.method,
                seeds=range(options.seeds),
                steps=variant.steps,
                scheduler=variant.scheduler,
                batch_size=options.seeds,
                progress=False,
            )
            figures[name].add(drawn, judge, prompt, time.perf_counter() - began)
    table = Table("", "images", "lacking a subject", "guided steps", "updates", "time")
    for name, row in figures.items():
        table.add_row(
            name,
            str(row.images),
            f"{row.lacking / row.images:.1%}",
            f"{row.guided_steps / row.images:.1f}",
            f"{row.updates / row.images:.1f}",
            f"{row.seconds / figures['exact'].seconds:.0%}",
        )
    Console().print(table)
    if options.json:
        document = {name: asdict(row) for name, row in figures.items()}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
