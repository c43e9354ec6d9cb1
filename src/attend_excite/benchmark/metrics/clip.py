"""CLIP similarity of images to the whole prompt and to its most neglected subject (Section 5.2, A.3)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from attend_excite.benchmark.metrics.base import Metric, Row, pretrained, signature
from attend_excite.nouns import find_phrases

Wording = Literal["official", "paper"]
"""How prompts are put into templates and split: as the authors' code does it, or as the paper says it."""

WORDINGS: tuple[Wording, ...] = get_args(Wording)

_TEXTS_AT_ONCE = 256
_ARTICLE = re.compile(r"(?:an?|the) ", re.IGNORECASE)
# The "a" of "a dirty {}", but not that of "a photo of".
_TEMPLATE_ARTICLE = re.compile(r"\ba (?=(?:(?!of )[\w-]+ )*\{\})")


@cache
def templates() -> tuple[str, ...]:
    """The 80 templates of CLIP's evaluation on ImageNet: "a bad photo of a {}." and so on."""
    return tuple(json.loads(files("attend_excite").joinpath("data/templates.json").read_text("utf-8")))


def fill(template: str, prompt: str, wording: Wording) -> str:
    """A prompt put into a template.

    `official` puts the whole prompt in and then drops one of two articles wherever two meet, even within
    words: 56 of 80 texts about "a cat and a dog" differ. `paper` leaves the prompt's first article out
    where the template has its own and writes "an" before vowels: all 80 differ.
    """
    if wording == "official":
        return template.format(prompt).replace("a a", "a").replace("the a", "a")
    if not _ARTICLE.match(prompt):  # "yellow glasses", "two elephants"
        template = _TEMPLATE_ARTICLE.sub("", template)
    elif "many {}" not in template:  # "many a cat" is English, "many cat" is not.
        prompt = _ARTICLE.sub("", prompt, count=1)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", template.format(prompt))


def sub_prompts(prompt: str, subjects: Sequence[str], wording: Wording) -> list[str]:
    """The part of a prompt that speaks of each subject, colours included: "a cat", "a red ball".

    `official` splits at the first " and ", else at the first " with ", and takes a prompt without either as
    a whole. `paper` takes each subject's noun phrase, however many there are.
    """
    if wording == "official" or not subjects:
        return prompt.split(" and " if " and " in prompt else " with ", 1)
    phrases = find_phrases(prompt)
    return [
        next((phrase for phrase in phrases if re.search(rf"\b{re.escape(subject)}\b", phrase)), subject)
        for subject in subjects
    ]


class Clip:
    """A CLIP model that gives unit vectors.

    Args:
        name: a short name, a folder or a Hub id.
        device: where it goes.
        wording: how prompts are put into templates.

    Raises:
        ValueError: there is no such model.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu", wording: Wording = "official") -> None:
        from transformers import AutoModel

        self.signature = signature(name)
        self.wording: Wording = wording
        self._model, self._processor = pretrained(AutoModel, name, device)
        self._prompts: dict[str, Tensor] = {}

    @property
    def described(self) -> str:
        """All that its similarities depend on: "stickers-clip, official wording"."""
        return f"{self.signature}, {self.wording} wording"

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, width) unit vectors."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(
            self._model.device, self._model.dtype
        )
        return normalize(self._model.get_image_features(**inputs).pooler_output.float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(texts, width) unit vectors; what is too long for the model is cut off."""
        features = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            inputs = self._processor(
                text=list(texts[start : start + _TEXTS_AT_ONCE]),
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).to(self._model.device, self._model.dtype)
            features.append(self._model.get_text_features(**inputs).pooler_output.float())
        return normalize(torch.cat(features), dim=-1)

    def prompt(self, prompt: str) -> Tensor:
        """The (width,) unit vector of a prompt: the mean over all templates (A.3)."""
        if prompt not in self._prompts:
            filled = self.texts([fill(template, prompt, self.wording) for template in templates()])
            self._prompts[prompt] = normalize(filled.mean(dim=0), dim=0)
        return self._prompts[prompt]


class ClipSimilarity(Metric):
    """Cosine similarities of image and text: `full` with the prompt, `objects` with the part that speaks of
    each subject, `minimum` the least of those."""

    name = "clip"

    def __init__(self, clip: Clip) -> None:
        super().__init__(clip.described)
        self._clip = clip

    def _judge(self, images: Sequence[Image.Image], rows: Sequence[Row]) -> list[dict[str, Any]]:
        scores = []
        for image, row in zip(self._clip.images(images), rows, strict=True):
            parts = sub_prompts(row["prompt"], row["subjects"], self._clip.wording)
            vectors = torch.stack([self._clip.prompt(text) for text in (row["prompt"], *parts)])
            full, *objects = (vectors @ image).tolist()
            scores.append({"full": full, "minimum": min(objects), "objects": objects})
        return scores
