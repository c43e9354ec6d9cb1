"""Averages over prompts, how sure they are, and how they compare."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Values = NDArray[np.float64]

RESAMPLES = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval: 95 %, by resampling the prompts. NaN where there is nothing to say, as of
    the interval of a single prompt."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether a value is known to lie outside the interval."""
        return value < self.low or value > self.high

    def columns(self, name: str) -> dict[str, float | None]:
        """As columns of a table: "name", "name_low" and "name_high"; None where there is nothing to say."""
        values = {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}
        return {key: None if np.isnan(value) else float(value) for key, value in values.items()}


NOTHING = Estimate(np.nan, np.nan, np.nan)


def per_prompt(prompt: NDArray[np.int64], values: Values, prompts: int) -> Values:
    """The mean of each prompt's images (Section 5.2).

    Args:
        prompt: (images,), the index of each image's prompt.
        values: (images,), NaN where an image has none and is left out.
        prompts: how many there are.

    Returns:
        (prompts,), NaN for a prompt without images.
    """
    there = ~np.isnan(values)
    counts = np.bincount(prompt[there], minlength=prompts)
    sums = np.bincount(prompt[there], weights=values[there], minlength=prompts)
    return np.divide(sums, counts, out=np.full(prompts, np.nan), where=counts > 0)


def mean(values: Values) -> Estimate:
    """The mean over prompts, those without a value (NaN) left out."""
    kept = values[~np.isnan(values)]
    if not kept.size:
        return NOTHING
    return _estimate(kept.mean(), kept.size, kept[_resamples(kept.size)].mean(axis=1))


def difference(values: Values, reference: Values) -> Estimate:
    """How far a system's mean is from the reference's, on the prompts that both have.

    Args:
        values: (prompts,), a system's.
        reference: (prompts,), another's, in the same order.
    """
    values, reference = _paired(values, reference)
    return mean(values - reference)


def relative_difference(values: Values, reference: Values) -> Estimate:
    """The same in per cent of the reference's mean, as the paper's tables have it; -5 means 5 % less.

    Nothing where that mean isn't surely above nought: CLIP's similarities can be below.
    """
    values, reference = _paired(values, reference)
    rows = _resamples(values.size) if values.size else np.zeros((0, 0), dtype=np.int64)
    references = reference[rows].mean(axis=1) if values.size else np.zeros(0)
    if not (references > 0).all() or not values.size or reference.mean() <= 0:
        return NOTHING
    resampled = 100 * (values[rows].mean(axis=1) / references - 1)
    return _estimate(100 * (values.mean() / reference.mean() - 1), values.size, resampled)


def chance_of_order(scores: Values, better: NDArray[np.bool_]) -> float:
    """How often an image that is better has the higher score than one that is not (AUC): 1 always, 0.5 as
    often as by chance. NaN where all images are alike.

    Args:
        scores: (images,).
        better: (images,).
    """
    good, bad = int(better.sum()), int((~better).sum())
    if not good or not bad:
        return float("nan")
    return float((rankdata(scores)[better].sum() - good * (good + 1) / 2) / (good * bad))


def chance_of_order_within(
    prompt: NDArray[np.int64], group: NDArray[np.int64], scores: Values, better: NDArray[np.bool_]
) -> Estimate:
    """The same among images of one prompt and one group: what the score says of the image, apart from what
    it says of the prompt and the group.

    Args:
        prompt: (images,), the index of each image's prompt.
        group: (images,), the index of what else may not differ: each image's system.
        scores: (images,).
        better: (images,).

    Returns:
        The mean over prompts of the mean over their groups that have both kinds.
    """
    groups = np.unique(np.stack([prompt, group]), axis=1)
    chances = np.array(
        [
            chance_of_order(scores[alike], better[alike])
            for alike in ((prompt == of_prompt) & (group == of_group) for of_prompt, of_group in groups.T)
        ]
    )
    return mean(per_prompt(groups[0], chances, int(prompt.max(initial=-1)) + 1))


def _paired(values: Values, reference: Values) -> tuple[Values, Values]:
    both = ~np.isnan(values) & ~np.isnan(reference)
    return values[both], reference[both]


@lru_cache(maxsize=8)
def _resamples(size: int) -> NDArray[np.int64]:
    """(resamples, size) prompts, the same for every figure, so that a report can be made again."""
    return np.random.default_rng(0).integers(size, size=(RESAMPLES, size))


def _estimate(value: float, sample: int, resampled: Values) -> Estimate:
    if sample < 2:
        return Estimate(float(value), float("nan"), float("nan"))
    outside = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [outside, 100 - outside])
    return Estimate(float(value), float(low), float(high))
