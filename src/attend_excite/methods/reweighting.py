"""Prompt-to-Prompt's attention re-weighting: multiply the attention to each subject."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.methods.base import Denoise, Run, Step
from attend_excite.subjects import columns_of


@dataclass(frozen=True)
class AttentionReweighting:
    """Attention re-weighting (Hertz et al., ICLR 2023): A_s <- c A_s for the tokens s of the subjects.

    The maps are multiplied in every layer in which the image attends to the text, behind the softmax and
    without normalising them again, and only in the conditional half of the guidance.

    Attributes:
        weight: c, -2 to 2. Above 1 the subjects get stronger, below 1 weaker; 1 is Stable Diffusion. A
            subject that is negated gets -c. The authors' code has no default; 2 is the most their paper has.
        share: the first share of the steps in which the maps are multiplied, 0 to 1.

    Raises:
        ValueError: a number is out of its range.
    """

    weight: float = 2.0
    share: float = 0.8

    name = "reweight"
    title = "Attention re-weighting"
    uses_subjects = True
    attends_to_prompt = True

    def __post_init__(self) -> None:
        if not -2 <= self.weight <= 2:
            raise ValueError(f"weight is {self.weight}: it must be -2 to 2")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}: it must be a share of the steps, 0 to 1")

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        """The plain step, with the subjects' values multiplied for the first share of the run."""
        # As the authors' code rounds: 40 of 50 steps, and 40 of the 51 iterations of PNDM.
        multiplied = int(self.share * len(run.timesteps))
        weights = self._weights(run)
        plain = torch.ones_like(weights)
        with run.weighted_tokens(weights if multiplied else plain) as weigh:

            def denoise(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
                output = run.predict_guided(latents, step)
                # Behind the pass, not before it: a method on top has then measured the same step already.
                if step.index == multiplied - 1:
                    weigh(plain)
                return latents, output

            yield denoise

    def _weights(self, run: Run) -> Tensor:
        """(B, tokens): c at the tokens of the subjects, elsewhere 1."""
        weights = run.text.states.new_ones(run.text.states.shape[:2])
        starts = [stream.start for stream in run.streams]
        for row, prompt in zip(weights, run.prompts, strict=True):
            for group in prompt.groups:
                row[list(columns_of(group, starts))] = -self.weight if group.negated else self.weight
        return weights
