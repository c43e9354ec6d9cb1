"""What happened to an image on its way: losses, attention and updates of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from attend_excite.guidance.nurse import Visit


@dataclass(frozen=True)
class Update:
    """One measurement of the latent and the update that followed it.

    Attributes:
        attention: each subject's largest smoothed attention before the update, 0 to 1.
        loss: the loss before the update: of the most neglected subject (Equation 2), or of another objective.
        shift: the update's size relative to the latent, |dz| / |z|; 0: there was none. Above some 0.1
            the step is too long for the model, and the picture suffers.
        skipped: the update was left out because its gradient was NaN or infinite.
        parts: by name, what the loss was the sum of, where it was one.
    """

    attention: Mapping[str, float]
    loss: float
    shift: float
    skipped: bool
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
class Trace:
    """The steps of one image."""

    steps: tuple[TraceStep, ...]

    @property
    def losses(self) -> list[float]:
        """The last loss of every step that was measured, as the authors' notebooks print it."""
        return [step.loss for step in self.steps if step.loss is not None]

    @property
    def refinements(self) -> dict[int, int]:
        """Step index -> measurements after the first, for the steps that were refined."""
        return {step.index: len(step.updates) - 1 for step in self.steps if len(step.updates) > 1}

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
                    parts={name: float(part[at]) for name, part in visit.parts.items()}
                    if len(visit.parts) > 1
                    else {},
                )
            )
    return tuple(updates)
