"""Every method on the same prompts, seeds and noise: images a second, and what the presence judge sees.

    python -m benchmarks.methods

The prompts are the 30 that `training/data/evaluation.json` keeps for final figures. The judge is made by
`training/judge.py`; of the pictures it says which subjects are there, and in which colours.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from attend_excite import load
from attend_excite.methods import METHODS
from attend_excite.models.catalogue import source_of
from attend_excite.models.judge import Judge
from training.evaluate import PROMPTS, judged


def main() -> None:
    """Draw, judge, print a table, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="stickers", help="name or folder of a sticker model")
    parser.add_argument("--judge", type=Path, default=source_of("stickers-judge"), help="its folder")
    parser.add_argument("--prompts", type=int, default=10, help="prompts of each of the three subsets")
    parser.add_argument("--seeds", type=int, default=4, help="images a prompt")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="only these")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    model, judge = load(options.model, device="cpu"), Judge.load(options.judge)
    prompts = [prompt for subset in PROMPTS["final"].values() for prompt in subset[: options.prompts]]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    figures = {}
    for name in options.methods:
        began = time.perf_counter()
        drawn = model.generate(prompts, method=METHODS[name](), seeds=seeds, steps=options.steps)
        seconds = time.perf_counter() - began
        lacking, miscoloured = 0, 0
        for index, prompt in enumerate(prompts):
            images = drawn.images[index * options.seeds : (index + 1) * options.seeds]
            there, right = judged(judge, images, prompt)
            lacking += int((~there).any(axis=1).sum())
            miscoloured += int(np.logical_and(there, ~right).any(axis=1).sum())
        figures[name] = {
            "images": len(drawn.images),
            "lacking a subject": lacking,
            "wrong colour on a subject that is there": miscoloured,
            "images a second": len(drawn.images) / seconds,
        }
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    table = Table("method", *next(iter(figures.values())))
    for name, row in figures.items():
        table.add_row(name, *(f"{value:.3g}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
