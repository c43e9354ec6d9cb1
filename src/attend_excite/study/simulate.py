"""A panel that votes by rule: to try a study out without people, and to check its analysis.

Every vote has the source "simulated" and a respondent called "simulated-…", so that no table or file of such
a panel can be taken for people's.

A respondent chooses the set of the highest utility. Utilities are what the prompt's sets are worth to all
(`known_utilities` or `judged_utilities`), plus the respondent's own taste for a system, plus standard Gumbel
noise for each vote: without taste that is Luce's choice model, with exp(utility) as strengths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from attend_excite.study.create import IMAGES, NONE, Study
from attend_excite.study.votes import Vote

Utilities = Mapping[str, Mapping[str, float]]
"""Prompt -> system -> what its set is worth. "None is better" is worth 0 where nothing is said of "none"."""

CERTAINTY = 4.0
"""Utility of a set whose images are all right over one with none: chosen of two with a chance of 98 %."""

_SECONDS, _HASTY_SECONDS = 8.0, 0.5


def simulate(
    study: Study,
    utilities: Utilities,
    respondents: int,
    *,
    taste: float = 0.5,
    inattentive: float = 0.05,
    seed: int = 0,
) -> list[Vote]:
    """The votes of a panel on all pages of a study.

    Args:
        study: whose pages are answered, repeated ones too, and checks as expected.
        utilities: of each prompt.
        respondents: how many.
        taste: standard deviation of a respondent's own utility for a system.
        inattentive: chance that a respondent answers all pages at random and in haste.
        seed: of all that is drawn.

    Raises:
        ValueError: a number is out of its range.
    """
    if respondents < 1:
        raise ValueError(f"{respondents} respondents: there must be 1 or more")
    if taste < 0:
        raise ValueError(f"the taste is {taste}: it must be 0 or more")
    if not 0 <= inattentive <= 1:
        raise ValueError(f"the chance to be inattentive is {inattentive}: it must be 0 to 1")
    draw = random.Random(seed)
    votes: list[Vote] = []
    for number in range(respondents):
        hasty = draw.random() < inattentive
        tastes = {system: draw.gauss(0, taste) for system in study.systems}
        for page in draw.sample(study.pages, len(study.pages)):
            shown = tuple(draw.sample(sorted(page.images), len(page.images)))
            options = (*shown, NONE) if study.allow_none else shown
            if hasty:
                choice = draw.choice(options)
            elif page.expected is not None:
                choice = page.expected
            else:
                worth = {
                    name: utilities[page.prompt].get(name, 0.0)
                    + tastes.get(name, 0.0)
                    - math.log(draw.expovariate(1))
                    for name in options
                }
                choice = max(worth, key=worth.__getitem__)
            votes.append(
                Vote(
                    respondent=f"simulated-{seed}-{number:04}",
                    page=page.id,
                    kind=page.kind,
                    repeats=page.repeats,
                    prompt=page.prompt,
                    subset=page.subset,
                    shown=shown,
                    choice=None if choice == NONE else choice,
                    expected=page.expected,
                    seconds=(_HASTY_SECONDS if hasty else _SECONDS) * draw.lognormvariate(0, 0.2),
                    source="simulated",
                )
            )
    return votes


def known_utilities(
    study: Study, strengths: Mapping[str, float], *, spread: float = 0.5, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Utilities of known strengths, which differ from prompt to prompt.

    Args:
        study: whose prompts they are for.
        strengths: of each system, above 0; only their ratios matter.
        spread: standard deviation of a prompt's utility for a system around the logarithm of its strength.
        seed: of what is drawn.

    Raises:
        ValueError: a system has no strength, or there is no such system.
    """
    if missing := [system for system in study.systems if system not in strengths]:
        raise ValueError(f"no strength for {', '.join(missing)}: give one for each system of the study")
    if unknown := sorted(strengths.keys() - set(study.systems)):
        compared = ", ".join(study.systems)
        raise ValueError(f"a strength for {unknown[0]}, which the study doesn't compare: it has {compared}")
    if low := [name for name, strength in strengths.items() if not 0 < strength < float("inf")]:
        raise ValueError(f"the strength of {low[0]} is {strengths[low[0]]}: it must be above 0")
    # Another stream than that of the panel.
    draw = random.Random(f"utilities {seed}")
    return {
        prompt: {name: math.log(strengths[name]) + draw.gauss(0, spread) for name in study.systems}
        for prompt in sorted({page.prompt for page in study.pages})
    }


def judged_utilities(
    study: Study, folder: Path, judge: str = "stickers-judge"
) -> dict[str, dict[str, float]]:
    """Utilities that follow the presence judge: `CERTAINTY` times the share of a set's images that show every
    subject that it knows, in its colour.

    Args:
        study: whose images are judged, as respondents see them.
        folder: the study's.
        judge: a short name, or a folder.

    Raises:
        ValueError: there is no such judge, or it knows none of a prompt's subjects.
    """
    from PIL import Image
    from tqdm import tqdm

    from attend_excite.benchmark.metrics import JudgedPresence
    from attend_excite.nouns import find_nouns

    metric = JudgedPresence(judge)
    sets = {
        (page.prompt, name): files
        for page in study.pages
        if page.kind == "ordinary"
        for name, files in page.images.items()
    }
    utilities: dict[str, dict[str, float]] = {}
    for (prompt, system), files in tqdm(sets.items(), "judging", unit="set", leave=False, disable=None):
        subjects = [noun.text for noun in find_nouns(prompt) if metric.knows(noun.text)]
        if not subjects:
            raise ValueError(f"{judge} knows no subject of '{prompt}': let choices follow strengths instead")
        row = {"job": "", "prompt": prompt, "subjects": subjects}
        images = [Image.open(folder / IMAGES / name).convert("RGB") for name in files]
        metric.update(images, [row] * len(images))
        right = [verdict["right"] for verdict in metric.compute()]
        utilities.setdefault(prompt, {})[system] = CERTAINTY * fmean(right)
    return utilities
