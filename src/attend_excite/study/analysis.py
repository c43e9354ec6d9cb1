"""From votes to figures: shares, strengths, winners, agreement, and how sure they are.

The result as JSON, which `study analyse` writes as `study_result.json` and the benchmark's report reads as
Table 2 of the paper:

    {
      "format": 1,
      "study": "<the study's hash>", "model": "stickers", "simulated": false,
      "confidence": 0.95, "resamples": 2000,
      "respondents": 63, "excluded": [{"respondent": "...", "reason": "..."}], "rules": {...},
      "subsets": {
        "animals": {
          "attend-excite": {
            "votes": 471, "shown": 630,
            "share": 0.748, "low": 0.712, "high": 0.780, "bootstrap_low": 0.66, "bootstrap_high": 0.82,
            "strength": 0.748, "strength_low": 0.66, "strength_high": 0.82},
          ...},
        ...,
        "all": {...}
      },
      "prompts": [{"subset": "animals", "prompt": "a cat and a frog", "votes": {"attend-excite": 51, ...},
                   "winners": ["attend-excite"], "share": 0.81, "majority": true}, ...],
      "agreement": {"alpha": 0.61, "repeats": 189, "repeats_alike": 160}
    }

Shares are 0 to 1; null is what the votes do not tell. Where "none is better" was chosen it has an entry of
its own, the system "none", without a strength.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import attrgetter
from statistics import median
from typing import Any

import numpy as np

from attend_excite.benchmark.statistics import CONFIDENCE
from attend_excite.study.create import NONE, Page, Rules, Study
from attend_excite.study.standings import RESAMPLES, Standing, standings
from attend_excite.study.votes import Vote

FORMAT = 1
"""The version of the JSON document."""

ALL = "all"
"""The name under which the subsets are taken together."""

_respondent, _prompt = attrgetter("respondent"), attrgetter("subset", "prompt")


@dataclass(frozen=True)
class Winner:
    """Who won a prompt.

    Attributes:
        subset: the prompt's.
        prompt: its text.
        votes: of each system that was shown, and of "none" if it was chosen.
        winners: of most votes; several where they are level.
        share: of the votes, a winner's.
        majority: whether that is more than half.
    """

    subset: str
    prompt: str
    votes: Mapping[str, int]
    winners: tuple[str, ...]
    share: float
    majority: bool


@dataclass(frozen=True)
class Exclusion:
    """A respondent who is left out, and the rule that says so."""

    respondent: str
    reason: str


@dataclass(frozen=True)
class Agreement:
    """How far respondents agree with each other, and with themselves.

    Attributes:
        alpha: Krippendorff's, of choices on ordinary pages: 1 if all agree, 0 as by chance; None where
            nothing can be compared.
        repeats: repeated pages answered both times.
        repeats_alike: of those, answered alike.
    """

    alpha: float | None
    repeats: int
    repeats_alike: int


@dataclass(frozen=True)
class Result:
    """All figures of a study; see the module for what they mean.

    Attributes:
        study: the study's hash.
        model: the model that drew the images.
        simulated: whether a program voted.
        respondents: whose votes are counted.
        excluded: whose are not.
        rules: by which.
        subsets: subset -> system -> standing; under `ALL` the subsets together.
        prompts: who won each prompt.
        agreement: among respondents.
        confidence: of the intervals.
        resamples: of the bootstrap.
        titles: those of the systems that a user wrote, for people.
    """

    study: str
    model: str
    simulated: bool
    respondents: int
    excluded: tuple[Exclusion, ...]
    rules: Rules
    subsets: Mapping[str, Mapping[str, Standing]]
    prompts: tuple[Winner, ...]
    agreement: Agreement
    confidence: float
    resamples: int
    titles: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The JSON document of the module's head."""
        return {"format": FORMAT} | asdict(self)


def analyse(study: Study, votes: Sequence[Vote], resamples: int = RESAMPLES) -> Result:
    """All figures of a study.

    Args:
        study: whose rules say who is left out.
        votes: of its respondents, checks and repeated pages among them.
        resamples: of the bootstrap.

    Raises:
        ValueError: there are no votes, they mix people and programs, or the rules leave nobody.
    """
    if not votes:
        raise ValueError("the study has no votes yet")
    simulated = {vote.source == "simulated" for vote in votes}
    if len(simulated) > 1:
        raise ValueError("the votes mix those of people and simulated ones: analyse them apart")
    excluded = exclusions(votes, study.rules, study.pages)
    out = {exclusion.respondent for exclusion in excluded}
    kept = [vote for vote in votes if vote.respondent not in out]
    counted = [vote for vote in kept if vote.kind == "ordinary"]
    if not counted:
        raise ValueError(
            f"nobody is left to count: of {len(out)} respondents the rules leave out all, "
            f"the first because {excluded[0].reason}"
            if excluded
            else "no ordinary page has been answered yet"
        )
    subsets = {
        subset: standings([vote for vote in counted if vote.subset == subset], resamples)
        for subset in sorted({vote.subset for vote in counted})
    }
    whole = standings(counted, resamples) if len(subsets) > 1 else subsets[counted[0].subset]
    return Result(
        study=study.hash,
        model=study.model,
        titles=study.titles,
        simulated=simulated.pop(),
        respondents=len({vote.respondent for vote in counted}),
        excluded=tuple(excluded),
        rules=study.rules,
        subsets=subsets | {ALL: whole},
        prompts=winners(counted),
        agreement=agreement(kept),
        confidence=CONFIDENCE,
        resamples=resamples,
    )


def exclusions(votes: Sequence[Vote], rules: Rules, pages: Sequence[Page]) -> list[Exclusion]:
    """Whom the rules leave out: each with the first rule that does.

    Args:
        votes: all of all respondents.
        rules: fixed when the study was created.
        pages: the study's. A check that somebody left out is one that they have not passed.
    """
    of_study = sum(page.kind == "check" for page in pages)
    found: list[Exclusion] = []
    for respondent, group in groupby(sorted(votes, key=_respondent), _respondent):
        theirs = list(group)
        passed = sum(vote.kind == "check" and vote.choice == vote.expected for vote in theirs)
        seconds = median(vote.seconds for vote in theirs)
        if len(theirs) < rules.least_answered * len(pages):
            found.append(Exclusion(respondent, f"answered {len(theirs)} of {len(pages)} pages"))
        elif passed < rules.least_checks * of_study:
            found.append(Exclusion(respondent, f"passed {passed} of {of_study} checks"))
        elif seconds < rules.least_seconds:
            found.append(Exclusion(respondent, f"took {seconds:.1f} s a page"))
    return found


def winners(votes: Sequence[Vote]) -> tuple[Winner, ...]:
    """Who won each prompt: most votes of those on its page."""
    won: list[Winner] = []
    for (subset, prompt), group in groupby(sorted(votes, key=_prompt), _prompt):
        theirs = list(group)
        counts = Counter({system: 0 for vote in theirs for system in sorted(vote.shown)})
        counts.update(vote.choice or NONE for vote in theirs)
        most = max(counts.values())
        best = tuple(sorted(system for system, count in counts.items() if count == most))
        won.append(Winner(subset, prompt, dict(counts), best, most / len(theirs), 2 * most > len(theirs)))
    return tuple(won)


def agreement(votes: Sequence[Vote]) -> Agreement:
    """Krippendorff's alpha of the ordinary pages, and how often a repeated page was answered as before."""
    try:
        import krippendorff
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the study needs {error.name}: pip install 'attend-excite[study]'"
        ) from error

    ordinary = {(vote.respondent, vote.page): vote.choice for vote in votes if vote.kind == "ordinary"}
    pages = sorted({page for _, page in ordinary})
    choices = sorted({choice or NONE for choice in ordinary.values()})
    counts = np.zeros((len(pages), len(choices)))
    for (_, page), choice in ordinary.items():
        counts[pages.index(page), choices.index(choice or NONE)] += 1
    counts = counts[counts.sum(axis=1) > 1]
    comparable = (counts.sum(axis=0) > 0).sum() > 1
    alpha = krippendorff.alpha(value_counts=counts, level_of_measurement="nominal") if comparable else None
    again = [
        vote.choice == ordinary[vote.respondent, vote.repeats]
        for vote in votes
        if vote.repeats is not None and (vote.respondent, vote.repeats) in ordinary
    ]
    return Agreement(None if alpha is None else float(alpha), len(again), sum(again))
