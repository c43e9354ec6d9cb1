"""StructureDiffusion: each noun phrase has a say in what its words mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attend_excite.methods.base import Denoise, Run, Step
from attend_excite.nouns import find_phrases
from attend_excite.turns import turn_of

Align = Literal["values", "keys-and-values"]


@dataclass(frozen=True)
class StructureDiffusion:
    """Training-free structured diffusion guidance (Feng et al., ICLR 2023).

    Each of a prompt's k noun phrases is encoded alone, and its tokens' embeddings are laid over the
    prompt's where the phrase stands there. This gives k texts beside the prompt's own; the output of every
    cross-attention layer is the mean over these k + 1.

    Attributes:
        phrases: the phrases, each as it stands in every prompt; a phrase listed twice is its first two
            occurrences. None: those that the tagger finds.
        align: "values", where all attend with the prompt's own keys, so only what is seen changes; or
            "keys-and-values", where each has its own keys too, so where it is seen can change. The maps
            that are recorded, and nursed, are those of the prompt's own keys in either case.

    Raises:
        ValueError: there is no such alignment, or `phrases` is empty.
    """

    phrases: Sequence[str] | None = None
    align: Align = "values"

    name = "structure"
    title = "StructureDiffusion"
    uses_subjects = False
    attends_to_prompt = True

    def __post_init__(self) -> None:
        if self.align not in get_args(Align):
            raise ValueError(f"align is '{self.align}': it must be {' or '.join(get_args(Align))}")
        if self.phrases is not None:
            object.__setattr__(self, "phrases", tuple(self.phrases))
            if not self.phrases:
                raise ValueError("phrases is empty: give one or more, or None for those of the prompt")

    @contextmanager
    def attach(self, run: Run) -> Iterator[Denoise]:
        """The plain step, with the phrases' texts behind the prompt's own.

        Raises:
            ValueError: a prompt has no noun phrase, or lacks one of `phrases`; or the model can't attend to
                several texts.
        """
        run.model.family.require_sets()
        states = run.text.states
        rows = {prompt.text: row for row, prompt in enumerate(run.prompts)}
        aligned = {
            prompt: _aligned_texts(run, states[row], self._find_phrases(run, prompt))
            for prompt, row in rows.items()
        }
        texts = [aligned[prompt.text] for prompt in run.prompts]
        if self.align == "values":
            # softmax(QK) is the same for all, and softmax(QK) V is linear in V, as V is in the text: the
            # mean of the outputs is the output for the mean of the texts, one attention instead of k + 1.
            keys, values = states[:, None], torch.stack([text.mean(dim=0, keepdim=True) for text in texts])
        else:
            keys, values = _padded(texts)
        with run.conditioned_on(keys, values):

            def denoise(latents: Tensor, step: Step) -> tuple[Tensor, Tensor]:
                return latents, run.predict_guided(latents, step)

            yield denoise

    def _find_phrases(self, run: Run, prompt: str) -> list[_Phrase]:
        def token_ids(text: str) -> list[int]:
            # A learnt word may stand for several tokens.
            written_out: Any = run.model.pipeline.maybe_convert_prompt(text, run.model.tokenizer)
            with turn_of(run.model.tokenizer):
                return run.model.tokenizer(written_out, truncation=True).input_ids

        tokens = token_ids(prompt)
        phrases: list[_Phrase] = []
        ends: dict[str | None, int] = {}
        for text in find_phrases(prompt) if self.phrases is None else self.phrases:
            wanted = token_ids(text)[1:-1]
            # Those that are found stand one behind the other; given ones may come in any order.
            kind = None if self.phrases is None else text
            for start in range(ends.get(kind, 1), len(tokens) - len(wanted)):
                place = slice(start, start + len(wanted))
                if wanted and tokens[place] == wanted:
                    phrases.append(_Phrase(text, place))
                    ends[kind] = place.stop
                    break
            else:
                # What the tagger finds is missing only where the model's context cuts the prompt.
                if self.phrases is not None:
                    raise ValueError(
                        f"the phrase '{text}' is not in '{prompt}', or not so often: "
                        "write it as the prompt has it"
                    )
        if not phrases:
            raise ValueError(f"no noun phrase found in '{prompt}': name one or more with phrases=[...]")
        return phrases


@dataclass(frozen=True)
class _Phrase:
    """A phrase and where its tokens are in the prompt, 0 being <sot>."""

    text: str
    tokens: slice


def _aligned_texts(run: Run, text: Tensor, phrases: Sequence[_Phrase]) -> Tensor:
    """The text of a prompt, then that with each of its k phrases laid over it.

    Args:
        run: which encodes the phrases.
        text: (tokens, width) of the prompt.
        phrases: of the prompt.

    Returns:
        (k + 1, tokens, width). A phrase's <sot>, <eot> and padding are left out.
    """
    texts = text.repeat(len(phrases) + 1, 1, 1)
    encoded = run.encode([phrase.text for phrase in phrases]).states
    for laid, alone, phrase in zip(texts[1:], encoded, phrases, strict=True):
        place = phrase.tokens
        laid[place] = alone[1 : 1 + place.stop - place.start]
    return texts


def _padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of images with different numbers of sets, as (B, sets, tokens, width) each."""
    sets = max(len(text) for text in texts)
    keys = [torch.cat([text, text[:1].expand(sets - len(text), -1, -1)]) for text in texts]
    # Values of 0 make a filler set add nothing. The mean is taken over all sets: an image with fewer has
    # each of them count for more, which can go into the values, as the output is linear in them.
    values = [
        torch.cat([text * (sets / len(text)), text.new_zeros(sets - len(text), *text.shape[1:])])
        for text in texts
    ]
    return torch.stack(keys), torch.stack(values)
