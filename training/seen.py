"""Does the presence judge see what a person sees in the generator's pictures?

`python -m training.seen` sets the judge's verdict on the recorded benchmark beside that of viewers, who
looked at 600 of its pictures, two hundred from the same noise each of three ways, with their prompts and
without knowing which was which, and asked of each whether all its subjects can be recognised
(`data/seen_stickers.csv`); `--run stickers-excite` of four other viewers, who looked at 300, plain and by
`excite`, `--run stickers-joint` of five others, who looked at 300 of that model, and `--run methods` of
five others, who looked at 400 of the comparison of methods. `--run` also names earlier ones, or several to be
taken together: `stickers-first` and `stickers-20-steps` are of the first generation of the weights, 400 and
200 pictures, plain and nursed (in the former, pictures that an earlier judge found wanting were drawn more
often than others; how many each one stands for is in `data/seen.csv`); `stickers-second` is of the second
generation as it was at first, 300 pictures, and so are `objectives` and `objectives-hard`, the comparison as
it was then: plain, Attend-and-Excite and `excite`. Intervals are 95 %, by resampling the prompts.

`--singles FILE` is about pictures of one subject, of which a viewer said what they show without knowing what
they should: in how many it was recognised, of each subject and of all, and in how many its colour.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.glyphs import COLOURS, DATA

RECORDED = Path("docs/results")
ANSWERS = {
    "stickers": "seen_stickers.csv",
    "stickers-excite": "seen_excite.csv",
    "stickers-joint": "seen_joint.csv",
    "methods": "seen_methods.csv",
    "stickers-first": "seen.csv",
    "stickers-20-steps": "seen_20_steps.csv",
    "stickers-second": "seen_second.csv",
    "objectives": "seen_objectives.csv",
    "objectives-hard": "seen_objectives_hard.csv",
}
# Of the same pictures.
RECORD_OF = {"stickers-excite": "stickers"}
PLAIN, NURSED = "stable-diffusion", "attend-excite"
RESAMPLES = 5000


@dataclass(frozen=True)
class Seen:
    """One picture of a run: how many it stands for, whether a subject is missing, by eye and by the judge,
    and whether a colour is wrong by eye; None: that wasn't asked."""

    run: str
    prompt: str
    seed: str
    stands_for: float
    by_eye: bool
    by_judge: bool
    miscoloured: bool | None


def share(pictures: list[Seen], values: list[bool]) -> float:
    """The weighted share of pictures for which a value is true."""
    return float(np.average(values, weights=[picture.stands_for for picture in pictures]))


def resampled(prompts: list[str], values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the weighted mean of one value a picture, the prompts being resampled: the
    pictures of one prompt are alike."""
    names, at = np.unique(prompts, return_inverse=True)
    sums = np.bincount(at, weights=weights * values, minlength=len(names))
    counts = np.bincount(at, weights=weights, minlength=len(names))
    rows = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    low, high = np.quantile(sums[rows].sum(axis=1) / counts[rows].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def interval(pictures: list[Seen]) -> tuple[float, float]:
    """Of the share that lacks a subject by eye."""
    lacking = np.array([picture.by_eye for picture in pictures], dtype=float)
    weights = np.array([picture.stands_for for picture in pictures])
    return resampled([picture.prompt for picture in pictures], lacking, weights)


def changed(first: list[Seen], other: list[Seen]) -> str | None:
    """What became by eye of the pictures that were seen both ways; None: there are none."""
    before, after = (
        {(picture.prompt, picture.run, picture.seed): picture.by_eye for picture in pictures}
        for pictures in (first, other)
    )
    both = sorted(before.keys() & after.keys())
    if len(both) < len(before):
        return None
    fewer = np.array([before[each] - after[each] for each in both], dtype=float)
    low, high = resampled([prompt for prompt, *_ in both], fewer, np.ones(len(both)))
    mended, lacking = int((fewer > 0).sum()), sum(before.values())
    return (
        f"{mended} of {lacking} mended, {int((fewer < 0).sum())} of {len(both) - lacking} spoiled, "
        f"{100 * fewer.mean():.1f} points fewer ({100 * low:.1f} to {100 * high:.1f})"
    )


def read_seen(run: str, without: str | None) -> dict[str, list[Seen]]:
    """The pictures that were looked at, by system, but for prompts that name the subject `without`."""
    with (RECORDED / RECORD_OF.get(run, run) / "numbers/images.csv").open(newline="") as lines:
        rows = {(row["prompt"], row["seed"], row["system"]): row for row in csv.DictReader(lines)}
    pictures: dict[str, list[Seen]] = defaultdict(list)
    with (DATA / ANSWERS[run]).open(newline="") as lines:
        for seen in csv.DictReader(lines):
            row = rows[seen["prompt"], seen["seed"], seen["system"]]
            if without is not None and without in row["prompt"].split():
                continue
            picture = Seen(
                run,
                seen["prompt"],
                seen["seed"],
                float(seen["stands_for"]),
                seen["lacking"] == "1",
                row["presence neglected"] != "0",
                seen["miscoloured"] == "1" if seen.get("miscoloured") else None,
            )
            pictures[row["system"]].append(picture)
    return pictures


def print_recognised(path: Path) -> None:
    """How many pictures of one subject were taken for it, and had the colour that their prompt names."""
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    found: dict[str, list[bool]] = defaultdict(list)
    coloured = []
    for row in rows:
        *before, subject = row["prompt"].split()
        found[subject].append(row["subject"] == subject)
        if before[-1] in COLOURS:
            coloured.append(row["colour"] == before[-1])
    for subject, told in sorted(found.items(), key=lambda item: np.mean(item[1])):
        print(f"{subject}: {sum(told)} of {len(told)}")
    print(f"recognised: {np.mean([known for told in found.values() for known in told]):.1%} of {len(rows)}")
    print(f"in the right colour: {np.mean(coloured):.1%} of {len(coloured)}")


def main() -> None:
    """Print the figures of each system."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", choices=list(ANSWERS), nargs="+", default=["stickers"], help="recorded benchmarks, together"
    )
    parser.add_argument("--without", help="a subject: leave out the prompts that name it")
    parser.add_argument("--singles", type=Path, help="such a table, in place of --run")
    arguments = parser.parse_args()
    if arguments.singles is not None:
        print_recognised(arguments.singles)
        return
    seen: dict[str, list[Seen]] = defaultdict(list)
    for run in arguments.run:
        for system, pictures in read_seen(run, arguments.without).items():
            seen[system] += pictures
    for system, pictures in seen.items():
        eye = [picture.by_eye for picture in pictures]
        judge = [picture.by_judge for picture in pictures]
        low, high = interval(pictures)
        agreed = share(pictures, [a == b for a, b in zip(eye, judge, strict=True)])
        both = share(pictures, [a and b for a, b in zip(eye, judge, strict=True)])
        print(f"{system}, {len(pictures)} pictures")
        print(f"  a subject is missing by eye: {share(pictures, eye):.1%} ({low:.1%} to {high:.1%})")
        print(f"  by the judge, in the same pictures: {share(pictures, judge):.1%}")
        print(f"  the two agree on {agreed:.1%}")
        print(f"  of the pictures that lack one by eye the judge names {both / share(pictures, eye):.1%}")
        wrong = [picture.miscoloured for picture in pictures]
        if None not in wrong:
            print(f"  a colour is wrong by eye: {share(pictures, list(map(bool, wrong))):.1%}")
        for first in (PLAIN, NURSED):
            others = first in seen and system not in (PLAIN, first)
            if others and (told := changed(seen[first], pictures)):
                print(f"  beside {first}: {told}")


if __name__ == "__main__":
    main()
