"""The search for a noise to begin from, by its gradient (InitNO's first stage). Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attend_excite.guidance.nurse import GRADIENT_SCALE, Measure
from attend_excite.guidance.schedule import NoiseSearch

# The authors' numbers: how close the noise is to stay to a standard normal one, and Adam's epsilon.
_CLOSE, _ADAM_EPSILON = 1e-3, 1e-3


@dataclass
class Climb:
    """One noise of one image on its way: m + exp(v / 2) z.

    Attributes:
        drawn: (C, H, W) z, standard normal.
        loss: the lowest that was measured so far.
        best: (C, H, W) the noise of that loss.
    """

    drawn: Tensor
    loss: float = float("inf")
    best: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.best = self.drawn
        self._parts = [torch.zeros_like(self.drawn).requires_grad_() for _ in range(2)]
        self._adam: torch.optim.Adam | None = None

    @property
    def noise(self) -> Tensor:
        """(C, H, W) where it is now, differentiable."""
        mean, log_variance = self._parts
        return mean + (log_variance / 2).exp() * self.drawn

    @property
    def parts(self) -> list[Tensor]:
        """m and v, (C, H, W) each."""
        return self._parts

    def divergence(self) -> Tensor:
        """How far the noise is from a standard normal one: the mean of the KL divergence over its cells."""
        mean, log_variance = self._parts
        return ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).mean()

    def move(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """One step of Adam, and straight back as far as it takes to be close to normal."""
        if self._adam is None:
            self._adam = torch.optim.Adam(self._parts, lr=learning_rate, eps=_ADAM_EPSILON)
        for part, gradient in zip(self._parts, gradients, strict=True):
            part.grad = gradient
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            # The divergence is all but quadratic in both, so this takes a turn or two.
            while (divergence := float(self.divergence())) >= _CLOSE:
                for part in self._parts:
                    part *= 0.999 * (_CLOSE / divergence) ** 0.5


@dataclass(frozen=True)
class Searched:
    """What became of the search for one image.

    Attributes:
        noise: (C, H, W) the best that was measured.
        losses: of each round the lowest.
        chosen: the round that it comes from.
        passes: of the network, with their gradients.
    """

    noise: Tensor
    losses: tuple[float, ...]
    chosen: int
    passes: int


def search_noise(
    noise: Tensor, draw: Callable[[], Tensor], measure: Measure, search: NoiseSearch
) -> list[Searched]:
    """Search for the noise of each image of a batch, as if it were alone.

    Args:
        noise: (B, C, H, W) of the first round, standard normal, float32 or wider.
        draw: gives another such noise for all images.
        measure: what a noise is worth: see `Measure`; its parts are asked for what is enough.
        search: how long, and how.
    """
    rounds: list[list[Climb]] = [[Climb(each) for each in noise]]
    images = range(len(rounds[0]))
    passes = [0 for _ in images]

    def climb(of: Sequence[Climb], rows: list[int], steps: int) -> list[int]:
        """Go so many steps with some images; give those that have not enough yet."""
        for _ in range(steps):
            if not rows:
                break
            there = _step([of[row] for row in rows], rows, measure, search)
            for row in rows:
                passes[row] += 1
            rows = [row for row, done in zip(rows, there, strict=True) if not done]
        return rows

    left = climb(rounds[0], list(images), search.steps)
    enough = [0 for _ in images]
    for number in range(1, search.rounds):
        if not left:
            break
        rounds.append([Climb(each) for each in draw()])
        for row in left:
            enough[row] = number
        left = climb(rounds[number], left, search.steps)
    # Where no round led there, the best of them; whoever has enough has it in the latest.
    tried = [[round[row] for round in rounds[: enough[row] + 1]] for row in images]
    for row in left:
        enough[row] = min(range(len(tried[row])), key=lambda number: tried[row][number].loss)
    chosen = [tried[row][enough[row]] for row in images]
    climb(chosen, left, search.more)
    return [
        Searched(chosen[row].best, tuple(each.loss for each in tried[row]), enough[row], passes[row])
        for row in images
    ]


def _step(climbs: Sequence[Climb], rows: Sequence[int], measure: Measure, search: NoiseSearch) -> list[bool]:
    """Measure some images and move those that have not enough; say which have."""
    with torch.enable_grad():
        noise = torch.stack([climb.noise for climb in climbs])
        measured = measure(noise, torch.tensor(rows, device=noise.device))
        total = measured.loss + torch.stack([climb.divergence() for climb in climbs])
        wanted = [part for climb in climbs for part in climb.parts]
        gradients = [
            each / GRADIENT_SCALE for each in torch.autograd.grad(GRADIENT_SCALE * total.sum(), wanted)
        ]
    losses = measured.loss.tolist()
    parts = {name: part.tolist() for name, part in measured.parts.items()}
    there = []
    for at, climb in enumerate(climbs):
        done = bool(search.enough) and all(parts[name][at] < below for name, below in search.enough)
        if done or losses[at] < climb.loss:
            climb.loss, climb.best = losses[at], noise[at].detach().clone()
        own = gradients[2 * at : 2 * at + 2]
        if not done and all(bool(gradient.isfinite().all()) for gradient in own):
            climb.move(own, search.learning_rate)
        there.append(done)
    return there
