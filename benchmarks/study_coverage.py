"""How often the user study's intervals hold the truth, on simulated respondents with known preferences.

    python -m benchmarks.study_coverage

Each condition is many studies, each with new respondents and new prompts of the same kind. The truth is what
endlessly many of both would vote. An interval that claims 95 % should hold it in 95 of 100 studies.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from attend_excite.benchmark.statistics import CONFIDENCE
from attend_excite.study.analysis import ALL, analyse
from attend_excite.study.create import Page, Rules, Study
from attend_excite.study.simulate import known_utilities, simulate
from attend_excite.study.standings import luce_strengths

STRENGTHS = {"attend-excite": 8.0, "stable-diffusion": 1.6, "composable": 1.2, "structure": 0.6}
INTERVALS = ("Wilson, share", "bootstrap, share", "bootstrap, strength")
_DRAWS = 200_000


@dataclass(frozen=True)
class Condition:
    """A kind of study.

    Attributes:
        name: for the table.
        respondents: 5 % of them answer at random and are to be excluded.
        prompts: one page each.
        taste: standard deviation of a respondent's own utility for a system.
        spread: standard deviation of a prompt's utility for a system.
        shown: systems on a page; each set of so many equally often.
    """

    name: str
    respondents: int
    prompts: int
    taste: float
    spread: float
    shown: int = len(STRENGTHS)


CONDITIONS = (
    Condition("all votes independent", 65, 10, 0.0, 0.0),
    Condition("respondents differ", 65, 10, 1.0, 0.0),
    Condition("both differ a little", 65, 10, 0.5, 0.5),
    Condition("both differ", 65, 10, 1.0, 1.0),
    Condition("both differ, 20 respondents", 20, 10, 1.0, 1.0),
    Condition("both differ, 30 prompts", 65, 30, 1.0, 1.0),
    Condition("pairs of systems shown", 65, 30, 0.5, 0.5, shown=2),
)


@dataclass(frozen=True)
class Coverage:
    """How often an interval held the truth.

    Attributes:
        condition: its name.
        interval: of `INTERVALS`.
        covered: share of studies and systems, 0 to 1.
        error: the standard error of that.
        width: mean, 0 to 1.
    """

    condition: str
    interval: str
    covered: float
    error: float
    width: float


def coverage(condition: Condition, studies: int, resamples: int, seed: int = 0) -> list[Coverage]:
    """Simulate and analyse many studies of one kind.

    Args:
        condition: the kind.
        studies: how many.
        resamples: of the bootstrap.
        seed: of the first study's draws.
    """
    study, systems = _study(condition), sorted(STRENGTHS)
    shares, strengths = _truth(condition)
    held: dict[str, list[list[bool]]] = {interval: [] for interval in INTERVALS}
    widths: dict[str, list[float]] = {interval: [] for interval in INTERVALS}
    for number in tqdm(range(seed, seed + studies), condition.name, leave=False, disable=None):
        utilities = known_utilities(study, STRENGTHS, spread=condition.spread, seed=number)
        votes = simulate(study, utilities, condition.respondents, taste=condition.taste, seed=number)
        result = analyse(study, votes, resamples).subsets[ALL]
        standings = [result[system] for system in systems]
        ends = {
            INTERVALS[0]: (shares, [(found.low, found.high) for found in standings]),
            INTERVALS[1]: (shares, [(found.bootstrap_low, found.bootstrap_high) for found in standings]),
            INTERVALS[2]: (strengths, [(found.strength_low, found.strength_high) for found in standings]),
        }
        for interval, (truth, pairs) in ends.items():
            bounds = np.array(pairs, dtype=float)
            held[interval].append(list((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])))
            widths[interval].append(float(np.diff(bounds).mean()))
    # The systems of one study are not independent, the studies are.
    by_study = {interval: np.mean(cases, axis=1) for interval, cases in held.items()}
    return [
        Coverage(
            condition.name,
            interval,
            float(cases.mean()),
            float(cases.std() / np.sqrt(studies)),
            float(np.mean(widths[interval])),
        )
        for interval, cases in by_study.items()
    ]


def _study(condition: Condition) -> Study:
    sets = list(combinations(sorted(STRENGTHS), condition.shown))
    pages = tuple(
        Page(f"{place}", "ordinary", f"prompt {place}", "", dict.fromkeys(sets[place % len(sets)], ()))
        for place in range(condition.prompts)
    )
    return Study(
        model="none: votes only",
        systems=tuple(sorted(STRENGTHS)),
        seeds=(0,),
        pages=pages,
        rules=Rules(),
        allow_none=False,
        consent="",
        draw_seed=0,
        files={},
    )


def _truth(condition: Condition) -> tuple[np.ndarray, np.ndarray]:
    """Shares and strengths of endlessly many votes, system by system."""
    systems = sorted(STRENGTHS)
    means = np.log([STRENGTHS[system] for system in systems])
    noise = np.random.default_rng(0).normal(0, 1, (_DRAWS, len(systems)))
    worth = np.exp(means + noise * np.hypot(condition.taste, condition.spread))
    sets = list(combinations(range(len(systems)), condition.shown))
    members = np.zeros((len(sets), len(systems)))
    wins = np.zeros(members.shape)
    for place, shown in enumerate(sets):
        members[place, shown] = 1
        wins[place, shown] = (worth[:, shown] / worth[:, shown].sum(axis=1, keepdims=True)).mean(axis=0)
    strengths = luce_strengths(wins.sum(axis=0), np.ones(len(sets)), members)
    return wins.sum(axis=0) / members.sum(axis=0), strengths


def plot(found: Sequence[Coverage], studies: int) -> Figure:
    """Coverage by condition and interval, with two standard errors."""
    names = list(dict.fromkeys(row.condition for row in found))
    figure = Figure(figsize=(8, 0.9 + 0.55 * len(names)), layout="constrained")
    panel = figure.subplots()
    for place, interval in enumerate(INTERVALS):
        rows = [row for row in found if row.interval == interval]
        panel.errorbar(
            [100 * row.covered for row in rows],
            [names.index(row.condition) + 0.2 * (place - 1) for row in rows],
            xerr=[200 * row.error for row in rows],
            fmt="os^"[place],
            color=f"C{place}",
            label=interval,
        )
    panel.axvline(100 * CONFIDENCE, color="0.4", linewidth=1, linestyle="--")
    panel.set(xlim=(30, 101), xlabel=f"intervals that hold the truth, % of {studies} studies (claimed: 95)")
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=len(INTERVALS))
    return figure


def main() -> None:
    """Simulate, print a table, and write the figures and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--studies", type=int, default=400, help="of each condition")
    parser.add_argument("--resamples", type=int, default=400, help="of each bootstrap")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="write the plot here, as .svg or .png")
    options = parser.parse_args()
    found: list[Coverage] = []
    for condition in CONDITIONS:
        found += coverage(condition, options.studies, options.resamples)
    table = Table(
        "condition", *INTERVALS, title=f"intervals that hold the truth, % of {options.studies} studies"
    )
    for at in range(0, len(found), len(INTERVALS)):
        rows = found[at : at + len(INTERVALS)]
        cells = (f"{100 * r.covered:.1f} ± {200 * r.error:.1f}, {100 * r.width:.1f} wide" for r in rows)
        table.add_row(rows[0].condition, *cells)
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(found, options.studies).savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
