"""The standing of each system: its share of the votes, its strength, and how sure they are.

**Intervals.** Wilson's (`low`, `high`) takes every vote for independent. Votes are not: one respondent casts
many, and every prompt gets many. The bootstrap's interval beside it takes respondents and prompts as drawn
from more of their kind. It resamples respondents, then prompts, and adds the two variances less that of
resampled votes, which both contain (Cameron, Gelbach and Miller 2011). Resampling both at once would count
the noise of single votes three times (Owen 2007). The variance becomes an interval in Wilson's form, with as
many votes as would give that variance if they were independent (Korn and Graubard 1998), and with the t
quantile for the fewer of respondents and prompts. So it stays between 0 and 1, and has a width where all
agree.

**Strengths** are those of Luce's choice model: on a page that shows the systems in A, system i is chosen
with the chance w_i / sum of w_j over A (Bradley-Terry for two, the first place of Plackett-Luce for more).
They are the shares to expect if every page showed all systems, and the shares themselves where every page
does. "None is better" prefers no system, so those votes are left out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm, t

from attend_excite.benchmark.statistics import CONFIDENCE
from attend_excite.study.create import NONE
from attend_excite.study.votes import Vote

Values = NDArray[np.float64]

RESAMPLES = 2000

_MAX_ITERATIONS, _TOLERANCE = 1000, 1e-8

_respondent, _prompt = attrgetter("respondent"), attrgetter("subset", "prompt")


@dataclass(frozen=True)
class Standing:
    """How one system does in one subset. Shares and strengths are 0 to 1.

    Attributes:
        votes: pages on which it was chosen.
        shown: pages on which it could be.
        share: the one over the other.
        low, high: Wilson's interval of the share.
        bootstrap_low, bootstrap_high: the share's interval by respondents and prompts; None with fewer than
            two of either.
        strength: of Luce's model; None for "none", or where the votes do not rank all systems.
        strength_low, strength_high: its interval by respondents and prompts.
    """

    votes: int
    shown: int
    share: float
    low: float
    high: float
    bootstrap_low: float | None
    bootstrap_high: float | None
    strength: float | None
    strength_low: float | None
    strength_high: float | None


def standings(votes: Sequence[Vote], resamples: int = RESAMPLES) -> dict[str, Standing]:
    """The standing of each system that was shown, in the alphabet's order, then of "none" if it was chosen.

    Args:
        votes: on ordinary pages.
        resamples: of the bootstrap.
    """
    systems = sorted({system for vote in votes for system in vote.shown})
    sets = sorted({tuple(sorted(vote.shown)) for vote in votes})
    members = np.array([[system in shown for system in systems] for shown in sets], dtype=float)
    by_respondent = _counts(votes, _respondent, sets, systems)
    by_prompt = _counts(votes, _prompt, sets, systems)
    cells = by_respondent.sum(axis=0)

    def figures(cells: Values) -> Values:
        preferring = cells[..., :-1]
        strengths = luce_strengths(preferring.sum(axis=-2), preferring.sum(axis=-1), members)
        # A resample in which nobody preferred a system says nothing of their strengths.
        strengths[preferring.sum(axis=(-2, -1)) == 0] = np.nan
        return np.concatenate([_ratio(cells.sum(axis=-2), _shown(cells, members)), strengths], axis=-1)

    subsets = [subset for subset, _ in sorted({_prompt(vote) for vote in votes})]
    variances, freedom = _two_way(figures, by_respondent, by_prompt, subsets, resamples)
    places = len(systems) + 1
    wins, shown = cells.sum(axis=0), _shown(cells, members)
    shares, strengths = figures(cells)[:places], figures(cells)[places:]
    plain = wilson(shares, shown, float(norm.ppf(0.5 + CONFIDENCE / 2)))
    bootstrapped = _intervals(shares, variances[:places], shown, freedom)
    ranked: list[tuple[float | None, float | None, float | None]] = [(None, None, None)] * places
    if _ranks_all(cells, members):
        preferring = cells[:, :-1].sum(axis=-1) @ members
        intervals = _intervals(strengths, variances[places:], preferring, freedom)
        ranked[:-1] = [(float(value), *ends) for value, ends in zip(strengths, intervals, strict=True)]
    return {
        system: Standing(
            int(wins[place]),
            int(shown[place]),
            float(shares[place]),
            float(plain[0][place]),
            float(plain[1][place]),
            *bootstrapped[place],
            *ranked[place],
        )
        for place, system in enumerate([*systems, NONE])
        if system != NONE or wins[place]
    }


def luce_strengths(wins: Values, pages: Values, members: Values) -> Values:
    """Maximum-likelihood strengths of Luce's choice model, by Hunter's MM algorithm (2004).

    Args:
        wins: (..., S), how often each of S systems was chosen.
        pages: (..., K), on how many pages each of K sets of systems was shown and one of them chosen.
        members: (K, S), 1 where a set holds a system, else 0.

    Returns:
        (..., S), adding up to 1. A system that never won has 0.
    """
    strengths = np.full(wins.shape, 1 / wins.shape[-1])
    for _ in range(_MAX_ITERATIONS):
        before = strengths
        rates = _ratio(pages, before @ members.T)
        strengths = _ratio(wins, rates @ members)
        strengths = _ratio(strengths, strengths.sum(axis=-1, keepdims=True))
        if np.abs(strengths - before).max() < _TOLERANCE:
            break
    return strengths


def wilson(share: Values, votes: Values, quantile: float) -> tuple[Values, Values]:
    """Wilson's interval (1927).

    Args:
        share: of the votes, 0 to 1.
        votes: how many; need not be whole.
        quantile: of the normal distribution, 1.96 for 95 %.

    Returns:
        Its low and its high end, 0 to 1.
    """
    squared = quantile**2 / votes
    centre = (share + squared / 2) / (1 + squared)
    half = quantile / (1 + squared) * np.sqrt(share * (1 - share) / votes + squared / votes / 4)
    return np.maximum(centre - half, 0), np.minimum(centre + half, 1)


def _counts(
    votes: Sequence[Vote],
    group: Callable[[Vote], Any],
    sets: Sequence[tuple[str, ...]],
    systems: Sequence[str],
) -> Values:
    """(groups, sets, systems + 1) votes: of each group, on pages with each set, for each system or none."""
    groups = {name: place for place, name in enumerate(sorted({group(vote) for vote in votes}))}
    set_places = {shown: place for place, shown in enumerate(sets)}
    choices: dict[str | None, int] = {system: place for place, system in enumerate([*systems, None])}
    counts = np.zeros((len(groups), len(sets), len(choices)))
    for vote in votes:
        counts[groups[group(vote)], set_places[tuple(sorted(vote.shown))], choices[vote.choice]] += 1
    return counts


def _shown(cells: Values, members: Values) -> Values:
    """(..., S + 1) pages on which each system, and none, could be chosen."""
    pages = cells.sum(axis=-1)
    return np.concatenate([pages @ members, pages.sum(axis=-1, keepdims=True)], axis=-1)


def _intervals(
    values: Values, variances: Values, votes: Values, freedom: int
) -> list[tuple[float | None, float | None]]:
    """Wilson's interval for as many independent votes as would give these variances."""
    if not freedom:
        return [(None, None)] * len(values)
    # Where nobody or everybody chose a system no resample differs, and each vote counts.
    spread = values * (1 - values)
    worth = np.divide(spread, variances, out=votes.copy(), where=(variances > 0) & (spread > 0))
    lows, highs = wilson(values, worth, float(t.ppf(0.5 + CONFIDENCE / 2, freedom)))
    return list(zip(lows.tolist(), highs.tolist(), strict=True))


def _two_way(
    figures: Callable[[Values], Values],
    by_respondent: Values,
    by_prompt: Values,
    subsets: Sequence[str],
    resamples: int,
) -> tuple[Values, int]:
    """The variances of figures when respondents and prompts are drawn anew, and their degrees of freedom.

    Args:
        figures: (..., sets, systems + 1) votes -> (..., figures).
        by_respondent: (respondents, sets, systems + 1) votes.
        by_prompt: (prompts, sets, systems + 1) votes.
        subsets: of the prompts; as many prompts are drawn from each as it has.
        resamples: of each kind.
    """
    draw = np.random.default_rng(0)
    respondents, prompts, strata = len(by_respondent), len(by_prompt), len(set(subsets))
    freedom = min(respondents - 1, prompts - strata)
    cells = by_respondent.sum(axis=0)
    if not freedom:
        return np.full(figures(cells).shape, np.nan), 0

    def variances(groups: Values, of: Sequence[str]) -> Values:
        drawn = np.zeros((resamples, len(groups)))
        for stratum in sorted(set(of)):
            at = [place for place, name in enumerate(of) if name == stratum]
            drawn[:, at] = draw.multinomial(len(at), np.full(len(at), 1 / len(at)), size=resamples)
        return np.nanvar(figures(np.tensordot(drawn, groups, 1)), axis=0)

    votes = round(cells.sum())
    single = draw.multinomial(votes, cells.ravel() / votes, size=resamples).astype(float)
    of_votes = np.nanvar(figures(single.reshape(-1, *cells.shape)), axis=0)
    of_respondents = variances(by_respondent, [""] * respondents) * respondents / (respondents - 1)
    of_prompts = variances(by_prompt, subsets) * prompts / (prompts - strata)
    return np.maximum(of_respondents + of_prompts - of_votes, of_votes), freedom


def _ranks_all(cells: Values, members: Values) -> bool:
    """Whether the votes determine all strengths: only then is there a single system, or a circle of systems
    each of which lost to the next, that no other has beaten."""
    beaten = (cells[:, :-1].T @ members) > 0
    groups, group = connected_components(beaten, connection="strong")
    lost_to_another = {group[loser] for winner, loser in np.argwhere(beaten) if group[winner] != group[loser]}
    return groups - len(lost_to_another) == 1


def _ratio(numerator: Values, denominator: Values) -> Values:
    """Zero where there is nothing to divide by."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    return np.divide(numerator, denominator, out=np.zeros(shape), where=denominator > 0)
