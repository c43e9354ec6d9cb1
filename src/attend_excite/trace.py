"""What happened to an image on its way: losses, attention and updates of every step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from attend_excite.guidance.nurse import Visit
from attend_excite.subjects import TokenGroup

# A subject whose loss fell by less than a tenth in so many updates cannot be raised: a word of no picture
# ("a", a network's name) falls by 0 to 7 % in 50, a subject by half and more in a few.
_FELL, _TRIED = 0.9, 5

# Below float32's resolution an update is none; and less than this in all changes a tenth of the bundled
# model's pixels by a few of 256 levels.
_NO_SHIFT, _NO_CHANGE = 1e-7, 1e-3


@dataclass(frozen=True)
class Update:
    """One measurement of the latent and the update that followed it.

    Attributes:
        attention: each subject's largest smoothed attention before the update, 0 to 1.
        loss: the loss before the update: of the most neglected subject (Equation 2), or of another objective.
        shift: the update's size relative to the latent, |dz| / |z|; 0: there was none. Above some 0.1
            the step is too long for the model, and the picture suffers.
        skipped: the update was left out because its gradient was NaN or infinite.
        due: an update was to be made here; False: it was only looked.
        parts: by name, what the loss was the sum of, where it was one.
    """

    attention: Mapping[str, float]
    loss: float
    shift: float
    skipped: bool
    due: bool = True
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TraceStep:
    """One iteration of the denoising loop.

    Attributes:
        index: from 0.
        timestep: the scheduler's.
        seconds: that the iteration took, for the whole batch.
        updates: in their order; empty on the steps that no method alters.
    """

    index: int
    timestep: float
    seconds: float
    updates: tuple[Update, ...] = ()

    @property
    def loss(self) -> float | None:
        """The last measured loss; None where nothing was measured."""
        return self.updates[-1].loss if self.updates else None


@dataclass(frozen=True)
class Finding:
    """Nursing that came to nothing, or went too far.

    Attributes:
        kind: "stuck": most updates were for one subject, whose loss hardly fell; "idle": updates for it moved
            nothing; "torn": an update was larger than the latent; "plain": all updates together were too
            small for another picture than the plain one; "skipped": none was made, or few, since most
            gradients were NaN or infinite.
        subject: by its text; None: it isn't known which, as with an objective of one's own.
        sentence: the same for people, and what to do.
    """

    kind: Literal["stuck", "idle", "torn", "plain", "skipped"]
    subject: str | None
    sentence: str


@dataclass(frozen=True)
class ChosenNoise:
    """How the noise that an image began from was found, where it isn't simply the seed's own.

    Attributes:
        losses: of each noise that was tried, in their order, the seed's own first: the recipe's loss, or in a
            search the lowest that was come to.
        chosen: the index of the one that it began from.
        passes: of the network that it took, for this image.
        seconds: that it took, for the whole batch.
    """

    losses: tuple[float, ...]
    chosen: int
    passes: int
    seconds: float


@dataclass(frozen=True)
class Nursed:
    """What is nursed in a batch.

    Attributes:
        tokens: for each image, each subject's token positions whose attention is measured: of a word of
            several tokens the dominant one.
        goal: the attention that every subject is to have in the end, 0 to 1 (`Recipe.goal`).
    """

    tokens: tuple[Mapping[str, tuple[int, ...]], ...]
    goal: float


@dataclass(frozen=True)
class Trace:
    """The steps of one image.

    Attributes:
        steps: in their order.
        tokens: each subject's token positions whose attention was measured, 0 being <sot>; of a word of
            several tokens the dominant one alone. Empty where nothing was nursed.
        findings: what nursing did in vain, or overdid.
        noise: how the noise was found; None: it is the seed's own.
    """

    steps: tuple[TraceStep, ...]
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    noise: ChosenNoise | None = None

    @property
    def losses(self) -> list[float]:
        """The last loss of every step that was measured, as the authors' notebooks print it."""
        return [step.loss for step in self.steps if step.loss is not None]

    @property
    def refinements(self) -> dict[int, int]:
        """Step index -> measurements after the first, for the steps that were refined."""
        return {step.index: len(step.updates) - 1 for step in self.steps if len(step.updates) > 1}

    @property
    def seconds(self) -> float:
        """That it took, for the whole batch, decoding excluded."""
        return sum(step.seconds for step in self.steps) + (self.noise.seconds if self.noise else 0.0)

    @property
    def skipped(self) -> int:
        """Updates left out because their gradient was NaN or infinite."""
        return sum(update.skipped for step in self.steps for update in step.updates)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def updates_of(visits: Sequence[Visit], row: int, subjects: Sequence[str]) -> tuple[Update, ...]:
    """The visits to one image of a batch, with its subjects by name."""
    updates = []
    for visit in visits:
        for at in (visit.rows == row).nonzero().flatten().tolist():
            values = visit.attention[at, : len(subjects)].tolist()
            updates.append(
                Update(
                    attention=dict(zip(subjects, values, strict=True)),
                    loss=float(visit.loss[at]),
                    shift=float(visit.shift[at]),
                    skipped=bool(visit.skipped[at]),
                    due=bool(visit.due[at]),
                    parts={name: float(part[at]) for name, part in visit.parts.items()}
                    if len(visit.parts) > 1
                    else {},
                )
            )
    return tuple(updates)


def findings_of(steps: Sequence[TraceStep], groups: Sequence[TokenGroup], goal: float) -> tuple[Finding, ...]:
    """What nursing did in vain, or overdid, on one image.

    Args:
        steps: of the image.
        groups: its subjects.
        goal: the attention that every subject is to have in the end, 0 to 1.
    """
    updates = [update for step in steps for update in step.updates]
    made = [update for update in updates if update.due and not update.skipped]
    lost = sum(update.skipped for update in updates)
    if lost > len(made):
        sentence = (
            f"{lost} of {lost + len(made)} updates were left out, as their gradient was NaN or infinite: "
            "load the model in bfloat16 or float32, or take a recipe with a smaller step_size"
        )
        return (Finding("skipped", None, sentence),)
    if not made:
        return ()
    last = updates[-1]
    tolerated = {
        group.text: max((1 - group.target if group.negated else group.target) - goal, 0) for group in groups
    }
    unmet = [group.text for group in groups if _loss(group, last) > tolerated[group.text]]
    return tuple(_findings(made, last, unmet, groups))


def _findings(
    made: Sequence[Update], last: Update, unmet: Sequence[str], groups: Sequence[TokenGroup]
) -> Iterator[Finding]:
    of: dict[str | None, list[Update]] = {}
    for update in made:
        of.setdefault(_most_neglected(update, groups), []).append(update)
    for group in groups:
        pulled = of.get(group.text, [])
        if group.text not in unmet or len(pulled) < _TRIED:
            continue
        wanted = "pushed down" if group.negated else "raised"
        if sum(update.shift <= _NO_SHIFT for update in pulled) > len(pulled) / 2:
            yield Finding(
                "idle",
                group.text,
                f"the attention to {group.text!r} could not be {wanted}, since its updates moved nothing: "
                "choose another word, or a recipe with a lower temperature",
            )
        elif len(pulled) > len(made) / 2 and _loss(group, last) > _FELL * _loss(group, pulled[0]):
            yield Finding(
                "stuck",
                group.text,
                f"the attention to {group.text!r} could not be {wanted}, though most updates were for it and "
                "the other subjects got few or none: choose another word, or leave it out",
            )
    for word, pulled in of.items():
        if any(update.shift > 1 for update in pulled):
            whose = "" if word is None else f" for {word!r}"
            yield Finding(
                "torn",
                word,
                f"an update{whose} was larger than the latent itself, which "
                "tears a picture apart: take a recipe with a smaller step_size, or with max_shift",
            )
    if unmet and sum(update.shift for update in made) < _NO_CHANGE:
        worst = max((group for group in groups if group.text in unmet), key=lambda group: _loss(group, last))
        had = "more attention than allowed" if worst.negated else "less attention than demanded"
        yield Finding(
            "plain",
            worst.text,
            "all updates together moved next to nothing, so this is as good as the plain picture, and "
            f"{worst.text!r} had {had} in the end",
        )


def _loss(group: TokenGroup, update: Update) -> float:
    attention = update.attention[group.text]
    return max(attention - group.target if group.negated else group.target - attention, 0)


def _most_neglected(update: Update, groups: Sequence[TokenGroup]) -> str | None:
    """The subject that the update was for; None where the loss is none of Equation 2."""
    worst = max(groups, key=lambda group: _loss(group, update), default=None)
    fits = worst is not None and math.isclose(_loss(worst, update), update.loss, rel_tol=1e-3, abs_tol=1e-6)
    return worst.text if worst is not None and fits else None
