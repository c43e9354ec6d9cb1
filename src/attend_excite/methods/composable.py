"""Composable Diffusion: each part of the prompt predicts for itself, and the predictions are added up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attend_excite.methods.base import Denoise, Run, Step
from attend_excite.models.families import concatenated
from attend_excite.models.reading import warn_of_cut, warn_of_unknown_words

_OPERATOR = re.compile(r"\b(AND\s+NOT|AND|NOT)\b")
_SPOKEN_OPERATORS = tuple(re.compile(rf"(?<![\w-])({word})(?![\w-])") for word in ("and", "with"))


@dataclass(frozen=True)
class Concept:
    """A part of a prompt: its text, and whether the picture is not to show it."""

    text: str
    negated: bool = False


@dataclass(frozen=True)
class ComposableDiffusion:
    """Conjunction and negation of concepts (Liu et al., ECCV 2022):

        eps = eps(empty) + sum_i w_i (eps(c_i) - eps(empty))

    The same holds for models that predict velocities, which for given latents are affine in the noise.

    Attributes:
        weights: one a concept, in the prompt's order; a concept behind NOT counts with the opposite sign.
            None: the guidance scale for each, so that a prompt of one concept is Stable Diffusion.

    Raises:
        ValueError: the weights are empty, or not finite.
    """

    weights: Sequence[float] | None = None

    name = "composable"
    title = "Composable Diffusion"
    uses_subjects = False
    # Each pass sees a part of the prompt, and none the prompt.
    attends_to_prompt = False

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if not self.weights or not torch.tensor(self.weights).isfinite().all():
            raise ValueError(f"weights are {list(self.weights)}: they must be finite numbers, one a concept")

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        """All concepts of all images in one pass.

        Raises:
            ValueError: a prompt cannot be split, the weights are not as many as its concepts, there is no
                classifier-free guidance, or maps of the attention to the whole prompt are wanted, to which
                this method never attends.
        """
        if run.map_downsampling is not None:
            raise ValueError(
                "composable diffusion never attends to the whole prompt, so it has no maps of it: "
                "generate with maps=False"
            )
        if run.empty_text is None and run.distilled is not None and self.weights is None:
            raise ValueError(
                "composable diffusion needs classifier-free guidance, and this model's is distilled into it: "
                "ask for some with true_cfg_scale above 1, or give the weights"
            )
        split = [concepts(prompt.text) for prompt in run.prompts]
        weights = [self._weights(parts, run).view(-1, 1, 1, 1) for parts in split]
        counts = [len(parts) for parts in split]
        spoken = [part.text for parts in split for part in parts]
        warn_of_cut(run.model, spoken, "a concept")
        warn_of_unknown_words(run.model, spoken)
        texts = run.encode(spoken)
        # Without classifier-free guidance the loop has none, but the weights here may be others.
        empty = run.empty_text if run.empty_text is not None else run.encode_negative(len(split))
        text = concatenated(empty, texts)
        image = torch.arange(len(split), device=text.device).repeat_interleave(
            torch.tensor(counts, device=text.device)
        )

        def denoise(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
            output = run.predict(torch.cat([latents, latents[image]]), step, text)
            unconditional, conditional = output.split([len(latents), len(image)])
            parts = conditional.split(counts)
            guided = [
                base + (weight * (part - base)).sum(dim=0)
                for base, part, weight in zip(unconditional, parts, weights, strict=True)
            ]
            middle = torch.stack([part.mean(dim=0) for part in parts])
            return latents, run.model.family.tempered(torch.stack(guided), middle)

        yield denoise

    def _weights(self, parts: Sequence[Concept], run: Run) -> Tensor:
        # Without classifier-free guidance a concept alone is its conditional pass, and not nothing.
        usual = max(run.guidance_scale, 1.0)
        weights = [usual] * len(parts) if self.weights is None else self.weights
        if len(weights) != len(parts):
            named = ", ".join(f"'{part.text}'" for part in parts)
            raise ValueError(
                f"there are {len(parts)} concepts, and {len(weights)} weights: give one for each of {named}"
            )
        signed = [-weight if part.negated else weight for weight, part in zip(weights, parts, strict=True)]
        return torch.tensor(signed, dtype=run.latents_dtype, device=run.text.device)


def concepts(prompt: str) -> list[Concept]:
    """The concepts that a prompt joins.

    "a cat AND a dog", "a cat NOT a frog", "a cat AND NOT a frog". A prompt without such an operator is
    split at each "and", and one without "and" at each "with".

    Raises:
        ValueError: there is nothing to split at, or nothing between two operators.
    """
    operators = _OPERATOR
    for spoken in _SPOKEN_OPERATORS:
        if not operators.search(prompt):
            operators = spoken
    first, *rest = operators.split(prompt)
    if not rest:
        raise ValueError(
            f"'{prompt}' cannot be split into concepts: join them with AND, and put NOT before "
            'what the picture is not to show, like "a cat AND a dog NOT a frog"'
        )
    found = [Concept(_trimmed(first))] if _trimmed(first) or not rest[0].endswith("NOT") else []
    for operator, text in zip(rest[::2], rest[1::2], strict=True):
        found.append(Concept(_trimmed(text), negated=operator.endswith("NOT")))
    if not all(concept.text for concept in found):
        raise ValueError(
            f"'{prompt}' joins a concept to nothing: put words on both sides of AND, and behind NOT"
        )
    return found


def _trimmed(text: str) -> str:
    return text.strip(" \t\n,;")
