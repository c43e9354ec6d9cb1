"""Pictures of a benchmark for a viewer who doesn't know which system drew them.

`python -m training.blind RUN --out FOLDER` takes jobs of the run at random, each a prompt and a seed, and
writes the pictures of all its systems, or of those that `--system` names, shuffled, to numbered sheets
`sheet-01.png` …, under their prompts. `key.csv` says what is what: the viewer is given the sheets alone, and
writes `answers.csv`, a row `number,lacking,miscoloured` for each picture: 1 where a subject that the prompt
names can't be recognised, and where a colour is on the wrong thing or missing, else 0.

With `--unnamed` the sheets don't tell the prompts, and the answers are `number,subject,colour`: what the
viewer takes the one thing in a picture for.

The same command with `--join FILE` then puts key and answers together, for `training.seen`.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attend_excite.benchmark.store import read_image, read_rows
from training.loop import write_atomically
from training.sheets import save_sheet

A_SHEET, COLUMNS, SCALE = 20, 5, 2
KEY = ("number", "prompt", "seed", "system", "stands_for")


def chosen(rows: list[Mapping[str, Any]], count: int, seed: int) -> list[Mapping[str, Any]]:
    """The rows of `count` prompts and seeds that every system has drawn, in random order."""
    systems = {row["system"] for row in rows}
    drawn: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["image"] is not None:
            drawn.setdefault((row["prompt"], row["seed"]), []).append(row)
    whole = sorted(each for each, group in drawn.items() if len(group) == len(systems))
    draw = random.Random(seed)
    pictures = [row for each in draw.sample(whole, min(count, len(whole))) for row in drawn[each]]
    draw.shuffle(pictures)
    return [{**row, "stands_for": round(len(whole) / min(count, len(whole)), 3)} for row in pictures]


def write_sheets(run: str, pictures: list[Mapping[str, Any]], folder: Path, unnamed: bool) -> None:
    """The sheets, with or without the prompts, and the key."""
    for start in range(0, len(pictures), A_SHEET):
        part = pictures[start : start + A_SHEET]
        images = [read_image(run, row["image"]).convert("RGB") for row in part]
        large = [
            np.asarray(image.resize([SCALE * side for side in image.size], Image.Resampling.BICUBIC))
            for image in images
        ]
        captions = [
            f"{start + k}" if unnamed else f"{start + k}: {row['prompt']}" for k, row in enumerate(part, 1)
        ]
        save_sheet(folder / f"sheet-{start // A_SHEET + 1:02}.png", large, captions, columns=COLUMNS)

    def write(path: Path) -> None:
        with path.open("w", newline="") as lines:
            table = csv.DictWriter(lines, KEY, extrasaction="ignore")
            table.writeheader()
            table.writerows({**row, "number": k} for k, row in enumerate(pictures, 1))

    write_atomically(folder / "key.csv", write)


def join(folder: Path, to: Path) -> None:
    """Key and answers in one table.

    Raises:
        ValueError: a picture has no answer, or one that is none.
    """
    with (folder / "answers.csv").open(newline="") as lines:
        told = [{name: (text or "").strip() for name, text in row.items()} for row in csv.DictReader(lines)]
    answers = {row.pop("number"): row for row in told}
    for number, row in answers.items():
        if strange := [
            row[name] for name in ("lacking", "miscoloured") if row.get(name, "0") not in ("0", "1")
        ]:
            raise ValueError(f"the answer to picture {number} is {strange[0]!r}: it must be 0 or 1")
    with (folder / "key.csv").open(newline="") as lines:
        key = list(csv.DictReader(lines))
    if missing := [row["number"] for row in key if row["number"] not in answers]:
        raise ValueError(f"no answer for the pictures {', '.join(missing)}")
    rows = [{**row, **answers[row["number"]]} for row in key]
    asked = next(iter(answers.values()), {})

    def write(path: Path) -> None:
        with path.open("w", newline="") as lines:
            table = csv.DictWriter(lines, (*KEY[1:], *asked), extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)

    write_atomically(to, write)


def main() -> None:
    """Write the sheets, or join the answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a benchmark's run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="prompts and seeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--system", action="append", help="of these systems alone; again for each")
    parser.add_argument("--unnamed", action="store_true", help="don't show the prompts")
    parser.add_argument("--join", type=Path, help="write key and answers to this table instead")
    arguments = parser.parse_args()
    if arguments.join is not None:
        join(arguments.out, arguments.join)
        return
    rows = read_rows(arguments.run).to_pylist()
    drawn = {row["system"] for row in rows}
    if unknown := sorted(set(arguments.system or ()) - drawn):
        parser.error(f"the run has no system '{unknown[0]}': it has {', '.join(sorted(drawn))}")
    if (arguments.out / "key.csv").exists():
        parser.error(
            f"'{arguments.out}' has a key already: choose another folder, so that no answers are mixed"
        )
    if arguments.system is not None:
        rows = [row for row in rows if row["system"] in arguments.system]
    pictures = chosen(rows, arguments.count, arguments.seed)
    write_sheets(arguments.run, pictures, arguments.out, arguments.unnamed)


if __name__ == "__main__":
    main()
