"""What compiling or half precision gains on this machine.

    python -m benchmarks.other_ways compiled
    python -m benchmarks.other_ways bfloat16

`stickers` as it is, in float32, and the other way, in turns: seconds of an image alone and in a batch,
after one run of each that may compile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from attend_excite import AttendAndExcite, Model, StableDiffusion, load
from attend_excite.methods import Method

PROMPT = "a cat and a frog"
METHODS: dict[str, Method] = {"plain": StableDiffusion(), "attend-excite": AttendAndExcite()}


def seconds(model: Model, method: Method, batch: int) -> float:
    """Of one image in a batch of so many, 50 steps."""
    began = time.perf_counter()
    model.generate(PROMPT, method=method, seeds=range(batch), batch_size=batch, progress=False)
    return (time.perf_counter() - began) / batch


def main() -> None:
    """Warm up, take turns, print a table, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("way", choices=("compiled", "bfloat16", "float16"), help="what to set beside it")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="images in one pass")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each of the two takes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    way: str = options.way
    other = load("stickers", device="cpu", dtype=None if way == "compiled" else way)
    if way == "compiled":
        other.compile()
    models = {"as it is": load("stickers", device="cpu"), way: other}
    cases = [(name, batch) for name in METHODS for batch in options.batches]

    first = {}
    for name, batch in track(cases, "warming up", console=Console(stderr=True)):
        seconds(models["as it is"], METHODS[name], batch)
        first[name, batch] = seconds(other, METHODS[name], batch) * batch

    turns = []
    for name, batch in track(cases * options.rounds, "taking turns", console=Console(stderr=True)):
        turn = {which: seconds(model, METHODS[name], batch) for which, model in models.items()}
        turns.append({"method": name, "batch": batch} | turn)

    table = Table("", "images", "as it is", way, "gain", f"first run, {way}")
    for name, batch in cases:
        own = [turn for turn in turns if (turn["method"], turn["batch"]) == (name, batch)]
        ratios = [turn["as it is"] / turn[way] for turn in own]
        table.add_row(
            name,
            str(batch),
            *(f"{statistics.median(turn[which] for turn in own):.2f} s an image" for which in models),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{first[name, batch]:.0f} s",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(turns, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
